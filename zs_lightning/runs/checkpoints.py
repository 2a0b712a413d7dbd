"""Checkpoints of a run: how they are found, known and read."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zs_lightning.errors import UserError
from zs_lightning.runs.folder import CHECKPOINT, CONFIG

if TYPE_CHECKING:  # Torch takes seconds to import, which the check of a command line does without.
    from torch import Tensor


def find_run(run: Path, option: str) -> tuple[Path, Path]:
    """Configuration and checkpoint of a run, of which `run` is the folder or the checkpoint. Raises
    UserError, with the option of the command line, if one of them is missing or is none."""
    checkpoint = find_checkpoint(run, option)
    file = checkpoint.parent / CONFIG
    if not file.is_file():
        said = "leave a checkpoint in the folder of its run"
        raise UserError(f"{option}: there is no {CONFIG} beside {checkpoint}; {said}")
    return file, checkpoint


def find_checkpoint(run: Path, option: str) -> Path:
    """The checkpoint that lies in a run folder, or that `run` itself is. Raises UserError, with the
    option of the command line, if there is none."""
    file = run / CHECKPOINT if run.is_dir() else run
    if not file.is_file():
        said = "expected the run folder of a `fit`, or the checkpoint in it"
        # The quickstart's folder holds several runs.
        if inside := sorted(run.glob(f"*/{CHECKPOINT}")):
            said = f"did you mean {' or '.join(str(found.parent) for found in inside)}?"
        raise UserError(f"{option}: there is no file {file}; {said}")
    # torch reads other files as well, but only in an archive are the checksums for `identity`.
    if not zipfile.is_zipfile(file):
        said = f"expected the {CHECKPOINT} of a `fit`"
        raise UserError(f"{option}: {file} is damaged or no checkpoint; {said}")
    return file


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

    try:
        # Mapped, so that a reader of a part takes no memory for the optimiser's state.
        found: dict[str, Any] = torch.load(file, "cpu", weights_only=True, mmap=True)
        found["state_dict"]
    except (RuntimeError, KeyError, TypeError, EOFError, ValueError) as error:
        said = str(error).splitlines()[0]
        raise UserError(f"{option}: {file} cannot be read: {said}") from error
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
