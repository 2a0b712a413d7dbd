"""What a run may change when it goes on from its checkpoint: all else would make another run."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from zs_lightning.errors import UserError
from zs_lightning.runs.checkpoints import load_checkpoint
from zs_lightning.runs.folder import CONFIG, MODEL, read_config

FREE = {
    "micro_batch_tokens", "checkpointing", "slots", "device", "decodings", "validation_noise",
    "http", "hosts", "endpoint", "cache", "api_key_env",
}  # fmt: skip
"""Options of the model that change speed, memory, where something runs or what is measured."""

NOISE = ("NoiseAnnealing", "NoiseBySuccess")
"""Callbacks that decide what is trained."""

SHOWN = 3
"""Differences that a message names."""


def position(ckpt_path: Path, steps: int) -> dict[str, Any]:
    """The state of the loader of the rows, as a checkpoint holds it. Raises UserError if the run
    has done the `steps` that it is to have, or the checkpoint is none of a run."""
    loop = load_checkpoint(ckpt_path, "--ckpt_path")["loops"]["fit_loop"]
    state: dict[str, Any] = loop["state_dict"]["combined_loader"][0]
    done = state["batches"]
    # An interrupted run has done fewer, one that is made longer has more to do.
    if done == state.get("steps", done) == steps:
        model = ckpt_path.parent / MODEL
        export = f"; `export --ckpt {ckpt_path} --out {model}` writes its model"
        raise UserError(
            f"--ckpt_path: the run is already finished at {done} of {done} steps; with a higher "
            "data.steps it goes on with further rows, its noise and learning rate stay as they were "
            f"at the end{'' if model.is_dir() else export}"
        )
    return state


def refuse_another_run(ckpt_path: Path, now: dict[str, Any]) -> None:
    """Raises UserError if the resolved configuration would not have made the run that left the
    checkpoint."""
    file = ckpt_path.parent / CONFIG
    before = read_config(file)
    # A checkpoint that lies elsewhere than its configuration is taken as it is.
    found = list(differences(trained(before), trained(now))) if before else []
    if found:
        said = "; ".join(f"{key} was {was}, got {given}" for key, was, given in found[:SHOWN])
        more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        raise UserError(
            f"--ckpt_path: this would be another run than that of {file}: {said}{more}; set them "
            "back, or begin anew without --ckpt_path"
        )


def trained(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a configuration that decides what is trained."""
    from zs_lightning.models.checks import check_precision

    # The rows are known by the loader's state.
    data = {name: config["data"].get(name) for name in ("batch_size", "task", "seed")}
    callbacks = config["trainer"].get("callbacks") or []
    return {
        "seed_everything": config.get("seed_everything"),
        "model": config["model"],
        "data": data,
        "trainer": {
            "precision": check_precision(config["trainer"].get("precision")),
            "callbacks": [c for c in callbacks if c["class_path"].endswith(NOISE)],
        },
    }


def differences(before: Any, now: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Key, value before and value now of the options that differ."""
    if isinstance(before, dict) and isinstance(now, dict):
        if before.get("class_path") != now.get("class_path"):
            yield key, before.get("class_path"), now.get("class_path")
            return
        # An option that only one of them has came or went with a version of the program.
        for name in before.keys() & now.keys() - FREE:
            inner = key if name == "init_args" else f"{key}.{name}".lstrip(".")
            yield from differences(before[name], now[name], inner)
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for old, new in zip(before, now, strict=True):
            yield from differences(old, new, key)
    elif before != now:
        yield key, before, now
