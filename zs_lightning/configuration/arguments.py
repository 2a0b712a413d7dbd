"""Command lines of the commands that serve and ask: `--help` is there at once, and a search engine is named as in a config."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from zs_lightning.errors import UserError


class CommandParser(argparse.ArgumentParser):
    """A parser whose help ends with text that is laid out already.

    Args:
        name: of the command.
    """

    def __init__(self, name: str, description: str | None, ending: str | None = None) -> None:
        super().__init__(
            prog=f"python -m zs_lightning {name}",
            description=description,
            epilog=ending,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.name = name

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.name}: {message}; see {self.prog} --help")


def split(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """A command's own options, and those of the search engine, whose values must not be taken for the question."""
    own: list[str] = []
    search: list[str] = []
    words = iter(args)
    for word in words:
        if word == "--":
            return [*own, word, *words], search
        if word.partition("=")[0] == "--search" or word.startswith("--search."):
            search.append(word)
            if "=" not in word:
                search += [value for value in [next(words, None)] if value is not None]
        else:
            own.append(word)
    return own, search


def search_options(args: Sequence[str], default: Sequence[str]) -> dict[str, Any]:
    """The engine that `--search CLASS --search.OPTION VALUE` means, as class_path and init_args.

    Args:
        default: options that name an engine; `args` may change its options if they name none.

    Raises:
        UserError: an option is unknown or of a wrong type.
    """
    from zs_lightning.configuration.lightning_cli import Parser
    from zs_lightning.search.base import SearchEngine

    named = any(word.partition("=")[0] in ("--search", "--search.help") for word in args)
    parser = Parser()
    parser.add_subclass_arguments(SearchEngine, "search", required=True)
    config = parser.parse_args([*([] if named else default), *args]).as_dict()
    return dict(config["search"])


def build(base: type[Any], key: str, options: Any) -> Any:
    """An object of a subclass of `base`, from class_path and init_args as they stand at `key` of a config.

    Raises:
        UserError: an option is unknown, missing or of a wrong type.
    """
    from zs_lightning.configuration.lightning_cli import Parser

    parser = Parser()
    parser.add_subclass_arguments(base, key, required=True)
    return parser.instantiate_classes(parser.parse_object({key: options}))[key]
