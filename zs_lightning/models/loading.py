"""Loads causal language models and tokenizers as a ModelSpec says. Imports transformers on use."""

import logging
import os
import warnings
from pathlib import Path
from typing import Any

import torch

from zs_lightning.errors import UserError
from zs_lightning.models import attention
from zs_lightning.models.checks import check_logits, check_model
from zs_lightning.models.lora import TRAINED, add_adapter
from zs_lightning.models.specs import ModelSpec, choose_device, naming, read, resolve_path
from zs_lightning.models.sums import check_sums
from zs_lightning.models.vocabulary import leave_out_padding


def load_tokenizer(path: str, key: str = "model.model") -> Any:
    """The model's tokenizer. Raises UserError, which begins with the key, if there is none, or it
    has no end token."""
    from transformers import AutoTokenizer

    with naming(key):
        folder = Path(resolve_path(path))
        files = ("tokenizer.json", "tokenizer.model", "vocab.json")
        # transformers would make an empty tokenizer of the model's kind.
        if folder.is_dir() and not any((folder / name).is_file() for name in files):
            change = "save the tokenizer next to the model"
            raise UserError(f"path: the folder {path} has no tokenizer (tokenizer.json); {change}")
        tokenizer = read(AutoTokenizer.from_pretrained, path, "tokenizer")
        if tokenizer.eos_token_id is None:
            change = "set eos_token in its config"
            raise UserError(f"path: the tokenizer of {path} has no end-of-text token; {change}")
    return tokenizer


def load_model(spec: ModelSpec, key: str = "model.model", merge: bool = True, tokenizer: Any = None) -> Any:
    """The model in eval mode on its device. Raises UserError for nothing to load there, a model of
    a kind that cannot be used, or an adapter that does not fit.

    Args:
        key: where the spec stands in the configuration, for messages.
        merge: put its adapter into the weights, which is faster, if they can hold it.
        tokenizer: ids that it does not know get no logits.
    """
    from transformers import AutoModelForCausalLM

    _quiet()
    check_model(spec, key)
    device = choose_device(spec.device)
    # A model that has no sdpa is refused by transformers: eager attention would misread our masks.
    kind = attention.register() if device.type == "cpu" else "sdpa"
    options: dict[str, Any] = {"dtype": getattr(torch, spec.dtype), "attn_implementation": kind}
    if spec.quantization != "none":
        options |= {"quantization_config": _quantization(spec), "device_map": {"": device}}
    with naming(key):
        options |= {"config": spec.config}
        check_sums(resolve_path(spec.path), "path")
        model = read(AutoModelForCausalLM.from_pretrained, spec.path, "model", **options)
        if spec.quantization == "none":
            model = model.to(device)
        _prepare(model)
        check_logits(model.eval(), spec.path)
    if tokenizer is not None:
        leave_out_padding(model, tokenizer)
    if spec.adapter:
        model = add_adapter(model, spec.adapter, TRAINED, key)
        if merge and spec.merges:
            model = model.merge_and_unload()
    return model.eval()


def _quantization(spec: ModelSpec) -> Any:
    from transformers import BitsAndBytesConfig

    if spec.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=getattr(torch, spec.dtype),
    )


def _prepare(model: torch.nn.Module) -> None:
    """Switches off all dropout, and a packing of 4-bit layers that has no right backward pass."""
    for module in model.modules():
        # bitsandbytes packs a layer, on CPUs with AVX512-BF16, on its first forward pass without
        # gradient. A rollout, then an update, is exactly that order.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
        # What is trained must be the distribution that is sampled from, whatever mode a layer is
        # in. lora.dropout comes later.
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        # Others hand a number to a function, such as attention_dropout.
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def recompute_activations(model: Any) -> None:
    """Keeps only the layers' inputs for the backward pass, which computes the rest again."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # The method is getting another name.
        model.gradient_checkpointing_enable({"use_reentrant": False})
    # transformers looks at the mode of the layers, and models are loaded in eval mode.
    model.train()


def _quiet() -> None:
    """Keeps notices of libraries (kernels for CPU, casts on every call) off the user's terminal."""
    from transformers.utils import logging as transformers_logging

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in ("bitsandbytes", "transformers.modeling_utils", "transformers.distributed.tensor_parallel"):
        logging.getLogger(name).setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")
