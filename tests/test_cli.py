"""The command line, in this process: help, and what a user reads when an option is wrong."""

import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from support.commandline import CONFIGS, POLICY, ROOT, SIMULATOR, SMALL_SFT, TEST, failure
from support.runfolders import eight_questions
from zs_lightning.cli import COMMANDS, main
from zs_lightning.models.specs import SHIPPED
from zs_lightning.modules import SimulatorSFT
from zs_lightning.search import BM25Search

pytestmark = pytest.mark.usefixtures("environment")

# ---------------------------------------------------------------------- help


HERE = "import sys\nfrom zs_lightning.cli import main\n"


def program(code):
    """Stdout of a process of its own and its CPU seconds: its wall time says as much about what else runs here."""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    said = process.stdout.read()
    # Its own: what all ended processes of this one took may grow by that of another meanwhile.
    _, status, used = os.wait4(process.pid, 0)
    process.stdout.close()
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return said, used.ru_utime + used.ru_stime


def test_help_lists_the_commands_at_once_without_torch():
    said, seconds = program(
        f"{HERE}main(['--help']); main(['--version'])\n"
        "print([m for m in ('torch', 'lightning', 'jsonargparse') if m in sys.modules])"
    )
    assert seconds < program("import torch")[1]
    for command in COMMANDS:
        assert f"\n  {command} " in said
    assert "predict" not in said
    assert "python -m zs_lightning fit --config configs/miniature/simulator.yaml" in said
    assert said.endswith("\nzs_lightning 0.1.0\n[]\n")


def test_help_of_fit_is_fast_and_loads_no_heavy_library():
    code = (
        f"{HERE}try: main(['fit', '--help'])\nexcept SystemExit as end: print(end.code)\n"
        "print([m for m in ('peft', 'bitsandbytes', 'datasets', 'bm25s') if m in sys.modules])"
    )
    # In times of what it cannot do without, which comes first: the first import after an installation
    # compiles the libraries, and seconds are another number on each machine.
    needed = program("import lightning.pytorch, jsonargparse")[1]
    said, seconds = program(code)
    assert seconds < 3 * needed
    assert "--data.batch_size" in said
    assert said.endswith("\n0\n[]\n")


def test_help_names_the_program_as_it_is_called(capsys):
    for words in (["fit", "--help"], ["fit", "--model.help", "PolicyRL"], ["ask", "--search.help", "BM25Search"]):
        with pytest.raises(SystemExit):
            main(words)
        assert capsys.readouterr().out.startswith("usage: python -m zs_lightning ")


NOWHERE = {
    "fit": ["--config=nope.yaml"],
    "validate": ["-c", "nope.yaml"],
    "test": [TEST, "--ckpt_path", "nope"],
    "estimate": ["--card", "24", "--config", "nope.yaml"],
    "ask": ["--ckpt=nope", "Who?"],
    "export": ["--merge", "--ckpt", "nope", "--out", "x"],
    "compare": ["base=nope", "trained=nope"],
    "measure-simulator": ["base=nope"],
    "serve": ["--search", "BM25Search", "--search.corpus", "nope"],
    "build-simulator-data": ["--config=nope.yaml"],
    "make-questions": ["--corpus", "nope"],
}


@pytest.mark.parametrize("words", [["fit", "--config="], ["compare", "base="], ["test", TEST, "--model.search.corpus="]])
def test_a_name_that_is_too_long_is_of_nothing(capsys, words):
    code, said = failure(capsys, *words[:-1], words[-1] + "x" * 300)
    assert code == 2
    assert "there is no " in said


def test_what_is_not_there_is_said_before_a_library_is_loaded():
    """Loading them takes seconds."""
    code = f"{HERE}for command, words in {NOWHERE}.items():\n"
    code += "  try: main([command, *words])\n  except SystemExit as end: print(end.code)\n"
    said, _ = program(f"{code}print([m for m in ('torch', 'lightning', 'jsonargparse', 'transformers') if m in sys.modules])")
    assert said == "2\n" * len(COMMANDS) + "[]\n"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["compare", "runs", "nope"], "compare: there is no folder nope; expected the run folder of a finished `test`"),
        (["compare", "runs", "base=nope", "--out", "x"], "compare: there is no folder nope; expected the run folder of a"),
        (["compare", "--out", "x", "runs", "--training=nope"], "--training: there is no folder nope"),
        (["export", "--ckpt", "a/last.ckpt", "--out", "x", "--results", "nope"], "--results: there is no folder nope"),
        (["test", TEST, "--model.search.corpus=nope"], "--model.search.corpus: there is no file or folder nope"),
        (["ask", "--ckpt", "runs", "Who?"], "--ckpt: there is no file runs/last.ckpt; did you mean runs/a or runs/b?"),
        (["test", TEST, "--ckpt_path", "runs"], "--ckpt_path: there is no file runs/last.ckpt; did you mean runs/a or runs/b?"),
    ],
)
def test_a_path_that_leads_nowhere_is_named(words, sentence, capsys):
    for name in ("a", "runs/a", "runs/b"):
        Path(name).mkdir(parents=True)
        torch.save({}, Path(name) / "last.ckpt")
    code, said = failure(capsys, *words)
    assert code == 2
    assert said.startswith(f"error: {sentence}")


def test_what_is_logged_steers_no_terminal(tmp_path, monkeypatch, capsys):
    main(["--version"])
    # As in a process of its own, where pytest has no handler.
    monkeypatch.setattr(logging.root, "handlers", [])
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "a.txt").write_text("red")
    (folder / "b.\x1b]0;owned\x07\nerror: \u202ex").write_text("blue")
    BM25Search(corpus=str(folder), cache=str(tmp_path / "cache")).setup()
    said = f"search: 1 passages in {folder}; passed over 1 other files: .␛]0;owned␇ error: \ufffdx 1\n"
    assert said in capsys.readouterr().err
    try:
        raise ValueError("\x1b[2J")
    except ValueError:
        logging.getLogger("zs_lightning").exception("it failed")
    shown = capsys.readouterr().err
    assert shown.startswith("it failed\nTraceback")
    assert shown.endswith("\nValueError: ␛[2J\n")


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path):
    """Its end of the pipe is closed before a word is written."""
    command = [sys.executable, "-m", "zs_lightning", "compare", "base", "trained", "--out", "out"]
    path = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=eight_questions(tmp_path), env=path
    )
    ended.stdout.close()
    assert ended.stderr.read() == ""
    assert ended.wait() == 1
    assert (tmp_path / "out" / "report.html").is_file()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_python_without_the_packages_is_told_where_they_are(command):
    options = {"export": "--ckpt a --out b", "ask": "--config a b", "estimate": "--config a", "serve": "--search BM25Search"}
    words = [command, *options.get(command, "").split()]
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from zs_lightning.cli import main; main({words})"
    ended = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    sentence = (
        r"error: the package \w+ is missing for \S+; activate the environment that has it with `source \.venv/bin/activate`, "
        r"or make it with `bash scripts/quickstart\.sh`\n"
    )
    assert re.fullmatch(sentence, ended.stderr)


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
    "a group that is needed": (["fit", SIMULATOR, "--model.lora=null"], "model.lora: expected a group of options; got null"),
    "no rank": (["fit", POLICY, "--model.lora.r=0"], "lora: expected r >= 1 and 0 <= dropout < 1; got r=0, dropout=0.0"),
    "wrong choice": (["fit", POLICY, "--data.task=foo"], "data.task: expected questions, records or null; got foo"),
    "wrong choice of the model": (
        ["fit", POLICY, "--model.estimator=a2c"],
        "model.estimator: there is no a2c; expected one of reinforce, reinforce_baseline, rloo, grpo, grpo_no_std, ppo, or a "
        "function such as my_estimators.mine in a file beside",
    ),
    "wrong reward": (["fit", POLICY, "--model.reward=Foo"], "model.reward: there is no class Foo; expected AnswerReward"),
    "wrong model": (["fit", POLICY, "--model=Foo"], "model: there is no class Foo; expected PolicyRL"),
    "wrong class": (["fit", POLICY, "--model.search=BM25"], "model.search: there is no class BM25; did you mean BM25Search?"),
    "newer schema": (
        ["fit", POLICY, "--schema=2"],
        "config schema 2 is newer than this program understands (1); upgrade zs_lightning",
    ),
    "unknown schema": (["fit", POLICY, "--schema=0"], "config schema 0 is not known to this program; expected 1"),
    "missing checkpoint": (
        ["fit", POLICY, "--ckpt_path=no.ckpt"],
        "--ckpt_path: there is no file no.ckpt; expected the run folder of a `fit`, or the checkpoint in it",
    ),
    "folder without a checkpoint": (
        ["test", TEST, f"--ckpt_path={CONFIGS}"],
        f"--ckpt_path: there is no file {CONFIGS}/last.ckpt; expected the run folder of a `fit`, or the checkpoint in it",
    ),
    "not a checkpoint": (
        ["fit", POLICY, f"--ckpt_path={__file__}"],
        f"--ckpt_path: {__file__} is damaged or no checkpoint; expected the last.ckpt of a `fit`",
    ),
    "no such template set": (
        ["fit", POLICY, "--model.prompts=x"],
        "prompts: no template set is called 'x'; expected one of miniature, zerosearch, "
        "zerosearch_noisy_untold, zerosearch_prompted, zerosearch_untold or a .yaml or .json file",
    ),
    "lone estimator": (
        ["fit", POLICY, "--model.group_size=1"],
        "model: estimator grpo compares the rollouts of a group; set group_size to 2 or more",
    ),
    "rows for the other module": (
        ["fit", SIMULATOR, "--data.task=questions"],
        "data.task: SimulatorSFT works on records; got questions",
    ),
    "nameless folder": (["fit", SIMULATOR, "--run.folder="], "run.folder: expected a folder; got an empty text"),
    "no steps": (["fit", POLICY, "--data.steps=0"], "data: expected steps >= 1; got 0"),
    "empty data": (
        ["test", TEST, "--data.source=support.commandline.NoQuestions"],
        "data: the test split of NoQuestions has no rows; change data.source",
    ),
    "no records": (
        ["fit", SIMULATOR, "--data.source=support.commandline.NoQuestions"],
        "data: NoQuestions has no search records; choose another source, or train a policy (PolicyRL) on its questions",
    ),
    "no adapter": (
        ["fit", POLICY],
        "model.search.model.adapter: there is no adapter in runs/simulator/model (adapter_config.json is missing); "
        "a `fit` writes one into its run folder as `model`, for the miniature's simulator: python -m zs_lightning fit "
        "--config configs/miniature/simulator.yaml",
    ),
    "no adapter of the policy": (
        ["test", TEST, "--model.model.adapter=nowhere"],
        "model.model.adapter: there is no adapter in nowhere (adapter_config.json is missing)",
    ),
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
    goes_on = case in ("unknown accelerator", "wrong reward", "wrong model", "no adapter of the policy")
    assert said.startswith(f"error: {sentence}") if goes_on else said == f"error: {sentence}"
    assert "\n" not in said


def test_a_split_that_a_source_does_not_have(capsys):
    """The error's class is made of ValueError and is none itself."""
    Path("q.csv").write_text("question,golden_answers\nWhat is the capital of China?,Beijing\n")
    source = ["--data.source=FileSource", "--data.source.path=q.csv", "--data.source.splits={train: 1.0}"]
    sentence = (
        "error: data.source: q.csv has no test split: data.source.splits names only train; set data.source.splits, such as "
        "splits: {train: 0.9, test: 0.1}, or a file or split of the data set for each"
    )
    assert failure(capsys, "test", TEST, *source) == (2, sentence)


def test_a_card_that_is_full_is_one_sentence(capsys, monkeypatch):
    """There is no card here to fill."""

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(SimulatorSFT, "training_step", full)
    code, said = failure(capsys, "fit", SIMULATOR, *SMALL_SFT, "--data.steps=2")
    assert code == 1
    assert said.splitlines()[-1].startswith("error: the card's memory is full; lower model.micro_batch_tokens")
    assert "Traceback" not in said


def test_a_run_goes_on_by_its_folder(runs, capsys):
    """What is said of its end is read from the checkpoint in it."""
    folder = runs / "simulator"
    code, said = failure(capsys, "fit", f"--config={folder / 'config.yaml'}", f"--ckpt_path={folder}")
    assert (code, said[:60]) == (2, "error: --ckpt_path: the run is already finished at 1 of 1 st")


AFTER_DATA = (CONFIGS / "policy.yaml").read_text().split("\n").index("data:") + 3
"""The second line behind it, at which YAML gives up."""


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("batch_size", "batchsize", "unknown option data.batchsize; did you mean data.batch_size?"),
        ("precision", "precisions", "unknown option trainer.precisions; did you mean trainer.precision?"),
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
            "estimator: a2c",
            "model.estimator: there is no a2c; expected one of reinforce, reinforce_baseline, rloo, grpo, grpo_no_std, ppo, or "
            "a function such as my_estimators.mine in a file beside",
        ),
        ("data:", "data: [", f"--config: wrong.yaml is not valid YAML, see its line {AFTER_DATA}"),
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
    sentence = "model.model.path: the folder base has no tokenizer (tokenizer.json); save the tokenizer next to the model"
    assert failure(capsys, "test", TEST, "--model.model.path=base") == (2, f"error: {sentence}")
