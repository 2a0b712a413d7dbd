"""Shapes and bytes of a model's weights, before it is loaded."""

from typing import Any

import torch
from torch import Tensor

BLOCK = 64
"""Weights that share a scale in the nf4 format of bitsandbytes."""


def bare_model(config: Any, dtype: str) -> Any:
    """The model with shapes only."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))


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
            if quantization != "none" and linear and name == "weight":
                total += _quantised(parameter, quantization)
            else:
                total += parameter.nbytes
    return total


def _quantised(weight: Tensor, quantization: str) -> int:
    count = weight.numel()
    scale = torch.float32.itemsize
    if quantization == "int8":
        return count + weight.shape[0] * scale
    return -(-count // 2) + -(-count // BLOCK) * scale + 16 * scale
