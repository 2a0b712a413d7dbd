"""The comparison of a training as one HTML page: numbers, curves and examples."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zs_lightning.errors import UserError
from zs_lightning.runs.pages import COLOURS, render
from zs_lightning.runs.tables import (
    INTERVAL,
    LEGEND,
    SECONDS,
    difference_line,
    engines,
    headline,
    subset_legend,
    subset_names,
)
from zs_lightning.streams import derive_seed

EXAMPLES = {(0.0, 1.0): 4, (1.0, 1.0): 1, (1.0, 0.0): 1, (0.0, 0.0): 2}
"""How many questions to show for each (EM of base, EM of trained): gains, and never only gains."""

CHARTS = (
    ("Reward", "mean F1 of the rollouts of a step", (("reward/mean", "reward"),)),
    ("Exact match", "share of rollouts, sampled", (("reward/em", "exact match"),)),
    ("Searches", "per question", (("search/per_question", "searches"),)),
    ("Curriculum", "share of noisy searches", (("noise/planned", "planned"), ("noise/realised", "realised"))),
)
CHARTS_LEGEND = (
    "Every value is of the rollouts of one step. Curriculum: planned is the probability that a query gets noisy documents, as "
    "the schedule sets it; realised is the share of the step's searches that got them. It lies above the plan where a policy "
    "repeats queries that got noise."
)
WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 420, 190, 38, 10, 24
"""Of a chart, in its own units; the plot is inside of the margins."""

Curves = dict[str, list[tuple[int, float]]]
Outcomes = tuple[Path, list[dict[str, Any]]]
"""A run folder of `test` and the lines of its questions.jsonl."""


def read_curves(folder: Path) -> Curves:
    """Step and value of each scalar the charts show, from the event files of a run folder. Where a resumed run wrote a
    step twice, the later value counts.

    Raises:
        UserError: there are none.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    curves: Curves = {}
    if any(folder.glob("*tfevents*")):
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
        for tag in {tag for _, _, series in CHARTS for tag, _ in series} & set(events.Tags()["scalars"]):
            values = {event.step: event.value for event in events.Scalars(tag) if math.isfinite(event.value)}
            curves[tag] = sorted(values.items())
    if not curves:
        raise UserError(f"--training: {folder} holds no curves; expected the run folder of a `fit` of PolicyRL")
    return curves


@dataclass(frozen=True)
class Series:
    name: str
    raw: str
    """Points of an SVG polyline."""
    smooth: str
    first: float
    last: float
    """Smoothed values at both ends."""


@dataclass(frozen=True)
class Chart:
    title: str
    note: str
    series: list[Series]
    y_ticks: list[tuple[float, str]]
    """Place and label."""
    x_ticks: list[tuple[float, str]]


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Centred mean over up to `window` values; fewer at the ends, where it stays centred."""
    means = []
    for i in range(len(values)):
        reach = min(window // 2, i, len(values) - 1 - i)
        part = values[i - reach : i + reach + 1]
        means.append(sum(part) / len(part))
    return means


def nice_maximum(value: float) -> float:
    """The smallest of 1, 2, 4, 6, 8 times a power of ten that is not below the value."""
    power = 10.0 ** math.floor(math.log10(value)) if value > 0 else 1.0
    return next(factor * power for factor in (1, 2, 4, 6, 8, 10) if factor * power >= value * (1 - 1e-9))


def charts(curves: Curves) -> list[Chart]:
    """The charts for which there are at least two points."""
    made = []
    for title, note, tags in CHARTS:
        lines = [(name, curves[tag]) for tag, name in tags if len(curves.get(tag, [])) > 1]
        if lines:
            made.append(_chart(title, note, lines))
    return made


def _chart(title: str, note: str, lines: list[tuple[str, list[tuple[int, float]]]]) -> Chart:
    steps, values = ([pair[i] for _, line in lines for pair in line] for i in (0, 1))
    first, last, low, high = min(steps), max(steps), min(0.0, *values), nice_maximum(max(values))

    def place(step: float, value: float) -> tuple[float, float]:
        x = LEFT + (WIDTH - LEFT - 8) * (step - first) / (last - first)
        return round(x, 1), round(HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * (value - low) / (high - low), 1)

    def points(line: Sequence[tuple[int, float]]) -> str:
        return " ".join(f"{x},{y}" for x, y in (place(*pair) for pair in line))

    series = []
    for name, line in lines:
        means = running_mean([value for _, value in line], max(1, len(line) // 8))
        smooth = list(zip((step for step, _ in line), means, strict=True))
        series.append(Series(name, points(line), points(smooth), means[0], means[-1]))
    y_ticks = [(place(first, value)[1], f"{value:g}") for value in (0.0, high / 2, high)]
    x_ticks = [(place(step, 0)[0], str(step + 1)) for step in (first, (first + last) // 2, last)]
    return Chart(title, note, series, y_ticks, x_ticks)


def _trajectories(folder: Path, lines: Sequence[dict[str, Any]], wanted: set[str]) -> dict[str, dict[str, Any]]:
    """Greedy trajectories of the wanted questions. The file has a line for each of questions.jsonl, in the same order.

    Raises:
        UserError: it does not.
    """
    found = {}
    path = folder / "trajectories" / "test.jsonl"
    with path.open(encoding="utf-8") as file:
        for row, line in zip(lines, file, strict=False):
            if row["decoding"] != "greedy" or row["id"] not in wanted:
                continue
            trajectory = json.loads(line)
            if trajectory["id"] != row["id"]:
                raise UserError(f"{path} does not go with questions.jsonl beside it; run the test again")
            found[row["id"]] = trajectory | {name: row[name] for name in ("em", "f1", "subset")}
    return found


def choose_examples(base: Outcomes, trained: Outcomes) -> list[dict[str, Any]]:
    """Questions with what both policies did, greedy: some of each outcome, drawn by the questions' ids and never picked
    for their looks. Empty if a run kept no trajectories."""
    if not all((folder / "trajectories" / "test.jsonl").is_file() for folder, _ in (base, trained)):
        return []
    scores = [{row["id"]: row["em"] for row in lines if row["decoding"] == "greedy"} for _, lines in (base, trained)]
    drawn = sorted(scores[0], key=lambda name: derive_seed("examples", name))
    chosen = [i for kind, n in EXAMPLES.items() for i in [i for i in drawn if (scores[0][i], scores[1][i]) == kind][:n]]
    chosen += [i for i in drawn if i not in chosen][: sum(EXAMPLES.values()) - len(chosen)]
    before, after = (_trajectories(*side, set(chosen)) for side in (base, trained))
    return [{"base": before[i], "trained": after[i]} for i in chosen if i in before and i in after]


def marked(text: str, answers: Sequence[str]) -> list[tuple[str, bool]]:
    """The text cut where a golden answer stands in it: (part, is an answer)."""
    known = sorted((re.escape(answer) for answer in answers if answer.strip()), key=len, reverse=True)
    parts = re.split(rf"(?<!\w)({'|'.join(known)})(?!\w)", text, flags=re.IGNORECASE) if known else [text]
    return [(part, i % 2 == 1) for i, part in enumerate(parts) if part]


def html(results: dict[str, Any], curves: Curves, examples: Sequence[dict[str, Any]]) -> str:
    """The page. A function of the arguments alone.

    Args:
        results: as in results.json.
        curves: from `read_curves`; empty for a page without.
        examples: from `choose_examples`.
    """
    names = dict.fromkeys(name for _, policies in engines(results) for name in policies)
    values = {
        "results": results,
        "headline": headline(results),
        "difference": difference_line(results),
        "legend": LEGEND,
        "interval": INTERVAL,
        "subset_legend": subset_legend(subset_names(results)),
        "charts_legend": CHARTS_LEGEND,
        "seconds_legend": SECONDS,
        "engines": list(engines(results)),
        "subsets": subset_names(results),
        "charts": charts(curves),
        "examples": examples,
        "marked": marked,
        "colours": {name: number % COLOURS for number, name in enumerate(names)},
        "size": {"width": WIDTH, "height": HEIGHT, "left": LEFT},
    }
    return render("report.html", values, "commands/compare")
