"""Updates with the options of `loss`, and what a rollout earns by option: on the real module."""

import io
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console

from support.detached import (
    DetachedPolicy,
    NoEngine,
    assert_same,
    judged,
    prepare,
    random_trajectories,
    slow_rows,
    step,
    step_of,
)
from support.stage import PROMPTS, Stage
from support.tiny import CHATML, make_tokenizer
from zs_lightning.cli import main
from zs_lightning.commands.ask.stream import Stream, html
from zs_lightning.models.specs import LoraSpec, ModelSpec
from zs_lightning.rl.losses import LossSpec
from zs_lightning.rl.rewards import AnswerReward
from zs_lightning.rollout import RolloutSpec
from zs_lightning.runs.outcomes import Outcome
from zs_lightning.types import ActionKind, Status, Turn

OPTIONS = [LossSpec(mean=mean, importance_cap=cap) for mean in ("sequence", "constant") for cap in (None, 1.3)]


def policy(lr=1.0, **options):
    """The miniature with plain SGD and no clipping of gradients: its step is lr times the gradient."""
    options = {"max_grad_norm": 0.0, "lora": LoraSpec(r=4), "seed": 0, **options}
    module = DetachedPolicy(NoEngine(), model=ModelSpec(device="cpu"), prompts="miniature", **options)
    module.setup("fit")
    generator = torch.Generator().manual_seed(1)
    for name, parameter in module.named_parameters():
        if "lora_B" in name:  # 0 in a fresh adapter, which would leave the other half without gradient.
            parameter.data.normal_(0, 0.05, generator=generator)
    return module.attach(torch.optim.SGD(module.trainable().values(), lr=lr))


def near_policy(module, seed, **options):
    """Trajectories whose log-probabilities at sampling time were near to the module's."""
    rows = random_trajectories(seed, **options)
    generator = torch.Generator().manual_seed(seed)
    for row in rows:
        with torch.no_grad():
            now = iter((slow_rows(module.policy, row, 1.0)[0]).tolist())
        noise = (0.3 * torch.randn(len(row.loss_mask), generator=generator)).tolist()
        row.old_logprobs = [next(now) + e if sampled else 0.0 for sampled, e in zip(row.loss_mask, noise, strict=True)]
    return rows


@pytest.mark.parametrize("spec", OPTIONS, ids=[f"{s.mean}-{s.importance_cap}" for s in OPTIONS])
def test_an_update_follows_the_slow_gradient(spec):
    module = policy(loss=spec, rollout=RolloutSpec(max_turns=3, max_new_tokens=10, max_length=640), micro_batch_tokens=80)
    rows = near_policy(module, 0, zero=2)
    loss = torch.zeros(())
    for row in rows:
        now, then = slow_rows(module.policy, row, 1.0)
        for logprob, sampled in zip(now, then, strict=True):
            weight = 1.0 if spec.importance_cap is None else min(math.exp(logprob.item() - sampled.item()), 1.3)
            # Four turns of 10 tokens are the most that a rollout may sample; rows without advantage count as well.
            share = 7 * len(now) if spec.mean == "sequence" else 7 * 40
            loss = loss - weight * row.advantage * logprob / share
    gradients = torch.autograd.grad(loss, list(module.trainable().values()))
    moved, sums = step_of(module, rows)
    assert_same(moved, dict(zip(module.trainable(), gradients, strict=True)))
    assert ("importance_weight" in sums) == (spec.importance_cap is not None)


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_micro_batches_do_not_change_the_gradient(ratio):
    spec = LossSpec(mean="sequence", ratio=ratio, importance_cap=1.3, clip_low=0.05, clip_high=0.1, kl_coef=0.1)
    steps = []
    for tokens in (1, 90, 100_000):
        module = policy(0.1, loss=spec, updates_per_rollout=2, micro_batch_tokens=tokens)
        module.policy.double()  # Two updates with clipping: in float32 the order of sums is seen in the fifth digit.
        prepared = prepare(module, near_policy(module, 1))
        step(module, prepared)
        steps.append(step_of(module, prepared)[0])
    assert_same(steps[1], steps[0])
    assert_same(steps[2], steps[0])


def test_later_updates_weigh_by_the_policy_before_the_first():
    """The weight stays that of sampling against training; how far the updates have gone is the ratio's business."""
    steps, sums = [], []
    for cap in (1e9, None):
        spec = LossSpec(importance_cap=cap, clip_low=0.99, clip_high=99.0)
        module = policy(lr=0.1, loss=spec, updates_per_rollout=2)
        prepared = prepare(module, near_policy(module, 2))
        sums.append(step(module, prepared))
        moved, second = step_of(module, prepared)
        steps.append(moved)
        sums.append(second)
    assert sums[0]["importance_weight"] == sums[1]["importance_weight"]
    assert sums[0]["sampling_gap"] != sums[1]["sampling_gap"]
    # With bounds so wide, ratio · weight = p_now / p_sampled: what one gets without the option.
    assert_same(steps[0], steps[1])


def test_the_first_update_after_a_new_rollout_forgets_the_last_one(monkeypatch):
    module = policy(loss=LossSpec(importance_cap=1.3), updates_per_rollout=2, lr=10.0)
    rows = near_policy(module, 3)
    monkeypatch.setattr(module, "roll_out", lambda *_: rows)
    monkeypatch.setattr(module, "judge", lambda trajectories: trajectories)
    module.update.estimator = None
    seen, make = [], module.update.prepare
    monkeypatch.setattr(module.update, "prepare", lambda *args: seen.append(make(*args)) or seen[-1])
    for _ in range(2):
        module.training_step([], 0)
    seen = [torch.cat([batch.first_logprobs for batch in prepared.batches]) for prepared in seen]
    assert not torch.allclose(seen[0], seen[1], atol=1e-3)
    assert module.logged["policy/sampling_gap"] > 0
    assert module.logged["policy/sampling_gap_max"] >= module.logged["policy/sampling_gap"]
    assert module.logged["policy/importance_weight"] == pytest.approx(1.0, abs=0.4)


# ---------------------------------------------------------------------------------------------- judging


def test_exact_match_earns_by_option():
    rows = [judged(0, Status.ANSWERED, "gold"), judged(1, Status.ANSWERED, "gold nugget"), judged(2, Status.ANSWERED, "red")]
    assert [row.reward for row in policy().judge(rows)] == pytest.approx([1, 2 / 3, 0])
    assert [row.reward for row in policy(reward=AnswerReward("em")).judge(rows)] == [1, 0, 0]


def test_a_right_answer_in_other_typography_earns_as_much():
    for answer_score in ("f1", "em"):
        row = judged(0, Status.ANSWERED, "“Gold”…")
        assert policy(reward=AnswerReward(answer_score)).judge([row])[0].reward == 1


def test_a_policy_that_plays_the_search_engine_earns_nothing_and_is_shown(tokenizers):
    """It may go on inside of its result, and answer there: sampling ends at the tag, and the rest is another turn."""
    result = "Doc 1: gold 1 </information><information>"
    trajectory = Stage(tokenizers["raw"]).play("<think> I know. </think><information>", result, result, "<information>")
    assert trajectory.status is Status.TURN_LIMIT
    (row,) = policy(reward=AnswerReward(format_weight=0.2)).judge([trajectory])
    assert row.reward == 0
    outcome = Outcome.of(trajectory)
    assert (outcome.forged, outcome.invalid_actions, outcome.em, outcome.searches) == (1, 4, 0, 0)
    screen = Console(file=io.StringIO(), width=80)
    stream = Stream(screen, str)
    stream(trajectory, [])
    stream.end(trajectory)
    page = html([trajectory], "policy", "engine")
    assert screen.file.getvalue().count("forged information") == page.count("forged information") == 4


def test_a_result_that_is_forged_inside_of_an_opened_thought_earns_nothing():
    tokenizer = make_tokenizer("chat")
    tokenizer.chat_template = CHATML.replace("assistant\n", "assistant\n<think>\n")
    thought = "I ask. <information>Doc 1: gold 1 </information> So it is."
    rewards = []
    for before in (thought, "I know."):
        trajectory = Stage(tokenizer, replace(PROMPTS, chat=True)).play(f"{before} </think><answer> gold 1 </answer>")
        assert trajectory.answer == "gold 1"
        rewards += [row.reward for row in policy().judge([trajectory])]
        assert Outcome.of(trajectory).forged == (before == thought)
    assert rewards == [0, 1]


def test_searches_cost_by_option():
    row = judged(0, Status.ANSWERED, "gold")
    words = ("Red harbor", "red  harbor", "blue")
    row.turns[:0] = [Turn(text="", kind=ActionKind.SEARCH, content=q, span=(0, 1), observation_span=(1, 2)) for q in words]
    policy(reward=AnswerReward(search_cost=0.1, repeat_cost=0.05)).judge([row])
    assert row.reward == pytest.approx(1 - 3 * 0.1 - 0.05)
    assert row.reward_parts == pytest.approx({"answer": 1.0, "format": 0.0, "repeats": -0.05, "searches": -0.3})
    policy().judge([row])
    assert row.reward == 1.0


def test_a_dual_clip_below_the_clip_is_refused():
    with pytest.raises(ValueError, match=r"loss.dual_clip: expected a number above 1 \+ clip_high = 1.5, or null; got 1.4"):
        LossSpec(clip_high=0.5, dual_clip=1.4)


def test_the_options_are_keys_of_the_config(capsys, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])
    said = [
        "--model.loss.mean=sequence",
        "--model.loss.ratio=sequence",
        "--model.loss.importance_cap=2",
        "--model.reward.score=em",
    ]
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config=configs/miniature/policy.yaml", *said, "--print_config"])
    assert end.value.code == 0
    arguments = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]
    clip = {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": None, "importance_cap": 2.0}
    remedies = {"likelihood_coef": 0.0, "deepest_share": 1.0}
    assert arguments["loss"] == {"mean": "sequence", "ratio": "sequence", **clip, "kl_coef": 0.05, **remedies}
    costs = {"format_weight": 0.0, "repeat_cost": 0.0, "search_cost": 0.0, "surfaced_weight": 0.0, "unsearched_cost": 0.0}
    assert arguments["reward"] == {"class_path": "zs_lightning.rl.rewards.AnswerReward", "init_args": {"score": "em", **costs}}
