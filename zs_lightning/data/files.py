"""A person's own questions, or search records, from files or from the hub."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from zs_lightning.data.columns import Columns, example_of, record_of
from zs_lightning.data.parts import Part, hub_parts, is_hub_name, local_parts
from zs_lightning.data.reading import Item, Table, example_in, read_parts, report_overlap, say
from zs_lightning.data.sources import SPLITS, MissingSplit, QASource
from zs_lightning.data.tables import SUFFIXES
from zs_lightning.errors import UserError
from zs_lightning.streams import uniform
from zs_lightning.types import QAExample, SearchRecord


class FileSource(QASource):
    """Questions, or search records, from files (parquet, jsonl, json, csv, tsv) or from a data set of the hub.

    Answers are a text or a list, which a spreadsheet's cell holds as JSON. Documents are a list of texts or of objects with
    text and title, or one text "Doc 1: ... Doc 2: ...". A prompt column is ignored: the prompt is made from the question.
    Rows come in an order that is a function of the seed, so that the first ones are a fair sample.

    Args:
        path: a file; a folder or pattern of files; or a data set of the hub such as owner/name.
        config: of a data set of the hub that has several.
        splits: for train, validation and test a file (seen from the folder of path), a split of the data set, a value of
            the split column, or the share of all rows (0.8), cut off by a hash of the question. null goes by the names
            of files and splits (train, validation, valid, val, dev, test); a single file then serves every split whole.
        columns: where to find what has another name, such as {question: text, golden_answers: meta.answers}. Found by
            themselves are question; golden_answers, answer or reward_model.ground_truth.target; id; data_source; split; and
            for search records also query, documents, and noisy (true, false) or label (useful, noisy).
        limit: most questions of each data set in each split, a sample that depends on the seed; null takes all.
        bad_rows: skip leaves rows that cannot be used out and error stops at them; both say which and why.
        seed: of the order of the rows and of the sample.
    """

    def __init__(
        self,
        path: str,
        config: str | None = None,
        splits: dict[str, float | str] | None = None,
        columns: dict[str, str] | None = None,
        limit: int | None = None,
        bad_rows: Literal["skip", "error"] = "skip",
        seed: int = 0,
    ) -> None:
        if limit is not None and limit < 1:
            raise UserError(f"data.source: expected limit >= 1 or null; got {limit}")
        self.path, self.config, self.limit, self.bad_rows, self.seed = path, config, limit, bad_rows, seed
        self.from_hub = is_hub_name(path)
        self.columns = Columns(columns)
        self._parts: dict[str | None, list[Part]] = {}
        self.splits = _checked_splits(splits)
        for choice in (self.splits or {}).values():
            if isinstance(choice, str) and choice.endswith(SUFFIXES) and not self.from_hub:
                self._parts_of("", choice)
        self._tables: dict[tuple[str, ...], Table[Any]] = {}
        self._counted: set[tuple[str, str]] = set()

    def questions(self, split: str) -> list[QAExample]:
        rows = self._rows(split, "questions", example_of)
        if split == "train":
            report_overlap(self.path, rows, lambda held: self._rows(held, "questions", example_of))
        return rows

    def search_records(self, split: str, count: int) -> list[SearchRecord]:
        return self._rows(split, "records", record_of)[:count]

    # ------------------------------------------------------------------------------------------------ which rows

    def _rows(self, split: str, task: str, convert: Callable[[Any, Columns, str], Item]) -> list[Item]:
        if self.splits is not None and split not in self.splits:
            raise self._missing(split, f"data.source.splits names only {', '.join(self.splits)}")
        choice = None if self.splits is None else self.splits[split]
        if isinstance(choice, float | int):
            names = [name for name in SPLITS if name in (self.splits or {})]
            low = sum(float(self.splits[name]) for name in names[: names.index(split)]) if self.splits else 0.0
            table = self._whole(task, convert)
            rows = [row for row, place in zip(table.rows, table.places, strict=True) if low <= place < low + choice]
        elif choice is None or self.from_hub or choice.endswith(SUFFIXES):
            table = self._table(self._parts_of(split, choice), task, convert)
            rows = table.rows
        else:
            table = self._whole(task, convert)
            rows = [row for row, value in zip(table.rows, table.splits, strict=True) if value == choice]
            if not rows:
                raise self._missing(split, f"no row's split column says {choice}")
        sample = self._sample(rows)
        if len(sample) < len(table.rows) and (split, task) not in self._counted:
            self._counted.add((split, task))
            say(f"data: {self.path}: {split} split: {len(sample)} of {len(table.rows)} {task}")
        return sample

    def _sample(self, rows: list[Item]) -> list[Item]:
        ordered = sorted(rows, key=lambda row: uniform(self.seed, "order", example_in(row).key, getattr(row, "query", "")))
        if self.limit is None:
            return ordered
        taken: Counter[str] = Counter()
        kept = []
        for row in ordered:
            taken[example_in(row).source] += 1
            if taken[example_in(row).source] <= self.limit:
                kept.append(row)
        return kept

    # ------------------------------------------------------------------------------------------------ which files

    def _all_parts(self) -> list[Part]:
        if None not in self._parts:
            self._parts[None] = hub_parts(self.path, self.config) if self.from_hub else local_parts(self.path)
        return self._parts[None]

    def _parts_of(self, split: str, choice: str | None) -> list[Part]:
        if choice is not None:
            if choice not in self._parts:
                path = Path(self.path).expanduser()
                file = (path if path.is_dir() else path.parent) / choice
                self._parts[choice] = hub_parts(self.path, self.config, choice) if self.from_hub else local_parts(str(file))
            return self._parts[choice]
        parts = self._all_parts()
        if not any(part.split for part in parts) or (len(parts) == 1 and not self.from_hub):
            return parts
        chosen = [part for part in parts if part.split == split]
        if not chosen:
            raise self._missing(split, f"found {', '.join(part.place for part in parts[:5])}")
        return chosen

    def _missing(self, split: str, reason: str) -> MissingSplit:
        return MissingSplit(
            f"data.source: {self.path} has no {split} split: {reason}; set data.source.splits, such as "
            "splits: {train: 0.9, test: 0.1}, or a file or split of the data set for each"
        )

    # ------------------------------------------------------------------------------------------------ reading

    def _whole(self, task: str, convert: Callable[[Any, Columns, str], Item]) -> Table[Item]:
        return self._table(self._all_parts(), task, convert)

    def _table(self, parts: list[Part], task: str, convert: Callable[[Any, Columns, str], Item]) -> Table[Item]:
        key = (task, *(part.place for part in parts))
        if key not in self._tables:
            self._tables[key] = read_parts(self.path, parts, self.columns, task, convert, self.bad_rows)
        return self._tables[key]


def _checked_splits(splits: dict[str, float | str] | None) -> dict[str, float | str] | None:
    if splits is None:
        return None
    if unknown := [name for name in splits if name not in SPLITS]:
        raise UserError(f"data.source.splits: there is no split {unknown[0]}; expected {', '.join(SPLITS)}")
    shares = [float(share) for share in splits.values() if not isinstance(share, str)]
    if shares and (len(shares) < len(splits) or not all(0 < share <= 1 for share in shares) or sum(shares) > 1 + 1e-9):
        raise UserError(
            f"data.source.splits: expected files or splits only, or shares between 0 and 1 only with a sum of at most 1; "
            f"got {splits}"
        )
    return dict(splits)
