"""Passages to search: read from files, written beside their index, and what their engines share."""

import fcntl
import json
import logging
import mmap
import os
import shutil
import tempfile
import time
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np

from zs_lightning.errors import UserError
from zs_lightning.search.base import SearchEngine
from zs_lightning.search.cache import at_home
from zs_lightning.streams import derive_seed
from zs_lightning.types import Document, SearchRequest, SearchResult

CACHE = "~/.cache/zs_lightning"
WORDS = 100
"""Words of a passage cut out of a text; none has fewer than 2/3 or more than 3/2 of them."""
LARGEST = 1_000_000
"""Most bytes of one document: a text file or a line of JSON."""
TEXTS = (".txt", ".md", ".markdown", ".rst")
LINES = ".jsonl"
FORMAT = 1
"""Version of what is written; a change makes every corpus be indexed again."""
SIZES = "sizes.json"
"""The file with the bytes of an index's other files."""
IN_USE = 3600
"""Seconds after it was asked for in which an older index of a corpus is kept."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Passage:
    """One thing that a search can find. All of it is untrusted text."""

    id: str
    text: str
    title: str = ""

    @property
    def contents(self) -> str:
        """What is indexed: title in quotes and text below it, as Search-R1's corpora have it."""
        return f'"{self.title}"\n{self.text}' if self.title else self.text


@dataclass(frozen=True, slots=True)
class Hit:
    """One passage that was found, and how well it fits (comparable within one query only)."""

    passage: Passage
    score: float


class Passages:
    """The passages that `_store` wrote, read from disk one at a time."""

    def __init__(self, folder: Path) -> None:
        # Mapped, as the texts are: a corpus of Wikipedia has 21 million offsets.
        self.offsets = np.load(folder / "offsets.npy", mmap_mode="r")
        # The mapping outlives the file object.
        with (folder / "passages.jsonl").open("rb") as file:
            self.lines = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, number: int) -> Passage:
        if not 0 <= number < len(self):
            raise IndexError(f"passage {number} of {len(self)}")
        return Passage(*json.loads(self.lines[self.offsets[number] : self.offsets[number + 1]]))


@dataclass(eq=False, repr=False, kw_only=True)
class LocalSearch(SearchEngine):
    """An engine that holds its passages itself. To add one, write `rank`.

    Args:
        count: documents per search.
    """

    count: int = 3

    def __post_init__(self) -> None:
        if self.count < 1:
            raise UserError(f"search: expected count >= 1; got {self.count}")
        self.documents: Sequence[Passage] | Passages = []
        self.pending: list[SearchRequest] = []

    @abstractmethod
    def rank(self, queries: Sequence[str], count: int) -> list[list[Hit]]:
        """At most `count` hits for each query, best first."""

    def submit(self, requests: Sequence[SearchRequest]) -> None:
        self.pending += requests

    def poll(self) -> list[SearchResult]:
        requests, self.pending = self.pending, []
        if not requests:
            return []
        # Half characters, which JSON of others can hold, are no text for a tokenizer.
        queries = [request.query.encode("utf-8", "replace").decode("utf-8") for request in requests]
        results = []
        for request, hits in zip(requests, self.rank(queries, self.count), strict=True):
            documents = tuple(Document(text=h.passage.text, title=h.passage.title) for h in hits)
            results.append(SearchResult(key=request.key, documents=documents))
        return results


def corpus_files(path: str, option: str = "search.corpus") -> tuple[list[Path], str]:
    """The files to read, in a fixed order, of a folder's whole tree; and what to say of the others.
    Raises UserError, with the option that names it, if there is nothing to read."""
    root = at_home(path, option)
    # Not by Path, which fails for a name that is too long.
    if not os.path.exists(root):
        raise UserError(f"{option}: there is no file or folder {path}")
    tree = sorted(Path(folder) / name for folder, _, names in os.walk(root) for name in names)
    files = []
    others: Counter[str] = Counter()
    for file in tree if root.is_dir() else [root]:
        kind = file.suffix.lower() or "no ending"
        # A pipe never ends, and a link may lead to what nobody meant to be found.
        if not file.is_file():
            kind = "not plain"
        elif file != root and file.is_symlink() and not file.resolve().is_relative_to(root.resolve()):
            kind = "links to elsewhere"
        if kind in (*TEXTS, LINES):
            files.append(file)
        # What is hidden is nobody's text, and need not be said.
        elif not any(part.startswith(".") for part in file.relative_to(root).parts):
            others[kind] += 1
    named = ", ".join(f"{ending} {count}" for ending, count in others.most_common(6))
    passed_over = f"; passed over {others.total()} other files: {named}" if others else ""
    if not files:
        expected = f"expected a file or a folder of files that end in {', '.join((*TEXTS, LINES))}"
        raise UserError(f"{option}: nothing to search in {path}{passed_over}; {expected}")
    return files, passed_over


class Skipped(Exception):
    """A document that is none; the message is the reason."""


def read_passages(path: str, skipped: Counter[str], option: str = "search.corpus") -> Iterator[Passage]:
    """Every passage of a corpus; `skipped` counts the documents that are none, by reason."""
    root = at_home(path, option)
    for file in corpus_files(path, option)[0]:
        name = file.relative_to(root).as_posix() if root.is_dir() else file.name
        # A name that is not UTF-8 is no text that could be written.
        name = os.fsencode(name).decode("utf-8", "backslashreplace")
        try:
            if file.suffix.lower() == LINES:
                yield from _read_lines(file, name, skipped)
            else:
                yield from _read_text(file, name)
        except Skipped as reason:
            skipped[str(reason)] += 1
        except OSError as error:
            skipped[f"unreadable ({error.strerror})"] += 1


def _read_text(file: Path, name: str) -> Iterator[Passage]:
    with file.open("rb") as opened:
        text = _decoded(opened.read(LARGEST + 1))
    headings = (line.lstrip("# ").strip() for line in text.splitlines() if line.startswith("# "))
    title = next(headings, "") or Path(name).stem
    words = text.split()
    # What is left of a text is shared out over its passages: none is a snippet of a few words.
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
            # The rest of a line that is too long is read in pieces: it may exceed the memory.
            while len(rest) > LARGEST and not rest.endswith(b"\n"):
                rest = opened.readline(LARGEST + 1)
            try:
                yield _parsed(_decoded(line), f"{name}:{number}")
            except Skipped as reason:
                skipped[str(reason)] += 1


def _decoded(raw: bytes) -> str:
    if len(raw) > LARGEST:
        raise Skipped(f"larger than {LARGEST // 1_000_000} MB")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise Skipped("not UTF-8") from None
    if not text.strip():
        raise Skipped("empty")
    return text


def _parsed(line: str, name: str) -> Passage:
    """A passage from {id, contents} or {id, title, text}; `name` stands in for a missing id."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise Skipped("not JSON") from None
    row = row if isinstance(row, dict) else {}
    whole = row.get("contents") is not None
    text = row["contents"] if whole else row.get("text")
    title = row.get("title") or ""
    if not isinstance(text, str) or not isinstance(title, str):
        raise Skipped("without contents or text")
    title = " ".join(title.split())
    # In the corpora of Search-R1 and FlashRAG the first line of `contents` is the title.
    first, _, rest = text.partition("\n")
    if whole and not title and rest.strip():
        title = first.strip().removeprefix('"').removesuffix('"')
        text = rest
    if not text.strip():
        raise Skipped("empty")
    own = row.get("id")
    passage = Passage(id=name if own is None else str(own), text=text, title=title)
    # JSON can hold halves of characters, which no file and no tokenizer can.
    if any("\ud800" <= c <= "\udfff" for c in "".join(astuple(passage))):
        raise Skipped("half characters")
    return passage


def indexed(path: str, cache: str, kind: str, build: Callable[[Path, Passages], None]) -> Path:
    """The folder with a corpus's passages and their index; made anew in the `cache` only if a file
    changed. Raises UserError if there is nothing to search.

    Args:
        kind: the kind of index, with everything else that the index depends on.
        build: writes the index of the passages into the folder.
    """
    files = corpus_files(path)[0]
    stamps = [(file, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    place = f"{derive_seed(FORMAT, kind, at_home(path, 'search.corpus').resolve()):016x}"
    folder = at_home(cache, "search.cache") / f"{place}-{derive_seed(*stamps):016x}"
    try:
        if not _is_whole(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            with _alone(folder.parent / f"{place}.lock", path):
                # Another process may have made it meanwhile.
                if not _is_whole(folder):
                    shutil.rmtree(folder, ignore_errors=True)
                    _make(path, folder, f"{place}.", build)
    except OSError as error:
        said = f"the index of {path} cannot be written to {cache}: {error.strerror or error}"
        raise UserError(f"search.cache: {said}; name another folder") from error
    # One that is another user's, or on a disk that is only read, is used all the same.
    with suppress(OSError):
        os.utime(folder)
    for old in folder.parent.glob(f"{place}-*"):
        # Other processes remove it, too, or have just asked for it and are about to open it.
        with suppress(OSError):
            if old != folder and time.time() - old.stat().st_mtime > IN_USE:
                shutil.rmtree(old)
    return folder


@contextmanager
def _alone(lock: Path, path: str) -> Iterator[None]:
    """Makes indices of one corpus one at a time: who found none must not delete the one that came
    meanwhile, and nobody has to make it twice."""
    with lock.open("wb") as file:
        # Some file systems of networks have no locks: there each process makes its own.
        with suppress(OSError):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                _log.warning("search: another process makes the index of %s; waiting for it", path)
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _is_whole(folder: Path) -> bool:
    try:
        sizes = json.loads((folder / SIZES).read_text())
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def _make(path: str, folder: Path, prefix: str, build: Callable[[Path, Passages], None]) -> None:
    # Written beside it and moved: a kill leaves no half index that looks whole.
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=prefix) as scratch:
        part = Path(scratch) / "index"
        part.mkdir()
        _store(path, part)
        build(part, Passages(part))
        sizes = {file.name: file.stat().st_size for file in part.iterdir()}
        (part / SIZES).write_text(json.dumps(sizes))
        try:
            part.rename(folder)
        except OSError:
            # Where there are no locks, another process may have been faster.
            if not folder.is_dir():
                raise


def _store(path: str, folder: Path) -> None:
    skipped: Counter[str] = Counter()
    offsets = [0]
    with (folder / "passages.jsonl").open("wb") as file:
        for passage in read_passages(path, skipped):
            file.write(json.dumps(astuple(passage), ensure_ascii=False).encode() + b"\n")
            offsets.append(file.tell())
    np.save(folder / "offsets.npy", np.array(offsets, dtype=np.int64))
    reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
    said = f"; skipped {skipped.total()} documents: {reasons}" if skipped else ""
    if len(offsets) == 1:
        raise UserError(f"search.corpus: no passage in {path}{said}")
    _log.warning("search: %s passages in %s%s", len(offsets) - 1, path, corpus_files(path)[1] + said)
