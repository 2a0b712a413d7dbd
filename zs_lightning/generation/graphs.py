"""Decoding steps as CUDA graphs: hundreds of small kernels are launched as one.

A graph is recorded when a step of its shape first occurs, and holds the addresses of what it reads: the K/V memory, the
step's buffers, the weights. Graphs therefore live as long as their generator, and where K/V memory is given back after each
rollout they are recorded anew in the next. That costs, for a shape, about as much as launching the step twice without a
graph: the warm-up is not lost, its result is that step's. A rollout meets some twenty shapes and hundreds of steps, each of
which saves a launch; to keep the graphs would be to keep the K/V memory from the update.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

CLOSE = {torch.float32: 1e-3, torch.float16: 0.01, torch.bfloat16: 0.05}
"""Largest difference of a replayed step from the step itself, relative to its largest number: another order of sums."""


@functools.cache
def _side_stream(device: torch.device) -> Any:
    """One for all generators of a card: its libraries keep a workspace for each stream they have ever seen."""
    return torch.cuda.Stream(device)


class CudaRecorder:
    """Records on one card. All graphs work in one pool of memory, since no two of them run at the same time."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.pool, self.side = device, torch.cuda.graph_pool_handle(), _side_stream(device)

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """What is launched in here goes to the side stream, after what was launched before and before what follows."""
        with torch.cuda.device(self.device):
            main = torch.cuda.current_stream()
            self.side.wait_stream(main)
            # Leaves the side stream also after a recording that failed, which torch.cuda.graph does not.
            with torch.cuda.stream(self.side):
                yield
            main.wait_stream(self.side)

    def warm_up(self, compute: Callable[[], Tensor]) -> Tensor:
        """Runs the step on the side stream: what libraries set up at first use must not happen while a graph is recorded."""
        with self._aside():
            return compute()

    def record(self, compute: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """What replays the step, and where it leaves its result. Raises RuntimeError for a step that waits for the card."""
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as a loader's, may use the card meanwhile.
        recording = torch.cuda.graph(graph, pool=self.pool, stream=self.side, capture_error_mode="thread_local")
        with self._aside(), recording:
            result = compute()
        return graph.replay, result


class Graphs:
    """Runs steps: eagerly when one of a shape first occurs, replayed from then on.

    If one cannot be recorded, or its replay differs from the step itself, this is said once and all steps run eagerly.
    """

    def __init__(self, recorder: Any, device: torch.device) -> None:
        self.recorder, self.kind = recorder, device.type
        self.usable = True
        self.state: Hashable = None
        self.recorded: dict[Hashable, tuple[Callable[[], None], Tensor]] = {}

    def run(self, shape: Hashable, state: Hashable, live: int, compute: Callable[[], Tensor]) -> Tensor:
        """The result of `compute`, which is only valid until the next step; of its first `live` rows, in truth.

        Args:
            state: what else the recorded kernels depend on; when it changes, older graphs are forgotten.
            compute: a function of buffers at fixed addresses, which gives the same when it is run again.
        """
        if not self.usable:
            return compute()
        precision = (torch.is_autocast_enabled(self.kind), torch.get_autocast_dtype(self.kind))
        if (state, precision) != self.state:
            self.recorded.clear()
            self.state = (state, precision)
        if shape not in self.recorded:
            # Autocast keeps what it cast until its context ends, a graph reads from it until the generator ends.
            with torch.autocast(self.kind, dtype=precision[1], enabled=precision[0], cache_enabled=False):
                return self._record(shape, live, compute)
        replay, result = self.recorded[shape]
        replay()
        return result

    def _record(self, shape: Hashable, live: int, compute: Callable[[], Tensor]) -> Tensor:
        expected = self.recorder.warm_up(compute)
        try:
            replay, result = self.recorder.record(compute)
            replay()
            reason = "" if _close(result[:live], expected[:live]) else "a replayed step differs from the step itself"
        except RuntimeError as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
        if not reason:
            self.recorded[shape] = replay, result
            return expected
        self.usable = False
        self.recorded.clear()
        warnings.warn(f"generation goes on without CUDA graphs, which is slower: {reason}", RuntimeWarning, stacklevel=2)
        # Once more, since a wrong replay has left wrong keys and values.
        return compute()


def _close(result: Tensor, expected: Tensor) -> bool:
    result, limit, expected = result.float(), CLOSE[expected.dtype], expected.float()
    return torch.allclose(result, expected, rtol=limit, atol=limit * float(expected.abs().max()), equal_nan=True)
