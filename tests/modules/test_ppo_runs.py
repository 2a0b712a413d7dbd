"""Whole runs of PPO on the miniature: what they learn, leave and log, and how they go on."""

import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from support.commandline import tensors
from support.detached import NoEngine
from support.ppo import policy, rollouts
from zs_lightning.cli import main
from zs_lightning.commands.estimate.job import job_of
from zs_lightning.commands.estimate.memory import plan
from zs_lightning.models.specs import LoraSpec, ModelSpec
from zs_lightning.models.value_head import of_critic
from zs_lightning.modules import PolicyRL
from zs_lightning.modules.critic import CriticSpec
from zs_lightning.rollout import RolloutSpec

pytestmark = pytest.mark.usefixtures("environment")

CONFIGS = Path(__file__).parents[2] / "configs" / "miniature"
TEST = [f"--config={CONFIGS / 'test.yaml'}", "--model.lora.r=2", "--model.lora.alpha=8", "--data.test_rows=4"]
SMALL = [
    f"--config={CONFIGS / 'policy.yaml'}",
    "--model.search=BM25Search",
    "--data.batch_size=2",
    "--data.steps=2",
    "--model.group_size=2",
    "--model.lora.r=2",
    "--model.lora.alpha=8",
    "--model.reward.format_weight=0.5",
    "--model.updates_per_rollout=2",
    "--run.save_every=1",
]
PPO = [*SMALL, "--model.estimator=ppo", "--model.critic.lr=1e-3", "--model.critic.warmup_steps=0"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Run folder of two steps."""
    folder = tmp_path_factory.mktemp("runs") / "ppo"
    main(["fit", *PPO, f"--run.folder={folder}"])
    return folder


def test_an_interrupted_run_goes_on_bit_for_bit(run, tmp_path, capsys):
    folder = tmp_path / "parts"
    with pytest.raises(SystemExit):
        main(["fit", *PPO, f"--run.folder={folder}", "--trainer.callbacks+=support.commandline.StopAfterOneStep"])
    half = torch.load(folder / "last.ckpt", weights_only=True)
    main(["fit", *PPO, f"--run.folder={folder}", f"--ckpt_path={folder / 'last.ckpt'}"])
    whole, parts = (torch.load(f / "last.ckpt", weights_only=True) for f in (run, folder))
    assert sum(map(of_critic, whole["state_dict"])) == 57
    for name, weight in whole["state_dict"].items():
        if of_critic(name):
            assert not torch.equal(weight, half["state_dict"][name]), "the second step changes it"
    whole, parts = tensors(whole), tensors(parts)
    learned = [name for name in whole if name.startswith(("/state_dict", "/optimizer_states", "/lr_schedulers"))]
    assert len(learned) > 113 * 4
    for name in learned:
        same = torch.equal(whole[name], parts[name]) if isinstance(whole[name], torch.Tensor) else whole[name] == parts[name]
        assert same, name


def test_the_critic_has_its_own_rate(run):
    """The policy's is 5e-4 after 5 steps of warm-up, of which the third would come next."""
    groups = torch.load(run / "last.ckpt", weights_only=True)["optimizer_states"][0]["param_groups"]
    assert [len(group["params"]) for group in groups] == [56, 57]
    assert [group["lr"] for group in groups] == pytest.approx([5e-4 * 3 / 5, 1e-3])


def test_the_board_shows_the_critic(run):
    board = EventAccumulator(str(run)).Reload()
    names = {name for name in board.Tags()["scalars"] if name.startswith("critic/")}
    parts = {"value", "return", "loss", "clip_fraction", "grad_norm", "explained_variance"}
    assert names == {f"critic/{part}" for part in parts}
    assert board.Scalars("critic/value")[0].value == 0.0
    assert all(event.value > 0 for event in board.Scalars("critic/grad_norm"))
    assert board.Scalars("critic/explained_variance")[0].value == pytest.approx(0.0, abs=1e-6)


def test_the_saved_policy_knows_nothing_of_the_critic(run, tmp_path):
    saved = load_file(run / "model" / "adapter_model.safetensors")
    assert len(saved) == 56
    assert not any("critic" in name for name in saved)
    assert not list((run / "model").glob("*critic*"))
    state = torch.load(run / "last.ckpt", weights_only=True)["state_dict"]
    for name, weight in saved.items():
        assert torch.equal(state["policy." + name.replace(".weight", ".default.weight")], weight)
    main(["export", f"--ckpt={run}", f"--out={tmp_path / 'out'}"])
    assert load_file(tmp_path / "out" / "adapter_model.safetensors").keys() == saved.keys()


@pytest.mark.parametrize("options", [[], ["--model.estimator=ppo"]], ids=["plain", "ppo"])
def test_the_checkpoint_is_tested_without_its_critic(options, run, tmp_path):
    main(["test", *TEST, *options, f"--run.folder={tmp_path / 'test'}", f"--ckpt_path={run / 'last.ckpt'}"])
    assert (tmp_path / "test" / "results.json").is_file()


def test_another_estimator_does_not_go_on_from_it(tmp_path, capsys):
    folder = tmp_path / "half"
    with pytest.raises(SystemExit):
        main(["fit", *PPO, f"--run.folder={folder}", "--trainer.callbacks+=support.commandline.StopAfterOneStep"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(["fit", *SMALL, f"--run.folder={folder}", f"--ckpt_path={folder / 'last.ckpt'}", "--model.estimator=rloo"])
    assert end.value.code == 2
    assert "--ckpt_path: this would be another run than that of" in capsys.readouterr().err
    (folder / "config.yaml").unlink()  # The weights tell as well.
    with pytest.raises(SystemExit) as end:
        main(["fit", *SMALL, f"--run.folder={folder}", f"--ckpt_path={folder / 'last.ckpt'}", "--model.estimator=rloo"])
    assert end.value.code == 2
    assert "(57 differ, first critic.model.weight); use the config that the checkpoint" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- learning


def test_the_critic_learns_which_rollouts_are_rewarded(monkeypatch):
    """Whether a rollout is rewarded stands in its prompt, so that the value can be known at every token."""
    rows = rollouts(8, 8)
    for i, row in enumerate(rows):
        row.prompt_ids, row.reward = [40 + i % 2] * 4, float(i % 2)
    module = policy(critic=CriticSpec(), updates_per_rollout=2)
    groups = [group for group, _ in module.parameter_groups()]
    module.attach(torch.optim.Adam([{**groups[0], "lr": 0.0}, {**groups[1], "lr": 3e-3}]))
    module.critic.model.weight.data.zero_()
    monkeypatch.setattr(module, "roll_out", lambda *_: rows)
    monkeypatch.setattr(module, "judge", lambda trajectories: trajectories)
    losses, explained = [], []
    for _ in range(10):
        module.training_step([], 0)
        losses.append(module.logged["critic/loss"])
        explained.append(module.logged["critic/explained_variance"])
    assert explained[0] == pytest.approx(0.0, abs=1e-6)
    assert explained[-1] > 0.5
    assert losses[-1] < losses[0] / 2


def test_the_policy_learns_what_is_rewarded(monkeypatch):
    """The second likeliest token is rewarded: it becomes likelier, and the likeliest less likely."""
    rows, prompt = rollouts(9, 8), [7, 8, 9]
    module = policy(critic=CriticSpec(), updates_per_rollout=2)

    def logprobs():
        with torch.no_grad():
            return module.policy(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)

    tokens = logprobs().topk(2).indices.tolist()
    before = logprobs()[tokens].tolist()
    for i, row in enumerate(rows):
        row.prompt_ids, row.token_ids, row.loss_mask = prompt, [tokens[i % 2]], [True]
        row.old_logprobs, row.reward = [before[i % 2]], float(i % 2)
    groups = [group for group, _ in module.parameter_groups()]
    module.attach(torch.optim.Adam([{**groups[0], "lr": 1e-3}, {**groups[1], "lr": 1e-3}]))
    monkeypatch.setattr(module, "roll_out", lambda *_: rows)
    monkeypatch.setattr(module, "judge", lambda trajectories: trajectories)
    module.training_step([], 0)
    after = logprobs()[tokens].tolist()
    assert after[0] < before[0] - 0.01
    assert after[1] > before[1] + 0.01
    assert [row.advantage > 0 for row in rows] == [False, True] * 4


# ---------------------------------------------------------------------------------------------- before a run


def test_the_estimate_counts_the_critic():
    """Beside the head, which is one row of numbers."""
    found, lora = {}, LoraSpec(r=4)
    for estimator in ("rloo", "ppo"):
        options = {"estimator": estimator, "updates_per_rollout": 2, "rollout": RolloutSpec(max_length=640)}
        module = PolicyRL(NoEngine(), model=ModelSpec(device="cpu"), lora=lora, **options)
        (card,) = plan(job_of(module, 4, "32-true"), 10**9)
        found[estimator] = {item.what: item.bytes for item in [*card.always, *card.update]}
    weights = [weight for name, weight in policy().trainable().items() if of_critic(name)]
    assert sum(weight.nbytes for weight in weights) == found["ppo"]["critic's adapter"] + 4 * 128
    assert found["ppo"]["critic's adapter"] == found["ppo"]["policy's adapter"]
    for what in ("gradients", "optimizer"):
        assert found["ppo"][what] == pytest.approx(2 * found["rloo"][what])
    same = ("activations", "policy's weights", "logits, backward pass")
    assert [found["ppo"][what] for what in same] == [found["rloo"][what] for what in same]
