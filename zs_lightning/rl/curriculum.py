"""The noise curriculum (paper section 3.4, equation 1)."""

from __future__ import annotations

import math

from zs_lightning.errors import UserError


def noise_probability(
    step: int,
    total_steps: int,
    start: float,
    end: float,
    base: float = 4.0,
) -> float:
    """p_i = p_s + (b^(i/m) - 1) / (b - 1) · (p_e - p_s): the probability that a search is answered
    with noise.

    Args:
        step: i, from 0 to total_steps; larger ones are held at the end.
        total_steps: m.
        start: p_s in [0, 1].
        end: p_e in [0, 1]; below start for a reversed curriculum.
        base: b > 0. Above 1 the noise rises slowly first; b = 1 is the linear limit.

    Raises:
        UserError: an argument is out of range.
    """
    if not (0.0 <= start <= 1.0 and 0.0 <= end <= 1.0):
        raise UserError(f"NoiseAnnealing: start and end are probabilities from 0 to 1; got start {start:g} and end {end:g}")
    if not 0 < base < math.inf:
        raise UserError(f"NoiseAnnealing: expected a finite base above 0; got base {base:g}")
    if total_steps < 1 or step < 0:
        raise UserError(f"expected step >= 0 and total_steps >= 1; got step={step}, total_steps={total_steps}")
    share = min(1.0, step / total_steps)
    if base != 1.0:
        share = (base**share - 1) / (base - 1)
    return start + share * (end - start)
