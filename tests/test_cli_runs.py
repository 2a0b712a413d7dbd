"""Tiny real runs of every stage on the command line: what they leave, how they fail, and how they go on."""

import errno
import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch._weights_only_unpickler import UnpicklingError

from support.commandline import POLICY, ROOT, SIMULATOR, SMALL_RL, SMALL_SFT, TEST, failure, tensors
from zs_lightning import cli
from zs_lightning.cli import main
from zs_lightning.configuration import lightning_cli
from zs_lightning.errors import Stopped
from zs_lightning.rl import advantages
from zs_lightning.runs.stopping import STOPPING

pytestmark = pytest.mark.usefixtures("environment")


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


# ---------------------------------------------------------------------- failures of a run


def test_a_bug_keeps_its_traceback(simulator, monkeypatch):
    """Even one whose exception has a type that we raise ourselves: here zip(strict=True) finds two lengths."""
    right = advantages.compute_advantages
    monkeypatch.setattr(advantages, "compute_advantages", lambda *args: right(*args)[1:])
    with pytest.raises(ValueError, match="zip"):
        main(["fit", POLICY, f"--model.search.model.adapter={simulator / 'model'}", "--data.steps=1", *SMALL_RL])


def test_training_that_cannot_go_on_ends_with_one_sentence(capsys):
    weights = ["--model.optimizer.init_args.lr=1e30", "--model.max_grad_norm=0", "--model.warmup_steps=0"]
    code, said = failure(capsys, "fit", SIMULATOR, "--data.steps=9", "--trainer.limit_val_batches=0", *SMALL_SFT, *weights)
    why = "the loss was not finite; lower the learning rate, or use precision 32-true"
    assert code == 1
    assert said.startswith(f"error: 3 steps in a row were skipped, the last since {why}; fit goes on with")


def test_a_disk_that_is_full_elsewhere_is_one_sentence_too(monkeypatch, capsys):
    """As TensorBoard's file can find it; where the run goes on may be noted at an earlier error."""

    def full(*_):
        try:
            error = ValueError("first")
            error.add_note("it goes on")
            raise error
        finally:
            raise OSError(errno.ENOSPC, "No space left on device", "curves")

    monkeypatch.setattr(cli, "_dispatch", full)
    said = "error: curves cannot be written: No space left on device; make room; it goes on"
    assert failure(capsys, "compare") == (1, said)


@pytest.mark.parametrize(("noted", "said"), [("", "fit goes on with --ckpt_path run/last.ckpt"), ("it goes on", "it goes on")])
def test_a_signal_past_the_training_says_where_the_run_is(noted, said, monkeypatch, capsys):
    """No callback is asked any more, which would have noted it at the error."""

    def ends(*_):
        STOPPING.save = lambda: Path("run/last.ckpt")
        stopped = Stopped(signal.SIGTERM)
        if noted:
            stopped.add_note(noted)
        raise stopped

    monkeypatch.setattr(cli, "_dispatch", ends)
    assert failure(capsys, "compare") == (143, f"error: stopped by SIGTERM; {said}")


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
    assert failure(capsys, "fit", SIMULATOR, folder, "--resume=never") == (2, sentence)
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


def test_an_adapter_in_which_a_bit_flipped_is_not_trained_against(simulator, capsys):
    shutil.copytree(simulator / "model", "model")
    weights = Path("model/adapter_model.safetensors")
    content = bytearray(weights.read_bytes())
    content[-100] ^= 1
    weights.write_bytes(content)
    said = f"error: model.search.model.adapter: {weights} is damaged: it is not what sha256.json beside it says"
    assert failure(capsys, "fit", POLICY, "--model.search.model.adapter=model", "--data.steps=1", *SMALL_RL) == (2, said)


class Code:
    def __reduce__(self):
        return os.mkdir, ("it ran",)


def test_a_copied_checkpoint_is_looked_at_before_anything_is_measured(simulator, capsys, monkeypatch):
    """It has no checksums beside it. Code in it does not run, even where the environment allows it."""
    saved = torch.load(simulator / "last.ckpt", weights_only=True)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    for command, content, expected in (
        ("test", saved | {"schema": 2}, "x.ckpt was written by a newer version of zs_lightning (schema 2); upgrade it"),
        ("validate", {"state_dict": saved["state_dict"]}, "x.ckpt is not the checkpoint of a `fit`"),
        (
            "test",
            saved | {"more": Code()},
            "x.ckpt cannot be read: it holds more than numbers; expected the last.ckpt of a `fit`",
        ),
    ):
        torch.save(content, "x.ckpt")
        arguments = [command, SIMULATOR, "--run.folder=copied", "--ckpt_path=x.ckpt", "--data.test_rows=4"]
        assert failure(capsys, *arguments) == (2, f"error: --ckpt_path: {expected}")
    monkeypatch.setattr(lightning_cli, "position", lambda path: None)
    with pytest.raises(UnpicklingError):
        main([*arguments, "--weights_only=false"])
    assert not Path("it ran").exists()


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("stage", ["simulator", "policy"])
def test_a_finished_run_is_not_gone_on_with(stage, simulator, policy, capsys):
    folder = {"simulator": simulator, "policy": policy}[stage]
    before = contents(folder)
    args = ["fit", f"--config={folder / 'config.yaml'}", f"--ckpt_path={folder / 'last.ckpt'}"]
    code, said = failure(capsys, *args)
    assert code == 2
    assert said.startswith("error: --ckpt_path: the run is already finished at 2 of 2 steps; ")
    assert contents(folder) == before
    made = json.loads((folder / "fit.json").read_text())
    assert (set(made), made["steps"]) == ({"seconds", "steps"}, 2)


def test_a_run_does_not_go_on_with_other_batches(tmp_path, capsys):
    folder = tmp_path / "run"
    args = ["fit", SIMULATOR, *SMALL_SFT, "--trainer.val_check_interval=2", f"--run.folder={folder}"]
    assert failure(capsys, *args, "--data.steps=2", "--trainer.callbacks+=support.commandline.StopAfterOneStep")[0] == 130
    before = contents(folder)
    changed = [*args, "--data.steps=2", "--data.batch_size=5", f"--ckpt_path={folder / 'last.ckpt'}"]
    sentence = "error: data.batch_size: the checkpoint was trained with 4, got 5; set it back"
    assert failure(capsys, *changed) == (2, sentence)
    assert contents(folder) == before


def test_a_run_that_was_interrupted_in_its_first_step_leaves_its_folder_free(tmp_path, capsys):
    folder = tmp_path / "run"
    args = ["fit", POLICY, *SMALL_RL, "--model.search=BM25Search", "--data.steps=2", "--run.save_every=5"]
    args += [f"--run.folder={folder}", "--trainer.log_every_n_steps=1"]
    for number in (1, 2):
        stop = ["--trainer.callbacks+=support.commandline.StopAfterOneStep", "--trainer.callbacks.step=0"]
        code, said = failure(capsys, *args, *stop)
        assert code == 130
        assert said == (
            "error: interrupted; no step was finished; the same command begins anew; what was written is now in "
            f"{folder / f'unsaved-{number}'}"
        )
        signal.signal(signal.SIGINT, signal.default_int_handler)
    main(args)
    assert (folder / "last.ckpt").is_file()
    lines = (folder / "trajectories" / "train.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1] * 4 + [2] * 4
    assert [step for step, _ in scalars(folder, "reward")] == [0, 1]
    for place in (folder / "unsaved-1", folder / "unsaved-2"):
        assert (place / "config.yaml").is_file()
        assert not (place / "trajectories").exists()


def test_a_killed_run_can_be_deleted(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("seed_everything: 0")
    code, said = failure(capsys, "fit", SIMULATOR, f"--run.folder={tmp_path}", "--resume=never")
    assert code == 2
    assert said.endswith("; if nothing runs there any more, you can delete it: it has neither a checkpoint nor results")


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["validate", POLICY, "--model.search=BM25Search"], "trainer.limit_val_batches: 0 leaves nothing to measure; set it"),
        (["test", TEST, "--trainer.limit_test_batches=0"], "trainer.limit_test_batches: 0 leaves nothing to measure; set it"),
        (["test", TEST, "--model.noise_prob=1.5"], "model.noise_prob: expected a number from 0 to 1; got 1.5"),
        (["fit", POLICY, "--model.noise_prob=-0.1"], "model.noise_prob: expected a number from 0 to 1; got -0.1"),
        (
            ["fit", POLICY, "--trainer.callbacks=NoiseAnnealing", "--trainer.callbacks.start=2"],
            "NoiseAnnealing: start and end are probabilities from 0 to 1; got start 2 and end 0.5",
        ),
    ],
)
def test_what_a_run_could_not_measure_is_said(args, sentence, capsys):
    code, said = failure(capsys, *args)
    assert code == 2
    assert said.startswith(f"error: {sentence}")
    assert not Path("runs/policy/config.yaml").exists()


# ---------------------------------------------------------------------- tiny runs


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
        # Of eight questions no interval is told.
        assert list(summary["em"]) == ["mean"]
    assert (folder / "config.yaml").read_text().startswith("# command: test\n")
    names = ["config.yaml", "questions.jsonl", "results.json", "trajectories"]
    assert sorted(path.name for path in folder.iterdir()) == names


def test_a_test_leaves_no_curves_whatever_its_config(simulator, tmp_path):
    """Else some tests of a folder would be in TensorBoard, with a single point, and others not."""
    folder = tmp_path / "recall"
    main(["test", SIMULATOR, "--data.test_rows=4", f"--run.folder={folder}", f"--ckpt_path={simulator / 'last.ckpt'}"])
    assert sorted(path.name for path in folder.iterdir()) == ["config.yaml", "results.json"]
    assert not (simulator / "hparams.yaml").exists()
    assert "epoch" not in EventAccumulator(str(simulator)).Reload().Tags()["scalars"]


@pytest.mark.parametrize("stage", ["simulator", "policy"])
def test_an_interrupted_run_goes_on_bit_for_bit(stage, simulator, policy, tmp_path, capsys):
    folder = tmp_path / stage
    small = {"simulator": [SIMULATOR, "--trainer.val_check_interval=2", *SMALL_SFT], "policy": [POLICY, *SMALL_RL]}[stage]
    if stage == "policy":
        small += [f"--model.search.model.adapter={simulator / 'model'}", "--trainer.log_every_n_steps=1"]
    args = ["fit", *small, f"--run.folder={folder}", "--data.steps=2"]
    code, said = failure(capsys, *args, "--trainer.callbacks+=support.commandline.StopAfterOneStep")
    assert code == 130
    assert said == f"error: interrupted; fit goes on with --ckpt_path {folder / 'last.ckpt'}"
    main([*args, f"--ckpt_path={folder / 'last.ckpt'}"])
    said = capsys.readouterr()
    assert said.err == ""
    metrics = {"simulator": ["loss", "useful", "noise"], "policy": ["reward", "noise"]}[stage]
    lines = [line.rstrip() for line in said.out.splitlines()]
    (bar,) = (at for at, line in enumerate(lines) if line.startswith("fit "))
    assert re.fullmatch(r"fit \S+ 2/2 \S+ • \S+", lines[bar])
    assert re.fullmatch("    " + " ".join(rf"{name}: [0-9.]+" for name in metrics), lines[bar + 1])
    assert (folder / "config-2.yaml").is_file()
    made = json.loads((folder / "fit.json").read_text())
    assert (made["steps"], made["resumed_after"]) == (2, 1)
    assert stage == "simulator" or json.loads((folder / "search.json").read_text())["resumed_after"] == 1
    whole = tensors(torch.load({"simulator": simulator, "policy": policy}[stage] / "last.ckpt", weights_only=True))
    parts = tensors(torch.load(folder / "last.ckpt", weights_only=True))
    learned = [name for name in whole if name.startswith(("/state_dict", "/optimizer_states", "/lr_schedulers"))]
    assert len(learned) > 20
    for name in learned:
        same = torch.equal(whole[name], parts[name]) if isinstance(whole[name], torch.Tensor) else whole[name] == parts[name]
        assert same, name
