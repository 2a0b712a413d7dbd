"""Passages to search: read from a folder or a file, written once beside their index, and read from disk by number."""

from __future__ import annotations

import json
import logging
import mmap
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import overload

import numpy as np

from zs_lightning.errors import UserError
from zs_lightning.streams import derive_seed

CACHE = "~/.cache/zs_lightning"
WORDS = 100
"""Of a passage cut out of a text; the rest of a text is shared out, so that none has fewer than 2/3 or more than 3/2."""
LARGEST = 1_000_000
"""Bytes of one document: a text file or a line of JSON."""
TEXTS = (".txt", ".md", ".markdown", ".rst")
LINES = (".jsonl",)
MOST_NAMED = 6
"""Endings of files that are not read."""
FORMAT = 1
"""Of what is written; a change makes every corpus be indexed again."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Passage:
    """One thing that a search can find. All of it is untrusted text."""

    id: str
    text: str
    title: str = ""

    @property
    def contents(self) -> str:
        """Title in quotes and text below it, as Search-R1's corpora have it; this is what is indexed."""
        return f'"{self.title}"\n{self.text}' if self.title else self.text


class Passages(Sequence[Passage]):
    """The passages that `store` wrote, read from disk one at a time."""

    def __init__(self, folder: Path) -> None:
        self.offsets = np.load(folder / "offsets.npy", mmap_mode="r")
        with (folder / "passages.jsonl").open("rb") as file:
            self.lines = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, number: int) -> Passage: ...
    @overload
    def __getitem__(self, number: slice) -> list[Passage]: ...
    def __getitem__(self, number: int | slice) -> Passage | list[Passage]:
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        if not 0 <= number < len(self):
            raise IndexError(f"passage {number} of {len(self)}")
        return Passage(*json.loads(self.lines[self.offsets[number] : self.offsets[number + 1]]))


# ---------------------------------------------------------------------- reading


def corpus_files(path: str) -> list[Path]:
    """The files of a corpus in a fixed order: the file itself, or those of a folder and its folders.

    Raises:
        UserError: there are none.
    """
    if not Path(path).expanduser().exists():
        raise UserError(f"search.corpus: there is no file or folder {path}")
    files = [file for file in _files(path) if file.suffix.lower() in TEXTS + LINES]
    if not files:
        others = "; ".join(["", *_passed_over(path)])
        raise UserError(
            f"search.corpus: nothing to search in {path}{others}; expected a file or a folder of files that end in "
            f"{', '.join(TEXTS + LINES)}"
        )
    return files


def _files(path: str) -> list[Path]:
    root = Path(path).expanduser()
    inside = [Path(folder) / name for folder, _, names in os.walk(root) for name in names]
    return sorted(inside) if root.is_dir() else [root]


def _passed_over(path: str, unreadable: int = 0) -> list[str]:
    """How many files were read, if not all, and which were not; hidden ones are nobody's texts."""
    root = Path(path).expanduser()
    files = [file for file in _files(path) if not any(part.startswith(".") for part in file.relative_to(root).parts)]
    others = Counter(file.suffix.lower() or "no ending" for file in files if file.suffix.lower() not in TEXTS + LINES)
    read = len(files) - others.total() - unreadable
    named = ", ".join(f"{ending} {count}" for ending, count in others.most_common(MOST_NAMED))
    said = [f"{read} of {len(files)} files read"] if read < len(files) else []
    return said + ([f"passed over: {named}{', …' if len(others) > MOST_NAMED else ''}"] if others else [])


def read_passages(path: str, skipped: Counter[str]) -> Iterator[Passage]:
    """Every passage of a corpus; `skipped` counts the documents that are none, by reason."""
    root = Path(path).expanduser()
    for file in corpus_files(path):
        name = file.relative_to(root).as_posix() if root.is_dir() else file.name
        try:
            read = _read_lines if file.suffix.lower() in LINES else _read_text
            yield from read(file, name, skipped)
        except OSError as error:
            skipped[f"unreadable ({error.strerror})"] += 1


def _read_text(file: Path, name: str, skipped: Counter[str]) -> Iterator[Passage]:
    with file.open("rb") as opened:
        text = _decoded(opened.read(LARGEST + 1), skipped)
    words = text.split()
    if not words:
        return
    title = next((line.lstrip("# ").strip() for line in text.splitlines() if line.startswith("# ")), "") or file.stem
    count = max(1, round(len(words) / WORDS))
    for i in range(count):
        part = words[i * len(words) // count : (i + 1) * len(words) // count]
        yield Passage(id=f"{name}#{i}", text=" ".join(part), title=title)


def _read_lines(file: Path, name: str, skipped: Counter[str]) -> Iterator[Passage]:
    with file.open("rb") as opened:
        number = 0
        while line := opened.readline(LARGEST + 1):
            number += 1
            rest = line
            # What is left of a line that is too long is read in pieces: it may be larger than the memory.
            while len(rest) > LARGEST and not rest.endswith(b"\n"):
                rest = opened.readline(LARGEST + 1)
            if text := _decoded(line, skipped):
                passage = _parsed(text, f"{name}:{number}", skipped)
                if passage is not None:
                    yield passage


def _decoded(raw: bytes, skipped: Counter[str]) -> str:
    """The document's text; empty if it is skipped."""
    if len(raw) > LARGEST:
        skipped[f"larger than {LARGEST // 1_000_000} MB"] += 1
        return ""
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        skipped["not UTF-8"] += 1
        return ""
    if not text.strip():
        skipped["empty"] += 1
        return ""
    return text


def _parsed(line: str, name: str, skipped: Counter[str]) -> Passage | None:
    """A passage from {id, contents} or {id, title, text}; `name` stands in for a missing id."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        skipped["not JSON"] += 1
        return None
    text = row.get("contents", row.get("text")) if isinstance(row, dict) else None
    title = row.get("title") or "" if isinstance(row, dict) else None
    if not isinstance(text, str) or not isinstance(title, str):
        skipped["without contents or text"] += 1
        return None
    if "contents" in row and not title:
        first, end, rest = text.partition("\n")
        title, text = (first.strip().removeprefix('"').removesuffix('"'), rest) if end and rest.strip() else ("", text)
    if not text.strip():
        skipped["empty"] += 1
        return None
    passage = Passage(id=str(row.get("id", name)), text=text, title=title)
    if any("\ud800" <= c <= "\udfff" for value in astuple(passage) for c in value):
        skipped["half characters"] += 1
        return None
    return passage


# ---------------------------------------------------------------------- on disk


def indexed(path: str, cache: str, kind: str, build: Callable[[Path, Passages], None]) -> Path:
    """The folder with a corpus's passages and their index; made anew only if a file of the corpus changed.

    Args:
        path: file or folder.
        cache: where indices are kept.
        kind: of index, with everything else that the index depends on.
        build: writes the index of the passages into the folder.

    Raises:
        UserError: nothing to search.
    """
    files = corpus_files(path)
    stamps = [(file, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.exists()]
    place = f"{derive_seed(FORMAT, kind, Path(path).expanduser().resolve()):016x}"
    folder = Path(cache).expanduser() / f"{place}-{derive_seed(*stamps):016x}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Written beside it and moved: a kill leaves no half index that looks whole.
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{place}.") as scratch:
            part = Path(scratch) / "index"
            part.mkdir()
            _report(path, *_store(path, part))
            build(part, Passages(part))
            if not folder.is_dir():
                part.rename(folder)
        for old in folder.parent.glob(f"{place}-*"):
            if old != folder:
                shutil.rmtree(old)
    return folder


def _store(path: str, folder: Path) -> tuple[int, Counter[str]]:
    skipped: Counter[str] = Counter()
    offsets = [0]
    with (folder / "passages.jsonl").open("wb") as file:
        for passage in read_passages(path, skipped):
            file.write(json.dumps(astuple(passage), ensure_ascii=False).encode() + b"\n")
            offsets.append(file.tell())
    np.save(folder / "offsets.npy", np.array(offsets, dtype=np.int64))
    if len(offsets) == 1:
        raise UserError(f"search.corpus: no passage in {path}; {_counted(skipped)}")
    return len(offsets) - 1, skipped


def _report(path: str, passages: int, skipped: Counter[str]) -> None:
    unreadable = sum(number for reason, number in skipped.items() if reason.startswith("unreadable"))
    said = [*_passed_over(path, unreadable), *([_counted(skipped)] if skipped else [])]
    _log.warning("search: %s", "; ".join([f"{passages} passages in {path}", *said]))


def _counted(skipped: Counter[str]) -> str:
    return f"skipped {skipped.total()} documents: " + ", ".join(f"{n} {reason}" for reason, n in skipped.items())
