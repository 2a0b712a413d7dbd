"""The noise curriculum (paper section 3.4, equation 1), other schedules, and one that follows
success."""

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Literal, get_args

from zs_lightning.errors import UserError

Schedule = Literal["exponential", "linear", "cosine", "steps"]


def noise_probability(
    step: int,
    total_steps: int,
    start: float,
    end: float,
    base: float = 4.0,
    schedule: Schedule = "exponential",
    stages: int = 5,
) -> float:
    """p_s + share · (p_e - p_s): the probability that a search is answered with noise.

    Args:
        step: i, from 0 to total_steps; larger ones are held at the end.
        total_steps: m.
        start: p_s in [0, 1].
        end: p_e in [0, 1]; below start for a reversed curriculum.
        base: b > 0 of `exponential`. Above 1 the noise rises slowly first; b = 1 is the linear
            limit.
        schedule: the share: `exponential` (the paper) is (b^(i/m) - 1) / (b - 1), `linear` i/m,
            `cosine` (1 - cos(π i/m)) / 2, `steps` equally long stages at equal distances, the first
            at the start, the last at the end.
        stages: 2 or more, of `steps`.

    Raises:
        UserError: an argument is out of range.
    """
    if not (0.0 <= start <= 1.0 and 0.0 <= end <= 1.0):
        raise UserError(f"NoiseAnnealing: start and end are probabilities from 0 to 1; got start {start:g} and end {end:g}")
    if not 0 < base < math.inf:
        raise UserError(f"NoiseAnnealing: expected a finite base above 0; got base {base:g}")
    if schedule not in get_args(Schedule):
        raise UserError(f"NoiseAnnealing: expected a schedule of {', '.join(get_args(Schedule))}; got {schedule}")
    if stages < 2:
        raise UserError(f"NoiseAnnealing: expected stages of 2 or more; got stages {stages}")
    if total_steps < 1 or step < 0:
        raise UserError(f"expected step >= 0 and total_steps >= 1; got step={step}, total_steps={total_steps}")
    share = min(1.0, step / total_steps)
    if schedule == "exponential" and base != 1.0:
        share = (base**share - 1) / (base - 1)
    elif schedule == "cosine":
        share = (1 - math.cos(math.pi * share)) / 2
    elif schedule == "steps":
        # In whole numbers: 7 / 25 * 25 is more than 7. A stage ends with the step that fills it.
        stage = (min(step, total_steps) * stages - 1) // total_steps
        share = max(0, stage) / (stages - 1)
    return start + share * (end - start)


def noise_after(
    rewards: Sequence[float],
    noise: float,
    start: float,
    end: float,
    threshold: float,
    rise: float,
    fall: float,
    lower: float,
) -> float:
    """The probability of noise after a window of rollout steps, from start to end.

    Args:
        rewards: mean reward of each of these steps, one or more.
        noise: the probability so far.
        threshold: with a mean reward of this or more it rises by `rise`.
        lower: with one below this it falls by `fall`.
    """
    mean = fmean(rewards)
    change = rise if mean >= threshold else -fall if mean < lower else 0.0
    return min(end, max(start, noise + change))
