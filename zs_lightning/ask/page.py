"""Questions and answers as one HTML page that needs no script and no network. All text in it is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from zs_lightning.evaluation.report import pieces
from zs_lightning.evaluation.tables import visible
from zs_lightning.types import Trajectory


def _finalize(value: Any) -> Any:
    """Applied to everything that the template prints, so that no text can be forgotten."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def html(trajectories: Sequence[Trajectory], policy: str, engine: str) -> str:
    """The page. A function of the arguments alone.

    Args:
        policy: what was asked, such as its run folder.
        engine: name of the search engine.
    """
    environment = Environment(
        loader=PackageLoader("zs_lightning", "ask"),
        autoescape=True,
        finalize=_finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["pieces"] = pieces
    page = environment.get_template("page.html").render(trajectories=trajectories, policy=policy, engine=engine)
    return page.strip() + "\n"
