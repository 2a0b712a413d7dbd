"""Memory that is full: what was begun is done again with less at a time, and later with more."""

import gc
import logging
from collections.abc import Callable

import torch

from zs_lightning.errors import RunError

PATIENCE = 10
"""Works that must fit before more is tried again; twice as many after each time that it did not."""

_log = logging.getLogger(__name__)


def completes(work: Callable[[], object]) -> bool:
    """Whether memory sufficed for the work, which may be any other error's too."""
    try:
        work()
        return True
    except RuntimeError as error:
        # A CPU's allocator has no exception of its own.
        if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator: " not in str(error):
            raise
    # Only here: until its exception is gone, what the work had taken is held by its frames.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return False


class Fitting:
    """How much is done at a time: half of it where memory was full, more after some that fitted.

    Args:
        key: the option that says how much.
        most: what it says.
        instead: what helps where the least is too much.
    """

    def __init__(self, key: str, most: int, instead: str) -> None:
        self.key, self.instead = key, instead
        self.most = self.now = most
        self.fitted, self.patience = 0, PATIENCE

    def halve(self, least: int, used: int | None = None) -> None:
        """Halves it, down to `least`; only `used` of it were needed. Raises RunError at the
        least."""
        used = min(self.now, used or self.now)
        if used <= least:
            raise RunError(f"memory is full with {self.key} at its least, {least}; {self.instead}")
        if self.patience == PATIENCE:
            said = "memory was full; with less at a time, what was begun is done again: lower %s (%d) to save that time"
            _log.warning(said, self.key, self.most)
        self.now = max(least, used // 2)
        self.fitted, self.patience = 0, 2 * self.patience

    def grows(self) -> bool:
        """Counts a work that fitted, and returns whether the next one may take twice as much."""
        self.fitted += 1
        if self.now == self.most or self.fitted < self.patience:
            return False
        self.now, self.fitted = min(self.most, 2 * self.now), 0
        return True
