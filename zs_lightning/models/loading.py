"""Loads causal language models and tokenizers as a config describes them. transformers and peft are imported on use."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from zs_lightning.errors import UserError
from zs_lightning.models import attention
from zs_lightning.models.adapters import TRAINED, add_adapter
from zs_lightning.models.checks import (
    AUTOCAST,
    check_adapter,
    check_kind,
    check_logits,
    check_memory,
    emulated,
    read,
    slow_format,
)
from zs_lightning.models.sizes import bare_model, weight_bytes
from zs_lightning.models.vocabulary import leave_out_padding

SHIPPED = Path(__file__).parents[1] / "miniature" / "base"
_log = logging.getLogger(__name__)
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class ModelSpec:
    """Which weights to load and how.

    Args:
        path: a folder, a hub name, or `miniature` for the tiny base model that ships with the package.
        dtype: of the weights that are not quantised.
        quantization: bitsandbytes format of the linear layers; nf4 and int8 work on CPU and CUDA.
        adapter: folder of a PEFT adapter to put on the model; where a new `lora` is trained, that adapter is trained on.
        device: cpu, cuda, cuda:1 …; auto takes the first CUDA card if there is one.
    """

    path: str = "miniature"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    quantization: Literal["none", "nf4", "int8"] = "none"
    adapter: str | None = None
    device: str = "auto"

    @property
    def merges(self) -> bool:
        """Whether its weights hold what an adapter adds to them: most of it would be lost in a coarser format."""
        return self.quantization == "none" and self.dtype == "float32"


@dataclass(frozen=True)
class LoraSpec:
    """A new low-rank adapter on all linear layers.

    Args:
        r: rank.
        alpha: scale; None is 2·r.
        dropout: on the adapter's input. Keep 0 for RL: the sampled and the trained distribution must agree.
        rslora: scale by alpha/√r instead of alpha/r, which suits high ranks.
        dora: train the length of each row of the weights apart from its direction. Slower, and never in one batch with a
            simulator on the same base.
        init: of the adapter. None of them moves the base model, which switched off is the reference of kl_coef.
    """

    r: int = 16
    alpha: int | None = None
    dropout: float = 0.0
    rslora: bool = False
    dora: bool = False
    init: Literal["default", "orthogonal"] = "default"

    def __post_init__(self) -> None:
        if self.r < 1 or not 0 <= self.dropout < 1:
            raise UserError(f"lora: expected r >= 1 and 0 <= dropout < 1; got r={self.r}, dropout={self.dropout}")


def resolve_path(path: str) -> str:
    """The folder or hub name to load from. Raises UserError with a plain sentence if nothing can be there."""
    if path == "miniature":
        return str(SHIPPED)
    if Path(path).is_dir():
        if not (Path(path) / "config.json").is_file():
            raise UserError(f"model path: the folder {path} has no config.json; point to the folder of a saved model")
        return path
    if path.startswith((".", "/", "~")) or not _HUB_NAME.fullmatch(path):
        raise UserError(f"model path: there is no folder {path}; expected a model folder, a hub name or `miniature`")
    return path


def load_tokenizer(path: str) -> Any:
    """The model's tokenizer.

    Raises:
        UserError: the folder has no tokenizer, or the tokenizer has no end token.
    """
    from transformers import AutoTokenizer

    folder = Path(resolve_path(path))
    if folder.is_dir() and not any((folder / f).is_file() for f in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise UserError(
            f"model path: the folder {path} has no tokenizer (tokenizer.json); save the tokenizer next to the model"
        )
    tokenizer = read(AutoTokenizer.from_pretrained, str(folder), path, "tokenizer")
    if tokenizer.eos_token_id is None:
        raise UserError(f"model path: the tokenizer of {path} has no end-of-text token; set eos_token in its config")
    return tokenizer


def choose_device(device: str, key: str = "device") -> torch.device:
    """Raises UserError, which names the key, if there is no such device here."""
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        return torch.device("cuda" if cards else "cpu")
    if not (found := re.fullmatch(r"cpu|cuda(?::(\d+))?", device)):
        raise UserError(f"{key}: expected cpu, cuda, cuda:1 … or auto; got {device}")
    if device != "cpu" and int(found[1] or 0) >= cards:
        there = f"{cards} CUDA cards, from cuda:0 on" if cards else "no CUDA card that torch can use"
        raise UserError(f"{key}: there is no {device} here, which has {there}; set another device, or auto")
    return torch.device(device)


def check_model(spec: ModelSpec, key: str = "model.model") -> None:
    """Raises UserError for what can be known to be wrong without the weights, whose loading may take minutes. Arguments as
    for load_model."""
    choose_device(spec.device, f"{key}.device")
    config = read_config(spec.path)
    check_kind(config, spec.path)
    if spec.adapter:
        check_adapter(config, spec.path, spec.adapter, f"{key}.adapter")


def check_models(specs: Mapping[str, ModelSpec]) -> None:
    """check_model for each of several models, by their keys; raises ValueError also if a card is too small for them."""
    needed: dict[torch.device, dict[str, int]] = {}
    for key, spec in specs.items():
        check_model(spec, key)
        device = choose_device(spec.device)
        if device.type == "cuda":
            model = bare_model(read_config(spec.path), spec.dtype)
            needed.setdefault(device, {})[key] = weight_bytes(model, spec.quantization)
    for device, sizes in needed.items():
        check_memory(sum(sizes.values()), torch.cuda.mem_get_info(device)[0], str(device), list(sizes))


def say_slow(specs: Mapping[str, ModelSpec], precision: str) -> None:
    """Warns of models, by their keys, that are slow in their formats where they are to run, in a trainer's precision."""
    for key, spec in specs.items():
        device = choose_device(spec.device, f"{key}.device")
        if slow := slow_format(key, spec, device.type, AUTOCAST[precision] is not None, emulated(device)):
            _log.warning("%s", slow)


def read_config(path: str) -> Any:
    from transformers import AutoConfig

    return read(AutoConfig.from_pretrained, resolve_path(path), path, "model")


def load_model(spec: ModelSpec, key: str = "model.model", merge: bool = True, tokenizer: Any = None) -> Any:
    """The model in eval mode on its device.

    Args:
        key: where the spec stands in the configuration, for messages.
        merge: put its adapter into the weights, which is faster, if they hold it.
        tokenizer: ids that it does not know have no logits.

    Raises:
        UserError: nothing to load there, a model of a kind that cannot be used, an adapter that does not fit, or a missing
            package.
    """
    _quiet()
    from transformers import AutoModelForCausalLM

    check_model(spec, key)
    device = choose_device(spec.device)
    options: dict[str, Any] = {"dtype": getattr(torch, spec.dtype)}
    if device.type == "cpu":
        options["attn_implementation"] = attention.register()
    if spec.quantization != "none":
        options |= {"quantization_config": _quantization(spec), "device_map": {"": device}}
    model = read(AutoModelForCausalLM.from_pretrained, resolve_path(spec.path), spec.path, "model", **options)
    if spec.quantization == "none":
        model = model.to(device)
    else:
        _keep_weights_trainable(model)
    check_logits(model.eval(), spec.path)
    _switch_off_dropout(model)
    if tokenizer is not None:
        leave_out_padding(model, tokenizer)
    if spec.adapter:
        model = add_adapter(model, spec.adapter, TRAINED, key)
        if merge and spec.merges:
            model = model.merge_and_unload()
    return model.eval()


def _quantization(spec: ModelSpec) -> Any:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            f"quantization {spec.quantization} needs the package bitsandbytes; install it or set quantization: none"
        )
    from transformers import BitsAndBytesConfig

    if spec.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = getattr(torch, spec.dtype)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)


def _switch_off_dropout(model: torch.nn.Module) -> None:
    """What is trained is the distribution that is sampled from, whatever mode a layer is in. lora.dropout comes later."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def _keep_weights_trainable(model: torch.nn.Module) -> None:
    """On CPUs with AVX512-BF16, bitsandbytes repacks a 4-bit layer on its first forward without gradient; the packed
    layer has no right backward. Rollout, then update, is exactly that order, so the packing is switched off."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def recompute_activations(model: Any) -> None:
    """Keeps only the layers' inputs in a forward pass for training, and computes the rest again in the backward pass."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # The method is getting another name.
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    # transformers looks at the mode of the layers, and models are loaded in eval mode.
    model.train()


def _quiet() -> None:
    """Keeps the libraries' notices (kernels for CPU, casts on every call) out of the user's terminal."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in ("bitsandbytes", "transformers.modeling_utils", "transformers.distributed.tensor_parallel"):
        logging.getLogger(name).setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
