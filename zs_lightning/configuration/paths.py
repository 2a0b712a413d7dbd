"""What a command line names must be there: looked at before libraries are loaded."""

from collections.abc import Iterator, Sequence

# Those of Path raise where a name is too long.
from os.path import exists, isdir, isfile
from pathlib import Path
from typing import Any

import yaml

from zs_lightning.configuration.arguments import at_home
from zs_lightning.errors import UserError
from zs_lightning.runs.checkpoints import check_presence
from zs_lightning.runs.folder import read_config

SCHEMA = 1
"""Version of the configuration files; a change that old files do not survive raises it."""


def check_paths(command: str, args: Sequence[str]) -> None:
    """Raises UserError if a configuration, run folder, checkpoint or corpus that is named behind
    the command is not there, or is something else."""
    for option, value in _values(args):
        if option in ("-c", "--config"):
            check_config_file(at_home(value))
        elif option in ("--simulator", "--training", "--results"):
            if not isdir(at_home(value)):
                raise UserError(f"{option}: there is no folder {value}")
        elif not option and command == "compare":
            # NAME=FOLDER, or a folder alone.
            folder = value.partition("=")[2] or value
            if not isdir(at_home(folder)):
                expected = "expected the run folder of a finished `test`"
                raise UserError(f"compare: there is no folder {folder}; {expected}")
        elif value == "null":
            continue
        elif option in ("--ckpt", "--ckpt_path"):
            check_presence(at_home(value), option)
        elif option.endswith((".corpus", "--corpus")) and not exists(at_home(value)):
            raise UserError(f"{option}: there is no file or folder {value}")


def _values(args: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Each option with its value, and each word that belongs to no option with an empty one."""
    option = ""
    for word in args:
        value = word
        if word.startswith("-"):
            option, equals, value = word.partition("=")
            if not equals:
                continue
        yield option, value
        option = ""


def check_config_file(path: Path) -> None:
    """Raises UserError for a file that is no configuration, or of a newer version, in which the
    parser would blame a key that is new."""
    if not isfile(path):
        raise UserError(f"--config: there is no file {path}")
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", see its line {mark.line + 1}" if mark else ""
        raise UserError(f"--config: {path} is not valid YAML{line}") from error
    if not isinstance(content, dict):
        raise UserError(f"--config: {path} has no options; expected such as `seed_everything: 0`")
    check_schema(content.get("schema", SCHEMA))


def read_module(file: Path, wrong: str) -> dict[str, Any]:
    """What a configuration file, or that of a run folder, says. Raises UserError, which says what is
    `wrong`, if it describes no module."""
    check_config_file(file)
    # By the reader of run folders, so that options of earlier versions are where they are today.
    config = read_config(file)
    model = config.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("init_args") or {}, dict):
        raise UserError(wrong)
    return config


def check_schema(schema: object) -> None:
    if isinstance(schema, int) and schema > SCHEMA:
        newer = f"newer than this program understands ({SCHEMA}); upgrade zs_lightning"
        raise UserError(f"config schema {schema} is {newer}")
    if schema != SCHEMA:
        raise UserError(f"config schema {schema} is not known to this program; expected {SCHEMA}")
