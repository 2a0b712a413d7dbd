"""The walk from a person's own questions, notes and model to an answer, as the README has it, with one step of each stage."""

import csv
import json
import re
import shlex
import signal
from pathlib import Path

import pytest
import torch
import yaml

from support.commandline import failure, tensors
from support.tiny import make_model, make_tokenizer
from zs_lightning.cli import main

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
WALK = re.search(r"^## Your own questions.*?^```bash\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
TRUSTED = re.search(r"^## A simulator one can trust.*?^```bash\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def commands(walk):
    return [shlex.split(line) for line in walk[1].replace("\\\n", " ").splitlines() if line.startswith("python")]


LIMITS = {"slots": 4, "max_new_tokens": 6, "max_observation_tokens": 40, "max_length": 1200}
ROLLOUT = [f"--model.rollout.{key}={value}" for key, value in LIMITS.items()]
STEP = ["--data.batch_size=2", "--data.steps=1", "--trainer.enable_progress_bar=false"]
START = [*STEP, *ROLLOUT, "--model.rollout.max_new_tokens=120", "--model.rollout.max_observation_tokens=150"]
START += ["--model.rollout.max_length=2000", "--data.validation_rows=2", "--trainer.val_check_interval=1"]
SMALL = {
    "start": START,
    "simulator": [*STEP, "--model.max_new_tokens=16", "--data.validation_rows=2"],
    "policy": [*STEP, *ROLLOUT, "--model.group_size=2", "--model.search.slots=4", "--model.search.max_new_tokens=8"],
    "test": ROLLOUT,
}
CPU = ["--model.model.path=model", "--model.model.dtype=float32", "--trainer.precision=32-true"]


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A working folder with a model, questions, notes and records."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    make_model("qwen2", max_position_embeddings=4096).save_pretrained("model")
    make_tokenizer("chat").save_pretrained("model")
    questions = [[f"Who wrote book {number}?", f"Writer {number}"] for number in range(40)]
    with open("my_questions.csv", "w") as file:
        csv.writer(file).writerows([["question", "answer"], *questions])
    Path("notes").mkdir()
    for number, (_, answer) in enumerate(questions):
        Path(f"notes/{number}.md").write_text(f"Book {number} was written by {answer}.\n")
    record = {"query": "book writer", "label": "useful", "documents": ["A book.", {"title": "Book", "text": "A writer."}]}
    lines = [json.dumps({"question": q, "golden_answers": [a], **record}) for q, a in questions]
    Path("my_records.jsonl").write_text("\n".join(lines))
    yield tmp_path
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Lightning ignores Ctrl-C once it has seen one.


def test_the_walk_of_the_readme(mine):
    for words in commands(WALK):
        command, options = words[3], words[4:]
        if command in ("fit", "test"):
            config = Path(options[options.index("--config") + 1])
            options = [*options, *CPU, *SMALL[config.stem]]
        main([command, *options])
    report = json.loads((mine / "runs/own/report/results.json").read_text())
    trained = report["runs"][1]
    held_back = trained["decodings"]["greedy"]["questions"]
    assert 1 <= held_back <= 20
    assert (trained["name"], trained["engine"]) == ("trained", "bm25")
    assert len((mine / "runs/own/trained/questions.jsonl").read_text().splitlines()) == held_back
    assert (mine / "answer.html").is_file()
    assert (mine / "exported/adapter_model.safetensors").is_file()
    assert f"| {held_back} |" in (mine / "exported/README.md").read_text()


@pytest.mark.parametrize("name", SMALL)
def test_the_heads_name_what_a_cpu_needs(name):
    said = " ".join(option.replace("=", " ") for option in CPU[1:])
    assert re.search(rf"^# On a CPU add: +{re.escape(said)}", (ROOT / f"configs/own/{name}.yaml").read_text(), re.MULTILINE)


def test_a_simulator_of_ones_own_plays_for_the_policy(mine):
    """By the line at the head of policy.yaml."""
    records = "--data.source.path=my_records.jsonl"
    main(["fit", "--config=configs/own/simulator.yaml", records, *CPU, *SMALL["simulator"]])
    own = ["--model.search.model.adapter=runs/own/simulator/model", "--model.search.prompts=zerosearch"]
    main(["fit", "--config=configs/own/policy.yaml", *CPU, *SMALL["policy"], *own])
    assert (mine / "runs/own/policy/model/adapter_model.safetensors").is_file()


def test_rl_goes_on_from_a_supervised_start(mine, capsys):
    """By the lines of the README: the questions that a test holds back are in neither."""
    block = re.search(r"^\*A supervised start\.\*.*?^```bash\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    asked = {}
    for (command, *options), name in zip((words[3:] for words in commands(block)), ("start", "policy"), strict=True):
        main([command, *options, *CPU, *SMALL[name], "--data.steps=2"])
        asked[name] = {row["question"] for row in rows(f"runs/own/{name}/trajectories/train.jsonl")}
    said = capsys.readouterr().out
    assert re.search(r"^demonstrations: 4 trajectories for 4 of 4 questions$", said, re.MULTILINE)
    assert "next: python -m zs_lightning fit --config POLICY.yaml --model.model.adapter runs/own/start/model" in said
    learnt = rows("runs/own/start/trajectories/train.jsonl")
    assert [row["answer"] in row["golden_answers"] for row in learnt] == [True] * 4
    validated = {row["question"] for row in rows("runs/own/start/trajectories/validation.jsonl")}
    main(["test", "--config=configs/own/test.yaml", *CPU, *ROLLOUT, "--ckpt_path=runs/own/start", "--run.folder=tested"])
    held_back = {row["question"] for row in rows("tested/questions.jsonl")}
    assert held_back
    assert not held_back & (asked["start"] | asked["policy"] | validated)
    # What went well is a demonstration of its own.
    source = ["--model.demonstrations=FileDemonstrations", "--run.folder=again"]
    source.append("--model.demonstrations.path=runs/own/start/trajectories/train.jsonl")
    main(["fit", "--config=configs/own/start.yaml", *CPU, *START, *source])
    assert "demonstrations: 2 trajectories for 2 of 2 questions" in capsys.readouterr().out
    main(["estimate", "--config=configs/own/start.yaml", *CPU, "--card=24"])
    main(["export", "--ckpt=runs/own/start", "--out=exported"])
    assert "fine-tuned on demonstrations" in (mine / "exported/README.md").read_text()


@pytest.mark.parametrize("callback", ["Alarms", "NoiseAnnealing"])
def test_what_watches_or_changes_rollouts_is_refused_for_a_start(callback, mine, capsys):
    args = ["fit", "--config=configs/own/start.yaml", *CPU, *START, f"--trainer.callbacks+={callback}"]
    code, said = failure(capsys, *args)
    assert code
    assert re.search(rf"{callback}: PolicySFT has no .*; use it with PolicyRL", said)


def test_a_start_that_is_stopped_goes_on_bit_for_bit(mine, capsys):
    args = ["fit", "--config=configs/own/start.yaml", *CPU, *START, "--model.lora.dropout=0.1", "--data.steps=3"]
    args += ["--run.save_every=1"]
    main([*args, "--run.folder=whole"])
    stop = ["--trainer.callbacks+=support.commandline.StopAfterOneStep", "--trainer.callbacks.step=2"]
    with pytest.raises(SystemExit):
        main([*args, "--run.folder=run", *stop])
    main([*args, "--run.folder=run"])
    said = capsys.readouterr().out
    assert "run: goes on after 2 of 3 steps" in said
    assert said.count("demonstrations: 6 trajectories for 6 of 6 questions\n") == 3
    states = [tensors(torch.load(f"{name}/last.ckpt", weights_only=True)["state_dict"]) for name in ("whole", "run")]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert rows("whole/trajectories/train.jsonl") == rows("run/trajectories/train.jsonl")


def test_the_walk_trains_against_the_simulator_that_it_measured():
    (measured,) = re.findall(r" trained=(\S+)", TRUSTED[1])
    (adapter,) = re.findall(r" --model.search.model.adapter (\S+)", TRUSTED[1])
    assert measured == adapter


def test_a_query_that_is_repeated_finds_the_same():
    config = yaml.safe_load((ROOT / "configs/own/policy.yaml").read_text())
    assert config["model"]["init_args"]["rollout"]["noise_draw"] == "query"


def test_the_walk_to_a_simulator_one_can_trust(mine, capsys):
    """With a random model, which does not search by itself: the questions are sent as they are."""
    build = ["--model.path=model", "--model.dtype=float32", "--rollout.max_new_tokens=4", "--rollout.slots=4"]
    build += ["--rollout.retrieve_first=true", "--rollout.max_turns=0"]
    for words in commands(TRUSTED):
        command, options = words[3], words[4:]
        if command in ("fit", "test"):
            config = Path(options[options.index("--config") + 1])
            options = [*options, *CPU, *SMALL[config.stem]]
            if config.stem == "simulator":  # Few records.
                options.append("--data.source.splits={train: 0.6, validation: 0.2, test: 0.2}")
        elif command == "build-simulator-data":
            options += build
        else:
            # What a configuration names is the model that the person wrote into it.
            config = Path("mine.yaml")
            text = Path("configs/own/policy.yaml").read_text().replace("Qwen/Qwen2.5-1.5B-Instruct", "model")
            config.write_text(text.replace("bfloat16", "float32").replace("max_new_tokens: 300", "max_new_tokens: 8"))
            options = [f"prompted={config}" if "policy.yaml" in word else word for word in options] + ["--rows=3"]
        main([command, *options])
    assert labels("runs/own/simulator_data/records.jsonl") >= {"useful", "noisy", "off_topic"}
    assert (mine / "runs/own/simulator/best/adapter_model.safetensors").is_file()
    assert (mine / "runs/own/measured/report.html").is_file()
    turns = [turn for line in rows("runs/own/policy_trusted/trajectories/train.jsonl") for turn in line["turns"]]
    assert {turn["label"] for turn in turns} <= {None, "useful", "off_topic", "contradicting", "noisy"}
    assert json.loads((mine / "runs/own/trusted/results.json").read_text())["engine"] == "bm25"
    assert "prompted: " in capsys.readouterr().out


def rows(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def labels(path):
    return {row["label"] for row in rows(path)}


def test_other_loggers_by_the_lines_of_the_readme(mine):
    """But W&B, which is not installed here; the charts' arrangement is for TensorBoard and leaves a file alone."""
    block = re.search(r"^```yaml\n(trainer:\n  logger:\n.*?)^```", README, re.DOTALL | re.MULTILINE)
    loggers = yaml.safe_load(block[1])["trainer"]["logger"]
    assert [logger["class_path"].rpartition(".")[2] for logger in loggers] == ["WandbLogger", "CSVLogger", "Curves"]
    for kept in (loggers[1:], loggers[1:2]):
        Path("loggers.yaml").write_text(yaml.safe_dump({"trainer": {"logger": kept}}))
        files = ["--config=configs/own/policy.yaml", "--config=loggers.yaml"]
        main(["fit", *files, *CPU, *SMALL["policy"], f"--run.folder=runs/own/policy{len(kept)}"])
    written = [csv.DictReader(path.open()) for path in sorted(Path("runs/own/policy/curves").glob("*/metrics.csv"))]
    assert ["reward" in rows.fieldnames for rows in written] == [True, True]
    assert len(list(Path("runs/own/policy").glob("*tfevents*"))) == 1
