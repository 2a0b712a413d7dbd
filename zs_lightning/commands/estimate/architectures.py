"""A model's config.json: of a folder, of the hub's cache, of the table that ships, or of the
hub."""

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

from zs_lightning.errors import UserError
from zs_lightning.models.specs import resolve_path, without_code

SHIPPED = Path(__file__).with_name("architectures.json")
_VARIANT = re.compile(r"-(base|instruct|instruct-\d+|chat|chat-v[\d.]+)$")


@cache
def architecture(path: str) -> Any:
    """The transformers configuration of a model, its path as in ModelSpec. Weights are not looked
    at. Raises UserError if there is none at hand."""
    from transformers import AutoConfig

    resolved = resolve_path(path)
    known = json.loads(SHIPPED.read_text())
    name = _VARIANT.sub("", resolved.rpartition("/")[2].lower())
    # What is at hand comes first: nothing is asked of a hub that need not be.
    try:
        return without_code(AutoConfig.from_pretrained, resolved, "model path", local_files_only=True)
    except OSError:
        if name in known:
            return AutoConfig.for_model(**known[name])
    try:
        return without_code(AutoConfig.from_pretrained, resolved, "model path")
    except OSError as error:
        raise UserError(
            f"model path: no config.json of {path} is at hand, and the hub has none or cannot be "
            f"reached; go online, give a folder with its config.json, or one of {', '.join(known)}"
        ) from error
