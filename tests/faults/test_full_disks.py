"""Rows 4 and 5: a disk that is full at some byte of a save, and a run folder that cannot be written any more."""

import random

import pytest

from support.commandline import POLICY, SIMULATOR, SMALL_RL, SMALL_SFT
from support.lostdisk import WAYS, mended
from zs_lightning.cli import main
from zs_lightning.runs.checkpoints import find_checkpoint, load_checkpoint

BOTH = ["--trainer.limit_val_batches=0", "--trainer.enable_progress_bar=false", "--model.lora.r=2", "--data.steps=8"]
FIT = {
    "sft": ["fit", SIMULATOR, *SMALL_SFT, *BOTH],
    "rl": ["fit", POLICY, *SMALL_RL, *BOTH, "--model.search=BM25Search", "--model.rollout.max_new_tokens=12"],
}
RARELY = ["--run.save_every=100"]
# Stage, options, and bytes that a file may have: those of a checkpoint are 250,000, of a model 90,000, of trajectories
# 5,000 a step, of curves 500 a step.
FULL = {
    "a checkpoint": ("sft", [], (30_000, 240_000)),
    "the model": ("sft", RARELY, (30_000, 80_000)),
    "trajectories": ("rl", RARELY, (4_000, 9_000)),
    "curves": ("rl", [*RARELY, "--run.keep_trajectories=0", "--trainer.log_every_n_steps=1"], (4_000, 5_000)),
}
PLANNED = ["a checkpoint", *FULL, *["a checkpoint"] * 5]


def weights(folder):
    return (folder / "model" / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The weights of runs that nothing happened to, made when they are asked for."""
    made = {}

    def of(stage):
        if stage not in made:
            folder = tmp_path_factory.mktemp("whole") / stage
            main([*FIT[stage], f"--run.folder={folder}"])
            made[stage] = weights(folder)
        return made[stage]

    return of


def good_step(folder):
    """The step of the last good checkpoint; 0 if there is none."""
    if not (folder / "last.ckpt").is_file():
        return 0
    return int(load_checkpoint(find_checkpoint(folder, "here"), "here")["step"])


def goes_on(warm, words, place):
    """Whether the command, given again, ends well."""
    return until_lost(warm, words, place)[0] == 0


def until_lost(warm, words, place, *losing):
    """Exit code and stderr of a command, in which a callback may lose the disk."""
    place.mkdir(exist_ok=True)
    code, _, said = warm.begin([*words, "--run.folder=run", *losing], place).end()
    return code, said


def test_a_full_disk_leaves_the_last_good_checkpoint_and_no_part_of_a_file(warm, whole, tmp_path, times, figure):
    rng, trials, held = random.Random(4), times(10), 0
    for number, kind in enumerate(PLANNED[:trials]):
        stage, options, limits = FULL[kind]
        place, words = tmp_path / str(number), [*FIT[stage], *options]
        step, most = rng.randrange(2, 6), rng.randint(*limits)
        before = 0 if RARELY[0] in options else step - 1
        losing = ["--trainer.callbacks+=support.lostdisk.FullDisk", f"--trainer.callbacks.step={step}"]
        code, said = until_lost(warm, words, place, *losing, f"--trainer.callbacks.most={most}")
        last = said.splitlines()[-1]
        parts = [path for path in (place / "run").rglob("*") if ".part" in path.name]
        told = last.startswith("error: ") and ("it takes" in last or "File too large" in last)
        assert (code, told, parts) == (1, True, []), f"{kind}, {most} bytes: {said}"
        assert (good_step(place / "run") >= before, (place / "run" / "fit.json").exists()) == (True, False), kind
        held += goes_on(warm, words, place) and weights(place / "run") == whole(stage)
    figure(
        4, "a disk that is full in the middle of a save", f"{held} of {trials} keep what was saved, and go on to the same end"
    )
    assert held == trials


def test_a_folder_that_cannot_be_written_ends_the_run_and_never_passes_as_saved(warm, whole, tmp_path, times, figure):
    trials, held = times(5), 0
    for way in list(WAYS)[:trials]:
        place, words = tmp_path / way, FIT["sft"]
        losing = ["--trainer.callbacks+=support.lostdisk.LostFolder", f"--trainer.callbacks.way={way}"]
        code, said = until_lost(warm, words, place, *losing)
        last = said.splitlines()[-1]
        named = last.startswith("error: run/last.ckpt was not written: ") or "error: run/checkpoints.json was not" in last
        assert (code, named, "it takes" in last) == (1, True, True), f"{way}: {said}"
        mended(place / "run", way)
        assert good_step(place / "run") == 2
        assert not (place / "run" / "fit.json").exists()
        held += goes_on(warm, words, place) and weights(place / "run") == whole("sft")
    figure(
        5,
        "a run folder that is locked, moved or replaced",
        f"{held} of {trials} end with the reason, and go on to the same end",
    )
    assert held == trials
