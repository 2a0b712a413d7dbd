"""Checkpoints: the one that a run left behind, and which one a file is, whatever it is called and wherever it lies."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

from zs_lightning.errors import UserError


def find_checkpoint(run: Path, option: str) -> Path:
    """The checkpoint that lies in a run folder, or that `run` itself is.

    Args:
        option: of the command line, for messages.

    Raises:
        UserError: there is none.
    """
    file = run / "last.ckpt" if run.is_dir() else run
    if not file.is_file():
        inside = " or ".join(str(found.parent) for found in sorted(run.glob("*/last.ckpt")))
        said = f"did you mean {inside}?" if inside else "expected the run folder of a `fit`, or the checkpoint in it"
        raise UserError(f"{option}: there is no file {file}; {said}")
    if not zipfile.is_zipfile(file):
        raise UserError(f"{option}: {file} is damaged or no checkpoint; expected the last.ckpt of a `fit`")
    return file


def config_beside(checkpoint: Path, option: str) -> Path:
    """The configuration of the run that left the checkpoint. Raises UserError, with the option, if it is not there."""
    file = checkpoint.parent / "config.yaml"
    if not file.is_file():
        raise UserError(f"{option}: there is no config.yaml beside {checkpoint}; leave a checkpoint in the folder of its run")
    return file


def identity(checkpoint: Path) -> str:
    """The same for a copy and another after one more training step, and there at once: a checkpoint of torch is a zip
    archive, which holds a checksum of each of its tensors."""
    with zipfile.ZipFile(checkpoint) as archive:
        parts = [(part.filename, part.file_size, part.CRC) for part in archive.infolist()]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
