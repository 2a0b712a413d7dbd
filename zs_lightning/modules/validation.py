"""What the validations of a fit say: with the engine that trains, and with a real one beside it."""

import logging
from collections.abc import Sequence

from zs_lightning.errors import UserError, check_least
from zs_lightning.modules.health import MOST_FAILED
from zs_lightning.runs.outcomes import Outcome, share
from zs_lightning.search import SearchEngine
from zs_lightning.types import Status, Trajectory

REAL_EM = "real/em"

_log = logging.getLogger(__name__)


def check_real(engine: SearchEngine, key: str) -> None:
    """Raises UserError for a simulator, of this process or of a server."""
    if engine.simulator is not None or hasattr(engine, "orders"):
        raise UserError(f"{key}: expected a real engine, such as BM25Search; got the simulator {engine.name}")


def check_validation(engine: SearchEngine | None, turns: int | None) -> None:
    """Raises UserError for a simulator, which cannot say what a real engine would find, and for a
    limit of no turn."""
    # Without a search the prompt is another one, which training has never seen.
    if turns is not None:
        check_least("model", validation_turns=(turns, 1))
    if engine is not None:
        check_real(engine, "model.validation_search")


def simulated_metrics(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Of greedy answers with the engine that trains; a failed search is a wrong answer."""
    rows = [Outcome.of(trajectory) for trajectory in trajectories]
    return {f"val/{name}": share(rows, name) for name in ("em", "f1", "searches", "truncated")}


def real_metrics(simulated: Sequence[Trajectory], real: Sequence[Trajectory]) -> dict[str, float]:
    """Of greedy answers to the same questions with the real engine, and the gap: what exact match
    with the simulator is above that with the real engine.

    Questions whose search failed are left out; where they are many, all but their share is, since
    the others may be other ones than usual.
    """
    failed = [trajectory.failure for trajectory in real if trajectory.status is Status.FAILED]
    found = {"real/failed": len(failed) / max(1, len(real))}
    if len(failed) > MOST_FAILED * len(real):
        said = "validation_search failed for %d of %d questions, for example: %s; training goes on"
        _log.warning(f"{said}, the curve has no point here", len(failed), len(real), failed[0])
        return found
    before, after = [], []
    for one, other in zip(simulated, real, strict=True):
        if other.status is not Status.FAILED:
            before.append(Outcome.of(one))
            after.append(Outcome.of(other))
    found |= {f"real/{name}": share(after, name) for name in ("em", "f1", "searches")}
    return found | {"real/gap": share(before, "em") - share(after, "em")}
