"""Rows of a file or of a data set of the hub, each with the number that its user would look it up by."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zs_lightning.errors import UserError

SUFFIXES = (".parquet", ".jsonl", ".json", ".csv", ".tsv")
_LONGEST_CELL = 1 << 30
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


@dataclass(frozen=True, slots=True)
class Row:
    """One row: its columns, or the reason why it could not be read."""

    number: int
    """Line of a jsonl file; row of a spreadsheet (the header is row 1); otherwise counted from 1."""
    values: dict[str, Any] = field(default_factory=dict)
    problem: str = ""


def read_file(path: Path) -> Iterator[Row]:
    """Rows of a parquet, jsonl, json, csv or tsv file. Bytes that are not UTF-8 come as lone surrogates.

    Raises:
        UserError: the file as a whole cannot be read.
    """
    if path.suffix not in SUFFIXES:
        raise UserError(f"data.source: {path} has an unknown kind; expected a file that ends with {', '.join(SUFFIXES)}")
    try:
        with path.open("rb") as file:
            head = file.read(4)
    except OSError as error:
        raise UserError(f"data.source: {path} cannot be read: {error.strerror}") from error
    if not head:
        raise UserError(f"data.source: {path} is empty")
    if path.suffix == ".parquet":
        return _parquet(path)
    if head.startswith(_UTF16):
        raise UserError(f"data.source: {path} is UTF-16; save it as UTF-8")
    return {".jsonl": _jsonl, ".json": _json}.get(path.suffix, _csv)(path)


def _jsonl(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            text = line.decode("utf-8-sig" if number == 1 else "utf-8", "surrogateescape")
            if text.strip():
                yield _object(number, text)


def _object(number: int, text: str) -> Row:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return Row(number, problem="the line is not JSON")
    return _row(number, value)


def _row(number: int, value: Any) -> Row:
    return Row(number, value) if isinstance(value, dict) else Row(number, problem="the row is not an object with columns")


def _json(path: Path) -> Iterator[Row]:
    """A list of objects, also as the only list in an object ({"data": [...]}), or lines of objects."""
    try:
        content = json.loads(path.read_bytes().decode("utf-8-sig", "surrogateescape"))
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data":
            yield from _jsonl(path)
            return
        where = f" in line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise UserError(f"data.source: {path} is not JSON: an error{where}") from error
    lists = [value for value in content.values() if isinstance(value, list)] if isinstance(content, dict) else [content]
    if len(lists) != 1 or not isinstance(lists[0], list):
        raise UserError(f"data.source: {path} holds no list of rows; expected [{{...}}, ...] or one object with one list")
    for number, value in enumerate(lists[0], 1):
        yield _row(number, value)


def _csv(path: Path) -> Iterator[Row]:
    before = csv.field_size_limit(_LONGEST_CELL)
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            # Spreadsheets of some countries write semicolons.
            delimiter = max(",;\t", key=file.readline().count)
            file.seek(0)
            # Strict: an unclosed quote would otherwise swallow the rest of the file without a word.
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            yield from _cells(reader)
    finally:
        csv.field_size_limit(before)


def _cells(reader: Any) -> Iterator[Row]:
    header: list[str] | None = None
    number = 0
    while True:
        number += 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield Row(number, problem=f"the row is not CSV, see its quotes ({error})")
            continue
        if header is None:
            header = [cell.strip() for cell in cells]
        elif len(cells) > len(header):
            yield Row(number, problem="the row has more cells than there are columns")
        elif cells:
            yield Row(number, dict(zip(header, cells, strict=False)))


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for values in _values(batch):
                    number += 1
                    yield Row(number, values) if values is not None else Row(number, problem="the row is not UTF-8")
    except (pa.ArrowException, OSError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise UserError(f"data.source: {path} cannot be read as parquet: {reason}") from error


def _values(batch: Any) -> list[dict[str, Any] | None]:
    """The batch's rows; None for one with text that is not UTF-8."""
    try:
        rows: list[dict[str, Any] | None] = batch.to_pylist()
        return rows
    except UnicodeDecodeError:
        if batch.num_rows == 1:
            return [None]
        half = batch.num_rows // 2
        return _values(batch.slice(0, half)) + _values(batch.slice(half))


def hub_splits(path: str, config: str | None, split: str | None = None) -> dict[str, Any]:
    """The splits of a data set of the hub (of a local data set folder too), by name; each is a sequence of rows.

    Args:
        config: which of the data set's configurations.
        split: loads this one alone; anything that `datasets` understands, such as test[:500].

    Raises:
        UserError: it cannot be loaded.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        found = load_dataset(path, config, split=split)
    except (OSError, ValueError, DatasetsError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise UserError(
            f"data.source: {path} is no file or folder here, and could not be loaded from the hub: {reason}; "
            "change data.source.path, or data.source.config and data.source.splits"
        ) from error
    return {split: found} if split is not None else dict(found)


def hub_rows(data: Any) -> Iterator[Row]:
    for number, value in enumerate(data, 1):
        yield _row(number, value)
