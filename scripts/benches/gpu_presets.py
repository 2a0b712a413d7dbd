"""Presets of configs/ on a card: a few short steps with random weights of the preset's shape, beside what estimate says.

A random policy never asks for a search. So each rollout begins with one (`retrieve_first`), and then the policy writes two
turns to their limit.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml

STEPS, TURN, WRITTEN, RESULT = 3, 64, 64, 260
"""Training steps; tokens of a turn, of a simulated result, and of what is appended for it. Shorter than in a run: what a
token costs is measured, and the keys and values of whole contexts are reserved anyway."""
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16}
SMALL |= {"num_key_value_heads": 2, "vocab_size": 2048, "max_position_embeddings": 4096}
"""The stand-ins of a dry run."""
WORDS = "amber basin cedar delta ember flint grove haven inlet jetty knoll ledge maple north ocean plain quarry ridge".split()


def make_tokenizer(size: int) -> Any:
    """Byte-level BPE that knows the words of the prompts; its other `size` ids are words that no text is split into."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from zs_lightning.text.prompts import get_prompts

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1500, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator([str(get_prompts("zerosearch")).replace("\\n", "\n"), " ".join(WORDS)] * 5, trainer)
    written = json.loads(inner.to_str())
    vocabulary = written["model"]["vocab"]
    vocabulary.update({f"Ġw{i}": i for i in range(len(vocabulary), size)})
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(written)), eos_token="<eos>")


def make_stand_in(name: str, folder: str, dry: bool) -> None:
    """Saves a model of the named one's shape with random weights, its tokenizer, and a fresh adapter in `adapter`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from zs_lightning.commands.estimate.architectures import architecture
    from zs_lightning.models.lora import add_lora
    from zs_lightning.models.specs import LoraSpec

    config = architecture(name)
    if dry:
        config = AutoConfig.for_model(config.model_type, **SMALL)
    with torch.random.fork_rng(), torch.device("cpu" if dry else "cuda"):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    make_tokenizer(config.vocab_size).save_pretrained(folder)
    add_lora(model, LoraSpec(), 0).save_pretrained(Path(folder) / "adapter", save_embedding_layers=False)


def make_rows(file: Path) -> None:
    """Questions that are search records as well, with prompts of some 200 tokens, and five documents of some 600."""
    question, document = " ".join(WORDS * 5), " ".join(WORDS * 7)[:700]
    with file.open("w") as lines:
        for i in range(400):
            row = {"question": f"{question} {i}?", "golden_answers": ["Foo"], "query": f"author of {i}"}
            lines.write(json.dumps({**row, "noisy": False, "documents": [f"{i} {document}"] * 5}) + "\n")


def models(preset: Path) -> list[str]:
    """Names of the base models that it loads."""
    module = yaml.safe_load(preset.read_text())["model"]["init_args"]
    simulator = module.get("search", {}).get("init_args", {}).get("model", {}).get("path", "policy")
    return [module["model"]["path"], *([simulator] if simulator != "policy" else [])]


def stand_in(name: str, folder: Path) -> Path:
    """Where the stand-in of the named model is kept."""
    return folder / name.rpartition("/")[2].lower()


def stand_ins(preset: Path, folder: Path) -> list[str]:
    """Options that put the stand-ins in `folder` and its rows in the place of what the hub has."""
    places = [stand_in(name, folder) for name in models(preset)]
    changes = {"data.source.path": folder / "rows.jsonl", "model.model.path": places[0]}
    if "search" in yaml.safe_load(preset.read_text())["model"]["init_args"]:
        changes["model.search.model.adapter"] = places[-1] / "adapter"
        if len(places) > 1:
            changes["model.search.model.path"] = places[1]
    return [f"--{key}={value}" for key, value in changes.items()]


def options(preset: Path, dry: bool) -> list[str]:
    """Of `fit` or `estimate`: the preset with short steps."""
    module = yaml.safe_load(preset.read_text())["model"]["init_args"]
    changes: dict[str, Any] = {"data.steps": STEPS, "trainer.limit_val_batches": 0, "trainer.enable_progress_bar": "false"}
    if "search" in module:
        # As many rollouts as are written at a time: one wave, so that a step is short and its memory that of a long one.
        changes["data.batch_size"] = 1 if dry else max(1, module["rollout"]["slots"] // module["group_size"])
        limits = {"retrieve_first": "true", "max_turns": 1, "max_new_tokens": TURN, "max_observation_tokens": RESULT}
        changes |= {f"model.rollout.{key}": value for key, value in limits.items()}
        changes["model.search.max_new_tokens"] = WRITTEN
    if dry:
        changes |= {"trainer.accelerator": "cpu", "model.model.device": "cpu"}
        short = {"model.rollout.max_new_tokens": 4, "model.search.max_new_tokens": 4, "model.group_size": 2}
        changes |= short if "search" in module else {"data.batch_size": 1}
        if len(models(preset)) > 1:
            changes["model.search.model.device"] = "cpu"
    return [f"--config={preset}", *(f"--{key}={value}" for key, value in changes.items())]


def estimated(arguments: list[str], gigabytes: int) -> dict[str, Any]:
    """What estimate says of these options: whether they fit, and bytes on each card."""
    from zs_lightning.commands.estimate.job import read_job
    from zs_lightning.commands.estimate.memory import plan
    from zs_lightning.configuration.lightning_cli import quiet

    quiet()
    cards = plan(read_job(arguments), gigabytes * 10**9)
    return {"fits": all(card.fits for card in cards), "peak_bytes": [card.peak for card in cards]}


class Watch(L.Callback):
    """Writes each training step's wall time and the most memory that tensors held so far on each card to steps.jsonl."""

    def __init__(self) -> None:
        self.start = 0.0

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:  # What loading took for a moment is not the step's.
            for card in in_use():
                torch.cuda.reset_peak_memory_stats(card)
        self.start = now()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step: dict[str, Any] = {"seconds": now() - self.start}
        step["peak_bytes"] = [torch.cuda.max_memory_allocated(card) for card in in_use()]
        step["reserved_bytes"] = [torch.cuda.max_memory_reserved(card) for card in in_use()]
        with (Path(trainer.default_root_dir) / "steps.jsonl").open("a") as file:
            file.write(json.dumps(step) + "\n")


def in_use() -> list[int]:
    """The cards on which this process has tensors; the others may be somebody else's."""
    return [card for card in range(torch.cuda.device_count()) if torch.cuda.memory_allocated(card)]


def now() -> float:
    """Seconds of a clock, the cards waited for."""
    for card in in_use():
        torch.cuda.synchronize(card)
    return time.perf_counter()


def measured(folder: Path) -> dict[str, Any] | None:
    """Of the steps that Watch wrote down: the fastest after the first, which also warms up, and the most memory."""
    file = folder / "steps.jsonl"
    steps = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    if len(steps) < 2:
        return None
    seconds = [round(step["seconds"], 2) for step in steps]
    last = {key: steps[-1][key] for key in ("peak_bytes", "reserved_bytes")}
    return {"steps": len(steps), "each_seconds": seconds, "step_seconds": min(seconds[1:]), **last}
