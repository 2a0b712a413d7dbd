"""Checkpoints of a run: how they are written, found, known and read.

A folder holds the last one and the one before it, and beside them the checksums of both. Each file
is written beside its place and moved there when it is whole and on the disk: a kill, a full disk or
a power cut leaves what was there before.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import lzma
import os
import shutil
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zs_lightning.errors import RunError, UserError
from zs_lightning.models.sums import digest, write_sums
from zs_lightning.runs.folder import BAD_STEPS, BEST, CHECKPOINT, CHECKSUMS, CONFIG, MODEL, PREVIOUS, newest

if TYPE_CHECKING:  # Torch takes seconds to import, which the check of a command line does without.
    from torch import Tensor

SCHEMA = 1
"""Version of our part of a checkpoint; a change that this program could not read raises it."""
PART, OLD = ".part", ".old"
"""Ends of the names of what is being written, and of a folder that is being replaced."""
OPTIMISER = "optimizer_states"
"""Lightning's name for a part of its checkpoints."""

_log = logging.getLogger(__name__)


def sync(path: Path) -> None:
    """Has the disk hold what was written to a file, or the names in a folder."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


@contextmanager
def told(path: Path, needed: int, *kinds: type[Exception]) -> Iterator[None]:
    """Raises RunError, which names the path and the bytes that it takes, for an error of the disk
    or one of these kinds."""
    failing: tuple[type[Exception], ...] = (OSError, *kinds)
    try:
        yield
    except RunError:
        raise
    except failing as error:
        why = (error.strerror or str(error)) if isinstance(error, OSError) else "the disk took a part of it"
        there = f"there is no folder {path.parent} any more"
        if path.parent.is_dir():
            there = f"{shutil.disk_usage(path.parent).free:,} are free; what was there is kept"
        said = f"{path} was not written: {why}; it takes {needed:,} bytes, {there}"
        raise RunError(said) from error


@contextmanager
def _whole(path: Path, needed: int) -> Iterator[Path]:
    """A place beside a file to write it to; it then takes the place of the file. Raises RunError if
    one of them fails, and what was there is there."""
    part = path.with_name(path.name + PART)
    # torch says that it wrote less than it wanted by a RuntimeError.
    with told(path, needed, RuntimeError):
        try:
            part.open("wb").close()  # Where that fails, torch would not say why.
            yield part
            sync(part)
            os.replace(part, path)
            sync(path.parent)
        except Exception:
            with suppress(OSError):
                part.unlink()
            raise


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes or replaces a file. Raises RunError if it cannot; what was there is there."""
    if isinstance(content, str):
        # Half a character, as JSON of others can hold, is written as the escape JSON has for it.
        content = content.encode("utf-8", "backslashreplace")
    with _whole(path, len(content)) as part:
        part.write_bytes(content)


def json_lines(rows: Iterable[Any]) -> str:
    """A line of JSON for each row."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def replace_folder(part: Path, folder: Path) -> None:
    """Puts a folder, with checksums of its weights, in the place of another one, which is there
    until the new one is on disk."""
    write_sums(part)
    for path in [*part.rglob("*"), part]:
        sync(path)
    old = folder.with_name(folder.name + OLD)
    if folder.exists():
        folder.rename(old)
    try:
        part.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Removes what a killed run was writing, and puts back what it was about to replace."""
    for name in (MODEL, BEST):
        old = folder / f"{name}{OLD}"
        if old.is_dir() and not (folder / name).exists():
            old.rename(folder / name)
        shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(folder / f"{name}{PART}", ignore_errors=True)
    for part in [*folder.glob(f"*{PART}"), *folder.glob(f"{BAD_STEPS}/*{PART}")]:
        if part.is_file() and part.suffixes[0] in (".ckpt", ".json", ".jsonl", ".yaml"):
            part.unlink()


def size_of(state: Any) -> int:
    """Bytes of the tensors in a nested structure."""
    if isinstance(state, Mapping):
        return sum(map(size_of, state.values()))
    if isinstance(state, list | tuple):
        return sum(map(size_of, state))
    return int(getattr(state, "nbytes", 0))


def save(folder: Path, state: dict[str, Any]) -> None:
    """Writes the checkpoint of a step, which the state names; the one that was the last is then the
    one before it. Raises RunError if it cannot be written; the last one then is the one that it
    was."""
    import torch

    last, size = folder / CHECKPOINT, size_of(state)
    with _whole(last, size) as part:
        if shutil.disk_usage(folder).free < size:
            raise OSError(errno.ENOSPC, "the disk is full")
        torch.save(state, part)
        entry = {"sha256": digest(part), "bytes": part.stat().st_size, "step": state["step"]}
        # Before any of the files has its name: at every moment the checksums of all are there.
        known = [{**entry, "schema": SCHEMA}, *(_checksums(folder) or _of_older(folder))][:3]
        write_whole(folder / CHECKSUMS, json.dumps(known, indent=1) + "\n")
        sync(part)
        if last.exists():
            _keep(last, folder / PREVIOUS)


def save_weights(file: Path, state: dict[str, Any]) -> None:
    """Writes what a test needs of a checkpoint, which is all but the optimiser's state. Raises
    RunError if it cannot; what was there is there."""
    import torch

    weights = {key: value for key, value in state.items() if key != OPTIMISER}
    with _whole(file, size_of(weights)) as part:
        torch.save(weights, part)


def _keep(last: Path, former: Path) -> None:
    """Gives the last checkpoint the name of the one before it too: at no moment is there no last
    one."""
    part = former.with_name(former.name + PART)
    try:
        os.link(last, part)
        os.replace(part, former)
        # A rename between two names of one file, as a kill may have left them, does nothing.
        part.unlink(missing_ok=True)
    except OSError:  # A file system without links.
        os.replace(last, former)


def _checksums(folder: Path) -> list[dict[str, Any]]:
    """Those beside the checkpoints of a folder; empty where there are none, as of older
    versions."""
    try:
        found = json.loads((folder / CHECKSUMS).read_text("utf-8"))
    except (OSError, ValueError):
        return []
    entries = found if isinstance(found, list) else []
    return [entry for entry in entries if isinstance(entry, dict) and isinstance(entry.get("schema", 0), int)]


def _of_older(folder: Path) -> list[dict[str, Any]]:
    """Those of the checkpoints that an older version left, which wrote none."""
    files = [folder / name for name in (CHECKPOINT, PREVIOUS)]
    return [{"sha256": digest(file)} for file in files if file.is_file() and not _wrong(file, "")]


def _newer(schema: int) -> str:
    return f"was written by a newer version of zs_lightning (schema {schema}); upgrade it"


def _wrong(file: Path, option: str) -> str:
    """What is wrong with a checkpoint, found without loading it; empty if nothing is. Raises
    UserError of one that a newer version wrote, which another one would replace."""
    damaged = f"is damaged or no checkpoint; expected the {CHECKPOINT} of a `fit`"
    if not zipfile.is_zipfile(file):
        return damaged
    known = _checksums(file.parent) if file.name in (CHECKPOINT, PREVIOUS) else []
    if known:
        found = digest(file)
        schemas = [entry.get("schema", 0) for entry in known if entry.get("sha256") == found]
        if not schemas:
            return f"is damaged: it is not what {CHECKSUMS} beside it says"
        if schemas[0] > SCHEMA:
            raise UserError(f"{option}: {file} {_newer(schemas[0])}")
        return ""
    try:
        with zipfile.ZipFile(file) as archive:
            return damaged if archive.testzip() else ""
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, RuntimeError, zlib.error, lzma.LZMAError):
        return damaged


def find_run(run: Path, option: str) -> tuple[Path, Path]:
    """Configuration and checkpoint of a run, of which `run` is the folder or the checkpoint. Raises
    UserError, with the option of the command line, if one of them is missing or is none."""
    checkpoint = find_checkpoint(run, option)
    file = checkpoint.parent / CONFIG
    if not file.is_file():
        said = "leave a checkpoint in the folder of its run"
        raise UserError(f"{option}: there is no {CONFIG} beside {checkpoint}; {said}")
    return file, checkpoint


def check_presence(run: Path, option: str) -> None:
    """Raises UserError, with the option of the command line, if a run folder holds no checkpoint,
    or `run` is none. The file is not read, which takes its time."""
    file = run / CHECKPOINT if run.is_dir() else run
    if not file.is_file() and not newest(run):
        said = "expected the run folder of a `fit`, or the checkpoint in it"
        # The quickstart's folder holds several runs.
        if inside := sorted(run.glob(f"*/{CHECKPOINT}")):
            said = f"did you mean {' or '.join(str(found.parent) for found in inside)}?"
        former = file.with_name(PREVIOUS)
        if file.name == CHECKPOINT and former.is_file():
            said = f"the one before it is there: {former}"
        raise UserError(f"{option}: there is no file {file}; {said}")


def find_checkpoint(run: Path, option: str) -> Path:
    """The newest good checkpoint of a run folder, or the one that `run` itself is. Warns of those
    that were passed over. Raises UserError, with the option of the command line, if none is
    good."""
    check_presence(run, option)
    passed_over: list[str] = []
    for file in (run / CHECKPOINT, run / PREVIOUS) if run.is_dir() else (run,):
        wrong = _wrong(file, option) if file.is_file() else "is not there"
        if not wrong:
            if passed_over:
                said = "%s: %s; the one before it is used: %s"
                _log.warning(said, option, "; ".join(passed_over), file)
            return file
        passed_over.append(f"{file} {wrong}")
    former = run.with_name(PREVIOUS)
    if run.name == CHECKPOINT and former.is_file():
        passed_over.append(f"beside it is {former}")
    raise UserError(f"{option}: {'; '.join(passed_over)}")


def identity(checkpoint: Path) -> str:
    """16 hex digits for the weights: the same for a copy, others after one more training step."""
    # Reading gigabytes takes minutes; a checkpoint is an archive with a checksum of each tensor.
    with zipfile.ZipFile(checkpoint) as archive:
        parts = [(part.filename, part.file_size, part.CRC) for part in archive.infolist()]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def load_checkpoint(file: Path, option: str) -> dict[str, Any]:
    """What a checkpoint holds, on the CPU; `state_dict` has the trainable weights. Raises
    UserError, with the option, if the file is damaged, or no checkpoint of a `fit`."""
    import torch
    from torch._weights_only_unpickler import UnpicklingError

    try:
        # Mapped, so that a reader of a part takes no memory for the optimiser's state.
        found: dict[str, Any] = torch.load(file, "cpu", weights_only=True, mmap=True)
        dict(found["state_dict"])
        schema = int(found.get("schema", 0))
    except (RuntimeError, LookupError, AttributeError, TypeError, EOFError, ValueError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{option}: {file} cannot be read: {said}") from error
    except UnpicklingError as error:
        # torch advises to load it all the same, which runs its code.
        said = f"it holds more than numbers; expected the {CHECKPOINT} of a `fit`"
        raise UserError(f"{option}: {file} cannot be read: {said}") from error
    if schema > SCHEMA:
        raise UserError(f"{option}: {file} {_newer(schema)}")
    return found


def check_tensors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raises UserError if a checkpoint's weights have other names or shapes than the model's."""
    wrong = sorted(found.keys() ^ expected.keys())
    wrong = wrong or [name for name in expected if found[name].shape != expected[name].shape]
    if wrong:
        raise UserError(
            "checkpoint: its weights do not fit model and lora of this config "
            f"({len(wrong)} differ, first {wrong[0]}); "
            "use the config that the checkpoint was trained with"
        )
