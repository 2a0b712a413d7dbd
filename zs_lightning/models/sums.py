"""Checksums of the weights that a run wrote: a bit that flips on a disk makes another model, which
loads in silence."""

import hashlib
import json
from pathlib import Path

from zs_lightning.errors import UserError

SUMS = "sha256.json"


def digest(file: Path) -> str:
    """The SHA-256 of a file in hex digits."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def write_sums(folder: Path) -> None:
    """Writes the checksums of the weights in a folder beside them, if there are any."""
    sums = {file.name: digest(file) for file in sorted(folder.glob("*.safetensors"))}
    if sums:
        (folder / SUMS).write_text(json.dumps(sums, indent=1) + "\n")


def check_sums(folder: str, field: str) -> None:
    """Raises UserError, with the field, if weights are not what was written. What has no checksums,
    such as a downloaded model, passes."""
    path = Path(folder) / SUMS
    if not path.is_file():
        return
    try:
        sums = json.loads(path.read_text("utf-8")).items()
        # Of a name that is a path, with_name raises ValueError.
        damaged = [name for name, expected in sums if digest(path.with_name(name)) != expected]
    except (AttributeError, OSError, ValueError) as error:
        raise UserError(f"{field}: {path} does not go with the weights beside it: {error}") from error
    if damaged:
        raise UserError(f"{field}: {path.with_name(damaged[0])} is damaged: it is not what {SUMS} beside it says")
