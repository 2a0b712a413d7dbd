"""transformers' own `generate`, as the peers call it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList


class RowLimit(StoppingCriteria):
    """Ends each row at its own number of new tokens."""

    def __init__(self, start: int, new: list[int]) -> None:
        self.start, self.new = start, torch.tensor(new)

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        return (input_ids.shape[1] - self.start) >= self.new


def left_pad(contexts: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Ids and mask [n, T]."""
    width = max(map(len, contexts))
    ids, mask = torch.zeros(len(contexts), width, dtype=torch.long), torch.zeros(len(contexts), width, dtype=torch.long)
    for i, context in enumerate(contexts):
        ids[i, width - len(context) :], mask[i, width - len(context) :] = torch.tensor(context), 1
    return ids, mask


def generate(model: Any, ids: Tensor, mask: Tensor, new: list[int], **options: Any) -> Tensor:
    """Greedy, row i for new[i] tokens; returns ids with what was generated, padded on the right."""
    limit = StoppingCriteriaList([RowLimit(ids.shape[1], new)])
    return model.generate(
        input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=max(new), stopping_criteria=limit, **options
    )


def cut(output: Tensor, start: int, new: list[int]) -> list[list[int]]:
    """What each row generated."""
    return [output[i, start : start + n].tolist() for i, n in enumerate(new)]
