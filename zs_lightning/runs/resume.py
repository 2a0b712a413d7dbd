"""What a run may change when it goes on from its checkpoint: all else would make another run."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from zs_lightning.errors import UserError
from zs_lightning.runs.checkpoints import OPTIMISER, load_checkpoint
from zs_lightning.runs.folder import CHECKPOINT, CONFIG, MODEL, read_config

FREE = {
    "checkpointing", "decodings", "validation_noise", "validation_search", "validation_turns",
    "http", "hosts", "endpoint", "cache", "api_key_env",
}  # fmt: skip
"""Options of the model that change speed, memory, where something runs or what is measured."""

ROUNDED = {"micro_batch_tokens", "slots", "device"}
"""Others that change these, and also the order in which sums are added up."""

NOISE = ("NoiseAnnealing", "NoiseBySuccess")
"""Callbacks that decide what is trained."""

WHOLE = {"noise", "options"}
"""Options whose value is a mapping of the user's own keys: one that is missing is another value."""

SHOWN = 3
"""Differences that a message names."""


def position(ckpt_path: Path, to_train: bool = False) -> dict[str, Any]:
    """The state of the loader of the rows, as a checkpoint holds it. Raises UserError if the
    checkpoint is none of a run, or holds no more than weights and is `to_train`."""
    found = load_checkpoint(ckpt_path, "--ckpt_path")
    if to_train and "state_dict" in found and OPTIMISER not in found:
        said = f"has no optimiser's state; a fit goes on from {CHECKPOINT}"
        raise UserError(f"--ckpt_path: {ckpt_path} {said}, or begins anew with its weights as model.model.adapter")
    try:
        state: dict[str, Any] = found["loops"]["fit_loop"]["state_dict"]["combined_loader"][0]
        state["batches"]
    except (KeyError, TypeError, IndexError) as error:
        raise UserError(f"--ckpt_path: {ckpt_path} is not the checkpoint of a `fit`") from error
    return state


def finished(ckpt_path: Path, state: Mapping[str, Any], steps: int) -> str:
    """What to say of a run that has done the `steps` that it is to have; empty if it has not."""
    done = state["batches"]
    # An interrupted run has done fewer, one that is made longer has more to do.
    if not done == state.get("steps", done) == steps:
        return ""
    model = ckpt_path.parent / MODEL
    export = f"; `export --ckpt {ckpt_path} --out {model}` writes its model"
    return (
        f"the run is already finished at {done} of {done} steps; with a higher data.steps it goes "
        "on with further rows, its noise and learning rate stay as they were at the end"
        f"{'' if model.is_dir() else export}"
    )


def refuse_another_run(ckpt_path: Path, now: dict[str, Any]) -> str:
    """Raises UserError if the resolved configuration would not have made the run that left the
    checkpoint.

    Returns:
        What will not be equal bit for bit, in a sentence; empty if all will.
    """
    file = ckpt_path.parent / CONFIG
    before = read_config(file)
    # A checkpoint that lies elsewhere than its configuration is taken as it is.
    changes = list(differences(trained(before), trained(now))) if before else []
    rounded = [change for change in changes if change[0].rpartition(".")[2] in ROUNDED]
    if found := [change for change in changes if change not in rounded]:
        said = "; ".join(f"{key} was {was}, got {given}" for key, was, given in found[:SHOWN])
        more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        raise UserError(
            f"--ckpt_path: this would be another run than that of {file}: {said}{more}; set them "
            "back, or begin anew with another --run.folder"
        )
    said = ", ".join(f"{key} was {was}, is {given}" for key, was, given in rounded)
    return f"equal up to rounding, not bit for bit: {said}" if said else ""


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
    whole = key.rpartition(".")[2] in WHOLE
    if isinstance(before, dict) and isinstance(now, dict) and not whole:
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
