"""Shapes and bytes of a model's weights, before it is loaded."""

from typing import Any

import torch

from zs_lightning.models.specs import without_code

BLOCK = 64
"""Weights that share a scale in the nf4 format of bitsandbytes."""
SCALE = torch.float32.itemsize


def bare_model(config: Any, dtype: str) -> Any:
    """The model with shapes only."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return without_code(AutoModelForCausalLM.from_config, config, dtype=getattr(torch, dtype))


def weight_bytes(model: Any, quantization: str) -> int:
    """Bytes of a base model's weights."""
    # bitsandbytes leaves the vocabulary head as it is.
    head = model.get_output_embeddings()
    total = 0
    seen: set[int] = set()
    for module in model.modules():
        linear = isinstance(module, torch.nn.Linear) and module is not head
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:  # Tied weights count once.
                continue
            seen.add(id(parameter))
            count = parameter.numel()
            if quantization == "none" or not linear or name != "weight":
                total += parameter.nbytes
            elif quantization == "int8":
                total += count + len(parameter) * SCALE
            else:
                total += -(-count // 2) + -(-count // BLOCK) * SCALE + 16 * SCALE
    return total
