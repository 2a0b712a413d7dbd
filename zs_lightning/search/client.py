"""How a client of one server is declared: its options are the fields of a dataclass."""

from __future__ import annotations

from dataclasses import dataclass

from zs_lightning.search.http import HttpSpec
from zs_lightning.search.remote import RemoteSearch


@dataclass(eq=False, repr=False)
class Client(RemoteSearch):
    """A server at one address. A subclass is a dataclass too, which names the fields whose defaults are its own.

    Args:
        endpoint: the server's address.
        count: documents per search.
        http: how the server is asked.
    """

    endpoint: str
    count: int = 5
    http: HttpSpec = HttpSpec()

    api_key_env = ""

    def __post_init__(self) -> None:
        super().__init__(self.endpoint, self.count, self.http, self.api_key_env)


@dataclass(eq=False, repr=False)
class KeyedClient(Client):
    """A server that wants a key.

    Args:
        api_key_env: name of the environment variable that holds the key.
    """

    api_key_env: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.refused = f"check the key in {self.api_key_env}"
