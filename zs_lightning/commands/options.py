"""The options of a command that are the fields of a class, from a file and from the command line."""

from collections.abc import Sequence
from typing import Any, TypeVar

Options = TypeVar("Options")


def parse(command: str, description: str | None, options: type, args: Sequence[str]) -> tuple[Any, Any]:
    """The parser of a command, and what these arguments give for the class's fields."""
    from jsonargparse import ActionConfigFile

    from zs_lightning.configuration.lightning_cli import Parser
    from zs_lightning.configuration.paths import SCHEMA

    parser = Parser(prog=f"python -m zs_lightning {command}", description=description)
    parser.add_argument("-c", "--config", action=ActionConfigFile, help="A file of options.")
    parser.add_argument("--schema", type=int, default=SCHEMA, help="Version of the configuration file.")
    parser.add_class_arguments(options)
    return parser, parser.parse_args(list(args))


def made(options: type[Options], parser: Any, config: Any) -> tuple[Options, dict[str, Any]]:
    """The object that the options ask for, and the options as plain data, all of them."""
    import yaml

    settings = yaml.safe_load(parser.dump(config, skip_none=False))
    fields = parser.instantiate_classes(config)
    # These two say how the options were given.
    own = {name: value for name, value in fields.items() if name not in ("config", "schema")}
    return options(**own), settings
