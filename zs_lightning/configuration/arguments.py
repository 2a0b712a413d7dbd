"""Command lines of the commands beside fit, validate and test: `--help` is there at once."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from zs_lightning.errors import UserError

Options = TypeVar("Options")


def at_home(path: str) -> Path:
    """The path, its ~ replaced: a shell does not do it in --out=~/x."""
    # Not by Path, which fails for the home of a user who is not known.
    return Path(os.path.expanduser(path))


class CommandParser(argparse.ArgumentParser):
    """The parser of every such command, of this name; its errors are UserErrors. The `ending` after
    the options is laid out already. argparse and not jsonargparse, which takes a second to
    import."""

    def __init__(self, name: str, description: str | None, ending: str | None = None) -> None:
        super().__init__(
            prog=f"python -m zs_lightning {name}",
            description=description,
            epilog=ending,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            # What is not known to it may be an option of fit or of a search engine.
            allow_abbrev=False,
        )
        self.name = name

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.name}: {message}; see {self.prog} --help")


def split(args: Sequence[str], key: str = "search") -> tuple[list[str], list[str]]:
    """A command's own words, and the options of the search engine with their values."""
    own: list[str] = []
    search: list[str] = []
    words = iter(args)
    for word in words:
        if word == "--":
            return [*own, word, *words], search
        if word.partition("=")[0] != f"--{key}" and not word.startswith(f"--{key}."):
            own.append(word)
            continue
        search.append(word)
        # Its value would be taken for the question.
        if "=" not in word:
            search.extend(value for value in [next(words, None)] if value is not None)
    return own, search


def search_options(args: Sequence[str], default: Sequence[str], key: str = "search") -> dict[str, Any]:
    """What `--search CLASS --search.OPTION VALUE` mean, as class_path and init_args. Where they
    name no engine, they change options of the `default` one. Raises UserError for an option that is
    unknown or of a wrong type."""
    from zs_lightning.configuration.lightning_cli import Parser
    from zs_lightning.search.base import SearchEngine

    named = any(word.partition("=")[0] in (f"--{key}", f"--{key}.help") for word in args)
    # As in a configuration, so that short names, messages and help are those of fit and test.
    parser = Parser()
    parser.add_subclass_arguments(SearchEngine, key, required=True)
    config = parser.parse_args([*([] if named else default), *args]).as_dict()
    return dict(config[key])


def given(command: str, description: str | None, options: type[Options], args: Sequence[str]) -> tuple[Options, dict[str, Any]]:
    """The object that the arguments of a command ask for, whose options are the fields of a class,
    from a file and from the command line; and all of them as plain data."""
    import yaml
    from jsonargparse import ActionConfigFile

    from zs_lightning.configuration.lightning_cli import Parser
    from zs_lightning.configuration.paths import SCHEMA

    parser = Parser(prog=f"python -m zs_lightning {command}", description=description)
    parser.add_argument("-c", "--config", action=ActionConfigFile, help="A file of options.")
    parser.add_argument("--schema", type=int, default=SCHEMA, help="Version of the configuration file.")
    parser.add_class_arguments(options)
    config = parser.parse_args(list(args))
    settings = yaml.safe_load(parser.dump(config, skip_none=False))
    fields = parser.instantiate_classes(config)
    # These two say how the options were given.
    own = {name: value for name, value in fields.items() if name not in ("config", "schema")}
    return options(**own), settings


def instantiate(base: type[Any], key: str, options: Any) -> Any:
    """An object of a subclass of `base`, from its class_path and init_args at `key` of a config.
    Raises UserError for an option that is unknown, missing or of a wrong type."""
    from zs_lightning.configuration.lightning_cli import Parser

    parser = Parser()
    parser.add_subclass_arguments(base, key, required=True)
    return parser.instantiate_classes(parser.parse_object({key: options}))[key]
