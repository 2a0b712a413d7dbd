"""The curves of a training, read from its event files and drawn as SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from zs_lightning.errors import UserError

CHARTS = (
    ("Reward", "mean F1 of the rollouts of a step", {"reward/mean": "reward"}),
    ("Exact match", "share of rollouts, sampled", {"reward/em": "exact match"}),
    ("Searches", "per question", {"search/per_question": "searches"}),
    ("Curriculum", "share of noisy searches", {"noise/planned": "planned", "noise/realised": "realised"}),
)
CHARTS_LEGEND = (
    "Every value is of the rollouts of one step. Curriculum: planned is the probability that a query gets noisy documents, as "
    "the schedule sets it; realised is the share of the step's searches that got them. It lies above the plan where a policy "
    "repeats queries that got noise."
)
WIDTH, HEIGHT = 366, 156
"""Size of a chart without its margins, in the units of its drawing."""

Curves = dict[str, list[tuple[int, float]]]
"""Step and value by tag."""


@dataclass(frozen=True)
class Line:
    name: str
    raw: list[tuple[float, float]]
    """Places in the drawing; y goes downwards."""
    smooth: list[tuple[float, float]]
    first: float
    last: float
    """Smoothed values at both ends."""


@dataclass(frozen=True)
class Chart:
    title: str
    note: str
    lines: list[Line]
    y_ticks: list[tuple[float, str]]
    x_ticks: list[tuple[float, str]]


def read_curves(folder: Path) -> Curves:
    """The scalars that the charts show, from the event files of a run folder.

    Raises:
        UserError: there are none.
    """
    # Late: tensorboard takes a second to import.
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    curves: Curves = {}
    if any(folder.glob("*tfevents*")):
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
        shown = {tag for _, _, names in CHARTS for tag in names}
        for tag in shown.intersection(events.Tags()["scalars"]):
            # Where a resumed run wrote a step twice, the later value counts.
            values = {event.step: event.value for event in events.Scalars(tag) if math.isfinite(event.value)}
            curves[tag] = sorted(values.items())
    if not curves:
        raise UserError(f"--training: {folder} holds no curves; expected the run folder of a `fit` of PolicyRL")
    return curves


def charts(curves: Curves) -> list[Chart]:
    """The charts for which there are at least two points."""
    made = []
    for title, note, names in CHARTS:
        lines = {name: curves[tag] for tag, name in names.items() if len(curves.get(tag, [])) > 1}
        if lines:
            made.append(draw(title, note, lines))
    return made


def draw(title: str, note: str, lines: dict[str, list[tuple[int, float]]]) -> Chart:
    steps = [step for line in lines.values() for step, _ in line]
    values = [value for line in lines.values() for _, value in line]
    start, end = min(steps), max(steps)
    low, high = min(0.0, *values), nice_maximum(max(values))

    def place(step: float, value: float) -> tuple[float, float]:
        return round(WIDTH * (step - start) / (end - start), 1), round(HEIGHT * (high - value) / (high - low), 1)

    drawn = []
    for name, line in lines.items():
        means = running_mean([value for _, value in line], max(1, len(line) // 8))
        smooth = [place(step, mean) for (step, _), mean in zip(line, means, strict=True)]
        drawn.append(Line(name, [place(*pair) for pair in line], smooth, means[0], means[-1]))
    y_ticks = [(place(start, value)[1], f"{value:g}") for value in (0.0, high / 2, high)]
    x_ticks = [(place(step, 0)[0], str(step + 1)) for step in (start, (start + end) // 2, end)]
    return Chart(title, note, drawn, y_ticks, x_ticks)


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """The mean around each value, over up to `window` of them; fewer at the ends, where it stays centred."""
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
