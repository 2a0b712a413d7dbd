"""The command line, in this process: what a user reads when something is wrong, and tiny real runs of every stage."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from zs_lightning.cli import COMMANDS, main
from zs_lightning.data.sources import QASource
from zs_lightning.models.loading import SHIPPED
from zs_lightning.modules import policy_rl

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs" / "miniature"
SIMULATOR, POLICY, TEST = (f"--config={CONFIGS / name}.yaml" for name in ("simulator", "policy", "test"))
SMALL_SFT = ["--data.batch_size=4", "--data.validation_rows=4", "--run.save_every=1"]
SMALL_RL = ["--data.batch_size=2", "--model.group_size=2", "--run.save_every=1", "--model.lora.r=2"]
# Rewards that are never all zero, so that there is something to learn in two steps.
SMALL_RL += ["--model.estimator=reinforce", "--model.format_weight=0.5"]


class NoQuestions(QASource):
    def questions(self, split):
        return []


class StopAfterOneStep(L.Callback):
    """Ctrl-C at the beginning of the second step."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 1:
            raise KeyboardInterrupt


@pytest.fixture(autouse=True)
def environment(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    yield
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Lightning ignores Ctrl-C once it has seen one.


def failure(capsys, *args):
    """Exit code and the whole of stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main([str(arg) for arg in args])
    return end.value.code, capsys.readouterr().err.rstrip("\n")


@pytest.fixture(scope="module")
def simulator(tmp_path_factory):
    """Run folder of an SFT run of two steps."""
    folder = tmp_path_factory.mktemp("runs") / "simulator"
    main(["fit", SIMULATOR, f"--run.folder={folder}", "--data.steps=2", "--trainer.val_check_interval=2", *SMALL_SFT])
    return folder


@pytest.fixture(scope="module")
def policy(simulator):
    """Run folder of an RL run of two steps against that simulator."""
    folder = simulator.parent / "policy"
    adapter = f"--model.search.model.adapter={simulator / 'model'}"
    main(["fit", POLICY, adapter, f"--run.folder={folder}", "--data.steps=2", *SMALL_RL, "--trainer.log_every_n_steps=1"])
    return folder


# ---------------------------------------------------------------------- help


def program(code):
    """Stdout of a process of its own and its CPU seconds: its wall time says as much about what else runs here."""
    command = [sys.executable, "-c", f"import sys\nfrom zs_lightning.cli import main\n{code}"]
    before = os.times()
    ended = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    after = os.times()
    return ended.stdout, (after.children_user + after.children_system) - (before.children_user + before.children_system)


def test_help_lists_the_commands_at_once_without_torch():
    said, seconds = program(
        "main(['--help']); main(['--version'])\nprint([m for m in ('torch', 'lightning', 'jsonargparse') if m in sys.modules])"
    )
    assert seconds < 5
    for command in COMMANDS:
        assert f"\n  {command} " in said
    assert "predict" not in said
    assert "python -m zs_lightning fit --config configs/miniature/simulator.yaml" in said
    assert said.endswith("\nzs_lightning 0.1.0\n[]\n")


def test_help_of_fit_is_fast_and_loads_no_heavy_library():
    said, seconds = program(
        "try: main(['fit', '--help'])\nexcept SystemExit as end: print(end.code)\n"
        "print([m for m in ('peft', 'bitsandbytes', 'datasets', 'bm25s') if m in sys.modules])"
    )
    assert seconds < 10
    assert "--data.batch_size" in said
    assert said.endswith("\n0\n[]\n")


def test_help_of_a_class(capsys):
    with pytest.raises(SystemExit) as end:
        main(["fit", "--model.help", "PolicyRL"])
    assert end.value.code == 0
    assert "rollouts of each question" in capsys.readouterr().out


# ---------------------------------------------------------------------- options

WRONG = {
    "no command": ([], f"no command is given; expected one of {', '.join(COMMANDS)}"),
    "unknown command": (["fitt"], "there is no command fitt; did you mean fit?"),
    "predict": (["predict"], f"there is no command predict; expected one of {', '.join(COMMANDS)}"),
    "no config": (["fit"], "no model is given; name a configuration file with --config"),
    "option without a model": (
        ["fit", "--model.group_size=3"],
        "no model is given; name a configuration file with --config",
    ),
    "class without its engine": (["fit", "--model=PolicyRL"], "model.search is missing: PolicyRL needs it"),
    "missing config": (["fit", "--config=nope.yaml"], "--config: there is no file nope.yaml"),
    "missing config, other spelling": (["fit", "-c", "nope.yaml"], "--config: there is no file nope.yaml"),
    "unknown option": (["fit", POLICY, "--data.batchsize=3"], "unknown option data.batchsize; did you mean data.batch_size?"),
    "unknown run option": (["fit", POLICY, "--run.fodler=x"], "unknown option run.fodler; did you mean run.folder?"),
    "nothing like it": (["fit", POLICY, "--zzz=3"], "unknown option zzz"),
    "unknown model option": (
        ["fit", POLICY, "--model.group_sise=3"],
        "unknown option model.group_sise (PolicyRL has no such option); did you mean model.group_size?",
    ),
    "unknown nested option": (
        ["fit", POLICY, "--model.model.pth=x"],
        "unknown option model.model.pth (PolicyRL has no such option); did you mean model.model.path?",
    ),
    "unknown engine option": (
        ["fit", POLICY, "--model.search.init_args.cont=3"],
        "unknown option model.search.cont (SimulatorSearch has no such option); did you mean model.search.count?",
    ),
    "unknown optimiser option": (
        ["fit", POLICY, "--model.optimizer.init_args.lrr=3"],
        "unknown option model.optimizer.lrr (AdamW has no such option); did you mean model.optimizer.lr?",
    ),
    "not an integer": (["fit", POLICY, "--model.group_size=few"], "model.group_size: expected a whole number; got few"),
    "not an integer, nested": (
        ["fit", POLICY, "--model.rollout.max_turns=x"],
        "model.rollout.max_turns: expected a whole number; got x",
    ),
    "not a number": (["fit", POLICY, "--model.optimizer.lr=x"], "model.optimizer.lr: expected a number; got x"),
    "not a group": (["fit", POLICY, "--model.lora=3"], "model.lora: expected a group of options or null; got 3"),
    "wrong choice": (["fit", POLICY, "--data.task=foo"], "data.task: expected questions or records; got foo"),
    "wrong choice of the model": (
        ["fit", POLICY, "--model.estimator=ppo"],
        "model.estimator: expected reinforce, reinforce_baseline, rloo, grpo or grpo_no_std; got ppo",
    ),
    "wrong model": (["fit", POLICY, "--model=Foo"], "model: there is no class Foo; expected PolicyRL"),
    "wrong class": (["fit", POLICY, "--model.search=BM25"], "model.search: there is no class BM25; did you mean BM25Search?"),
    "wrong optimiser": (
        ["fit", POLICY, "--model.optimizer=torch.optim.Adamx"],
        "model.optimizer: there is no class torch.optim.Adamx; did you mean Adamax?",
    ),
    "newer schema": (
        ["fit", POLICY, "--schema=2"],
        "config schema 2 is newer than this program understands (1); upgrade zs_lightning",
    ),
    "unknown schema": (["fit", POLICY, "--schema=0"], "config schema 0 is not known to this program; expected 1"),
    "missing checkpoint": (["fit", POLICY, "--ckpt_path=no.ckpt"], "--ckpt_path: there is no file no.ckpt"),
    "not a checkpoint": (
        ["fit", POLICY, f"--ckpt_path={__file__}"],
        f"--ckpt_path: {__file__} is not a checkpoint; expected the last.ckpt of a run",
    ),
    "no such template set": (
        ["fit", POLICY, "--model.prompts=x"],
        "prompts: no template set is called 'x'; expected one of miniature, zerosearch, zerosearch_prompted "
        "or a .yaml or .json file",
    ),
    "lone estimator": (
        ["fit", POLICY, "--model.group_size=1"],
        "model: estimator grpo compares the rollouts of a group; set group_size to 2 or more",
    ),
    "no steps": (["fit", POLICY, "--data.steps=0"], "data: expected steps >= 1; got 0"),
    "empty data": (
        ["test", TEST, "--data.source=test_cli.NoQuestions"],
        "data: the test split of NoQuestions has no rows; change data.source",
    ),
    "no records": (
        ["fit", SIMULATOR, "--data.source=test_cli.NoQuestions"],
        "data: NoQuestions has no search records; set task: questions or choose another source",
    ),
    "no adapter": (["fit", POLICY], "adapter: there is no adapter in runs/simulator/model (adapter_config.json is missing)"),
    "unknown accelerator": (
        ["fit", SIMULATOR, "--trainer.accelerator=gpux"],
        "trainer: You selected an invalid accelerator name",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_users_error_is_one_sentence(case, capsys):
    args, sentence = WRONG[case]
    code, said = failure(capsys, *args)
    assert code == 2
    # Lightning's own words go on, and other tests may have defined modules of their own.
    goes_on = case in ("unknown accelerator", "wrong model")
    assert said.startswith(f"error: {sentence}") if goes_on else said == f"error: {sentence}"
    assert "\n" not in said


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("batch_size", "batchsize", "unknown option data.batchsize; did you mean data.batch_size?"),
        ("max_epochs", "max_epoch", "unknown option trainer.max_epoch; did you mean trainer.max_epochs?"),
        (
            "group_size",
            "group_sise",
            "unknown option model.group_sise (PolicyRL has no such option); did you mean model.group_size?",
        ),
        (
            "max_turns",
            "max_turn",
            "unknown option model.rollout.max_turn (PolicyRL has no such option); did you mean model.rollout.max_turns?",
        ),
        (
            "{start: 0.0, end",
            "{start: 0.0, ende",
            "unknown option trainer.callbacks.ende (NoiseAnnealing has no such option); did you mean trainer.callbacks.end?",
        ),
        ("max_turns: 4", "max_turns: six", "model.rollout.max_turns: expected a whole number; got six"),
        (
            "estimator: grpo",
            "estimator: ppo",
            "model.estimator: expected reinforce, reinforce_baseline, rloo, grpo or grpo_no_std; got ppo",
        ),
        ("data:", "data: [", "--config: wrong.yaml is not valid YAML, see its line 42"),
        # A newer file is told to be newer, not blamed for what is new in it.
        (
            "schema: 1",
            "schema: 7\nunheard_of: true",
            "config schema 7 is newer than this program understands (1); upgrade zs_lightning",
        ),
    ],
)
def test_a_wrong_line_of_a_config_is_named(old, new, sentence, capsys):
    text = (CONFIGS / "policy.yaml").read_text()
    Path("wrong.yaml").write_text(text.replace(old, new, 1))
    assert failure(capsys, "fit", "--config=wrong.yaml") == (2, f"error: {sentence}")


def test_base_model_without_tokenizer(capsys, tmp_path):
    shutil.copytree(SHIPPED, tmp_path / "base", ignore=shutil.ignore_patterns("tokenizer*"))
    sentence = "model path: the folder base has no tokenizer (tokenizer.json); save the tokenizer next to the model"
    assert failure(capsys, "test", TEST, "--model.model.path=base") == (2, f"error: {sentence}")


# ---------------------------------------------------------------------- failures of a run


def test_a_bug_keeps_its_traceback(simulator, monkeypatch):
    """Even one whose exception has a type that we raise ourselves: here zip(strict=True) finds two lengths."""
    right = policy_rl.compute_advantages
    monkeypatch.setattr(policy_rl, "compute_advantages", lambda *args: right(*args)[1:])
    with pytest.raises(ValueError, match="zip"):
        main(["fit", POLICY, f"--model.search.model.adapter={simulator / 'model'}", "--data.steps=1", *SMALL_RL])


def test_training_that_cannot_go_on_ends_with_one_sentence(capsys):
    weights = ["--model.optimizer.init_args.lr=1e30", "--model.max_grad_norm=0", "--model.warmup_steps=0"]
    code, said = failure(capsys, "fit", SIMULATOR, "--data.steps=9", "--trainer.limit_val_batches=0", *SMALL_SFT, *weights)
    assert (code, said) == (1, "error: gradients were not finite 3 steps in a row; lower the learning rate")


def test_a_run_that_failed_to_load_does_not_occupy_its_folder(capsys):
    first = failure(capsys, "fit", POLICY)
    assert "adapter" in first[1]
    assert failure(capsys, "fit", POLICY) == first


def test_an_existing_run_is_never_overwritten(simulator, capsys):
    before = {path: path.read_bytes() for path in simulator.rglob("*") if path.is_file()}
    last = simulator / "last.ckpt"
    sentence = (
        f"error: run.folder: {simulator} already holds a run; choose another with --run.folder, "
        f"or go on with it by fit --ckpt_path {last}"
    )
    folder = f"--run.folder={simulator}"
    assert failure(capsys, "fit", SIMULATOR, folder) == (2, sentence)
    assert failure(capsys, "test", SIMULATOR, folder, f"--ckpt_path={last}") == (2, sentence)
    # A checkpoint of somewhere else is no permission to write here.
    other = shutil.copy(last, "other.ckpt")
    assert failure(capsys, "fit", SIMULATOR, folder, f"--ckpt_path={other}") == (2, sentence)
    assert {path: path.read_bytes() for path in simulator.rglob("*") if path.is_file()} == before


def test_a_folder_that_cannot_be_made(capsys):
    Path("taken").write_text("a file")
    sentence = "error: run.folder: taken/run cannot be made: Not a directory; choose another with --run.folder"
    assert failure(capsys, "fit", SIMULATOR, "--run.folder=taken/run") == (2, sentence)


def test_a_checkpoint_that_does_not_fit(simulator, capsys):
    code, said = failure(capsys, "test", TEST, f"--ckpt_path={simulator / 'last.ckpt'}")
    assert code == 2
    assert said.startswith("error: checkpoint: its weights do not fit model and lora of this config (")
    assert said.endswith("use the config that the checkpoint was trained with")


# ---------------------------------------------------------------------- tiny runs


def tensors(value, name=""):
    """All tensors and numbers in a nested structure, by their place."""
    if isinstance(value, dict):
        return {k: v for key, inner in value.items() for k, v in tensors(inner, f"{name}/{key}").items()}
    if isinstance(value, list | tuple):
        return tensors(dict(enumerate(value)), name)
    return {name: value}


def scalars(folder, tag):
    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_sft_trains_the_adapter_and_leaves_its_config(simulator):
    from safetensors.torch import load_file

    adapter = load_file(simulator / "model" / "adapter_model.safetensors")
    moved = [name for name, tensor in adapter.items() if "lora_B" in name and tensor.abs().sum() > 0]
    assert len(moved) == len(adapter) // 2  # B starts at zero.
    text = (simulator / "config.yaml").read_text()
    head = dict(line[2:].split(": ", 1) for line in text.splitlines() if line.startswith("# "))
    assert head["command"] == "fit"
    assert head["torch"] == torch.__version__
    assert {"zs_lightning", "python", "lightning", "transformers", "peft"} < set(head)
    assert str(ROOT) not in text
    config = yaml.safe_load(text)
    assert config["schema"] == 1
    assert config["data"]["batch_size"] == 4
    assert config["model"]["init_args"]["lora"]["r"] == 32
    assert [step for step, _ in scalars(simulator, "simulator/useful_recall")]


def test_the_resolved_config_repeats_the_run(simulator, tmp_path):
    config = f"--config={simulator / 'config.yaml'}"
    main(["fit", config, f"--run.folder={tmp_path / 'again'}"])
    first, again = (torch.load(f / "last.ckpt", weights_only=True)["state_dict"] for f in (simulator, tmp_path / "again"))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_rl_trains_the_adapter_with_rising_noise(policy):
    state = torch.load(policy / "last.ckpt", weights_only=True)
    assert state["rollout_step"] == 2
    assert any(tensor.abs().sum() > 0 for name, tensor in state["state_dict"].items() if "lora_B" in name)
    # Equation 1 with m = 2, b = 4, from 0 to 0.5: (4^(1/2) - 1) / 3 * 0.5 = 1/6, then 0.5.
    assert scalars(policy, "noise/planned") == [(0, pytest.approx(1 / 6)), (1, pytest.approx(0.5))]
    lines = [json.loads(line) for line in (policy / "trajectories" / "train.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1] * 4 + [2] * 4
    assert [line["noise_prob"] for line in lines] == pytest.approx([1 / 6] * 4 + [0.5] * 4)


def test_test_writes_results_with_another_engine(policy, tmp_path):
    folder = tmp_path / "test"
    lora = ["--model.lora.r=2", "--model.decodings=[greedy,sampled]"]
    main(["test", TEST, f"--run.folder={folder}", f"--ckpt_path={policy / 'last.ckpt'}", "--data.test_rows=8", *lora])
    results = json.loads((folder / "results.json").read_text())
    rows = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]
    assert results["engine"] == "bm25"
    assert list(results["decodings"]) == ["greedy", "sampled"]
    for name, summary in results["decodings"].items():
        mine = [row for row in rows if row["decoding"] == name]
        assert summary["questions"] == len(mine) == 8
        assert summary["em"]["mean"] == pytest.approx(sum(row["em"] for row in mine) / 8)
        assert summary["em"]["low"] <= summary["em"]["mean"] <= summary["em"]["high"]
    assert (folder / "config.yaml").read_text().startswith("# command: test\n")


@pytest.mark.parametrize("stage", ["simulator", "policy"])
def test_an_interrupted_run_goes_on_bit_for_bit(stage, simulator, policy, tmp_path, capsys):
    folder = tmp_path / stage
    small = {"simulator": [SIMULATOR, "--trainer.val_check_interval=2", *SMALL_SFT], "policy": [POLICY, *SMALL_RL]}[stage]
    if stage == "policy":
        small += [f"--model.search.model.adapter={simulator / 'model'}", "--trainer.log_every_n_steps=1"]
    args = ["fit", *small, f"--run.folder={folder}", "--data.steps=2"]
    code, said = failure(capsys, *args, "--trainer.callbacks+=test_cli.StopAfterOneStep")
    assert code == 130
    assert said == "error: interrupted; fit goes on from a checkpoint with --ckpt_path RUN_FOLDER/last.ckpt"
    main([*args, f"--ckpt_path={folder / 'last.ckpt'}"])
    said = capsys.readouterr()
    assert said.err == ""
    metrics = {"simulator": ["loss", "useful", "noisy"], "policy": ["reward", "noise"]}[stage]
    bar = rf"fit \S+ 2/2 \S+ • \S+ {' '.join(rf'{name}: [0-9.]+' for name in metrics)}"
    assert re.fullmatch(bar, said.out.splitlines()[-1].rstrip())  # One line of 80 columns.
    assert (folder / "config-2.yaml").is_file()
    whole = tensors(torch.load({"simulator": simulator, "policy": policy}[stage] / "last.ckpt", weights_only=True))
    parts = tensors(torch.load(folder / "last.ckpt", weights_only=True))
    learned = [name for name in whole if name.startswith(("/state_dict", "/optimizer_states", "/lr_schedulers"))]
    assert len(learned) > 20
    for name in learned:
        same = torch.equal(whole[name], parts[name]) if isinstance(whole[name], torch.Tensor) else whole[name] == parts[name]
        assert same, name
