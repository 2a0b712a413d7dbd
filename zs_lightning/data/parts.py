"""Which files, or splits of a data set of the hub, a path names."""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from zs_lightning.data.tables import SUFFIXES, Row, hub_rows, hub_splits, read_file
from zs_lightning.errors import UserError

_WORDS = {"train": "train", "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation"}
_WORDS |= {"test": "test"}
_SPLIT = re.compile(rf"(?:^|[-_.])({'|'.join(_WORDS)})(?=[-_.]|$)", re.IGNORECASE)
_SHARD = re.compile(r"-\d{5}-of-\d{5}$")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Part:
    """One file, or one split of a data set of the hub."""

    place: str
    """What a user calls it."""
    name: str
    """Of its data set."""
    split: str
    """The split that its name speaks of; empty if it speaks of none."""
    rows: Callable[[], Iterator[Row]]


def split_of(name: str) -> str:
    """nq_train-00000-of-00002 → train, dev → validation; empty for a name without a split."""
    found = _SPLIT.search(name)
    return _WORDS[found[1].lower()] if found else ""


def is_hub_name(path: str) -> bool:
    """Whether the path can only be a data set of the hub: owner/name, and nothing here is called that.

    Raises:
        UserError: it is nothing of all that.
    """
    if Path(path).expanduser().exists() or _matches(path):
        return False
    if _HUB_NAME.fullmatch(path) and not path.endswith(SUFFIXES) and not path.startswith("."):
        return True
    raise UserError(
        f"data.source.path: there is no file or folder {path}; expected a file ({', '.join(SUFFIXES)}), a folder or pattern "
        "of such files, or the name of a data set of the hub such as owner/name"
    )


def _matches(pattern: str) -> list[Path]:
    return [Path(path) for path in sorted(glob.glob(str(Path(pattern).expanduser()), recursive=True))]


def local_parts(path: str) -> list[Part]:
    """The file, the files of the folder, or the files that match the pattern.

    Raises:
        UserError: there are none that can be read.
    """
    given = Path(path).expanduser()
    files = [given] if given.is_file() else _matches(str(given / "*") if given.is_dir() else path)
    if len(files) > 1 or not given.is_file():
        files = [file for file in files if file.suffix in SUFFIXES and file.is_file()]
    if not files:
        raise UserError(f"data.source: there is no file {path}, or none in it that ends with {', '.join(SUFFIXES)}")
    folder = given.resolve().name if given.is_dir() else ""
    return [Part(str(file), folder or _name(file), split_of(file.stem), partial(read_file, file)) for file in files]


def _name(file: Path) -> str:
    """Of a file's data set: its name without the split, or, if that is all its name says, its folder's name."""
    return _SPLIT.sub("", _SHARD.sub("", file.stem)).strip("-_.") or file.resolve().parent.name or file.stem


def hub_parts(path: str, config: str | None, split: str | None = None) -> list[Part]:
    """All splits of a data set of the hub, or the named one."""
    name = config or path.rsplit("/", 1)[-1]

    def part(found: str, data: Any) -> Part:
        return Part(f"{path} {found}", name, split_of(found), partial(hub_rows, data))

    return [part(found, data) for found, data in hub_splits(path, config, split).items()]
