"""Runs that stop, by a kill, a time limit or their end, and go on: with the same rows, tokens, weights and files."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import threading
import time
from pathlib import Path

import lightning as L
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from support.commandline import POLICY, SIMULATOR, SMALL_SFT, failure
from support.killhooks import around
from zs_lightning.cli import main
from zs_lightning.data import QADataModule
from zs_lightning.data.files import FileSource
from zs_lightning.generation import Generator
from zs_lightning.runs.resume import differences

pytestmark = pytest.mark.usefixtures("environment")

STEPS = 5
SFT = [SIMULATOR, *SMALL_SFT, "--run.save_every=2", "--model.lora.dropout=0.1", "--trainer.val_check_interval=2"]
RL = [POLICY, "--model.search=BM25Search", "--data.batch_size=2", "--model.group_size=2", "--run.save_every=2"]
RL += ["--model.estimator=reinforce", "--model.reward.format_weight=0.5", "--model.lora.r=2", "--model.lora.dropout=0.1"]
RL += ["--model.updates_per_rollout=2"]
RL += [
    "--model.max_grad_norm=1",
    "--trainer.log_every_n_steps=1",
    "--data.validation_rows=2",
    "--trainer.limit_val_batches=1.0",
]
RL += ["--trainer.val_check_interval=2"]


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


class Kill(L.Callback):
    """kill -9 in the middle of a step, or at any moment."""

    def __init__(self, step: int = -1, seconds: float = 0.0):
        self.step, self.seconds = step, seconds

    def on_fit_start(self, trainer, pl_module):
        if self.seconds:
            threading.Timer(self.seconds, kill).start()

    def on_after_backward(self, trainer, pl_module):
        if trainer.fit_loop.epoch_loop.batch_idx == self.step:
            kill()


class Signal(L.Callback):
    """A signal to this process at a hook of a step, or inside of its rollout, when some tokens are written."""

    def __init__(self, number: int, step: int, hook: str):
        self.number, self.left = number, 5 if hook == "rollout" else 0
        act = self.inside if self.left else self.send
        hook = "on_train_batch_start" if self.left else hook
        setattr(self, hook, lambda trainer, *_: act() if trainer.fit_loop.epoch_loop.batch_idx == step else None)

    def inside(self):
        around(Generator, "step", lambda *_: self.send())

    def send(self):
        self.left -= 1
        if self.left < 0:
            print(f"sent at {time.monotonic()}", flush=True)
            os.kill(os.getpid(), self.number)


class Stop(L.Callback):
    """As EarlyStopping or max_time do it."""

    def __init__(self, step: int, hook: str = "on_train_batch_end"):
        setattr(self, hook, lambda trainer, *_: self.stop(trainer, step))

    def stop(self, trainer, step):
        if trainer.fit_loop.epoch_loop.batch_idx == step and trainer.training | trainer.validating:
            trainer.should_stop = True


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """Five questions: the third step of two begins a second pass over them."""
    path = tmp_path_factory.mktemp("data") / "questions.jsonl"
    row = (
        '{{"id": "q{i}", "question": "What is the birthplace of the author of The Book {i}?", "golden_answers": ["Foo {i}"]}}\n'
    )
    path.write_text("".join(row.format(i=i) for i in range(5)))
    return path


def source(path):
    own = {"class_path": "FileSource", "init_args": {"path": str(path), "splits": {"train": 1.0}}}
    return f"--data.source={json.dumps(own)}"


@pytest.fixture(scope="module")
def command(questions):
    """The arguments of a run of each stage, without its folder and steps."""
    with_file = [*RL, source(questions), "--trainer.limit_val_batches=0"]
    return {"sft": ["fit", *SFT], "rl": ["fit", *with_file]}


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory):
    """Folders of runs that nothing stopped."""
    folders = {}
    for stage, args in command.items():
        folders[stage] = tmp_path_factory.mktemp("whole") / stage
        main([*args, f"--data.steps={STEPS}", f"--run.folder={folders[stage]}"])
    return folders


def seconds(folder):
    return json.loads((folder / "fit.json").read_text())["seconds"]


def lines(folder):
    path = folder / "trajectories" / "train.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def learned(folder):
    found = torch.load(folder / "last.ckpt", weights_only=True)
    return found["state_dict"], found["optimizer_states"], found["lr_schedulers"]


def assert_equal(a, b):
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for name in a:
            assert_equal(a[name], b[name])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def steps_of(folder, tag):
    return [event.step for event in EventAccumulator(str(folder)).Reload().Scalars(tag)]


def killed(args, folder, code=-signal.SIGKILL):
    """Whether a forked process that runs the command was killed, or ended by another code. In about one of ten, torch refuses
    its threads after a fork ("Invalid thread pool") before anything happens: that one says nothing, and another is made."""
    before = folder.with_name("before")
    shutil.rmtree(before, ignore_errors=True)
    if folder.is_dir():
        shutil.copytree(folder, before)
    for _ in range(8):
        if not (child := os.fork()):
            try:
                main(args)
            except SystemExit as end:
                os._exit(end.code)
            finally:
                os._exit(1)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == code:
            return True
        shutil.rmtree(folder, ignore_errors=True)
        if before.is_dir():
            shutil.copytree(before, folder)
    return False


@pytest.mark.parametrize("stage", ["sft", "rl"])
def test_a_killed_run_goes_on_bit_for_bit(stage, command, whole, tmp_path, capfd):
    """Once in the middle of a step, then, as it goes on, at any moment: each time the same command is given again."""
    step = 3  # Saved are steps 2 and 4; lines of step 3 are written already.
    folder = tmp_path / "run"
    args = [*command[stage], f"--data.steps={STEPS}", f"--run.folder={folder}"]
    kill = "--trainer.callbacks+=test_going_on.Kill"
    assert killed([*args, kill, f"--trainer.callbacks.step={step}"], folder)
    capfd.readouterr()
    moment = random.Random(time.time_ns()).uniform(0.01, 0.6 * seconds(whole[stage]))
    print(f"killed after {moment} seconds")
    killed([*args, kill, f"--trainer.callbacks.seconds={moment}"], folder)
    assert f"{folder}: goes on after 2 of {STEPS} steps, from {folder / 'last.ckpt'}\n" in capfd.readouterr().out
    with contextlib.suppress(SystemExit):  # It may have come to its end.
        main(args)
    assert json.loads((folder / "fit.json").read_text())["resumed_after"] in (2, 4)
    assert_same_run(folder, whole[stage], stage)


def assert_same_run(folder, whole, stage):
    assert_equal(learned(folder), learned(whole))
    assert lines(folder) == lines(whole)
    left = {path.name for path in folder.iterdir()} - {path.name for path in whole.iterdir()}
    assert all(re.fullmatch(r"config-\d.yaml|.*tfevents.*", name) for name in left), left
    for name in ("model", "best"):
        weights = Path(name) / "adapter_model.safetensors"
        assert (folder / weights).is_file() == (whole / weights).is_file()
        assert not (folder / weights).is_file() or (folder / weights).read_bytes() == (whole / weights).read_bytes()
    tag = {"sft": "simulator/useful_recall", "rl": "reward"}[stage]
    assert steps_of(folder, tag) == steps_of(whole, tag)


def test_a_stopped_run_goes_on_after_its_last_finished_step(command, whole, tmp_path, capfd):
    """Inside of a rollout, of an update, and while the last model is written: each time the same command is given again."""
    folder = tmp_path / "run"
    args = [*command["rl"], f"--data.steps={STEPS}", f"--run.folder={folder}"]
    for code, step, hook, done in [(143, 1, "rollout", 1), (130, 3, "on_after_backward", 3), (143, 4, "on_train_end", 4)]:
        signals = {"number": code - 128, "step": step, "hook": hook}
        own = {"class_path": "test_going_on.Signal", "init_args": signals}
        capfd.readouterr()
        assert killed([*args, f"--trainer.callbacks+={json.dumps(own)}"], folder, code)
        ended, said = time.monotonic(), capfd.readouterr()
        assert ended - float(re.findall(r"sent at (\S+)", said.out)[-1]) < 5
        name = "interrupted" if code == 130 else "stopped by SIGTERM"
        assert f"error: {name}; fit goes on with --ckpt_path {folder / 'last.ckpt'}\n" in said.err
        assert torch.load(folder / "last.ckpt", weights_only=True)["step"] == done
    main(args)
    assert_same_run(folder, whole["rl"], "rl")


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_validation_end"])
def test_a_run_that_another_callback_ends_goes_on(hook, command, whole, tmp_path, caplog):
    folder = tmp_path / "run"
    args = [*command["sft"], f"--data.steps={STEPS}", f"--run.folder={folder}"]
    stop = ["--trainer.callbacks+=test_going_on.Stop", "--trainer.callbacks.step=3", f"--trainer.callbacks.hook={hook}"]
    main([*args, *stop])
    assert caplog.messages[-1] == f"stopped after 4 of 5 steps; fit goes on with --ckpt_path {folder / 'last.ckpt'}"
    assert (folder / "model" / "adapter_model.safetensors").is_file()
    main([*args, f"--ckpt_path={folder}"])
    assert_equal(learned(folder), learned(whole["sft"]))


def test_max_time_ends_a_run_after_a_step_and_counts_anew(command, whole, tmp_path, caplog):
    folder = tmp_path / "run"
    args = [*command["rl"], f"--data.steps={STEPS}", f"--run.folder={folder}", '--trainer.max_time={"milliseconds": 1}']
    main(args)
    main([*args, f"--ckpt_path={folder}"])
    for message, done in zip([m for m in caplog.messages if "stopped" in m], (1, 2), strict=True):
        assert message == f"stopped after {done} of {STEPS} steps; fit goes on with --ckpt_path {folder / 'last.ckpt'}"
    assert json.loads((folder / "fit.json").read_text())["steps"] == 2
    main([*args[:-1], f"--ckpt_path={folder}"])
    assert_equal(learned(folder), learned(whole["rl"]))
    assert lines(folder) == lines(whole["rl"])


def test_a_finished_run_goes_on_with_a_higher_number_of_steps(command, whole, tmp_path):
    """Rows go on in their order, noise and learning rate stay at their end; the files tell of one run."""
    for stage, args in command.items():
        folder = tmp_path / stage
        shutil.copytree(whole[stage], folder)
        main([*args, f"--data.steps={STEPS + 2}", f"--run.folder={folder}", f"--ckpt_path={folder}"])
        state = torch.load(folder / "last.ckpt", weights_only=True)
        position = state["loops"]["fit_loop"]["state_dict"]["combined_loader"][0]
        assert (position["batches"], position["steps"], position["planned"]) == (STEPS + 2, STEPS + 2, STEPS)
        if stage == "sft":
            # 20 warm-up steps; the cosine is at its floor of 2 % from step 5 on.
            assert state["lr_schedulers"][0]["_last_lr"] == [pytest.approx(6e-3 * 0.02 * (STEPS + 3) / 20)]
    whole_lines, more = lines(whole["rl"]), lines(folder)
    assert more[: len(whole_lines)] == whole_lines
    later = more[len(whole_lines) :]
    assert [line["step"] for line in later] == [6] * 4 + [7] * 4
    assert [line["noise_prob"] for line in later] == [0.5] * 8
    # Two batches make a pass over five questions, so the steps 5 and 6 are the third pass.
    assert {line["id"] for line in later[:4]}.isdisjoint(line["id"] for line in whole_lines[-4:])


@pytest.mark.parametrize("stage", ["sft", "rl"])
def test_the_same_command_after_the_end_does_nothing(stage, whole, command, capsys):
    before = {path: path.read_bytes() for path in whole[stage].rglob("*") if path.is_file()}
    args = [*command[stage], f"--data.steps={STEPS}", f"--run.folder={whole[stage]}"]
    with pytest.raises(SystemExit) as end:
        main(args)
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{whole[stage]}: the run is already finished at {STEPS} of {STEPS} steps; with a higher data.steps ")
    code, said = failure(capsys, *args, "--resume=never")
    assert (code, said.startswith(f"error: run.folder: {whole[stage]} already holds a run; ")) == (2, True)
    assert {path: path.read_bytes() for path in whole[stage].rglob("*") if path.is_file()} == before


def test_a_damaged_checkpoint_is_passed_over(whole, command, tmp_path, caplog):
    """The run goes on from the one before it and ends as it had; the damaged one is the next to be replaced."""
    folder = tmp_path / "run"
    shutil.copytree(whole["sft"], folder)
    last = folder / "last.ckpt"
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 1
    last.write_bytes(content)
    main([*command["sft"], f"--data.steps={STEPS}", f"--run.folder={folder}"])
    assert (
        f"run.folder: {last} is damaged: it is not what checkpoints.json beside it says; the one before it is used: "
        in caplog.text
    )
    assert_equal(learned(folder), learned(whole["sft"]))
    former = torch.load(folder / "previous.ckpt", weights_only=True)
    assert former["step"] == 4


def test_a_run_killed_before_its_first_save_begins_anew(whole, command, tmp_path, caplog):
    folder = tmp_path / "run"
    (folder / "trajectories").mkdir(parents=True)
    (folder / "config.yaml").write_text("seed_everything: 7\n")
    (folder / "trajectories" / "train.jsonl").write_text('{"schema": 1, "step": 1, "half')
    (folder / "last.ckpt.part").write_text("half")
    main([*command["rl"], f"--data.steps={STEPS}", f"--run.folder={folder}"])
    assert f"a run that ended before its first save was in {folder}; it is now in {folder / 'unsaved-1'}" in caplog.messages
    assert (folder / "unsaved-1" / "config.yaml").read_text() == "seed_everything: 7\n"
    assert lines(folder) == lines(whole["rl"])
    assert not list(folder.rglob("*.part"))


def test_a_finished_run_without_its_model_says_how_to_get_it(whole, command, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(whole["sft"], folder)
    args = [*command["sft"], f"--data.steps={STEPS}", f"--run.folder={folder}", f"--ckpt_path={folder}"]
    said = (
        f"error: --ckpt_path: the run is already finished at {STEPS} of {STEPS} steps; with a higher data.steps it goes on "
        "with further rows, its noise and learning rate stay as they were at the end"
    )
    assert failure(capsys, *args) == (2, said)
    shutil.rmtree(folder / "model")
    export = f"; `export --ckpt {folder / 'last.ckpt'} --out {folder / 'model'}` writes its model"
    assert failure(capsys, *args) == (2, said + export)
    assert failure(capsys, *args, "--data.steps=4") == (
        2,
        "error: data.steps: the run has 5, got 4; they can be raised, not lowered",
    )


def go_on(folder, args, capsys, *changes):
    return failure(capsys, *args, f"--data.steps={STEPS + 1}", f"--run.folder={folder}", f"--ckpt_path={folder}", *changes)


def test_another_run_is_not_gone_on_with(whole, command, tmp_path, capsys):
    before = {path: path.read_bytes() for path in whole["rl"].rglob("*") if path.is_file()}
    this = f"error: --ckpt_path: this would be another run than that of {whole['rl'] / 'config.yaml'}: "
    back = "; set them back, or begin anew with another --run.folder"
    for option, was, got in [
        ("seed_everything", "0", "1"),
        ("model.optimizer.lr", "0.0005", "1e-07"),
        ("model.lora.r", "2", "4"),
        ("model.estimator", "reinforce", "grpo"),
        ("model.group_size", "2", "3"),
        ("model.loss.kl_coef", "0.05", "0.0"),
        ("model.prompts", "miniature", "zerosearch"),
        ("trainer.precision", "32-true", "bf16-mixed"),
    ]:
        said = go_on(whole["rl"], command["rl"], capsys, f"--{option}={got}")
        assert said == (2, f"{this}{option} was {was}, got {got}{back}")
    noise = "--trainer.callbacks=[{class_path: NoiseAnnealing, init_args: {end: 0.75}}]"
    assert go_on(whole["rl"], command["rl"], capsys, noise)[1] == f"{this}trainer.callbacks.end was 0.5, got 0.75{back}"
    engine = ["--model.search=SimulatorSearch", "--model.group_size=4", "--model.loss.kl_coef=1", "--model.warmup_steps=0"]
    said = go_on(whole["rl"], command["rl"], capsys, *engine)[1]
    assert (said[: len(this)], said.count(" was ")) == (this, 3)
    assert "; and 1 more; set them back" in said
    assert {path: path.read_bytes() for path in whole["rl"].rglob("*") if path.is_file()} == before


def test_a_mapping_of_the_users_keys_is_one_value():
    """An option that only one side has came with a version; a key of such a mapping did not."""

    def config(noise, **more):
        return {"model": {"search": {"class_path": "S", "init_args": {"noise": noise, **more}}}}

    one, two = {"off_topic": 2}, {"off_topic": 2, "contradicting": 1}
    for before, now in ((one, two), (two, one), (None, one)):
        assert list(differences(config(before), config(now, later=1))) == [("model.search.noise", before, now)]
    assert list(differences(config(two), config(dict(reversed(two.items()))))) == []
    (found,) = differences({"api": {"options": {}}}, {"api": {"options": {"top_k": 1}}})
    assert found == ("api.options", {}, {"top_k": 1})


def test_what_does_not_change_a_run_may_change(whole, command, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(whole["rl"], folder)
    free = ["--run.save_every=1", "--model.micro_batch_tokens=4096", "--model.rollout.slots=8", "--trainer.log_every_n_steps=5"]
    free += ["--model.decodings=[greedy]", "--run.keep_trajectories=1", "--trainer.callbacks+=Board"]
    main([*command["rl"], f"--data.steps={STEPS + 1}", f"--run.folder={folder}", f"--ckpt_path={folder}", *free])
    assert len(lines(folder)) == 4 * STEPS + 1
    said = "equal up to rounding, not bit for bit: "
    changed = ["model.micro_batch_tokens was 3072, is 4096", "model.rollout.slots was 128, is 8"]
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith(said)]
    assert all(option in line for option in changed)


def test_other_rows_are_not_gone_on_with(whole, command, questions, tmp_path, capsys):
    texts = questions.read_text().splitlines(keepends=True)
    for name, changed, count in (
        ("more", [*texts, texts[0].replace("q0", "q9")], 6),
        ("other", [texts[0].replace("q0", "q9"), *texts[1:]], 5),
    ):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(changed))
        code, said = go_on(whole["rl"], command["rl"], capsys, source(path))
        assert code == 2
        assert said.startswith(
            f"error: data.source: the checkpoint was trained on 5 rows, got {count}, and not the same; set data.source or its "
            "file back, or begin anew with another --run.folder"
        )


def test_a_checkpoint_of_an_earlier_version_goes_on(whole, command, tmp_path):
    """It knows neither its rows nor its plan, and its configuration lacks what came later."""
    folder = tmp_path / "run"
    folder.mkdir()
    state = torch.load(whole["rl"] / "last.ckpt", weights_only=True)
    position = state["loops"]["fit_loop"]["state_dict"]["combined_loader"][0]
    for name in ("planned", "rows", "fingerprint"):
        del position[name]
    torch.save(state, folder / "last.ckpt")
    text = (whole["rl"] / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("    validation_noise: 0.0\n", ""))
    main([*command["rl"], f"--data.steps={STEPS + 1}", f"--run.folder={folder}", f"--ckpt_path={folder}"])
    assert [line["noise_prob"] for line in lines(folder)] == [0.5] * 4


def test_checkpoints_are_small_and_load_without_pickled_code(whole):
    """AdamW keeps two numbers for each weight; a frozen base would be some fifty adapters."""
    for stage, folder in whole.items():
        adapter = sum(t.nbytes for t in torch.load(folder / "last.ckpt", weights_only=True)["state_dict"].values())
        assert (folder / "last.ckpt").stat().st_size < 4 * adapter + 200_000, stage


@pytest.mark.parametrize(
    ("option", "kept", "instead"),
    [
        ("max_epochs=2", "1", "data.steps"),
        ("max_steps=3", "-1", "data.steps"),
        ("min_steps=3", "None", "data.steps"),
        ("limit_train_batches=3", "None", "data.steps"),
        ("fast_dev_run=true", "False", "data.steps: 1"),
        ("overfit_batches=1", "0.0", "data.steps and a data.source with few rows"),
        ("accumulate_grad_batches=2", "1", "data.batch_size; model.micro_batch_tokens bounds the memory"),
        ("gradient_clip_val=1.0", "None", "model.max_grad_norm"),
        ("check_val_every_n_epoch=2", "1", "trainer.val_check_interval"),
    ],
)
def test_options_of_the_trainer_that_would_break_a_run_are_refused(option, kept, instead, capsys):
    name, value = option.replace("=true", "=True").split("=")
    assert failure(capsys, "fit", SIMULATOR, f"--trainer.{option}") == (
        2,
        f"error: trainer.{name}: leave it at {kept}; got {value}; set {instead}",
    )


@pytest.mark.parametrize("callback", ["Alarms", "Board", "NoiseAnnealing", "NoiseBySuccess"])
def test_callbacks_of_the_policy_say_so_to_the_simulator(callback, capsys):
    code, said = failure(capsys, "fit", SIMULATOR, f"--trainer.callbacks={callback}")
    assert (code, said.endswith("; use it with PolicyRL")) == (2, True)
    assert said.startswith(f"error: {callback}: SimulatorSFT has no ")


def test_a_run_that_stopped_at_a_check_leaves_no_curves(tmp_path, capsys):
    failure(capsys, "fit", POLICY, "--model.search.model.adapter=nowhere", f"--run.folder={tmp_path}")
    assert not list(tmp_path.iterdir())


def test_the_policys_base_is_loaded_as_the_policy_says(capsys):
    shared = ["--model.lora.r=2", "--model.search.model.path=policy", "--model.search.model.adapter=null"]
    for option, value in (("dtype", "bfloat16"), ("quantization", "nf4"), ("device", "cuda:1")):
        code, said = failure(capsys, "fit", POLICY, *shared, f"--model.search.model.{option}={value}")
        assert (code, f"leave it out, or set model.model.{option}" in said) == (2, True), said


def test_repeated_questions_are_said(questions, caplog):
    for batch, steps, said in (
        (2, 30, "data: 30 steps train on each of the 5 questions 15 times; lower data.steps or add rows, else"),
        (8, 11, "questions 11 times; lower data.steps or"),
        (2, 20, ""),
    ):
        caplog.clear()
        QADataModule(FileSource(str(questions), splits={"train": 1.0}), batch_size=batch, steps=steps).train_dataloader()
        assert said in caplog.text if said else not caplog.text
