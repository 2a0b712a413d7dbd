"""Both modules against slow gradients: one unpadded trajectory at a time, all logits, the whole batch's denominator."""

import copy
import random

import lightning as L
import pytest
import torch
from conftest import make_model, make_tokenizer

from zs_lightning.data.datamodule import QADataModule
from zs_lightning.data.sources import MiniatureSource
from zs_lightning.models.loading import LoraSpec, ModelSpec
from zs_lightning.modules import PolicyRL, SimulatorSFT
from zs_lightning.rollout import RolloutSpec
from zs_lightning.search import BM25Search, SearchEngine
from zs_lightning.types import ActionKind, Document, QAExample, SearchRecord, Status, Trajectory, Turn


class NoEngine(SearchEngine):
    """For modules that are updated and never roll out."""

    name = "no engine"

    def submit(self, requests):
        raise AssertionError("nothing should be searched here")

    def poll(self):
        return []


class Detached:
    """What a Trainer gives a module in manual optimisation, without a Trainer."""

    def attach(self, optimizer):
        self.own_optimizer, self.logged = optimizer, {}
        return self

    def optimizers(self, use_pl_optimizer=True):
        return self.own_optimizer

    def lr_schedulers(self):
        return torch.optim.lr_scheduler.ConstantLR(self.own_optimizer, 1.0)

    def manual_backward(self, loss):
        loss.backward()

    def log_dict(self, values, **_):
        self.logged |= values

    def log(self, name, value, **_):
        self.logged[name] = value


class DetachedPolicy(Detached, PolicyRL):
    pass


class DetachedSimulator(Detached, SimulatorSFT):
    pass


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny"
    make_model("qwen3", initializer_range=0.1).save_pretrained(path)
    make_tokenizer("raw").save_pretrained(path)
    return str(path)


def policy(folder, lora=None, lr=1.0, **options):
    """A module with plain SGD and no clipping: its step is lr times the gradient."""
    options = {"max_grad_norm": 0.0, "estimator": "reinforce", "seed": 0, **options}
    module = DetachedPolicy(NoEngine(), model=ModelSpec(path=folder, device="cpu"), lora=lora, **options)
    module.setup("fit")
    move_adapter(module)
    return module.attach(torch.optim.SGD(module.trainable().values(), lr=lr))


def move_adapter(module):
    """A fresh adapter has B = 0: A would get no gradient, and the policy would be the base model."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in module.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05, generator=generator)


def example(i):
    return QAExample(id=str(i), question=f"Who is {i}?", golden_answers=("gold",), source="test")


def random_trajectories(seed, count=7, zero=0):
    rng = random.Random(seed)
    trajectories = []
    for i in range(count):
        length = rng.randint(3, 40)
        mask = [rng.random() < 0.6 for _ in range(length)]
        trajectories.append(
            Trajectory(
                example=example(i),
                sample=0,
                prompt_ids=[rng.randrange(300) for _ in range(rng.randint(1, 12))],
                token_ids=[rng.randrange(300) for _ in range(length)],
                loss_mask=mask,
                old_logprobs=[-6 + rng.gauss(0, 0.5) if m else 0.0 for m in mask],
                advantage=0.0 if i < zero else rng.gauss(0, 2),
            )
        )
    return trajectories


def slow_rows(model, trajectory, temperature):
    """Log-probabilities of the sampled tokens, and those of sampling time; one row, no padding, all logits."""
    ids = trajectory.prompt_ids + trajectory.token_ids
    table = (model(torch.tensor([ids])).logits[0] / temperature).log_softmax(-1)
    places = [len(trajectory.prompt_ids) + k for k, sampled in enumerate(trajectory.loss_mask) if sampled]
    now = torch.stack([table[place - 1, ids[place]] for place in places]) if places else torch.zeros(0)
    return now, torch.tensor([trajectory.old_logprobs[k] for k, sampled in enumerate(trajectory.loss_mask) if sampled])


def slow_gradient(module, trajectories, base=None, kl_coef=0.0, clip=None):
    """By name, from one backward pass over a loss written as loops."""
    tokens = sum(sum(t.loss_mask) for t in trajectories)
    temperature, loss = module.limits.temperature, torch.zeros(())
    for trajectory in trajectories:
        now, old = slow_rows(module.policy, trajectory, temperature)
        for new_logprob, old_logprob in zip(now, old, strict=True):
            if clip is None:
                loss = loss - trajectory.advantage * new_logprob / tokens
            else:
                ratio = (new_logprob - old_logprob).exp()
                # Pessimistic: no gradient where the ratio has gone past the bound in the direction that pays.
                past = ratio > 1 + clip if trajectory.advantage > 0 else ratio < 1 - clip
                loss = loss - (0.0 if past else trajectory.advantage * ratio / tokens)
        if base is not None:
            with torch.no_grad():
                reference, _ = slow_rows(base, trajectory, temperature)
            difference = reference - now
            loss = loss + kl_coef * (difference.exp() - difference - 1).sum() / tokens
    parameters = module.trainable()
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(parameters.items(), gradients, strict=True)}


def step_of(module, trajectories):
    """How far one update moves each weight, against the gradient."""
    before = {name: p.detach().clone() for name, p in module.trainable().items()}
    sums = module.update(trajectories)
    lr = module.own_optimizer.param_groups[0]["lr"]
    return {name: (before[name] - p.detach()) / lr for name, p in module.trainable().items()}, sums


def assert_same(found, expected, atol=1e-5):
    assert found.keys() == expected.keys()
    assert max(float(g.abs().max()) for g in expected.values()) > 100 * atol, "gradients too small to say anything"
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=atol, rtol=1e-4)


TRAINABLE = [None, LoraSpec(r=4)]


# ---------------------------------------------------------------------------------------------- the policy's update


@pytest.mark.parametrize("lora", TRAINABLE)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_an_update_follows_the_slow_gradient(folder, lora, temperature):
    trajectories = random_trajectories(0)
    # A trajectory without any sampled token, and advantages of both signs.
    trajectories[2].loss_mask = [False] * len(trajectories[2].loss_mask)
    module = policy(folder, lora, rollout=RolloutSpec(temperature=temperature))
    expected = slow_gradient(module, trajectories)
    moved, sums = step_of(module, trajectories)
    assert_same(moved, expected)
    norm = sum(float((g**2).sum()) for g in expected.values()) ** 0.5
    assert sums["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert sums["tokens"] == sums["trained_tokens"] == sum(sum(t.loss_mask) for t in trajectories)


@pytest.mark.parametrize("lora", TRAINABLE)
def test_micro_batches_do_not_change_the_gradient(folder, lora):
    trajectories = random_trajectories(1)
    steps = []
    for tokens in (1, 60, 100_000):
        steps.append(step_of(policy(folder, lora, micro_batch_tokens=tokens), trajectories)[0])
    assert_same(steps[1], steps[0])
    assert_same(steps[2], steps[0])


def test_rows_without_signal_are_skipped_and_count_in_the_denominator(folder, monkeypatch):
    trajectories = random_trajectories(2, zero=3)
    module = policy(folder)
    expected = slow_gradient(module, trajectories)
    seen, loss = [], module.loss
    monkeypatch.setattr(module, "loss", lambda batch, *rest: seen.append(len(batch.input_ids)) or loss(batch, *rest))
    moved, _ = step_of(module, trajectories)
    assert sum(seen) == 4
    assert_same(moved, expected)


def test_no_signal_at_all_is_no_step(folder):
    module = policy(folder)
    module.own_optimizer = torch.optim.AdamW(module.trainable().values(), lr=1.0, weight_decay=0.5)
    before = copy.deepcopy(module.state_dict())
    sums = module.update(random_trajectories(3, zero=7))
    assert sums["grad_norm"] == 0.0
    assert all(torch.equal(before[name], p) for name, p in module.trainable().items())


@pytest.mark.parametrize("lora", TRAINABLE)
def test_later_updates_on_a_batch_are_clipped(folder, lora):
    trajectories = random_trajectories(4)
    module = policy(folder, lora, updates_per_rollout=2, clip_low=0.3, clip_high=0.3)
    expected = slow_gradient(module, trajectories, clip=0.3)
    moved, sums = step_of(module, trajectories)
    assert_same(moved, expected)
    assert 0.1 < sums["clip_fraction"] / sums["tokens"] < 0.9


@pytest.mark.parametrize("lora", TRAINABLE)
def test_the_kl_term_follows_the_slow_gradient_and_pulls_to_the_base(folder, lora):
    trajectories = random_trajectories(5, zero=7)
    module, base = policy(folder, lora, kl_coef=0.5, lr=0.5), make_model("qwen3", initializer_range=0.1)
    if lora is None:
        generator = torch.Generator().manual_seed(2)
        for parameter in module.policy.parameters():
            parameter.data += 0.03 * torch.randn(parameter.shape, generator=generator)

    def divergence():
        """KL(policy || base), exactly, over all places of all rows."""
        total = 0.0
        with torch.no_grad():
            for t in trajectories:
                ids = torch.tensor([t.prompt_ids + t.token_ids])
                mine, other = (m(ids).logits.log_softmax(-1) for m in (module.policy, base))
                total += float((mine.exp() * (mine - other)).sum())
        return total

    expected, before = slow_gradient(module, trajectories, base, 0.5), divergence()
    moved, sums = step_of(module, trajectories)
    assert_same(moved, expected)
    assert sums["kl"] > 0
    for _ in range(30):
        module.update(trajectories)
    assert divergence() < 0.97 * before


def test_the_kl_of_an_unchanged_policy_is_zero(folder):
    for lora in TRAINABLE:
        module = DetachedPolicy(NoEngine(), model=ModelSpec(path=folder, device="cpu"), lora=lora, kl_coef=1.0, seed=0)
        module.setup("fit")
        module.attach(torch.optim.SGD(module.trainable().values(), lr=1.0))
        moved, sums = step_of(module, random_trajectories(6, zero=7))
        assert sums["kl"] == pytest.approx(0.0, abs=1e-6)
        assert all(float(step.abs().max()) < 1e-5 for step in moved.values())


def test_gradients_are_clipped_to_the_norm(folder):
    trajectories = random_trajectories(0)
    free, sums = step_of(policy(folder), trajectories)
    clipped, _ = step_of(policy(folder, max_grad_norm=sums["grad_norm"] / 4), trajectories)
    assert_same({name: 4 * step for name, step in clipped.items()}, free)


# ---------------------------------------------------------------------------------------------- judging


def judged(group, status, answer=None):
    kind = ActionKind.ANSWER if answer else ActionKind.INVALID
    turns = [Turn(text="", kind=kind, content=answer or "no_action", span=(0, 1))]
    failure = "no wire" if status is Status.FAILED else None
    return Trajectory(example=example(group), sample=0, prompt_ids=[1], turns=turns, status=status, failure=failure)


def test_failed_trajectories_are_no_ones_baseline_and_not_learnt_from(folder):
    rows = [judged(0, Status.ANSWERED, "gold"), judged(0, Status.ANSWERED, "red"), judged(0, Status.FAILED)]
    rows += [judged(0, Status.TURN_LIMIT), judged(1, Status.ANSWERED, "gold nugget"), judged(1, Status.LENGTH_LIMIT)]
    usable = policy(folder, estimator="grpo_no_std", group_size=3).judge(rows)
    assert usable == [row for row in rows if row.status is not Status.FAILED]
    # Group 0: rewards 1, 0, 0, mean 1/3. Group 1: F1 of "gold nugget" is 2/3, and 0.
    assert [row.advantage for row in usable] == pytest.approx([2 / 3, -1 / 3, -1 / 3, 1 / 3, -1 / 3])
    assert [row.reward for row in usable] == pytest.approx([1, 0, 0, 2 / 3, 0])
    assert (rows[2].reward, rows[2].advantage) == (0.0, 0.0)


def test_too_many_failures_stop_the_run(folder):
    module = policy(folder)
    good = [judged(i, Status.ANSWERED, "gold") for i in range(8)]
    assert len(module.judge([*good, judged(8, Status.FAILED), judged(9, Status.FAILED)])) == 8
    with pytest.raises(RuntimeError, match="no engine failed in 3 of 11 rollouts, for example: no wire"):
        module.judge([*good, *(judged(8 + i, Status.FAILED) for i in range(3))])


# ---------------------------------------------------------------------------------------------- accidents


def test_gradients_that_are_not_finite_change_nothing_and_stop_the_run_after_three(folder):
    module = policy(folder, LoraSpec(r=4), max_grad_norm=1.0)
    module.own_optimizer = torch.optim.AdamW(module.trainable().values(), lr=0.01)
    good, bad = random_trajectories(0), random_trajectories(0)
    bad[0].advantage = float("inf")
    for _ in range(2):
        for _ in range(2):
            before = copy.deepcopy(module.state_dict())
            module.update(bad)
            assert all(torch.equal(before[name], p) for name, p in module.trainable().items())
        # A good step starts the count anew, and is not spoilt by what the bad ones left.
        moved, _ = step_of(module, good)
        assert all(torch.isfinite(step).all() for step in moved.values())
        assert any(step.any() for step in moved.values())
    module.update(bad)
    module.update(bad)
    with pytest.raises(FloatingPointError, match="3 steps in a row"):
        module.update(bad)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_size": 0}, "group_size"),
        ({"updates_per_rollout": 0}, "updates_per_rollout"),
        ({"kl_coef": -0.1}, "kl_coef"),
        ({"estimator": "grpo", "group_size": 1}, "set group_size to 2"),
    ],
)
def test_impossible_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PolicyRL(NoEngine(), **options)


# ---------------------------------------------------------------------------------------------- checkpoints


def test_checkpoints_hold_what_is_trained_and_nothing_else(folder):
    for lora in TRAINABLE:
        module = policy(folder, lora, kl_coef=0.1)
        state = module.state_dict()
        assert set(state) == set(module.trainable())
        assert lora is None or all("lora_" in name for name in state)
        other = policy(folder, lora, kl_coef=0.1, seed=5)
        for parameter in other.trainable().values():
            parameter.data += 1
        other.on_load_checkpoint({"state_dict": state, "rollout_step": 7})
        other.load_state_dict(state, strict=other.strict_loading)
        ids = torch.arange(20)[None]
        assert torch.equal(other.policy(ids).logits, module.policy(ids).logits)
        assert other.rollout_step == 7


def test_checkpoints_of_another_config_are_refused(folder):
    states = {r: policy(folder, r and LoraSpec(r=r)).state_dict() for r in (None, 4, 8)}
    for mine in states:
        for other, state in states.items():
            module = policy(folder, mine and LoraSpec(r=mine))
            if mine == other:
                module.on_load_checkpoint({"state_dict": state})
                continue
            with pytest.raises(ValueError, match="use the config that the checkpoint was trained with"):
                module.on_load_checkpoint({"state_dict": state})


# ---------------------------------------------------------------------------------------------- whole steps


def trained(updates):
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
        kl_coef=0.01,
        optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3),
        warmup_steps=0,
    )
    trainer = L.Trainer(
        accelerator="cpu",
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
    seconds = {name for name in metrics if name.startswith("seconds/")}
    assert {n: v for n, v in metrics.items() if n not in seconds} == {n: v for n, v in repeated.items() if n not in seconds}
    assert all(torch.equal(p, again.trainable()[name]) for name, p in module.trainable().items())
    # Sampled and trained distribution are the same in the first update: dropout, padding and the memory do not show.
    assert metrics["policy/sampling_gap"] < 1e-4
    assert metrics["policy/clip_fraction"] == 0.0
    assert metrics["policy/grad_norm"] > 0
    assert len(module.trajectories) == 12
    assert all(len({t.group_id for t in module.trajectories[i : i + 4]}) == 1 for i in (0, 4, 8))


def test_a_second_update_on_a_batch_is_off_policy():
    _, metrics = trained(2)
    assert metrics["policy/sampling_gap"] > 1e-3


# ---------------------------------------------------------------------------------------------- simulator


def records():
    rows = []
    for i in range(4):
        documents = tuple(Document(text=f"The Red Harbor author Foo {'Bar ' * (i + k)}.") for k in range(1 + i % 3))
        asked = QAExample(id=str(i), question="Who is it?" * (i + 1), golden_answers=("Foo", "Bar"), source="test")
        rows.append(SearchRecord(example=asked, query="author " * (i + 1) + "x", noisy=i % 2 == 1, documents=documents))
    return rows


def sft():
    module = DetachedSimulator(
        model=ModelSpec(device="cpu"), lora=LoraSpec(r=4), prompts="miniature", max_grad_norm=0.0, seed=0
    )
    module.setup("fit")
    move_adapter(module)
    return module.attach(torch.optim.SGD(module.trainable().values(), lr=1.0))


def slow_sft_loss(module, rows):
    """Mean over all target tokens of the batch; the whole text is tokenised at once, the prompt carries no loss."""
    losses = []
    for row in rows:
        answers = ", ".join(row.example.golden_answers)
        prompt = (
            f"<question> {row.example.question}</question><answer> {answers}</answer><search> {row.query}</search>"
            f"<think> {'noisy' if row.noisy else 'useful'}</think><information>"
        )
        target = "".join(f" Doc {i}: {d.text}" for i, d in enumerate(row.documents, 1)) + "</information>"
        start = len(module.tokenizer(prompt)["input_ids"])
        ids = module.tokenizer(prompt + target)["input_ids"]
        table = module.language_model(torch.tensor([ids])).logits[0].log_softmax(-1)
        losses += [-table[place - 1, ids[place]] for place in range(start, len(ids))]
    return torch.stack(losses).mean(), len(losses)


def test_fine_tuning_follows_the_slow_gradient_and_masks_the_prompt():
    module, rows = sft(), records()
    expected_loss, tokens = slow_sft_loss(module, rows)
    parameters = module.trainable()
    gradients = torch.autograd.grad(expected_loss, list(parameters.values()))
    before = {name: p.detach().clone() for name, p in parameters.items()}
    module.training_step(rows, 0)
    assert float(module.logged["sft/loss"]) == pytest.approx(float(expected_loss), abs=1e-5)
    assert module.logged["sft/tokens"] == tokens
    moved = {name: before[name] - p.detach() for name, p in parameters.items()}
    assert_same(moved, dict(zip(parameters, gradients, strict=True)))


def test_fine_tuning_lowers_the_loss_and_can_write_what_it_learnt():
    module, rows = sft(), MiniatureSource().search_records("train", 2)
    module.own_optimizer = torch.optim.AdamW(module.trainable().values(), lr=0.02)
    for _ in range(40):
        module.training_step(rows, 0)
    assert float(module.logged["sft/loss"]) < 0.1
    module.language_model.eval()
    module.simulator.max_new_tokens = 30
    module.simulator.submit([module._request(row, str(i), float(row.noisy)) for i, row in enumerate(rows)])
    written = {result.key: result for result in module.simulator.poll()}
    for i, row in enumerate(rows):
        assert written[str(i)].noisy is row.noisy
        assert [d.text for d in written[str(i)].documents] == [" ".join(d.text.split()) for d in row.documents]
