"""What a run tested and what it searched with, in a few words."""

from collections.abc import Sequence
from pathlib import Path

from zs_lightning.runs.folder import Run, part_of


def policy_name(run: Run) -> str:
    """The name of the folder of the tested checkpoint; empty where the run does not say."""
    if "ckpt_path" not in run.config:
        return ""
    # The file itself is always called last.ckpt.
    path = run.config["ckpt_path"]
    return Path(str(path)).parent.name if path else "untrained"


def settings(runs: Sequence[Run]) -> list[str]:
    """For each run the user's name of its engine, or the engine with a simulator's noise and with
    the numbers among its options that are others in another run with it."""
    # What the user says of an engine is better than what its options do.
    unnamed = [run for run in runs if not run.label]
    return [run.label or ", ".join(_setting(run, unnamed)) for run in runs]


def _setting(run: Run, runs: Sequence[Run]) -> list[str]:
    arguments = part_of(run.config, "model", "init_args")
    limits = part_of(arguments, "rollout")
    silent = limits.get("max_turns") == 0
    if silent and not limits.get("retrieve_first"):
        return ["no search"]
    parts = [run.engine]
    noise = arguments.get("noise_prob")
    if run.engine == "simulator" and noise is not None:
        parts.append(f"noise {noise:g}" if isinstance(noise, int | float) else f"noise {noise}")
    others = [_numbers(other) for other in runs if other.engine == run.engine]
    for key, value in _numbers(run).items():
        if any(other.get(key) != value for other in others):
            parts.append(f"{key} {value:g}")
    parts += ["question searched first"] if limits.get("retrieve_first") else []
    return [*parts, "no other search"] if silent else parts


def _numbers(run: Run) -> dict[str, float]:
    # Texts are left out: one of them may be a key.
    options = part_of(run.config, "model", "init_args", "search", "init_args")
    return {key: value for key, value in options.items() if type(value) in (int, float)}
