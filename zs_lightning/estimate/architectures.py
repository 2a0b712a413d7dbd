"""A model's sizes from its config.json alone: of a folder, of the hub's cache, or of the table that ships."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from zs_lightning.models.loading import resolve_path

SHIPPED = Path(__file__).with_name("architectures.json")
_VARIANT = re.compile(r"-(base|instruct|instruct-\d+)$")


def architecture(path: str) -> Any:
    """The transformers configuration of a model. Weights are not looked at.

    Args:
        path: as in ModelSpec.

    Raises:
        ValueError: there is no configuration at hand.
    """
    from transformers import AutoConfig

    resolved = resolve_path(path)
    known = json.loads(SHIPPED.read_text())
    name = _VARIANT.sub("", resolved.rpartition("/")[2].lower())
    try:
        return AutoConfig.from_pretrained(resolved, local_files_only=name in known)
    except OSError as error:
        if name in known:
            return AutoConfig.for_model(**known[name])
        raise ValueError(
            f"model path: no config.json of {path} is at hand; go online, give a folder with its config.json, or one of "
            f"{', '.join(known)}"
        ) from error
