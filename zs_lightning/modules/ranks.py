"""Several processes with a card each, on one machine or several: the share of each, and what they
tell each other.

Every rank reads the whole batch and rolls out its share of it. Draws are functions of the question,
so the trajectories are those of one process. They are handed round and judged by every rank alike,
so that baselines and denominators are of the whole batch; each rank then takes its share of the
backward passes, and gradients are added up once per update.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import distributed

from zs_lightning.errors import RunError, UserError

Row = TypeVar("Row")

PATIENCE = timedelta(hours=2)
"""How long a rank waits for another one's rollouts. One that ends is noticed at once, this is for a
machine that vanishes."""


class Ranks(DDPStrategy):
    """Lightning's processes without its wrapper around the module.

    The wrapper adds gradients up in every backward pass, so ranks with different numbers of
    micro-batches would wait for each other for ever.
    """

    def __init__(self) -> None:
        super().__init__(timeout=PATIENCE)

    def _get_process_group_backend(self) -> str:
        """Ranks wait for each other by gloo on cards too: nccl does not notice that a process has
        ended."""
        return "cpu:gloo,cuda:nccl" if self.root_device.type == "cuda" else "gloo"

    def _configure_launcher(self) -> None:
        """Raises UserError if the processes were started by something that counts them
        otherwise."""
        processes, started = self.num_nodes * self.num_processes, os.environ.get("WORLD_SIZE")
        if started not in (None, str(processes)):
            raise UserError(
                f"WORLD_SIZE says {started} processes, trainer.devices times trainer.num_nodes {processes}; "
                "set devices to the processes of a machine and num_nodes to the number of machines"
            )
        super()._configure_launcher()

    def configure_ddp(self) -> None:
        """Nothing to wrap: every rank has loaded the same files and drawn the same adapter."""

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        wait()

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        with _told():
            return super().broadcast(obj, src)


@contextmanager
def _told() -> Iterator[None]:
    """Says in a sentence what torch says of a connection."""
    try:
        yield
    except RuntimeError as error:
        hours = PATIENCE.total_seconds() / 3600
        raise RunError(
            f"another process of this run has ended, or was not heard of for {hours:g} hours; see what it "
            "said, and go on from the last checkpoint with --ckpt_path"
        ) from error


def wait() -> None:
    """Until every rank is here."""
    if rank_and_size()[1] > 1:
        with _told():
            distributed.all_reduce(torch.zeros(1))


def rank_and_size() -> tuple[int, int]:
    if not (distributed.is_available() and distributed.is_initialized()):
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def own_share(rows: Sequence[Row]) -> list[Row]:
    """Every size-th row, beginning with the rank's."""
    rank, size = rank_and_size()
    return list(rows[rank::size])


def gather(rows: list[Row]) -> list[list[Row]]:
    """The rows of each rank, on every rank."""
    _, size = rank_and_size()
    if size == 1:
        return [rows]
    found: list[list[Row]] = [[] for _ in range(size)]
    with _told():
        distributed.all_gather_object(found, rows)
    return found


def together(results: list[Row], each: int) -> list[Row]:
    """On every rank, what all ranks made of their shares, in the order of the rows that were shared
    out; `each` results of a row follow each other."""
    shares = gather(results)
    found: list[Row] = []
    for start in range(0, max(map(len, shares)), each):
        for share in shares:
            found += share[start : start + each]
    return found


def sum_metrics(total: dict[str, float], part: Mapping[str, Any]) -> None:
    """Adds a part's numbers to the total, by name; of a name that ends in `_max` the greatest is
    kept."""
    for name, value in part.items():
        before = total.get(name, 0.0)
        total[name] = max(before, float(value)) if name.endswith("_max") else before + float(value)


def add_up(sums: dict[str, float]) -> dict[str, float]:
    """The metrics of all ranks, as sum_metrics adds them. A rank may lack a name."""
    total: dict[str, float] = {}
    for (part,) in gather([sums]):
        sum_metrics(total, part)
    return total


def sum_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Adds every gradient up over the ranks; one that a rank does not have counts as 0."""
    if rank_and_size()[1] == 1:
        return
    # A rank that ended is noticed here, in a sentence; nccl would wait for it.
    wait()
    for parameter in parameters:
        # All ranks must take part for every weight, or they would wait for each other for ever.
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        with _told():
            distributed.all_reduce(parameter.grad)
