"""What a configuration says of a model and of a new adapter, and what is to be found there."""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from zs_lightning.errors import UserError

SHIPPED = Path(__file__).parents[1] / "miniature" / "base"
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class ModelSpec:
    """Which weights to load and how.

    Args:
        path: a folder, a hub name, or `miniature` for the tiny base model of the package.
        dtype: type of the weights that are not quantised.
        quantization: bitsandbytes format of the linear layers; nf4 and int8 work on CPU and CUDA.
        adapter: folder of a PEFT adapter to put on the model; where a new `lora` is trained, that
            adapter is trained on.
        device: cpu, cuda, cuda:1 …; auto takes the first CUDA card if there is one.
    """

    path: str = "miniature"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    quantization: Literal["none", "nf4", "int8"] = "none"
    adapter: str | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", os.path.expanduser(self.path))
        if self.adapter:
            object.__setattr__(self, "adapter", os.path.expanduser(self.adapter))

    @cached_property
    def config(self) -> Any:
        """The model's config.json as transformers reads it, once for all who ask. Raises UserError
        if there is none, or transformers does not know such a model."""
        from transformers import AutoConfig

        return read(AutoConfig.from_pretrained, self.path, "model")

    @property
    def merges(self) -> bool:
        """Whether the weights can hold what an adapter adds: a coarser format would lose it."""
        return self.quantization == "none" and self.dtype == "float32"


@dataclass(frozen=True)
class LoraSpec:
    """A new low-rank adapter on all linear layers.

    Args:
        r: rank.
        alpha: scale; None is 2·r.
        dropout: dropout on the adapter's input. Keep 0 for RL: the sampled and the trained
            distribution must agree.
        rslora: scale by alpha/√r instead of alpha/r, which suits high ranks.
        dora: train the length of each row of the weights apart from its direction. Slower, and
            never in one batch with a simulator on the same base.
        init: how the adapter begins. Neither way moves the base model, which switched off is the
            reference of kl_coef.
    """

    r: int = 16
    alpha: int | None = None
    dropout: float = 0.0
    rslora: bool = False
    dora: bool = False
    init: Literal["default", "orthogonal"] = "default"

    def __post_init__(self) -> None:
        if self.r < 1 or not 0 <= self.dropout < 1:
            given = f"r={self.r}, dropout={self.dropout}"
            raise UserError(f"lora: expected r >= 1 and 0 <= dropout < 1; got {given}")


@contextmanager
def naming(key: str) -> Iterator[None]:
    """Puts the key of a ModelSpec before messages, which begin with one of its fields. So whoever
    checks a field need not know whose model it is."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{key}.{error}") from error


def resolve_path(path: str, field: str = "path") -> str:
    """The folder or hub name to load from. Raises UserError, with the field, if none can be
    there."""
    if path == "miniature":
        return str(SHIPPED)
    path = os.path.expanduser(path)
    # Not by Path, which fails for a name that is too long.
    if os.path.isdir(path):
        if not (Path(path) / "config.json").is_file():
            change = "point to the folder of a saved model"
            raise UserError(f"{field}: the folder {path} has no config.json; {change}")
        return path
    if path.startswith((".", "/", "~")) or not _HUB_NAME.fullmatch(path):
        expected = "expected a model folder, a hub name or `miniature`"
        raise UserError(f"{field}: there is no folder {path}; {expected}")
    return path


def weights_key(path: str) -> str:
    """What a model's results depend on: its name or, of a folder, its files, sizes and times."""
    folder = SHIPPED if path == "miniature" else Path(os.path.expanduser(path))
    if not os.path.isdir(folder):
        return path
    files = [file for file in sorted(folder.iterdir()) if file.is_file()]
    stamps = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return f"{folder.resolve()} {stamps}"


def choose_device(device: str, field: str = "device") -> torch.device:
    """The device that is meant. Raises UserError, with the field, if there is no such one here."""
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        return torch.device("cuda" if cards else "cpu")
    if not (found := re.fullmatch(r"cpu|cuda(?::(\d+))?", device)):
        raise UserError(f"{field}: expected cpu, cuda, cuda:1 … or auto; got {device}")
    if device != "cpu" and int(found[1] or 0) >= cards:
        there = f"{cards} CUDA cards, from cuda:0 on" if cards else "no CUDA card that torch can use"
        change = "set another device, or auto"
        raise UserError(f"{field}: there is no {device} here, which has {there}; {change}")
    return torch.device(device)


def without_code(load: Callable[..., Any], place: Any, field: str = "path", **options: Any) -> Any:
    """What a function of transformers makes of a folder, a hub name or a configuration. Raises
    UserError, with the field, for a model that cannot be used without its own program code."""
    # Left to itself, transformers asks in the terminal, and takes a piped `y` for a yes.
    try:
        return load(place, trust_remote_code=False, **options)
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        whose = f"{getattr(place, 'name_or_path', place)} brings program code of its own (auto_map)"
        change = "take a model of a kind that transformers knows"
        raise UserError(f"{field}: {whose}, which is never run here; {change}") from error


def read(load: Callable[..., Any], path: str, what: str, field: str = "path", **options: Any) -> Any:
    """What a function of transformers makes of a model's path, without its code. Raises UserError,
    with the field, if it cannot."""
    place = resolve_path(path, field)
    try:
        return without_code(load, place, field, **options)
    except UserError:
        raise
    except (OSError, ValueError) as error:
        said = " ".join(str(error).split())
        if "gated repo" in said:
            change = "accept its terms on its page of the hub and log in with `hf auth login`"
            raise UserError(f"{field}: {path} is gated; {change}, or take another") from error
        # The first sentence says what is wrong; what follows is advice for programmers.
        reason = said.split(". ")[0][:300].rstrip(".")
        raise UserError(f"{field}: no {what} could be loaded from {path}: {reason}") from error
