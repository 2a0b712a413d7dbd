"""Numbers between the host and a card, without making the host wait for the card."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from zs_lightning.errors import RunError


def upload(values: list[Any], device: torch.device) -> Tensor:
    """A tensor of (lists of) numbers on the device.

    It is copied to a card from pinned memory: a copy from other memory would wait until the card has done all before it.
    """
    return torch.tensor(values, pin_memory=device.type == "cuda").to(device, non_blocking=True)


class Drawn:
    """What `sample` drew, tokens [n] int64 and log-probabilities [n], on its way to the host in one transfer."""

    def __init__(self, tokens: Tensor, logprobs: Tensor) -> None:
        self.tokens = tokens
        # Exact in float64; a copy from a card to the host that does not block is one into pinned memory.
        self.values = torch.stack((tokens.double(), logprobs.double())).to("cpu", non_blocking=True)
        self.arrival = torch.cuda.current_stream(tokens.device).record_event() if tokens.is_cuda else None

    def read(self) -> tuple[list[int], list[float]]:
        """Tokens and log-probabilities, waiting for them if need be.

        Raises:
            RunError: a row's logits were not finite; so is then its log-probability.
        """
        if self.arrival is not None:
            self.arrival.synchronize()
        tokens, logprobs = self.values.tolist()
        if not all(map(math.isfinite, logprobs)):
            raise RunError("the model produced NaN or infinite logits; lower the learning rate or use precision 32-true")
        return list(map(int, tokens)), logprobs
