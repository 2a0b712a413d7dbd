"""HTML pages that need no network, and no script but for a reader. All text in them is untrusted
and escaped."""

import json
from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from zs_lightning.runs.checkpoints import write_whole
from zs_lightning.runs.folder import RESULTS
from zs_lightning.runs.tables import percent
from zs_lightning.text.protocol import pieces
from zs_lightning.text.shown import visible

PAGE = "report.html"
COLOURS = 6
"""Colours of runs in the style sheet."""


def _finalize(value: Any) -> Any:
    """Applied to everything that a template prints, so that no text can be forgotten."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def render(template: str, values: dict[str, Any], room: str = "runs") -> str:
    """The page, a function of the arguments alone. Templates are those of the room and, shared by
    all pages, those of `runs`."""
    environment = Environment(
        loader=ChoiceLoader([PackageLoader("zs_lightning", folder) for folder in (room, "runs")]),
        # Questions, answers and documents are of others, and so are the names of runs.
        autoescape=True,
        finalize=_finalize,
        # A wrong name in a template is an error and no empty place in the page.
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "pieces": pieces}
    return environment.get_template(template).render(values).strip() + "\n"


def markdown(template: Path, values: dict[str, Any]) -> str:
    """A page of Markdown. What in it is not ours goes through `markdown_cell`."""
    text = template.read_text("utf-8")
    return Template(text, trim_blocks=True, keep_trailing_newline=True).render(values)


def write_report(out: Path, results: dict[str, Any], markdown: str, page: str) -> None:
    """Writes results.json, report.md and report.html into a folder, each whole or not at all."""
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / RESULTS, json.dumps(results, indent=2) + "\n")
    write_whole(out / "report.md", markdown)
    write_whole(out / PAGE, page)
