"""What a command line names must be there: looked at before the libraries are loaded, which takes seconds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

from zs_lightning.errors import UserError
from zs_lightning.runs.folder import find_checkpoint

SCHEMA = 1
"""Version of the configuration files; a change that old files do not survive raises it."""


def check_paths(command: str, args: Sequence[str]) -> None:
    """
    Args:
        args: what stands after the command.

    Raises:
        UserError: a configuration, a run folder or a corpus is not there, or is none.
        UserError: a checkpoint is not there, or is none.
    """
    for option, value in _values(args):
        if option in ("-c", "--config"):
            check_config_file(Path(value))
        elif option in ("--ckpt", "--ckpt_path") and value != "null":
            find_checkpoint(Path(value), option)
        elif option.endswith(".corpus") and value != "null" and not Path(value).expanduser().exists():
            raise UserError(f"{option}: there is no file or folder {value}")
        elif option in ("--simulator", "--training", "--results") and not Path(value).is_dir():
            raise UserError(f"{option}: there is no folder {value}")
        elif not option and command == "compare" and not (folder := Path(value.partition("=")[2] or value)).is_dir():
            raise UserError(f"compare: there is no folder {folder}; expected the run folder of a finished `test`")


def _values(args: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Each option with its value, and each word that belongs to no option with an empty one."""
    words = iter(args)
    before = ""
    for word in words:
        if word == "--":
            yield from (("", other) for other in words)
        elif not word.startswith("-"):
            yield before, word
            before = ""
        else:
            before, equals, value = word.partition("=")
            if equals:
                yield before, value
                before = ""


def check_config_file(path: Path) -> None:
    """Before the parser looks at it, so that a newer file is not blamed for a key that is new."""
    if not path.is_file():
        raise UserError(f"--config: there is no file {path}")
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        raise UserError(f"--config: {path} is not valid YAML{f', see its line {mark.line + 1}' if mark else ''}") from error
    if not isinstance(content, dict):
        raise UserError(f"--config: {path} holds no options; expected lines such as `seed_everything: 0`")
    check_schema(content.get("schema", SCHEMA))


def check_schema(schema: object) -> None:
    if isinstance(schema, int) and schema > SCHEMA:
        raise UserError(f"config schema {schema} is newer than this program understands ({SCHEMA}); upgrade zs_lightning")
    if schema != SCHEMA:
        raise UserError(f"config schema {schema} is not known to this program; expected {SCHEMA}")
