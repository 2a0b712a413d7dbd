"""Which files, or splits of a data set of the hub, a path names, and their rows.

Each row has the number that its user would look it up by. The hub's library could read these files
too, but it fails a whole file for one bad row, and its errors do not say which row that is.
"""

import csv
import glob
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
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
    """Line of a text file (the first one of a row that has several), or counted from 1."""
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
    """nq_train-00000-of-00002 → train, dev → validation; of several words the last one counts;
    empty for a name without a split."""
    found = _SPLIT.findall(name)
    return _WORDS[found[-1].lower()] if found else ""


def is_hub_name(path: str) -> bool:
    """Whether the path can only be a data set of the hub. Raises UserError if it is nothing."""
    # What is here goes first: nobody is sent to the hub for the name of a folder, or a typo in one.
    if os.path.exists(os.path.expanduser(path)) or _matches(path):
        return False
    here = os.path.isdir(path.partition("/")[0])
    if _HUB_NAME.fullmatch(path) and not path.endswith(SUFFIXES) and not here:
        return True
    raise UserError(
        f"data.source.path: there is no file or folder {path}; expected a file ({', '.join(SUFFIXES)}), "
        "a folder or pattern of such files, or the name of a data set of the hub such as owner/name"
    )


def _matches(pattern: str) -> list[Path]:
    found = glob.glob(os.path.expanduser(pattern), recursive=True)
    return [Path(path) for path in sorted(found)]


def local_parts(path: str) -> list[Part]:
    """The file, the files of the folder, or those that match. Raises UserError if there are
    none."""
    given = Path(os.path.expanduser(path))
    files = [given]
    # A file that is named is read or refused; of a folder, what else lies in it is passed over.
    if not os.path.isfile(given):
        found = _matches(str(Path(glob.escape(str(given)), "*")) if os.path.isdir(given) else path)
        files = [file for file in found if file.suffix in SUFFIXES and file.is_file()]
    if not files:
        known = f"none in it that ends with {', '.join(SUFFIXES)}"
        raise UserError(f"data.source: there is no file {path}, or {known}")
    folder = given.resolve().name if os.path.isdir(given) else ""
    return [_part(file, folder) for file in files]


def _part(file: Path, folder: str) -> Part:
    # Without the split, or, if that is all the name says, by the folder: nq/test.jsonl is nq.
    own = _SPLIT.sub("", _SHARD.sub("", file.stem)).strip("-_.")
    name = folder or own or file.resolve().parent.name or file.stem
    # A name that is not UTF-8 is no text that could be printed or hashed.
    place, name = (os.fsencode(text).decode("utf-8", "backslashreplace") for text in (file, name))
    return Part(place, name, split_of(file.stem), partial(read_file, file))


def hub_parts(path: str, config: str | None, split: str | None = None) -> list[Part]:
    """All splits of a data set of the hub, or one: what `datasets` understands, such as
    test[:500]."""
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
    if isinstance(value, DoubledName):
        return NumberedRow(number, problem=f"the row has two columns {value.name}")
    return NumberedRow(number, problem="the row is not an object with columns")


@dataclass(frozen=True, slots=True)
class DoubledName:
    """What stands for an object of JSON with two values of one name."""

    name: str


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any] | DoubledName:
    found = dict(pairs)
    return found if len(found) == len(pairs) else DoubledName(_doubled(name for name, _ in pairs))


def _doubled(names: Iterable[str]) -> str:
    """The first name that occurs twice, or an empty text. Columns may be without a name."""
    return next((name for name, count in Counter(names).items() if name and count > 1), "")


def _refuse_doubled(names: Sequence[str], path: Path) -> None:
    if name := _doubled(names):
        said = "give one of them another name, or take it out"
        raise UserError(f"data.source: {path} has two columns {name}; {said}")


def _jsonl(path: Path) -> Iterator[NumberedRow]:
    # Bytes that are not UTF-8 come as lone surrogates: such a row is refused, not the file.
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            text = line.decode("utf-8-sig" if number == 1 else "utf-8", "surrogateescape")
            if not text.strip():
                continue
            try:
                row = _row(number, json.loads(text, object_pairs_hook=_object))
            except (ValueError, RecursionError):
                row = NumberedRow(number, problem="the line is not JSON")
            yield row


def _json(path: Path) -> Iterator[NumberedRow]:
    """Rows of a list, of the only list of objects in an object ({"data": [...]}), or of lines of
    objects, of which there may be one."""
    try:
        text = path.read_bytes().decode("utf-8-sig", "surrogateescape")
        content = json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        reason = str(error)
        if reason.startswith("Extra data"):  # The first line alone is JSON.
            return _jsonl(path)
        raise UserError(f"data.source: {path} is not JSON: {reason}") from error
    if isinstance(content, list):
        return as_rows(content)
    lists = []
    if isinstance(content, dict):
        lists = [v for v in content.values() if isinstance(v, list) and any(isinstance(i, dict) for i in v)]
        # Texts in lists are the answers of a question: it is a row by itself.
        lists = lists or [[content]]
    if len(lists) != 1:
        expected = "expected [{...}, ...] or one object with one list"
        raise UserError(f"data.source: {path} holds no list of rows; {expected}")
    return as_rows(lists[0])


def _csv(path: Path) -> Iterator[NumberedRow]:
    # A longer cell would end the whole file; as a bad row it is one row.
    csv.field_size_limit(1 << 30)
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        lines = file.readlines()
    if not lines:
        raise UserError(f"data.source: {path} is empty")
    # Spreadsheets of some countries write semicolons; in texts commas are the most frequent.
    unquoted = re.sub('"[^"]*"', "", lines[0])
    delimiter = "\t" if path.suffix == ".tsv" else max("\t;,", key=unquoted.count)
    cells, problem, at = _record(lines, 0, delimiter)
    header = [cell.strip() for cell in cells]
    if problem:
        raise UserError(f"data.source: the header of {path} is not CSV, see its quotes ({problem})")
    _refuse_doubled(header, path)
    while at < len(lines):
        first = at
        cells, problem, at = _record(lines, first, delimiter)
        # The last line is the one that ends the cell, rightly so if there is no problem.
        inside = list(filter(str.strip, lines[first + 1 : at if problem else at - 1]))
        alike = sum(_is_row(line, len(header), delimiter) for line in inside)
        # A quote that nobody meant takes the lines up to the next one for one cell. One that is
        # closed well may as well be meant, with a comma in some of the cell's lines.
        least, share = (1, 1 / 2) if problem else (3, 4 / 5)
        if alike >= max(least, share * len(inside)):
            goes_on = f"its quote goes on from line {first + 1} to {at}"
            problem = f"{goes_on}, over lines that are rows; read on in the next one"
            at = first + 1
        elif problem:
            which = f"the lines {first + 1} to {at} are" if inside else "the row is"
            problem = f"{which} not CSV, see the quotes ({problem})"
        elif len(cells) > len(header):
            problem = "the row has more cells than there are columns"
        if problem:
            yield from (NumberedRow(number + 1, problem=problem) for number in range(first, at))
        elif cells:
            yield NumberedRow(first + 1, dict(zip(header, cells, strict=False)))


def _record(lines: Sequence[str], first: int, delimiter: str) -> tuple[list[str], str, int]:
    """The cells from a line on, or what is wrong with them; and the line behind them."""
    # Strict: an unclosed quote would otherwise swallow the rest of the file without a word.
    rest = (lines[number] for number in range(first, len(lines)))
    reader = csv.reader(rest, delimiter=delimiter, strict=True)
    try:
        cells, problem = next(reader), ""
    except csv.Error as error:
        cells, problem = [], str(error)
    return cells, problem, first + reader.line_num


def _is_row(line: str, columns: int, delimiter: str) -> bool:
    cells, problem, _ = _record([line], 0, delimiter)
    # A quote inside of a text may be the end of the cell that is looked at.
    return not problem and len(cells) == columns > 1 and not any('"' in cell for cell in cells)


def _parquet(path: Path) -> Iterator[NumberedRow]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            _refuse_doubled(names, path)
            number = 0
            for batch in file.iter_batches():
                for cells in zip(*map(_cells, batch.columns), strict=True):
                    number += 1
                    yield NumberedRow(number, dict(zip(names, cells, strict=True)))
    except (pa.ArrowException, OSError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise UserError(f"data.source: {path} cannot be read as parquet: {reason}") from error


def _cells(column: Any) -> list[Any]:
    """A column's values; half a character for one that Python cannot hold, as for text that is not
    UTF-8: a row is refused only if it needs this cell."""
    try:
        return list(column.to_pylist())
    except (ValueError, OverflowError, LookupError):
        return [_cells(column[i : i + 1])[0] for i in range(len(column))] if len(column) > 1 else ["\udcff"]


_READERS = {".parquet": _parquet, ".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".tsv": _csv}
SUFFIXES = tuple(_READERS)
