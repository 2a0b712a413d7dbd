"""Which files, or splits of a data set of the hub, a path names, and their rows.

Each row has the number that its user would look it up by. The hub's library could read these files
too, but it fails a whole file for one bad row, and its errors do not say which row that is.
"""

import csv
import glob
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from zs_lightning.errors import UserError

# Names of splits in files and on the hub: nq_train-00000-of-00002, dev, valid.jsonl.
_WORDS = {"train": "train", "test": "test"}
_WORDS |= dict.fromkeys(("validation", "valid", "val", "dev"), "validation")
_SPLIT = re.compile(rf"(?:^|[-_.])({'|'.join(_WORDS)})(?=[-_.]|$)", re.IGNORECASE)
_SHARD = re.compile(r"-\d{5}-of-\d{5}$")
_HUB_NAME = re.compile(r"(?!\.)[\w.-]+/[\w.-]+")


@dataclass(frozen=True, slots=True)
class NumberedRow:
    """One row: its columns, or the reason why it could not be read."""

    number: int
    """Line of a jsonl file, row of a spreadsheet (its header is row 1), or counted from 1."""
    values: dict[str, Any] = field(default_factory=dict)
    problem: str = ""


@dataclass(frozen=True)
class Part:
    """One file, or one split of a data set of the hub."""

    place: str  # what a user calls it
    name: str  # name of its data set
    split: str  # the split that its name speaks of, or ""
    rows: Callable[[], Iterator[NumberedRow]]


def split_of(name: str) -> str:
    """nq_train-00000-of-00002 → train, dev → validation; empty for a name without a split."""
    found = _SPLIT.search(name)
    return _WORDS[found[1].lower()] if found else ""


def is_hub_name(path: str) -> bool:
    """Whether the path can only be a data set of the hub. Raises UserError if it is nothing."""
    # What is here goes first: nobody is sent to the hub for the name of a folder.
    if Path(path).expanduser().exists() or _matches(path):
        return False
    if _HUB_NAME.fullmatch(path) and not path.endswith(SUFFIXES):
        return True
    raise UserError(
        f"data.source.path: there is no file or folder {path}; expected a file ({', '.join(SUFFIXES)}), "
        "a folder or pattern of such files, or the name of a data set of the hub such as owner/name"
    )


def _matches(pattern: str) -> list[Path]:
    found = glob.glob(str(Path(pattern).expanduser()), recursive=True)
    return [Path(path) for path in sorted(found)]


def local_parts(path: str) -> list[Part]:
    """The file, the files of the folder, or those that match. Raises UserError if there are none."""
    given = Path(path).expanduser()
    files = [given]
    # A file that is named is read or refused; of a folder, what else lies in it is passed over.
    if not given.is_file():
        found = _matches(str(given / "*") if given.is_dir() else path)
        files = [file for file in found if file.suffix in SUFFIXES and file.is_file()]
    if not files:
        known = f"none in it that ends with {', '.join(SUFFIXES)}"
        raise UserError(f"data.source: there is no file {path}, or {known}")
    folder = given.resolve().name if given.is_dir() else ""
    return [_part(file, folder) for file in files]


def _part(file: Path, folder: str) -> Part:
    # Without the split, or, if that is all the name says, by the folder: nq/test.jsonl is nq.
    own = _SPLIT.sub("", _SHARD.sub("", file.stem)).strip("-_.")
    name = folder or own or file.resolve().parent.name or file.stem
    return Part(str(file), name, split_of(file.stem), partial(read_file, file))


def hub_parts(path: str, config: str | None, split: str | None = None) -> list[Part]:
    """All splits of a data set of the hub, or one: what `datasets` understands, such as test[:500]."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        loaded = load_dataset(path, config, split=split)
    except (OSError, ValueError, DatasetsError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise UserError(
            f"data.source: {path} is no file or folder here, and could not be loaded from the hub: "
            f"{reason}; change data.source.path, or data.source.config and data.source.splits"
        ) from error
    splits = loaded if split is None else {split: loaded}
    name = config or path.rsplit("/", 1)[-1]
    found = [(f"{path} {key}", split_of(key), rows) for key, rows in splits.items()]
    return [Part(place, name, key, partial(as_rows, rows)) for place, key, rows in found]


def read_file(path: Path) -> Iterator[NumberedRow]:
    """Rows of a file. Raises UserError if it cannot be read as a whole."""
    if path.suffix not in SUFFIXES:
        known = f"expected a file that ends with {', '.join(SUFFIXES)}"
        raise UserError(f"data.source: {path} has an unknown kind; {known}")
    if not path.stat().st_size:
        raise UserError(f"data.source: {path} is empty")
    return _READERS[path.suffix](path)


def as_rows(values: Iterable[Any]) -> Iterator[NumberedRow]:
    """Rows of values that should be objects."""
    return itertools.starmap(_row, enumerate(values, 1))


def _row(number: int, value: Any) -> NumberedRow:
    if isinstance(value, dict):
        return NumberedRow(number, value)
    return NumberedRow(number, problem="the row is not an object with columns")


def _jsonl(path: Path) -> Iterator[NumberedRow]:
    # Bytes that are not UTF-8 come as lone surrogates: such a row is refused, not the file.
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            text = line.decode("utf-8-sig" if number == 1 else "utf-8", "surrogateescape")
            if not text.strip():
                continue
            try:
                row = _row(number, json.loads(text))
            except (ValueError, RecursionError):
                row = NumberedRow(number, problem="the line is not JSON")
            yield row


def _json(path: Path) -> Iterator[NumberedRow]:
    """Rows of a list, of the only list in an object ({"data": [...]}), or of lines of objects."""
    try:
        content = json.loads(path.read_bytes().decode("utf-8-sig", "surrogateescape"))
    except (ValueError, RecursionError) as error:
        reason = str(error)
        if reason.startswith("Extra data"):  # The first line alone is JSON.
            return _jsonl(path)
        raise UserError(f"data.source: {path} is not JSON: {reason}") from error
    values = list(content.values()) if isinstance(content, dict) else [content]
    lists = [value for value in values if isinstance(value, list)]
    if len(lists) != 1:
        expected = "expected [{...}, ...] or one object with one list"
        raise UserError(f"data.source: {path} holds no list of rows; {expected}")
    return as_rows(lists[0])


def _csv(path: Path) -> Iterator[NumberedRow]:
    # A longer cell would end the whole file; as a bad row it is one row.
    csv.field_size_limit(1 << 30)
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        # Spreadsheets of some countries write semicolons.
        delimiter = max(",;\t", key=file.readline().count)
        file.seek(0)
        # Strict: an unclosed quote would otherwise swallow the rest of the file without a word.
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        header: list[str] = []
        for number in itertools.count(1):
            try:
                cells = next(reader, None)
            except csv.Error as error:
                yield NumberedRow(number, problem=f"the row is not CSV, see its quotes ({error})")
                continue
            if cells is None:
                return
            if number == 1:
                header = [cell.strip() for cell in cells]
            elif len(cells) > len(header):
                yield NumberedRow(number, problem="the row has more cells than there are columns")
            elif cells:
                yield NumberedRow(number, dict(zip(header, cells, strict=False)))


def _parquet(path: Path) -> Iterator[NumberedRow]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            batches = map(_values, file.iter_batches())
            for number, values in enumerate(itertools.chain.from_iterable(batches), 1):
                yield NumberedRow(number, values or {}, "the row is not UTF-8" if values is None else "")
    except (pa.ArrowException, OSError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise UserError(f"data.source: {path} cannot be read as parquet: {reason}") from error


def _values(batch: Any) -> list[dict[str, Any] | None]:
    """The batch's rows; None for one with text that is not UTF-8."""
    try:
        return list(batch.to_pylist())
    except UnicodeDecodeError:
        # Arrow does not say which row it was: half of the batch, until it is one row.
        half = batch.num_rows // 2
        return _values(batch.slice(0, half)) + _values(batch.slice(half)) if half else [None]


_READERS = {".parquet": _parquet, ".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".tsv": _csv}
SUFFIXES = tuple(_READERS)
