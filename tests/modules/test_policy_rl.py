"""The policy's module around its update: judging, settings, checkpoints and whole steps."""

import lightning as L
import pytest
import torch

from support.detached import TRAINABLE, NoEngine, judged, policy
from zs_lightning.data.datamodule import QADataModule
from zs_lightning.models.specs import LoraSpec, ModelSpec
from zs_lightning.modules import PolicyRL
from zs_lightning.modules.update import Update
from zs_lightning.rl.losses import LossSpec
from zs_lightning.rl.rewards import AnswerReward
from zs_lightning.rollout import RolloutSpec
from zs_lightning.runs.outcomes import Outcome
from zs_lightning.search import BM25Search
from zs_lightning.types import ActionKind, Status, Turn

# ---------------------------------------------------------------------------------------------- judging


def test_failed_trajectories_are_no_ones_baseline_and_not_learnt_from(tiny_folder):
    rows = [judged(0, Status.ANSWERED, "gold"), judged(0, Status.ANSWERED, "red"), judged(0, Status.FAILED)]
    rows += [judged(0, Status.TURN_LIMIT), judged(1, Status.ANSWERED, "gold nugget"), judged(1, Status.LENGTH_LIMIT)]
    module = policy(tiny_folder, estimator="grpo_no_std", group_size=3)
    usable = module.judge(rows)
    module.update.prepare(usable, "cpu")
    assert usable == [row for row in rows if row.status is not Status.FAILED]
    # Group 0: rewards 1, 0, 0, mean 1/3. Group 1: F1 of "gold nugget" is 2/3, and 0.
    assert [row.advantage for row in usable] == pytest.approx([2 / 3, -1 / 3, -1 / 3, 1 / 3, -1 / 3])
    assert [row.reward for row in usable] == pytest.approx([1, 0, 0, 2 / 3, 0])
    assert (rows[2].reward, rows[2].advantage) == (0.0, 0.0)


def test_too_many_failures_stop_the_run(tiny_folder):
    module = policy(tiny_folder)
    good = [judged(i, Status.ANSWERED, "gold") for i in range(8)]
    assert len(module.judge([*good, judged(8, Status.FAILED), judged(9, Status.FAILED)])) == 8
    with pytest.raises(RuntimeError, match=r"^3 of 11 rollouts failed \(.* is no engine\), for example: no wire; repair"):
        module.judge([*good, *(judged(8 + i, Status.FAILED) for i in range(3))])


def test_a_search_of_the_environment_earns_and_costs_nothing(tiny_folder):
    """As `rollout.retrieve_first` makes one: no turn of the policy, but its words have been searched."""
    opening = Turn(text="", kind=ActionKind.SEARCH, content="Who is it?", span=(0, 0), observation_span=(0, 4))
    again = Turn(text="x", kind=ActionKind.SEARCH, content="who is it", span=(4, 5), observation_span=(5, 6))
    rows = [judged(0, Status.TURN_LIMIT), judged(1, Status.ANSWERED, "gold"), judged(2, Status.LENGTH_LIMIT)]
    rows[0].turns, rows[1].turns, rows[2].turns = [opening, *rows[0].turns], [opening, again, *rows[1].turns], [opening]
    policy(tiny_folder, reward=AnswerReward("f1", 0.5, repeat_cost=0.2, search_cost=0.1)).judge(rows)
    assert [row.reward_parts["format"] for row in rows] == [0.0, 0.5, 0.0]
    assert [row.reward_parts["searches"] for row in rows] == pytest.approx([0.0, -0.1, 0.0])
    assert [row.reward_parts["repeats"] for row in rows] == pytest.approx([0.0, -0.2, 0.0])
    assert [(Outcome.of(row).turns, Outcome.of(row).searches) for row in rows] == [(1, 1), (2, 2), (0, 1)]


# ---------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_size": 0}, "group_size"),
        ({"updates_per_rollout": 0}, "updates_per_rollout"),
        ({"estimator": "my_estimators.mine"}, "there is no my_estimators.mine; expected one of reinforce, "),
        ({"noise_prob": -0.1}, r"model\.noise_prob"),
        ({"estimator": "grpo", "group_size": 1}, "set group_size to 2"),
        ({"rollout": RolloutSpec(clean_share=0.1), "group_size": 4}, r"0\.1 of a group of 4 is 0 .* or from 0\.25 to 0\.75,"),
        ({"rollout": RolloutSpec(clean_share=0.9), "group_size": 4}, r"clean_share: 0\.9 of a group of 4 is 4 rollouts"),
        ({"rollout": RolloutSpec(clean_share=0.5), "group_size": 1}, r"is 0 rollouts; expected 0 or 1, or set"),
    ],
)
def test_impossible_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PolicyRL(NoEngine(), **options)


def test_impossible_rewards_and_losses_are_refused():
    for options, message in (
        ({"format_weight": 1.5}, r"reward\.format_weight: expected a number from 0 to 1; got 1\.5"),
        ({"format_weight": float("nan")}, r"reward\.format_weight"),
        ({"repeat_cost": -0.1}, r"reward\.repeat_cost: expected 0 or more"),
        ({"search_cost": -0.1}, r"reward\.search_cost: expected 0 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            AnswerReward(**options)
    for name in ("kl_coef", "clip_low", "clip_high", "likelihood_coef"):
        with pytest.raises(ValueError, match=rf"loss\.{name}: expected 0 or more; got -0\.1"):
            LossSpec(**{name: -0.1})


# ---------------------------------------------------------------------------------------------- checkpoints


def test_checkpoints_hold_what_is_trained_and_nothing_else(tiny_folder):
    for lora in TRAINABLE:
        module = policy(tiny_folder, lora, loss=LossSpec(kl_coef=0.1))
        state = module.state_dict()
        assert set(state) == set(module.trainable())
        assert lora is None or all("lora_" in name for name in state)
        other = policy(tiny_folder, lora, loss=LossSpec(kl_coef=0.1), seed=5)
        for parameter in other.trainable().values():
            parameter.data += 1
        other.on_load_checkpoint({"state_dict": state, "rollout_step": 7})
        other.load_state_dict(state, strict=other.strict_loading)
        ids = torch.arange(20)[None]
        assert torch.equal(other.policy(ids).logits, module.policy(ids).logits)
        assert other.rollout_step == 7


def test_checkpoints_of_another_config_are_refused(tiny_folder):
    states = {r: policy(tiny_folder, r and LoraSpec(r=r)).state_dict() for r in (None, 4, 8)}
    for mine in states:
        for other, state in states.items():
            module = policy(tiny_folder, mine and LoraSpec(r=mine))
            if mine == other:
                module.on_load_checkpoint({"state_dict": state})
                continue
            with pytest.raises(ValueError, match="use the config that the checkpoint was trained with"):
                module.on_load_checkpoint({"state_dict": state})


# ---------------------------------------------------------------------------------------------- whole steps


def trained(updates, precision="32-true"):
    L.seed_everything(0, verbose=False)
    module = PolicyRL(
        BM25Search(count=1),
        model=ModelSpec(device="cpu"),
        prompts="miniature",
        lora=LoraSpec(r=4),
        rollout=RolloutSpec(max_turns=2, max_new_tokens=24, max_observation_tokens=30, max_length=200, slots=6),
        estimator="reinforce_baseline",
        group_size=4,
        updates_per_rollout=updates,
        loss=LossSpec(kl_coef=0.01),
        optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3),
        warmup_steps=0,
    )
    trainer = L.Trainer(
        accelerator="cpu",
        precision=precision,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
    )
    trainer.fit(module, QADataModule(batch_size=3, steps=2))
    return module, {name: float(value) for name, value in trainer.callback_metrics.items()}


def test_training_steps_repeat_exactly_and_log_what_they_did():
    module, metrics = trained(1)
    again, repeated = trained(1)
    assert module.rollout_step == 2
    # What the machine makes of it is no function of the seed: `memory/` is that of the whole process.
    machine = {name for name in metrics if name.startswith(("seconds/", "memory/"))}
    assert metrics.keys() == repeated.keys()
    assert {n: v for n, v in metrics.items() if n not in machine} == {n: v for n, v in repeated.items() if n not in machine}
    assert all(torch.equal(p, again.trainable()[name]) for name, p in module.trainable().items())
    # Sampled and trained distribution are the same in the first update: dropout, padding and the memory do not show.
    assert metrics["policy/sampling_gap"] < 1e-4
    assert metrics["clip_ratio"] == 0.0
    assert metrics["grad_norm"] > 0
    assert len(module.trajectories) == 12
    assert all(len({t.group_id for t in module.trajectories[i : i + 4]}) == 1 for i in (0, 4, 8))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_second_update_on_a_batch_is_off_policy(precision, monkeypatch):
    """Also where the weights are cast: a cast that were kept from the first update would make the second one its equal."""
    sums, update = [], Update.step
    monkeypatch.setattr(Update, "step", lambda *args: sums.append(update(*args)) or sums[-1])
    module, metrics = trained(2, precision)
    for first, second in zip(sums[::2], sums[1::2], strict=True):
        assert first["sampling_gap"] != second["sampling_gap"]
    assert metrics["policy/sampling_gap"] > 1e-3
    assert all(p.any() for name, p in module.trainable().items() if "lora_B" in name)
