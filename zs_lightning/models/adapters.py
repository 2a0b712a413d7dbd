"""LoRA adapters on a model: those of a folder, new ones, and folders' that are trained on. peft is imported on use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from zs_lightning.errors import UserError
from zs_lightning.models.checks import check_there

if TYPE_CHECKING:
    from zs_lightning.models.loading import LoraSpec

STILL = ("gaussian", "orthogonal")
"""Initialisations of peft with a name that leave the base model as it is."""
TRAINED = "default"
"""peft's name of the adapter that is trained, or that a model was loaded with."""


def add_adapter(model: Any, folder: str, name: str, key: str = "model.model") -> Any:
    """The model with the frozen adapter of this folder on it, beside those that it has.

    Args:
        key: where the folder's model stands in the configuration, for messages.

    Raises:
        UserError: there is no adapter, or it was made for another base model.
    """
    from peft import PeftModel, get_peft_model_state_dict, load_peft_weights

    check_there(folder, f"{key}.adapter")
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    start = json.loads((Path(folder) / "adapter_config.json").read_text()).get("init_lora_weights", True)
    if base is not model and isinstance(start, str) and start not in STILL:
        raise UserError(
            f"{key}.adapter: {folder} was begun by {start}, which moves the base model that other adapters share; give it a "
            "model of its own, or train it with another initialisation"
        )
    try:
        if base is model:
            model = PeftModel.from_pretrained(model, folder, adapter_name=name)
        else:
            model.load_adapter(folder, adapter_name=name)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{key}.adapter: {folder} does not fit the model {base.name_or_path}: {reason}") from error
    # peft passes over layers that only one side has.
    put_on = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    differing = sorted(name for name in set(load_peft_weights(folder, "cpu")) ^ set(put_on) if "lora_" in name)
    if differing:
        raise UserError(
            f"{key}.adapter: {folder} does not fit the model {base.name_or_path}: only one of them has {differing[0]}"
        )
    return model


def add_lora(model: Any, lora: LoraSpec, seed: int) -> Any:
    """A PEFT model whose only trainable weights are an fp32 adapter: the one that the model was loaded with, or a fresh one.
    Switched off, it is the model unchanged.

    Args:
        lora: of a fresh one; of the other, which check_trained_weights compares with it, the dropout alone.
        seed: of a fresh one.
    """
    from peft import LoraConfig, get_peft_model

    if hasattr(model, "peft_config"):
        return _train_on(model, lora)
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
        torch.manual_seed(seed)  # noqa: TID251
        # fp32 whatever the base is: at RL learning rates a bf16 adapter hardly moves.
        return get_peft_model(model, config, autocast_adapter_dtype=True)


def _train_on(model: Any, lora: LoraSpec) -> Any:
    """The model with its own adapter trainable: a second one beside it would be another model."""
    config = model.peft_config[TRAINED]
    config.inference_mode, config.lora_dropout = False, lora.dropout
    for module in model.modules():
        if hasattr(module, "lora_dropout") and TRAINED in module.lora_dropout:
            module.lora_dropout[TRAINED] = torch.nn.Dropout(lora.dropout) if lora.dropout else torch.nn.Identity()
    model.set_adapter(TRAINED)
    return model
