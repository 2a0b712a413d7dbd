"""Runs of tiny models of a family through every stage on the command line, and what has to come of them."""

import json
import math
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel, load_peft_weights
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

from support.commandline import POLICY, SIMULATOR, TEST
from support.families import FAMILIES, save_family
from support.modelserver import start_process
from zs_lightning.cli import main
from zs_lightning.models.loading import load_tokenizer
from zs_lightning.text.prompts import MINIATURE, ask, fill

FORMATS = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "mixed": {"dtype": "float32"},
    "nf4": {"dtype": "bfloat16", "quantization": "nf4"},
    "int8": {"dtype": "bfloat16", "quantization": "int8"},
}
PROMPTS = {
    "chat.yaml": {"base": "miniature", "chat": True, "document": " {text}"},
    "thinking.yaml": {"base": "miniature", "chat": True, "document": " {text}", "thinking": True},
    "no_thinking.yaml": {"base": "miniature", "chat": True, "document": " {text}", "thinking": False},
    "prompted.yaml": {"base": "zerosearch_prompted", "document": "{text} "},
}
"""Files of the user, in the folder of the test. Their documents have no numbers: all that a random model writes is one."""
PLAIN = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.log_every_n_steps=1"]
GAPS = {"float32": 1e-4, "mixed": 0.1, "bfloat16": 0.1, "nf4": 0.1}
"""Most difference between a token's log-probability when it was sampled and when it was trained, in nats."""


@dataclass(frozen=True)
class Case:
    family: str
    format: str
    lora: bool
    simulator: str
    """`adapter` and `prompted`: on the policy's base, with the simulator's adapter or without one; or another family, whose
    adapter was trained on the format after the slash. `served` before it: another process has it."""
    prompts: str = "chat.yaml"

    @property
    def id(self):
        return f"{self.family}-{self.format}-{'lora' if self.lora else 'full'}-{self.simulator.replace('/', '-')}"

    @property
    def trained_simulator(self):
        """Family and format of the simulator whose adapter is used, or None."""
        if self.simulator == "adapter":
            return self.family, self.format
        return tuple(self.simulator.removeprefix("served ").split("/")) if "/" in self.simulator else None


def write(file, **init_args):
    """An option that puts these arguments of the module over a shipped configuration."""
    for name, content in {file: {"model": {"init_args": init_args}}, **PROMPTS}.items():
        Path(name).write_text(yaml.safe_dump(content))
    return f"--config={file}"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of the families' models, by name."""
    root = tmp_path_factory.mktemp("families")
    return {name: save_family(name, root / name) for name in FAMILIES}


@pytest.fixture(scope="module")
def simulators(folders, tmp_path_factory):
    """Gives the run folder of one step of fine-tuning of a family's simulator in a format."""
    runs, root = {}, tmp_path_factory.mktemp("simulators")

    def trained(family, format):
        if (family, format) not in runs:
            folder = root / f"{family}-{format}"
            model = {"path": folders[family], **FORMATS[format]}
            there = write("simulator.yaml", model=model, lora={"r": 2}, prompts="chat.yaml", warmup_steps=0)
            small = ["--data.steps=1", "--data.batch_size=4", "--data.validation_rows=2", "--trainer.val_check_interval=1"]
            main(["fit", SIMULATOR, there, f"--run.folder={folder}", *small, *PLAIN, precision(format)])
            check_adapter(folder, folders[family], format, "language_model.")
            logged = scalars(folder)
            assert logged["sft/tokens"][0] > 0
            assert 0 < logged["sft/loss"][0] < 20
            runs[family, format] = folder
        return runs[family, format]

    return trained


@contextmanager
def served(case, folders, simulators):
    """A policy's `search` that asks a process with the simulator in it, its adapter merged."""
    family, format = case.trained_simulator
    with start_process(folders[family], str(simulators(family, format) / "model")) as server:
        options = {"hosts": server.stdout.readline().strip(), "max_new_tokens": 12, "prompts": case.prompts, "count": 2}
        try:
            yield {"class_path": "zs_lightning.search.ServedSimulatorSearch", "init_args": options}
        finally:
            server.kill()


def precision(format):
    return f"--trainer.precision={'32-true' if format == 'float32' else 'bf16-mixed'}"


def policy_of(case, folders):
    limits = {"max_turns": 2, "max_new_tokens": 24, "max_observation_tokens": 40, "max_length": 400, "slots": 8}
    return {
        "model": {"path": folders[case.family], **FORMATS[case.format]},
        "lora": {"r": 2} if case.lora else None,
        "prompts": case.prompts,
        "rollout": limits,
    }


def search_of(case, folders, simulators):
    limits = {"slots": 4, "max_new_tokens": 12, "max_length": 400, "prompts": "chat.yaml", "count": 2}
    if case.simulator == "prompted":
        return limits | {"model": {"path": "policy", "adapter": None}, "prompts": "prompted.yaml", "max_length": 2048}
    family, format = case.trained_simulator
    adapter = {"adapter": str(simulators(family, format) / "model")}
    if case.simulator == "adapter":
        return limits | {"model": {"path": "policy", **adapter}}
    return limits | {"model": {"path": folders[family], **FORMATS[format], **adapter}}


def fit(case, run, folders, search, *more):
    """Two steps of eight rollouts."""
    learning = {"group_size": 2, "estimator": "reinforce", "reward": {"format_weight": 0.5}, "warmup_steps": 0}
    there = write("policy.yaml", **policy_of(case, folders), **learning, search=search)
    small = ["--data.steps=2", "--data.batch_size=4", "--run.save_every=1"]
    main(["fit", POLICY, there, f"--run.folder={run}", *small, *PLAIN, precision(case.format), *more])


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def scalars(folder):
    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def check_family(case, folders, search):
    """Trains and tests it; returns the rows of the training's trajectories."""
    run = Path("run")
    fit(case, run, folders, search)
    rows = check_rollouts(case, run, folders)
    if case.lora:
        check_adapter(run, folders[case.family], case.format, "policy.")
    else:
        check_full(run, folders[case.family], case.format)
    check_test(case, run, folders)
    return rows


def check_rollouts(case, run, folders):
    rows = lines(run / "trajectories" / "train.jsonl")
    assert [row["step"] for row in rows] == [1] * 8 + [2] * 8
    assert not any(row["failure"] for row in rows)
    assert load_tokenizer(folders[case.family]).decode(rows[0]["prompt_ids"]) == opening(case, folders, rows[0]["question"])
    for row in rows:
        assert len(row["token_ids"]) == len(row["loss_mask"]) == len(row["old_logprobs"])
        assert sum(row["loss_mask"]) > 0
        assert all(-50 < value <= 0 for value in row["old_logprobs"])
    searches = [turn for row in rows for turn in row["turns"] if turn["label"] is not None]
    assert len(searches) >= 4
    assert any(turn["documents"] for turn in searches)
    logged = scalars(run)
    assert all(math.isfinite(value) for values in logged.values() for value in values)
    assert min(logged["grad_norm"]) > 0
    assert max(logged["policy/sampling_gap_max"]) < GAPS[case.format]
    return rows


def opening(case, folders, question):
    """The whole text that a conversation begins with, by transformers alone."""
    tokenizer, text = load_tokenizer(folders[case.family]), fill(MINIATURE.policy, question=ask(question))
    if case.prompts not in PROMPTS or not tokenizer.chat_template:
        return (FAMILIES[case.family].begin or "") + text
    thinking = {"thinking.yaml": {"enable_thinking": True}, "no_thinking.yaml": {"enable_thinking": False}}
    message, options = [{"role": "user", "content": text}], thinking.get(case.prompts, {})
    return tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True, **options)


def check_adapter(run, base, format, prefix):
    """Every matrix can be loaded by peft alone, is that of the checkpoint, and has moved."""
    state = torch.load(run / "last.ckpt", weights_only=True)["state_dict"]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, FORMATS[format]["dtype"]))
    wrapped = PeftModel.from_pretrained(model, run / "model")
    loaded = {name: p for name, p in wrapped.named_parameters() if "lora_" in name}
    assert len(load_peft_weights(str(run / "model"), "cpu")) == len(loaded) == len(state) == 2 * 2 * 7, "A and B of all layers"
    for name, weight in loaded.items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, state[prefix + name])
        assert weight.isfinite().all()
        assert "lora_B" not in name or weight.abs().sum() > 0, "B begins at zero"


def check_full(run, base, format):
    """The whole model can be loaded by transformers alone, is that of the checkpoint, and every weight has moved."""
    state = torch.load(run / "last.ckpt", weights_only=True)["state_dict"]
    before = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, FORMATS[format]["dtype"]))
    after = dict(AutoModelForCausalLM.from_pretrained(run / "model", dtype="auto").named_parameters())
    assert {f"policy.{name}" for name in after} == state.keys()
    for name, weight in before.named_parameters():
        assert weight.dtype == after[name].dtype
        assert torch.equal(after[name], state[f"policy.{name}"])
        assert after[name].isfinite().all()
        assert not torch.equal(after[name], weight), name


def check_test(case, run, folders):
    there = write("test.yaml", **policy_of(case, folders), decodings=["greedy", "sampled"])
    small = [f"--ckpt_path={run / 'last.ckpt'}", "--run.folder=tested", "--data.test_rows=6", "--data.eval_batch_size=4"]
    main(["test", TEST, there, *small, *PLAIN[:2], precision(case.format)])
    results, rows = json.loads(Path("tested/results.json").read_text()), lines(Path("tested/questions.jsonl"))
    assert results["engine"] == "bm25"
    assert {name: part["questions"] for name, part in results["decodings"].items()} == {"greedy": 6, "sampled": 6}
    assert len({(row["id"], row["decoding"]) for row in rows}) == 12
    turns = [turn for row in lines(Path("tested/trajectories/test.jsonl")) for turn in row["turns"]]
    assert sum(row["searches"] for row in rows) == sum(turn["kind"] == "search" for turn in turns if turn["observation_span"])
    assert any(turn["documents"] for turn in turns)
