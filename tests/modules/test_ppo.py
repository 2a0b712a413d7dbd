"""PPO on the real module: its update against slow gradients, and what the critic must not touch."""

import math

import pytest
import torch

from support.detached import NoEngine, assert_same, slow_rows, step, step_of
from support.ppo import GAMMA, LAM, policy, rollouts
from support.slow_gae import by_definition
from zs_lightning.errors import NotFiniteError
from zs_lightning.models.loading import load_model
from zs_lightning.models.specs import LoraSpec, ModelSpec
from zs_lightning.models.value_head import of_critic
from zs_lightning.modules import PolicyRL
from zs_lightning.modules.critic import CriticSpec
from zs_lightning.rl.losses import LossSpec
from zs_lightning.rollout import RolloutSpec, collate
from zs_lightning.search import SimulatorSearch


def prepared(rows, **options):
    """A module, and the rows as it updates on them."""
    module = policy(**options)
    return module, module.update.prepare(rows, "cpu")


def slow_values(module, row):
    """[sampled tokens]: the head on the last hidden state before each, one unpadded row; the critic's adapter must be on."""
    ids = torch.tensor([row.prompt_ids + row.token_ids])
    states = module.policy(ids, output_hidden_states=True).hidden_states[-1][0]
    places = [len(row.prompt_ids) + k - 1 for k, sampled in enumerate(row.loss_mask) if sampled]
    return torch.stack([states[place] @ module.critic.model.weight for place in places]) if places else torch.zeros(0)


def slow_update(module, rows, clip=None):
    """Gradients by name, explained variance and each row's advantage, from loops; leaves the module with other adapters on."""
    names = list(module.trainable())
    module.policy.set_adapter("critic")
    values = [slow_values(module, row) for row in rows]
    masks = [[True] * len(row) for row in values]
    advantages = by_definition([v.tolist() for v in values], [r.reward for r in rows], masks, GAMMA, LAM).float()
    flat = torch.cat(values)
    returns, tokens = advantages + flat.detach(), len(flat)
    critic_loss = 0.5 * ((flat - returns) ** 2).mean()
    weights = dict(module.named_parameters())
    mine = [name for name in names if of_critic(name)]
    gradients = dict(zip(mine, torch.autograd.grad(critic_loss, [weights[n] for n in mine]), strict=True))
    whitened = (advantages - advantages.mean()) / (advantages.var() + 1e-8).sqrt()
    module.policy.set_adapter("default")
    loss, start, means = torch.zeros(()), 0, []
    for row, own in zip(rows, values, strict=True):
        now, then = slow_rows(module.policy, row, 1.0)
        part, start = whitened[start : start + len(own)], start + len(own)
        means.append(float(part.mean()) if len(part) else 0.0)
        for logprob, old, advantage in zip(now, then, part, strict=True):
            ratio = (logprob - old).exp()
            past = clip is not None and (ratio > 1 + clip if advantage > 0 else ratio < 1 - clip)
            if clip is None:
                loss = loss - advantage * logprob / tokens
            elif not past:
                loss = loss - advantage * ratio / tokens
    others = [name for name in names if not of_critic(name)]
    gradients |= dict(zip(others, torch.autograd.grad(loss, [weights[n] for n in others]), strict=True))
    explained = 1 - float(advantages.var() / returns.var())
    return {name: gradients[name] for name in names}, explained, means


@pytest.mark.parametrize("clip", [None, 0.2])
def test_an_update_follows_the_slow_gradient(clip):
    rows = rollouts(0)
    expected, explained, means = slow_update(policy(), rows, clip)
    options = {} if clip is None else {"updates_per_rollout": 2, "loss": LossSpec(clip_low=clip, clip_high=clip)}
    module, batch = prepared(rows, micro_batch_tokens=1 if clip is None else 90, **options)
    moved, sums = step_of(module, batch)
    assert_same(moved, expected)
    assert batch.metrics["critic/explained_variance"] == pytest.approx(explained, abs=1e-5)
    assert [row.advantage for row in rows] == pytest.approx(means, abs=1e-5)
    for kind, norm in (("grad_norm", sums["grad_norm"]), ("value_grad_norm", sums["value_grad_norm"])):
        own = [g for name, g in expected.items() if of_critic(name) == (kind != "grad_norm")]
        assert norm == pytest.approx(math.sqrt(sum(float((g**2).sum()) for g in own)), rel=1e-4)


def test_micro_batches_do_not_change_the_gradient():
    """In the second update, with clips of both, KL, and other lengths in each micro-batch."""
    rows, steps = rollouts(1), []
    options = {"updates_per_rollout": 2, "loss": LossSpec(clip_low=0.05, clip_high=0.1, kl_coef=0.1)}
    options["critic"] = CriticSpec(gamma=GAMMA, lam=LAM, clip=0.002)
    for tokens in (1, 90, 100_000):
        module = policy(lr=0.02, micro_batch_tokens=tokens, **options)
        module.double()  # In float32 the order of sums is seen in the fifth digit.
        batch = module.update.prepare(rows, "cpu")
        step(module, batch)
        moved, sums = step_of(module, batch)
        steps.append(moved)
        assert sums["value_clipped"] > 0
        assert sums["clip_fraction"] > 0
    assert_same(steps[1], steps[0])
    assert_same(steps[2], steps[0])


def test_passes_before_the_first_update_are_signs_of_life():
    module, told = policy(loss=LossSpec(kl_coef=0.1), micro_batch_tokens=80), []
    module.update.tell = lambda *said: told.append(said)
    passes = len(module.update.prepare(rollouts(1), "cpu").batches)
    assert passes > 2
    expected = [("values", n, passes, 0) for n in range(passes)] + [("reference", n, passes, 0) for n in range(passes)]
    assert told == expected


def test_values_are_those_before_the_first_update():
    """A second update has the targets of the first, although the critic has moved."""
    rows = rollouts(2)
    module, whole = prepared(rows, lr=0.01, updates_per_rollout=2)
    before = [batch.advantages.clone() for batch in whole.batches]
    first, second = step(module, whole), step(module, whole)
    assert second["value_loss"] < first["value_loss"]
    assert all(torch.equal(a, batch.advantages) for a, batch in zip(before, whole.batches, strict=True))


def test_recomputed_activations_are_the_critics_own():
    """The backward pass computes the layers again: with the adapter that is on then."""
    rows, steps = rollouts(3), []
    for checkpointing in (False, True):
        steps.append(step_of(*prepared(rows, checkpointing=checkpointing, loss=LossSpec(kl_coef=0.1)))[0])
    assert_same(steps[1], steps[0])


def test_gradients_are_clipped_apart():
    rows = rollouts(4)
    free, sums = step_of(*prepared(rows))
    most = sums["grad_norm"] / 4
    clipped, _ = step_of(*prepared(rows, max_grad_norm=most))
    shares = {True: min(1.0, most / sums["value_grad_norm"]), False: 0.25}
    assert shares[True] != pytest.approx(0.25, rel=0.1)
    assert_same(clipped, {name: shares[of_critic(name)] * step for name, step in free.items()})


def test_a_gradient_of_the_critic_that_is_not_finite_drops_the_step():
    rows = rollouts(5)
    module, whole = prepared(rows)
    whole.batches[0].returns[0] = math.nan
    before = [p.detach().clone() for p in module.trainable().values()]
    with pytest.raises(NotFiniteError, match="the loss was not finite"):
        step(module, whole)
    assert all(torch.equal(p, old) for p, old in zip(module.trainable().values(), before, strict=True))


# ---------------------------------------------------------------------------------------------- the adapter


def test_the_same_weights_are_trained_after_every_switch():
    module = policy(loss=LossSpec(kl_coef=0.1))
    names, ids = set(module.trainable()), torch.arange(20)[None]
    assert len(names) == 2 * 56 + 1, "both halves of two adapters on 28 layers, and the head"
    before = module.policy(ids).logits
    with module.critic.model.in_use():
        assert set(module.trainable()) == names
        assert not torch.allclose(module.policy(ids).logits, before, atol=1e-3)
    assert set(module.trainable()) == names
    assert torch.equal(module.policy(ids).logits, before)


def test_values_are_precise_whatever_the_forward_pass_is_in():
    module = policy()
    batch = collate(rollouts(6), 0)
    with module.critic.model.in_use(), torch.autocast("cpu", torch.bfloat16):
        assert module.critic.model(batch.input_ids, batch.loss_mask).dtype == torch.float32


def test_the_same_weights_are_trained_after_a_reference_pass():
    module, rows = policy(loss=LossSpec(kl_coef=0.1)), rollouts(6)
    names = set(module.trainable())
    module.update.reference_logprobs(collate(rows, 0))
    assert set(module.trainable()) == names


SHORT = RolloutSpec(max_length=640)


def test_a_fresh_critic_says_zero_and_draws_from_no_stream_of_others():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    made = {}
    for estimator in ("reinforce", "ppo"):
        module = PolicyRL(
            NoEngine(), model=ModelSpec(device="cpu"), lora=LoraSpec(r=4), estimator=estimator, seed=0, rollout=SHORT
        )
        module.setup("fit")
        made[estimator] = module
    assert torch.equal(torch.get_rng_state(), state)
    plain, ppo = made["reinforce"].trainable(), made["ppo"].trainable()
    assert all(torch.equal(weight, ppo[name]) for name, weight in plain.items())
    assert {name for name in ppo if not of_critic(name)} == set(plain)
    own = {name.replace("critic", "default"): weight for name, weight in ppo.items() if "lora_A" in name and of_critic(name)}
    assert not any(torch.equal(weight, plain[name]) for name, weight in own.items()), "a stream of its own"
    batch = collate(rollouts(7), 0)
    with made["ppo"].critic.model.in_use():
        assert not made["ppo"].critic.model(batch.input_ids, batch.loss_mask).any()


def test_a_module_that_was_trained_is_tested_with_its_own_checkpoint():
    """Its critic is there, so its weights are wanted; a module that was made for a test has none and drops them."""
    module = policy()
    state = {name: parameter.detach().clone() for name, parameter in module.trainable().items()}
    module.setup("test")
    module.on_load_checkpoint({"state_dict": state})
    assert module.critic is not None


def test_a_simulator_on_the_same_base_stays_frozen(tmp_path):
    from zs_lightning.models.lora import add_lora

    add_lora(load_model(ModelSpec(device="cpu")), LoraSpec(r=2), 0).save_pretrained(tmp_path)
    module = PolicyRL(
        SimulatorSearch(model=ModelSpec(path="policy", adapter=str(tmp_path)), prompts="miniature", max_length=640),
        model=ModelSpec(device="cpu"),
        prompts="miniature",
        lora=LoraSpec(r=4),
        estimator="ppo",
        rollout=SHORT,
        seed=0,
    )
    module.setup("fit")
    names = set(module.trainable())
    assert len(names) == 113
    assert not any("simulator" in name for name in names)
    with module.actor.generating() as generator:
        assert generator.adapters.names == ["default", "simulator"]
    with module.critic.model.in_use():
        pass
    assert set(module.trainable()) == names


def test_without_an_adapter_there_is_no_critic():
    with pytest.raises(ValueError, match=r"^model: estimator ppo has its critic on the policy's base model, .* set lora"):
        PolicyRL(NoEngine(), lora=None, estimator="ppo")
