"""Texts of tokens, by a model's tokenizer alone: no weights and no network."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zs_lightning import miniature
from zs_lightning.runs.folder import BEST, MODEL, part_of, read_config

TOKENIZER = "tokenizer.json"


class Spelling:
    """What ids say."""

    def __init__(self, file: Path) -> None:
        from tokenizers import Tokenizer

        self.tokenizer: Any = Tokenizer.from_file(str(file))
        self.before: list[int] = self.tokenizer.encode("a", add_special_tokens=False).ids[-1:]

    def text(self, ids: Sequence[int]) -> str:
        """The text of ids, with every control token."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False))

    def token(self, token: int) -> str:
        """The text of one token, in the middle of others."""
        # Behind another one: at the beginning of a text some tokenizers drop a blank.
        return self.text([*self.before, token])[len(self.text(self.before)) :]

    def agrees(self, trajectory: Mapping[str, Any]) -> bool:
        """Whether the trajectory's sampled tokens have the texts that the run wrote for them."""
        ids, turns = trajectory["token_ids"], trajectory["turns"]
        return all(self.text(ids[slice(*turn["span"])]) == turn["text"] for turn in turns)


def read_spelling(folder: Path) -> Spelling | None:
    """That of the policy of a run folder; None if there is none on this machine that can be
    read."""
    path = part_of(read_config(folder), "model", "init_args", "model").get("path")
    found = [place / TOKENIZER for place in (folder / MODEL, folder / BEST)]
    found += _of_model(path) if isinstance(path, str) else []
    for file in found:
        if file.is_file():
            try:
                return Spelling(file)
            except Exception:  # noqa: BLE001 - of the library, which has no narrower one
                return None
    return None


def _of_model(path: str) -> list[Path]:
    """Where the tokenizer of a folder, of a model of the hub or of the miniature may lie."""
    if path == "miniature":
        return [Path(miniature.__file__).parent / "base" / TOKENIZER]
    place = Path(os.path.expanduser(path))
    if place.is_absolute() or place.is_dir():
        return [place / TOKENIZER]
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(path, TOKENIZER)
    except HFValidationError:
        return []
    return [Path(cached)] if isinstance(cached, str) else []
