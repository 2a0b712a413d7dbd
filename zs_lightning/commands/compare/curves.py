"""The curves of a training, read from its event files and placed in a drawing."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from zs_lightning.errors import UserError
from zs_lightning.runs.older import TAGS

NOISE = {"noise/planned": "planned", "noise/realised": "realised"}
CHARTS = (
    ("Reward", "mean F1 of the rollouts of a step", {"reward": "reward"}),
    ("Exact match", "share of rollouts, sampled", {"reward/em": "exact match"}),
    ("Held out", "exact match, greedy, by what is searched", {"val/em": "simulator", "real/em": "real engine"}),
    ("Searches", "per question", {"search/per_question": "searches"}),
    ("Curriculum", "share of noisy searches", NOISE),
)
WIDTH, HEIGHT = 366, 156
"""Size of a chart without its margins, in the units of its drawing."""

Points = list[tuple[int, float]]
"""Step and value."""


@dataclass(frozen=True)
class Line:
    name: str
    points: Points
    smooth: Points


@dataclass(frozen=True)
class Chart:
    title: str
    note: str
    lines: list[Line]

    @property
    def steps(self) -> tuple[int, int]:
        """The first and the last."""
        found = [step for line in self.lines for step, _ in line.points]
        return min(found), max(found)

    @property
    def limits(self) -> tuple[float, float]:
        """The values at the lower and at the upper end."""
        found = [value for line in self.lines for _, value in line.points]
        # From 0, so that small changes look small; costs can bring a reward below it.
        return min(0.0, *found), nice_maximum(max(found))

    def x(self, step: int) -> float:
        start, end = self.steps
        return round(WIDTH * (step - start) / (end - start), 1)

    def y(self, value: float) -> float:
        low, high = self.limits
        return round(HEIGHT * (high - value) / (high - low), 1)  # Downwards, as SVG has it.


def read_curves(folder: Path) -> dict[str, Points]:
    """The scalars that the charts show, by tag, from the event files of a run folder. Raises
    UserError if there are none."""
    # Late: tensorboard takes a second to import.
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict[str, dict[int, float]] = {}
    if any(folder.glob("*tfevents*")):
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
        shown = {tag for _, _, names in CHARTS for tag in names}
        # Former names first: a run that goes on in a later version has both.
        for tag in sorted(events.Tags()["scalars"], key=lambda tag: tag not in TAGS):
            if (name := TAGS.get(tag, tag)) in shown:
                # Where a resumed run wrote a step twice, the later value counts.
                found.setdefault(name, {}).update((event.step, event.value) for event in events.Scalars(tag))
    if not found:
        raise UserError(f"--training: {folder} holds no curves; expected a `fit` of PolicyRL")
    return {name: sorted(pair for pair in values.items() if math.isfinite(pair[1])) for name, values in found.items()}


def charts(curves: dict[str, Points]) -> list[Chart]:
    """The charts for which there are at least two points."""
    made = []
    for title, note, names in CHARTS:
        lines = []
        for tag, name in names.items():
            points = curves.get(tag, [])
            # One step has no curve, and no width to place it in.
            if len(points) > 1:
                means = running_mean([value for _, value in points], max(1, len(points) // 8))
                steps = [step for step, _ in points]
                lines.append(Line(name, points, list(zip(steps, means, strict=True))))
        if lines:
            made.append(Chart(title, note, lines))
    return made


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """The mean around each value, over up to `window`; fewer at the ends, where it stays
    centred."""
    means = []
    for i in range(len(values)):
        reach = min(window // 2, i, len(values) - 1 - i)
        part = values[i - reach : i + reach + 1]
        means.append(sum(part) / len(part))
    return means


def nice_maximum(value: float) -> float:
    """The smallest of 1, 2, 4, 6, 8 times a power of ten that is not below the value."""
    power = 10.0 ** math.floor(math.log10(value)) if value > 0 else 1.0
    # Steps of 1e-9 are rounding: 0.2 + 0.6 is not to be drawn on a scale up to 1.
    return next(n * power for n in (1, 2, 4, 6, 8, 10) if n * power >= value * (1 - 1e-9))
