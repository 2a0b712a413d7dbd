"""Run folders of earlier versions: where options and what the curves are called are now."""

from typing import Any

MOVED = {
    "clip_low": "loss.clip_low",
    "clip_high": "loss.clip_high",
    "kl_coef": "loss.kl_coef",
    "answer_score": "reward.score",
    "format_weight": "reward.format_weight",
    "repeat_cost": "reward.repeat_cost",
    "search_cost": "reward.search_cost",
}
"""Options of PolicyRL, and where they are now."""

NEW = {"reward": {"class_path": "zs_lightning.rl.rewards.AnswerReward", "init_args": {}}}
"""Groups that are a class, as they were when they had no name."""

TAGS = {
    "reward/mean": "reward",
    "reward/groups_without_signal": "frac_reward_zero_std",
    "policy/entropy": "entropy",
    "policy/kl": "kl",
    "policy/clip_fraction": "clip_ratio",
    "policy/grad_norm": "grad_norm",
    "policy/loss": "loss",
    "rollout/sampled_tokens": "completions/mean_length",
    "rollout/truncated": "completions/clipped_ratio",
}
"""Curves of a policy's training: former names, and those of now."""


def modernised(config: Any) -> Any:
    """The configuration with its options where they are now. Others than a policy's are left as
    they are."""
    model = config.get("model") if isinstance(config, dict) else None
    options = model.get("init_args") if isinstance(model, dict) else None
    if not isinstance(options, dict) or not MOVED.keys() & options.keys():
        return config
    moved = {name: value for name, value in options.items() if name not in MOVED}
    for name in MOVED.keys() & options.keys():
        group, _, option = MOVED[name].partition(".")
        # Beside what the group holds already; of a class, in either of its two forms.
        parts: dict[str, Any] = dict(moved.get(group) or NEW.get(group, {}))
        if isinstance(inner := parts.get("init_args"), dict):
            parts["init_args"] = {**inner, option: options[name]}
        else:
            parts[option] = options[name]
        moved[group] = parts
    return config | {"model": {**(model or {}), "init_args": moved}}
