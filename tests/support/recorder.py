"""CUDA graphs without a card: records the tensor operations of a step and replays them on the memory they had."""

from typing import ClassVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero", "aten::masked_select"}
"""What would wait for a card: it cannot be recorded."""


def tensors(values):
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


class Operations(TorchDispatchMode):
    """Notes every operation with its arguments and what it gave; refuses those that wait."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.name().split(".")[0] in WAITING:
            raise RuntimeError(f"operation not permitted when stream is capturing: {function.name()}")
        result = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, result))
        return result


class Recorder:
    """In the place of CudaRecorder. Like kernels, what it replays knows addresses and shapes, and no Python."""

    made: ClassVar = []  # one for each engine; set anew by each test

    def __init__(self, device):
        self.results, self.warmed = [], 0
        Recorder.made.append(self)

    def warm_up(self, compute):
        self.warmed += 1
        return compute()

    def record(self, compute):
        with Operations() as operations:
            result = compute()
        self.results.append(result)
        result.fill_(float("nan"))  # Recording computes nothing.

        def replay():
            for other in self.results:  # All graphs work in one pool: a replay destroys what others left.
                other.fill_(float("nan"))
            for function, args, kwargs, before in operations.calls:
                after = function(*args, **kwargs)
                for old, new in zip(tensors(before), tensors(after), strict=True):
                    if old.data_ptr() != new.data_ptr():
                        old.copy_(new)

        return replay, result
