"""A person's own questions, or search records, from files or from the hub."""

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain, cycle, islice
from pathlib import Path
from typing import Any, Literal

from zs_lightning.data.columns import BadRow, Columns, example_of, id_of, record_of, spelling
from zs_lightning.data.parts import Part, hub_parts, is_hub_name, local_parts
from zs_lightning.data.sources import SPLITS, MissingSplit, QASource, example_in, say
from zs_lightning.errors import UserError
from zs_lightning.streams import uniform
from zs_lightning.text.prompts import USEFUL
from zs_lightning.types import QAExample, SearchRecord

# Row numbers shown of each reason, and names of files.
SHOWN = 5


@dataclass(eq=False, repr=False)
class FileSource(QASource):
    """Questions, or search records, from files (parquet, jsonl, json, csv, tsv) or from the hub.

    Answers are a text or a list, which a spreadsheet's cell holds as JSON. Documents are a list of
    texts or of objects with text and title, or one text "Doc 1: ... Doc 2: ...". A prompt column is
    ignored: the prompt is made from the question. Rows come in an order that is a function of the
    seed, so that the first ones are a fair sample. Of search records that are not for training
    there is one for each query of a question: others of it would be the same measurement again.

    Args:
        path: a file; a folder or pattern of files; or a data set of the hub such as owner/name.
        config: of a data set of the hub that has several.
        splits: for train, validation and test a file (seen from the folder of path), a split of the
            data set, or the share of all rows (0.8), cut off by a hash of the question. null goes
            by the names of files and splits (train, validation, valid, val, dev, test); a single
            file then serves every split whole.
        columns: where to find what has another name, such as {question: q, golden_answers: meta.a}.
            Found by themselves are question; golden_answers, answer or
            reward_model.ground_truth.target; id; data_source; and for search records also query,
            documents, label (useful or a kind of noise) or noisy (true, false), and shown
            (documents that were found before).
        limit: most questions of each data set in each split, a sample by the seed; null takes all.
        bad_rows: skip leaves rows that cannot be used out and error stops at them; both say why.
        seed: of the order of the rows and of the sample.
    """

    path: str
    config: str | None = None
    splits: dict[str, float | str] | None = None
    columns: dict[str, str] | None = None
    limit: int | None = None
    bad_rows: Literal["skip", "error"] = "skip"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise UserError(f"data.source: expected limit >= 1 or null; got {self.limit}")
        self.chosen = self.splits or {}
        _check(self.chosen)
        self.places = Columns(self.columns)
        self.from_hub = is_hub_name(self.path)
        # By the name in splits, and by task and parts: several splits may be shares of one reading.
        self._parts: dict[str | None, list[Part]] = {}
        self._read: dict[tuple[str, ...], list[Any]] = {}
        # A file that is not there is missed now, not when training is over and the test begins.
        for choice in self.chosen.values():
            if isinstance(choice, str) and not self.from_hub:
                self._parts_by(choice)

    def questions(self, split: str) -> list[QAExample]:
        return self._rows(split, "questions")

    def search_records(self, split: str, count: int) -> list[SearchRecord]:
        rows = self._rows(split, "records")
        return balanced(rows, count) if split == "train" else rows[:count]

    def _rows(self, split: str, task: str) -> list[Any]:
        parts = self._parts_of(split)
        key = (task, *(part.place for part in parts))
        if key not in self._read:
            self._read[key] = read_parts(self.path, parts, self.places, task, self.bad_rows)
        every = self._read[key]
        rows = self._sample(self._share(split, every), task == "records" and split != "train")
        if len(rows) < len(every):
            say(f"data: {self.path}: {split} split: {len(rows)} of {len(every)} {task}")
        return rows

    def _share(self, split: str, rows: list[Any]) -> list[Any]:
        if not isinstance(self.chosen.get(split), float | int):
            return rows
        shares = [float(self.chosen.get(name, 0)) for name in SPLITS[: SPLITS.index(split) + 1]]
        low = sum(shares[:-1])
        high = low + shares[-1]
        # By the question in any spelling, so that shares never part its repetitions. Records by
        # another draw: theirs are built of the training share of questions.
        places = []
        for row in rows:
            draw = "split" if row is example_in(row) else "split of records"
            places.append(uniform(draw, spelling(example_in(row).question)))
        return [row for row, place in zip(rows, places, strict=True) if low <= place < high]

    def _sample(self, rows: list[Any], are_held_out: bool) -> list[Any]:
        taken: Counter[str] = Counter()
        kept = []
        # Drawn by the row itself: rows that come or go elsewhere in the file move nothing.
        rows = sorted(rows, key=self._order)
        for row in one_a_query(rows) if are_held_out else rows:
            source = example_in(row).source
            taken[source] += 1
            if self.limit is None or taken[source] <= self.limit:
                kept.append(row)
        return kept

    def _order(self, row: QAExample | SearchRecord) -> tuple[float, str]:
        # By the text: a file that is renamed or moved gives the same rows in the same order.
        example = example_in(row)
        text = (spelling(example.question), getattr(row, "query", ""))
        return uniform(self.seed, "order", *text), example.question

    def _parts_of(self, split: str) -> list[Part]:
        if self.chosen and split not in self.chosen:
            raise self._missing(split, f"data.source.splits names only {', '.join(self.chosen)}")
        choice = self.chosen.get(split)
        parts = self._parts_by(choice if isinstance(choice, str) else None)
        is_whole = self.is_whole()
        if is_whole and split == "train":
            hint = "data.source.splits parts them, such as {train: 0.9, test: 0.1}"
            say(f"data: {self.path}: every split has the same rows; {hint}")
        if choice is not None or is_whole:
            return parts
        chosen = [part for part in parts if part.split == split]
        if not chosen:
            raise self._missing(split, f"found {', '.join(part.place for part in parts[:SHOWN])}")
        return chosen

    def is_whole(self) -> bool:
        """Whether every split has all rows, since nothing parts them."""
        if self.chosen:
            return False
        parts = self._parts_by(None)
        # A single file serves every split, whatever it is called; of the hub it is one split.
        return (len(parts) == 1 and not self.from_hub) or not any(part.split for part in parts)

    def _parts_by(self, choice: str | None) -> list[Part]:
        """The file or split of the hub that is called so, or all there are."""
        if choice not in self._parts:
            path = Path(self.path).expanduser()
            if self.from_hub:
                parts = hub_parts(self.path, self.config, choice)
            elif choice is None:
                parts = local_parts(self.path)
            else:
                parts = local_parts(str((path if path.is_dir() else path.parent) / choice))
            self._parts[choice] = parts
            unnamed = [part.place for part in parts if not part.split]
            if choice is None and 0 < len(unnamed) < len(parts):
                named = ", ".join(unnamed[:SHOWN]) + (", ..." if len(unnamed) > SHOWN else "")
                said = f"left out, as no split is in their names: {named}; name them in data.source.splits"
                say(f"data: {self.path}: {said}")
        return self._parts[choice]

    def _missing(self, split: str, reason: str) -> MissingSplit:
        return MissingSplit(
            f"data.source: {self.path} has no {split} split: {reason}; set data.source.splits, such "
            "as splits: {train: 0.9, test: 0.1}, or a file or split of the data set for each"
        )


def balanced(rows: list[SearchRecord], count: int) -> list[SearchRecord]:
    """Up to `count` rows, each label as often as any other: those of fewer rows are repeated. A
    simulator that was taught more of one label would write it where another is ordered."""
    of_label: dict[str, list[SearchRecord]] = defaultdict(list)
    for row in rows:
        of_label[row.label].append(row)
    most = max(map(len, of_label.values()), default=0)
    rounds = islice(zip(*map(cycle, of_label.values()), strict=False), most)
    return list(chain.from_iterable(rounds))[:count]


def one_a_query(rows: list[SearchRecord]) -> list[SearchRecord]:
    """A row of each query of a question, useful ones and each kind of noise in turn, with the
    evidence that any row of the query has."""
    of_query: dict[tuple[str, str], dict[str, SearchRecord]] = defaultdict(dict)
    for row in rows:
        of_query[spelling(row.example.question), row.query].setdefault(row.label, row)
    taken: Counter[str] = Counter()
    kept = []
    for place, mine in enumerate(of_query.values()):
        kinds = sorted(set(mine) - {USEFUL})
        is_useful = USEFUL in mine and (place % 2 == 0 or not kinds)
        label = USEFUL if is_useful else min(kinds, key=taken.__getitem__)
        taken[label] += 1
        row = mine[label]
        evidence = row.evidence or next((other.evidence for other in mine.values() if other.evidence), ())
        kept.append(replace(row, evidence=evidence))
    return kept


def _check(splits: dict[str, float | str]) -> None:
    if unknown := [name for name in splits if name not in SPLITS]:
        expected = f"expected {', '.join(SPLITS)}"
        raise UserError(f"data.source.splits: there is no split {unknown[0]}; {expected}")
    shares = [float(share) for share in splits.values() if not isinstance(share, str)]
    mixed = 0 < len(shares) < len(splits)
    if mixed or not all(0 < share <= 1 for share in shares) or sum(shares) > 1 + 1e-9:
        expected = "expected files or splits only, or shares between 0 and 1 only"
        raise UserError(f"data.source.splits: {expected} with a sum of at most 1; got {splits}")


def read_parts(path: str, parts: list[Part], columns: Columns, task: str, bad_rows: str) -> list[Any]:
    """The usable rows of the parts. Prints how many there are, and why others are not used. Raises
    UserError if a part cannot be read, a column is missing, or no row can be used."""
    place = parts[0].place if len(parts) == 1 else f"{path} ({len(parts)} parts)"
    convert = example_of if task == "questions" else record_of
    used: list[Any] = []
    # Row numbers by the reason why the rows cannot be used.
    skipped: dict[str, list[str]] = defaultdict(list)
    read = 0
    for part in parts:
        rows = list(part.rows())
        read += len(rows)
        # All rows are looked at: a column may be missing from the first ones.
        if readable := [row.values for row in rows if not row.problem]:
            columns.check(readable, task, part.place)
        for row in rows:
            try:
                if row.problem:
                    raise BadRow(row.problem)
                used.append(convert(row.values, columns, part.name))
            except BadRow as error:
                number = str(row.number) if len(parts) == 1 else f"{part.place}:{row.number}"
                skipped[str(error)].append(number)
    if not used:
        reasons = "; ".join(_counted(skipped, "skipped")) or "it has none"
        raise UserError(f"data.source: no row of {place} can be used: {reasons}")
    if bad_rows == "error" and skipped:
        bad = "; ".join(_counted(skipped, "bad"))
        hint = "correct them or set data.source.bad_rows: skip"
        raise UserError(f"data.source: {place}: {bad}; {hint}")
    # Before anything is trained: nothing is left out in silence.
    lines = [f"data: {place}: {read} rows read, {len(used)} used", *_counted(skipped, "skipped")]
    if repeated := len(used) - len({_content(row) for row in used}):
        what = "question" if task == "questions" else "record"
        but = "but for case, punctuation and articles"
        lines.append(f"{repeated} used, but an earlier row has the same {what} {but}")
    say("\n  ".join(lines))
    return used if task == "records" else _with_own_ids(used)


def _counted(skipped: dict[str, list[str]], word: str) -> Iterator[str]:
    """`3 skipped: the question is empty (rows 4, 9, 12)`, one for each reason."""
    for reason, rows in skipped.items():
        shown = ", ".join(rows[:SHOWN]) + (", ..." if len(rows) > SHOWN else "")
        yield f"{len(rows)} {word}: {reason} ({'row' if len(rows) == 1 else 'rows'} {shown})"


def _content(row: QAExample | SearchRecord) -> tuple[object, ...]:
    """What two rows of one source have in common if one repeats the other."""
    example = example_in(row)
    record = (row.query, row.label, row.documents) if isinstance(row, SearchRecord) else ()
    return (example.source, spelling(example.question), *record)


def _with_own_ids(examples: list[QAExample]) -> list[QAExample]:
    """The questions, each with an id that no earlier one has: groups and draws go by it."""
    spellings: dict[str, set[str]] = defaultdict(set)
    for example in examples:
        spellings[example.key].add(example.question)
    unlike: list[QAExample] = []
    ids: Counter[str] = Counter()
    for example in examples:
        # C and C++ are one without punctuation: then the exact text tells them apart, in any order.
        if len(spellings[example.key]) > 1 and example.id == id_of(spelling(example.question)):
            example = replace(example, id=id_of(f"exactly {example.question}"))
        own = example
        while ids[own.key]:
            # The count goes on where the last one ended: many rows with one id take no longer.
            ids[example.key] += 1
            own = replace(example, id=f"{example.id}#{ids[example.key]}")
        ids[own.key] = 1
        unlike.append(own)
    return unlike
