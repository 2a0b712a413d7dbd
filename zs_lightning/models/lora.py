"""Puts LoRA adapters on a model: one that lies in a folder, or a new one. Imports peft on use.

How rows with different adapters share a batch is the business of generation/mixed_adapters.py.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from zs_lightning.errors import UserError
from zs_lightning.models.checks import adapter_options
from zs_lightning.models.specs import LoraSpec, naming

STILL = ("gaussian", "orthogonal")
"""Initialisations of peft with a name that leave the base model as it is."""
TRAINED = "default"
"""peft's name of the adapter that is trained, or that a model was loaded with."""


def add_adapter(model: Any, folder: str, name: str, key: str = "model.model") -> Any:
    """The model with the frozen adapter of this folder on it, beside those that it has. Raises
    UserError, which begins with the key, if there is none, or it was made for another base
    model."""
    from peft import PeftModel, get_peft_model_state_dict, load_peft_weights

    base = model.get_base_model() if hasattr(model, "peft_config") else model
    with naming(key):
        start = adapter_options(folder).get("init_lora_weights", True)
        if base is not model and isinstance(start, str) and start not in STILL:
            moves = "which moves the base model that other adapters share"
            change = "give it a model of its own, or train it with another initialisation"
            raise UserError(f"adapter: {folder} was begun by {start}, {moves}; {change}")
        if base is model:
            model = PeftModel.from_pretrained(model, folder, adapter_name=name)
        else:
            model.load_adapter(folder, adapter_name=name)
        # check_adapter has compared shapes; but peft passes over layers that only one side has.
        there = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
        differing = sorted(set(load_peft_weights(folder, "cpu")) ^ set(there))
        if differing := [weight for weight in differing if "lora_" in weight]:
            wrong = f"adapter: {folder} does not fit the model {base.name_or_path}"
            raise UserError(f"{wrong}: only one of them has {differing[0]}")
    return model


def add_lora(model: Any, lora: LoraSpec, seed: int) -> Any:
    """A PEFT model whose only trainable weights are an adapter in float32.

    It is the adapter that the model was loaded with, which keeps its options but for the dropout,
    or else a new one with weights drawn by the seed. Switched off, a new one leaves the model as it
    was.
    """
    from peft import LoraConfig, get_peft_model

    if hasattr(model, "peft_config"):
        return _leave_casts(_train_on(model, lora))
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
        # float32 whatever the base is: at RL learning rates an adapter in bfloat16 hardly moves.
        return _leave_casts(get_peft_model(model, config, autocast_adapter_dtype=True))


def _leave_casts(model: Any) -> Any:
    """The model, whose adapters leave it to autocast, where there is one, to cast their input."""
    # peft casts it to the adapter's float32, and autocast back again: equal numbers, but a tenth
    # more time and memory of a card. DoRA has norms of rows, which are to be taken in float32.
    from peft.tuners.lora import LoraLayer

    for layer in model.modules():
        if isinstance(layer, LoraLayer) and not layer.lora_variant:
            layer._cast_input_dtype = partial(_cast, layer._cast_input_dtype)  # type: ignore[method-assign]
    return model


def _cast(cast: Callable[[Any, torch.dtype], Any], states: Any, dtype: torch.dtype) -> Any:
    """peft's cast of a layer's input, but under autocast."""
    return states if torch.is_autocast_enabled(states.device.type) else cast(states, dtype)


def _train_on(model: Any, lora: LoraSpec) -> Any:
    """The model with its own adapter trainable: a second one beside it would be another model."""
    config = model.peft_config[TRAINED]
    config.inference_mode = False
    config.lora_dropout = lora.dropout
    for module in model.modules():
        if hasattr(module, "lora_dropout") and TRAINED in module.lora_dropout:
            dropout = torch.nn.Dropout(lora.dropout) if lora.dropout else torch.nn.Identity()
            module.lora_dropout[TRAINED] = dropout
    model.set_adapter(TRAINED)
    return model
