"""Decoding steps as CUDA graphs: hundreds of small kernels are launched as one."""

# A graph is recorded when a step of its shape first occurs, and holds the addresses of what it
# reads: K/V memory, buffers, weights. Graphs therefore live as long as their generator, and where
# K/V memory is given back after each rollout, for the update, they are recorded anew in the next.
# For a shape that costs about as much as launching the step twice without a graph; a rollout meets
# some twenty shapes and hundreds of steps.
# A graph must not see what happens on the host (it would be left out of a replay), a wait for the
# card (recording fails), what libraries set up at first use (hence a warm-up), or memory that is
# freed before the last replay (hence no cache of autocast).

import functools
import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

CLOSE = {torch.float32: 1e-3, torch.float16: 0.01, torch.bfloat16: 0.05}
"""Largest relative difference of a replay from its step, whose sums have another order."""

Compute = Callable[[], Tensor]
"""A step: gives [rows, 1, H] from buffers at fixed addresses, and the same again."""


@functools.cache
def _side_stream(device: torch.device) -> Any:
    """One for all generators of a card: libraries keep a workspace for each stream."""
    return torch.cuda.Stream(device)


class CudaRecorder:
    """Records on one card. All graphs share one pool of memory, since no two run at a time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool = torch.cuda.graph_pool_handle()
        self.side = _side_stream(device)

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """Sends what is launched inside to the side stream, between what comes before and after."""
        with torch.cuda.device(self.device):
            main = torch.cuda.current_stream()
            self.side.wait_stream(main)
            # Leaves the side stream also after a failed recording, which torch.cuda.graph does not.
            with torch.cuda.stream(self.side):
                yield
            main.wait_stream(self.side)

    def warm_up(self, compute: Compute) -> Tensor:
        """Runs the step, whose result counts, on the stream on which it will be recorded."""
        with self._aside():
            return compute()

    def record(self, compute: Compute) -> tuple[Callable[[], None], Tensor]:
        """What replays the step, and the [rows, 1, H] that it fills. RuntimeError if it waits."""
        graph = torch.cuda.CUDAGraph()
        # Thread-local: other threads, such as a loader's, may use the card meanwhile.
        with self._aside(), torch.cuda.graph(graph, self.pool, self.side, "thread_local"):
            result = compute()
        return graph.replay, result


class Graphs:
    """Runs steps: eagerly when one of a shape first occurs, replayed from then on."""

    def __init__(self, recorder: Any, device: torch.device) -> None:
        self.recorder = recorder
        self.kind = device.type
        self.usable = True
        self.state: Hashable = None
        self.recorded: dict[Hashable, tuple[Callable[[], None], Tensor]] = {}

    def run(self, shape: Hashable, state: Hashable, live: int, compute: Compute) -> Tensor:
        """What `compute` gives, [rows, 1, H]: its first `live` rows, until the next step."""
        # The state is what recorded kernels depend on besides the shape.
        if not self.usable:
            return compute()
        mixed = torch.is_autocast_enabled(self.kind)
        dtype = torch.get_autocast_dtype(self.kind)
        if (state, mixed, dtype) != self.state:
            self.recorded.clear()
            self.state = (state, mixed, dtype)
        if shape not in self.recorded:
            # Autocast would keep what it cast until its context ends; a graph reads it for longer.
            with torch.autocast(self.kind, dtype=dtype, enabled=mixed, cache_enabled=False):
                return self._record(shape, live, compute)
        replay, result = self.recorded[shape]
        replay()
        return result

    def _record(self, shape: Hashable, live: int, compute: Compute) -> Tensor:
        """Records a step, or gives up graphs if that fails or a replay differs; says so once."""
        expected = self.recorder.warm_up(compute)
        try:
            replay, result = self.recorder.record(compute)
            replay()
            reason = "" if _close(result[:live], expected[:live]) else "a replayed step differs"
        except RuntimeError as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
        if not reason:
            self.recorded[shape] = replay, result
            return expected
        self.usable = False
        self.recorded.clear()
        warnings.warn(f"generation goes on, slower, without CUDA graphs: {reason}", RuntimeWarning, stacklevel=2)
        # Once more, since a wrong replay has left wrong keys and values.
        return compute()


def _close(result: Tensor, expected: Tensor) -> bool:
    """Whether two results [live, 1, H] differ by no more than rounding."""
    limit = CLOSE[expected.dtype]
    most = limit * float(expected.float().abs().max())
    return torch.allclose(result.float(), expected.float(), rtol=limit, atol=most, equal_nan=True)
