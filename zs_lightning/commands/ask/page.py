"""Questions and answers as one HTML page."""

from collections.abc import Sequence

from zs_lightning.runs.pages import render
from zs_lightning.types import Trajectory


def html(trajectories: Sequence[Trajectory], policy: str, engine: str) -> str:
    """The page.

    Args:
        policy: what was asked, such as its run folder.
        engine: name of the search engine.
    """
    values = {"trajectories": trajectories, "policy": policy, "engine": engine}
    return render("page.html", values, room="commands/ask")
