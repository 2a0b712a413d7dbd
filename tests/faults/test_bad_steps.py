"""Rows 15 and 17: steps in which memory is full, or a number is not finite."""

import json
import random
from pathlib import Path

import lightning as L
import pytest
import torch

from support.commandline import POLICY, SMALL_RL, failure
from support.detached import example, policy
from zs_lightning.generation.decoding import Decoding
from zs_lightning.models.specs import LoraSpec
from zs_lightning.modules import update
from zs_lightning.modules.trainable import TrainableModule
from zs_lightning.rl.losses import LossSpec
from zs_lightning.rl.rewards import AnswerReward, Reward
from zs_lightning.rollout import RolloutSpec

# ---------------------------------------------------------------------------------------------- row 17: not finite

PLACES = ["reward nan", "loss inf", "gradient nan", "advantage nan", "reward inf", "log-probability nan", "reference nan"]
PLACES += ["gradient inf"]
NOW = {"place": "", "places": PLACES}
CHANGED: dict[int, bool] = {}
"""For each step whether it changed a byte of what is trained."""


class Spoiler(L.Callback):
    """Says which place is spoilt in a step: one after each good step, and at the end any."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        places = NOW["places"]
        NOW["place"] = places[batch_idx // 2 % len(places)] if batch_idx % 2 or batch_idx > 2 * len(places) else ""
        self.before = self.bytes_of(pl_module)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        CHANGED[batch_idx] = self.bytes_of(pl_module) != self.before

    @staticmethod
    def bytes_of(module):
        return b"".join(p.detach().numpy().tobytes() for p in module.trainable().values())


def spoil(monkeypatch):
    """Makes numbers not finite where the step says so."""

    def spoilt(kind, value):
        name, _, bad = NOW["place"].partition(" ")
        return value + float(bad) if name == kind else value

    def wrapped(owner, name, kind, change):
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **options: change(spoilt, kind, real(*args, **options), *args))

    def first(spoilt, kind, found, *_):
        return (spoilt(kind, found[0]), *found[1:])

    wrapped(AnswerReward, "parts", "reward", lambda spoilt, kind, parts, *_: {**parts, "odd": spoilt(kind, 1.0) - 1.0})
    wrapped(update, "micro_batch_loss", "loss", first)
    wrapped(update, "token_logprobs", "log-probability", first)
    wrapped(update.Update, "reference_logprobs", "reference", lambda spoilt, kind, found, *_: spoilt(kind, found))

    def advantages(spoilt, kind, found, rows, *_):
        rows[0].advantage = spoilt(kind, 1.0) if NOW["place"].startswith(kind) else rows[0].advantage

    def one_gradient(spoilt, kind, found, module, *_):
        gradient = next(p.grad for p in module.trainable().values() if p.grad is not None).view(-1)
        gradient[0] = spoilt(kind, 1.0) if NOW["place"].startswith(kind) else gradient[0]

    wrapped(update, "set_advantages", "advantage", advantages)
    wrapped(TrainableModule, "manual_backward", "gradient", one_gradient)


@pytest.mark.usefixtures("environment")
def test_a_number_that_is_not_finite_costs_a_step_and_no_weight(monkeypatch, capsys, full, figure):
    spoil(monkeypatch)
    NOW["places"] = PLACES if full else PLACES[:3]
    steps = 2 * len(NOW["places"]) + 1
    CHANGED.clear()
    fit = ["fit", POLICY, *SMALL_RL, "--model.search=BM25Search", f"--data.steps={steps + 9}", "--model.warmup_steps=0"]
    fit += ["--model.loss.kl_coef=0.1", "--model.rollout.max_new_tokens=12", "--trainer.enable_progress_bar=false"]
    code, said = failure(capsys, *fit, "--trainer.callbacks+=test_bad_steps.Spoiler", "--run.folder=run")
    bad = [step for step in range(steps) if step % 2]
    unchanged = sum(not CHANGED[step] for step in bad)
    learnt = sum(CHANGED[step] for step in range(steps) if not step % 2)
    written = {path.stem for path in Path("run/bad_steps").iterdir()}
    lines = [json.loads(line) for path in Path("run/bad_steps").iterdir() for line in path.open()]
    stopped = (
        code == 1 and "3 steps in a row were skipped" in said and said.endswith("fit goes on with --ckpt_path run/last.ckpt")
    )
    held = f"{unchanged} of {len(bad)} skipped, no byte changed, {learnt} of {len(bad) + 1} others learn; three in a row end it"
    figure(17, "NaN or infinity in rewards, advantages, losses, log-probabilities, gradients", held)
    assert (unchanged, learnt, stopped) == (len(bad), len(bad) + 1, True), said
    assert written == {f"step-{step + 1}" for step in [*bad, steps, steps + 1, steps + 2]}
    assert all(line["reason"] and line["token_ids"] for line in lines)
    assert all(torch.isfinite(p).all() for p in torch.load("run/last.ckpt", weights_only=True)["state_dict"].values())


# ---------------------------------------------------------------------------------------------- row 15: memory

FORWARD, HIDDEN = update.token_logprobs, Decoding.hidden
FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


class Sampled(Reward):
    """Of the tokens themselves, so that a random model has something to learn."""

    def parts(self, trajectory):
        return {"sum": sum(trajectory.token_ids) % 7 / 7}


def whole_step(folder):
    """A module after one step of rollouts without a search and two updates, and its trajectories."""
    spec = RolloutSpec(max_turns=0, max_new_tokens=10, max_length=200, slots=8)
    loss = LossSpec(kl_coef=0.1, importance_cap=1.3)
    module = policy(folder, LoraSpec(r=4), 0.05, loss=loss, rollout=spec, updates_per_rollout=2, micro_batch_tokens=600)
    module.reward = Sampled()
    module.search.submit = lambda requests: None  # There are none.
    module.group_size = 2
    module.training_step([example(i) for i in range(8)], 0)
    return module, [(row.token_ids, row.reward) for row in module.trajectories]


class Full:
    """An allocator that fails at chosen passes: forward or backward ones of an update, or of a rollout."""

    def __init__(self, rng):
        self.calls = {"forward": 0, "backward": 0, "hidden": 0}
        self.at = {"forward": rng.randrange(1, 6), "backward": rng.randrange(1, 4), "hidden": rng.randrange(1, 12)}
        del self.at[rng.choice(["forward", "backward", "hidden"])]

    def reach(self, kind):
        self.calls[kind] += 1
        if self.calls[kind] == self.at.get(kind):
            raise FULL

    def backward(self, gradient):
        self.reach("backward")

    def token_logprobs(self, *arguments):
        logprobs, entropy = FORWARD(*arguments)
        self.reach("forward")
        if logprobs.requires_grad:
            logprobs.register_hook(self.backward)
        return logprobs, entropy

    def hidden(self, decoding, *arguments):
        states = HIDDEN(decoding, *arguments)
        self.reach("hidden")
        return states


def test_memory_that_is_full_halves_the_batch_and_changes_no_update(tiny_folder, monkeypatch, times, figure):
    expected, rows = whole_step(tiny_folder)
    farthest, halved, regrown, trials = 0.0, 0, 0, times(20)
    for seed in range(trials):
        full = Full(random.Random(seed))
        monkeypatch.setattr(update, "token_logprobs", full.token_logprobs)
        monkeypatch.setattr(Decoding, "hidden", lambda *arguments, full=full: full.hidden(*arguments))
        module, found = whole_step(tiny_folder)
        monkeypatch.undo()
        assert found == rows
        assert all(full.calls[kind] >= at for kind, at in full.at.items()), "each of its faults came"
        for name, weight in expected.trainable().items():
            farthest = max(farthest, float((module.trainable()[name] - weight).abs().max()))
        halved += module.fitting.now < 600
        for _ in range(100):
            module.fitting.grows()
        regrown += module.fitting.now == 600
    held = f"{halved} of {trials} halved, the same update within {farthest:.0e}, {regrown} grown back later"
    figure(15, "memory that is full in rollouts, forward and backward passes", held)
    assert (halved, regrown) == (trials, trials)
    assert farthest <= 1e-5
