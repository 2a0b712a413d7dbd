"""What one rollout step says about itself, as TensorBoard tags."""

import os
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from statistics import stdev

import torch

from zs_lightning.rl.pool import by_group, has_signal
from zs_lightning.runs.outcomes import Outcome, empty_share, share, total
from zs_lightning.text.prompts import USEFUL
from zs_lightning.types import Trajectory


def step_metrics(
    trajectories: Sequence[Trajectory],
    usable: Sequence[Trajectory],
    sums: dict[str, float],
    noise_prob: float,
    seconds: dict[str, float],
    kinds: Collection[str] = (),
) -> dict[str, float]:
    """Metrics of a rollout step.

    Args:
        usable: those that did not fail: what the others earned says nothing.
        sums: over the trained tokens of the last update, from Update.step.
        seconds: by phase.
        kinds: of noise that a simulated engine may draw.
    """
    rows = [Outcome.of(t) for t in trajectories]
    fruitless = total(rows, "fruitless")
    groups = by_group(usable).values()
    tokens = max(1.0, sums.get("tokens", 0.0))
    context = sum(len(t.prompt_ids) + len(t.token_ids) for t in trajectories)
    metrics = {
        "reward": sum(t.reward for t in usable) / max(1, len(usable)),
        "reward_std": sum(spread([t.reward for t in group]) for group in groups) / max(1, len(groups)),
        "frac_reward_zero_std": sum(not has_signal(group) for group in groups) / max(1, len(groups)),
        "reward/em": share([row for row in rows if not row.invalid], "em"),
        "reward/answered": sum(t.answer is not None for t in usable) / max(1, len(usable)),
        "search/per_question": share(rows, "searches"),
        "search/failed": share(rows, "invalid"),
        "search/empty": empty_share(rows),
        "search/repeated_after_fruitless": total(rows, "repeated") / max(1, fruitless),
        "search/reworded_after_fruitless": total(rows, "reworded") / max(1, fruitless),
        "noise/planned": noise_prob,
        "completions/clipped_ratio": share(rows, "truncated"),
        "rollout/invalid_actions": share(rows, "invalid_actions"),
        "completions/mean_length": share(rows, "sampled_tokens"),
        "rollout/context_tokens": context / len(trajectories),
        "entropy": sums.get("entropy", 0.0) / tokens,
        "kl": sums.get("kl", 0.0) / tokens,
        "clip_ratio": sums.get("clip_fraction", 0.0) / tokens,
        "policy/sampling_gap": sums.get("sampling_gap", 0.0) / tokens,
        "policy/sampling_gap_max": sums.get("sampling_gap_max", 0.0),
        "loss": sums.get("policy_loss", 0.0),
        "grad_norm": sums.get("grad_norm", 0.0),
        **{f"seconds/{phase}": value for phase, value in seconds.items()},
    }
    if "importance_weight" in sums:
        metrics["policy/importance_weight"] = sums["importance_weight"] / tokens
    if "kept_rows" in sums:
        metrics["policy/likelihood_fell"] = sums["fallen_rows"] / max(1.0, sums["kept_rows"])
    if "value_loss" in sums:
        metrics["critic/loss"] = sums["value_loss"]
        metrics["critic/clip_fraction"] = sums["value_clipped"] / tokens
        metrics["critic/grad_norm"] = sums.get("value_grad_norm", 0.0)
    right = [t for t, row in zip(trajectories, rows, strict=True) if row.em]
    drawn = noise_metrics(trajectories, noise_prob, kinds)
    return metrics | likelihood(right) | drawn | more_searches(usable)


def likelihood(right: Sequence[Trajectory]) -> dict[str, float]:
    """The mean log-probability of the tokens of correct answers' trajectories, as they were
    sampled.

    Where it falls step by step while the reward still rises, training is about to collapse (LLDS,
    arXiv 2512.04220). Nothing where no answer was correct.
    """
    tokens = sum(sum(t.loss_mask) for t in right)
    return {"policy/correct_logprob": sum(sum(t.old_logprobs) for t in right) / tokens} if tokens else {}


def more_searches(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """How many searches followed a useful result, and a noisy one, in the mean. A list of both is
    noisy if more than half of it is. Nothing of a kind that was not found; a real engine has
    none."""
    followed: dict[str, list[int]] = {}
    for trajectory in trajectories:
        searches = trajectory.searches
        for number, turn in enumerate(searches, 1):
            if turn.noise is not None:
                name = "noise" if turn.noise > 0.5 else "useful"
                followed.setdefault(f"search/more_after_{name}", []).append(len(searches) - number)
    return {name: sum(counts) / len(counts) for name, counts in followed.items()}


def memory(device: torch.device) -> dict[str, float]:
    """MiB: the most that tensors took on the card so far; without one, what the process takes
    now."""
    if device.type == "cuda":
        return {"memory/card_peak": torch.cuda.max_memory_allocated(device) / 2**20}
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {"memory/resident": pages * os.sysconf("SC_PAGE_SIZE") / 2**20}


def spread(rewards: Sequence[float]) -> float:
    """The standard deviation of a group's rewards, with n - 1 as TRL has it; 0 for a single one."""
    return stdev(rewards) if len(rewards) > 1 else 0.0


def noise_metrics(trajectories: Sequence[Trajectory], noise_prob: float, kinds: Collection[str] = ()) -> dict[str, float]:
    """What a simulated engine drew, against what it should; nothing of a real one.

    A search that is repeated within a trajectory and gets the same documents is no draw: policies
    repeat what was fruitless, so that counting it would show more noise than was drawn.
    """
    # Rollouts that are kept clean are no part of the plan.
    planned = [t for t in trajectories if t.noise_prob == noise_prob]
    searches = [turn for t in planned for turn in t.searches if turn.label is not None]
    drawn = [turn for turn in searches if not turn.repeated]
    if not drawn:
        return {}
    metrics = {
        "noise/realised": sum(turn.noise or 0 for turn in drawn) / len(drawn),
        "noise/read": sum(turn.noise or 0 for turn in searches) / len(searches),
        "search/withheld": sum(turn.withheld for turn in searches) / len(searches),
    }
    counts = Counter(turn.label for turn in drawn)
    # Also what was not drawn: the mean of a curve without its zeros would be too high.
    for label in dict.fromkeys((USEFUL, *kinds, *counts)):
        metrics[f"noise/drawn_{label}"] = counts[label] / len(drawn)
    return metrics
