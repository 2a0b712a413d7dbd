"""Loads causal language models and tokenizers as a config describes them. transformers and peft are imported on use."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from zs_lightning.models import attention

SHIPPED = Path(__file__).parents[1] / "miniature" / "base"
STILL = ("gaussian", "orthogonal")
"""Initialisations of peft with a name that leave the base model as it is."""
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class ModelSpec:
    """Which weights to load and how.

    Args:
        path: a folder, a hub name, or `miniature` for the tiny base model that ships with the package.
        dtype: of the weights that are not quantised.
        quantization: bitsandbytes format of the linear layers; nf4 and int8 work on CPU and CUDA.
        adapter: folder of a PEFT adapter to put on the model; merged into it unless it is quantised.
        device: cpu, cuda, cuda:1 …; auto takes the first CUDA card if there is one.
    """

    path: str = "miniature"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    quantization: Literal["none", "nf4", "int8"] = "none"
    adapter: str | None = None
    device: str = "auto"


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


def resolve_path(path: str) -> str:
    """The folder or hub name to load from. Raises ValueError with a plain sentence if nothing can be there."""
    if path == "miniature":
        return str(SHIPPED)
    if Path(path).is_dir():
        if not (Path(path) / "config.json").is_file():
            raise ValueError(f"model path: the folder {path} has no config.json; point to the folder of a saved model")
        return path
    if path.startswith((".", "/", "~")) or not _HUB_NAME.fullmatch(path):
        raise ValueError(f"model path: there is no folder {path}; expected a model folder, a hub name or `miniature`")
    return path


def load_tokenizer(path: str) -> Any:
    """The model's tokenizer.

    Raises:
        ValueError: the folder has no tokenizer, or the tokenizer has no end token.
    """
    from transformers import AutoTokenizer

    resolved = resolve_path(path)
    folder = Path(resolved)
    if folder.is_dir() and not any((folder / f).is_file() for f in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise ValueError(
            f"model path: the folder {path} has no tokenizer (tokenizer.json); save the tokenizer next to the model"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(resolved)
    except OSError as error:
        raise ValueError(f"model path: no tokenizer could be loaded from {path}: {str(error).splitlines()[0]}") from error
    if tokenizer.eos_token_id is None:
        raise ValueError(f"model path: the tokenizer of {path} has no end-of-text token; set eos_token in its config")
    return tokenizer


def choose_device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)


def load_model(spec: ModelSpec) -> Any:
    """The model in eval mode on its device.

    Raises:
        ValueError: nothing to load there, an adapter that does not fit, or a missing package.
    """
    _quiet()
    from transformers import AutoModelForCausalLM

    resolved, device = resolve_path(spec.path), choose_device(spec.device)
    options: dict[str, Any] = {"dtype": getattr(torch, spec.dtype)}
    if device.type == "cpu":
        options["attn_implementation"] = attention.register()
    if spec.quantization != "none":
        options |= {"quantization_config": _quantization(spec), "device_map": {"": device}}
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(resolved, **options)
    except OSError as error:
        raise ValueError(f"model path: no model could be loaded from {spec.path}: {str(error).splitlines()[0]}") from error
    if spec.quantization == "none":
        model = model.to(device)
    else:
        _keep_weights_trainable(model)
    if spec.adapter:
        model = _put_on_adapter(model, spec)
    return model.eval()


def _quantization(spec: ModelSpec) -> Any:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(
            f"quantization {spec.quantization} needs the package bitsandbytes; install it or set quantization: none"
        )
    from transformers import BitsAndBytesConfig

    if spec.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = getattr(torch, spec.dtype)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)


def _keep_weights_trainable(model: torch.nn.Module) -> None:
    """On CPUs with AVX512-BF16, bitsandbytes repacks a 4-bit layer on its first forward without gradient; the packed
    layer has no right backward. Rollout, then update, is exactly that order, so the packing is switched off."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def _put_on_adapter(model: Any, spec: ModelSpec) -> Any:
    model = add_adapter(model, str(spec.adapter), "default")
    # Merging into a quantised base would re-quantise it and lose the adapter.
    return model.merge_and_unload() if spec.quantization == "none" else model


def add_adapter(model: Any, folder: str, name: str) -> Any:
    """The model with the frozen adapter of this folder on it, beside those that it has.

    Raises:
        ValueError: there is no adapter, or it was made for another base model.
    """
    from peft import PeftModel, get_peft_model_state_dict, load_peft_weights

    if not (Path(folder) / "adapter_config.json").is_file():
        raise ValueError(f"adapter: there is no adapter in {folder} (adapter_config.json is missing)")
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    start = json.loads((Path(folder) / "adapter_config.json").read_text()).get("init_lora_weights", True)
    if base is not model and isinstance(start, str) and start not in STILL:
        raise ValueError(
            f"adapter: {folder} was begun by {start}, which moves the base model that other adapters share; give it a model of "
            "its own, or train it with another initialisation"
        )
    try:
        if base is model:
            model = PeftModel.from_pretrained(model, folder, adapter_name=name)
        else:
            model.load_adapter(folder, adapter_name=name)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"adapter: {folder} does not fit the model {base.name_or_path}: {reason}") from error
    # peft passes over layers that only one side has.
    put_on = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    differing = sorted(name for name in set(load_peft_weights(folder, "cpu")) ^ set(put_on) if "lora_" in name)
    if differing:
        raise ValueError(f"adapter: {folder} does not fit the model {base.name_or_path}: only one of them has {differing[0]}")
    return model


def add_lora(model: Any, lora: LoraSpec, seed: int) -> Any:
    """A PEFT model whose only trainable weights are a fresh fp32 adapter; switched off, it is the model unchanged.

    Raises:
        ValueError: the model already has an adapter that is not merged.
    """
    _quiet()
    from peft import LoraConfig, get_peft_model

    if hasattr(model, "peft_config"):
        raise ValueError(
            "lora: the model's adapter could not be merged into quantised weights, so it cannot get a second one; "
            "set quantization: none, or train from the base model without adapter"
        )
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha or 2 * lora.r,
        lora_dropout=lora.dropout,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        init_lora_weights=lora.init if lora.init != "default" else True,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        # fp32 whatever the base is: at RL learning rates a bf16 adapter hardly moves.
        return get_peft_model(model, config, autocast_adapter_dtype=True)


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
