"""One server, or several that hold the same, asked as if they were one: repetitions, the next server, a deadline."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from zs_lightning.search import http
from zs_lightning.search.http import ATTEMPTS, MOST_FAILURES, Busy, Call, Failed, Http, Late, Rejected
from zs_lightning.streams import uniform

T = TypeVar("T")


@dataclass(eq=False)
class Host:
    """One of the servers.

    Args:
        base: its address, which comes before the path of every call; empty if calls have whole addresses.
        calls: that are on their way to it.
    """

    base: str
    door: Http
    calls: int = 0

    @property
    def is_broken(self) -> bool:
        breaker = self.door.breaker
        return breaker.failures >= MOST_FAILURES and time.monotonic() < breaker.closed_again

    @property
    def in_trouble(self) -> bool:
        """It failed a moment ago, or asks to wait."""
        breaker, now = self.door.breaker, time.monotonic()
        return bool(breaker.failures and now < breaker.closed_again) or self.door.not_before > now


class Hosts:
    """Sends each call to the server without trouble that has the fewest under way, and a failed one to the next.

    While there is another one to ask, a server has half of the time that is left.
    """

    def __init__(self, hosts: Sequence[Host]) -> None:
        self.hosts = list(hosts)

    async def close(self) -> None:
        for host in self.hosts:
            await host.door.close()

    async def ask(self, call: Call, parse: Callable[[Any], T], seconds: float, attempts: int = ATTEMPTS) -> T:
        """The parsed answer.

        Raises:
            Failed: there is none; says why and, of several servers, which one was asked last. Late if the seconds are over.
        """
        import tenacity

        def wait(state: tenacity.RetryCallState) -> float:
            chance = uniform("retry", call.url, call.params, call.json, state.attempt_number)
            return http.BACKOFF * 2 ** (state.attempt_number - 1) * (0.5 + chance)

        retrying = tenacity.AsyncRetrying(
            stop=tenacity.stop_after_attempt(attempts),
            retry=tenacity.retry_if_exception_type(Busy),
            wait=wait,
            reraise=True,
        )
        deadline = time.monotonic() + seconds
        tried: list[Host] = []
        try:
            async with asyncio.timeout(seconds):
                return await retrying(self._attempt, call, parse, deadline, tried)
        except TimeoutError:
            raise Late(self._named(tried[-1], late(tried[-1], seconds))) from None

    async def _attempt(self, call: Call, parse: Callable[[Any], T], deadline: float, tried: list[Host]) -> T:
        host = min(self.hosts, key=lambda host: (host.is_broken, host in tried, host.in_trouble, host.calls))
        repeated = bool(tried)
        tried.append(host)
        has_next = any(host not in tried and not host.is_broken for host in self.hosts)
        half = (deadline - time.monotonic()) / 2
        host.calls += 1
        try:
            async with asyncio.timeout(half if has_next else None):
                return await host.door.attempt(replace(call, url=host.base + call.url), parse, deadline, repeated)
        except TimeoutError:
            raise Busy(self._named(host, late(host, half))) from None
        except Failed as error:
            passes = has_next and not isinstance(error, Rejected)
            raise (Busy if passes else type(error))(self._named(host, str(error))) from None
        finally:
            host.calls -= 1

    def _named(self, host: Host, reason: str) -> str:
        return f"{host.base}: {reason}" if len(self.hosts) > 1 else reason


def late(host: Host, seconds: float) -> str:
    """Counts a call that had so many seconds as failed; returns the reason."""
    reason = f"no answer within {round(seconds, 1):g} s{host.door.via}"
    host.door.breaker.failed(reason)
    return reason
