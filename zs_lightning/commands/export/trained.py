"""What a `fit` left behind, and the model that its checkpoint describes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from zs_lightning.errors import UserError
from zs_lightning.models.encoding import TextEncoder
from zs_lightning.models.loading import load_model
from zs_lightning.models.lora import add_lora
from zs_lightning.models.specs import LoraSpec, ModelSpec
from zs_lightning.models.value_head import of_critic
from zs_lightning.runs.folder import config_beside, find_checkpoint
from zs_lightning.text.prompts import Prompts, get_prompts

LOST = 0.1
"""A merged model may differ from model and adapter by this share of what the adapter changes, as KL divergence."""
NOISE = 1e-7
"""KL divergence below which two models are the same."""
QUESTIONS = (
    "Who wrote the novel that the film of 1962 is based on?",
    "In which country is the birthplace of the inventor?",
    "What is the capital of China?",
)


@dataclass(frozen=True)
class Trained:
    """A `fit`: its checkpoint and what its config.yaml says."""

    checkpoint: Path
    kind: str
    """PolicyRL or SimulatorSFT."""
    config: dict[str, Any]
    versions: dict[str, str]
    """Of the libraries and the code that trained it, from the head of the config."""
    spec: ModelSpec
    lora: LoraSpec | None
    prompts: Prompts


def read_trained(path: Path) -> Trained:
    """Reads a run folder, or a checkpoint that lies in its run folder.

    Raises:
        UserError: a file is missing or is not what it should be.
    """
    checkpoint = find_checkpoint(path, "--ckpt")
    file = config_beside(checkpoint, "--ckpt")
    text = file.read_text("utf-8")
    head = [line[2:].partition(": ") for line in text.splitlines() if line.startswith("# ")]
    try:
        config = yaml.safe_load(text)
        arguments = config["model"]["init_args"]
        spec, lora = ModelSpec(**arguments["model"]), arguments["lora"]
        kind, prompts = str(config["model"]["class_path"]).rsplit(".", 1)[-1], str(arguments["prompts"])
        lora = None if lora is None else LoraSpec(**lora)
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise UserError(f"--ckpt: {file} is not the config of a `fit`: {' '.join(str(error).split())}") from error
    versions = {name: value for name, _, value in head if value}
    if lora is None and spec.quantization != "none":
        raise UserError(f"--ckpt: {checkpoint.parent} trained no adapter on a quantised model; there is nothing to export")
    return Trained(checkpoint, kind, config, versions, spec, lora, get_prompts(prompts))


def load_trained(trained: Trained, merge: bool) -> tuple[Any, bool]:
    """The trained model on the CPU, on a base that is not quantised: an adapter fits both, and only there it can be merged;
    and whether it is equal to its base.

    Args:
        merge: in float32 whatever the run's dtype is, so that a merged weight is rounded once, when it is saved.

    Raises:
        UserError: the checkpoint's tensors do not fit the model, or are not numbers.
    """
    spec = replace(trained.spec, quantization="none", device="cpu", dtype="float32" if merge else trained.spec.dtype)
    model = load_model(spec, merge=False)
    if trained.lora is not None:
        model = add_lora(model, trained.lora, 0)
    try:
        saved = torch.load(trained.checkpoint, map_location="cpu", weights_only=True)["state_dict"]
    except (RuntimeError, KeyError) as error:
        raise UserError(f"--ckpt: {trained.checkpoint} cannot be read: {str(error).splitlines()[0]}") from error
    found = {name.partition(".")[2]: tensor for name, tensor in saved.items() if not of_critic(name)}
    expected = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    wrong = sorted(set(expected) ^ set(found)) or [name for name in found if found[name].shape != expected[name].shape]
    if wrong:
        raise UserError(
            f"--ckpt: {trained.checkpoint} does not fit the model of its config.yaml: {len(wrong)} tensors differ, "
            f"first {wrong[0]}"
        )
    is_base = True
    for name, tensor in found.items():
        if not tensor.isfinite().all():
            raise UserError(f"--ckpt: {name} in {trained.checkpoint} holds values that are not numbers; the training diverged")
        before = expected[name].data.clone()
        # The first half of an adapter is drawn, and does nothing while the second is as it began.
        is_base &= torch.equal(before, expected[name].data.copy_(tensor)) or "lora_A" in name
    return model.eval(), is_base


def save_adapter(model: Any, base: str, folder: Path) -> None:
    """Writes the adapter.

    Args:
        base: where other programs find the model that it belongs to.
    """
    model.peft_config["default"].base_model_name_or_path = base
    # Embeddings are never trained here, and asking whether they were would look the base up on the hub.
    model.save_pretrained(folder, save_embedding_layers=False)
    # peft's own card; ours takes its place.
    (folder / "README.md").unlink(missing_ok=True)


def save_merged(model: Any, dtype: str, prompts: list[list[int]], folder: Path) -> str:
    """Merges the adapter into its base and saves the model, then loads it again and compares it with model and adapter.
    Returns a sentence that says how it compares.

    Args:
        model: base and adapter, float32.
        dtype: of the saved weights.
        prompts: token ids of the texts to compare on. The comparison is in float32, so that it sees the weights' rounding and
            not that of the computation.

    Raises:
        UserError: the saved model does not do what the adapter does.
    """
    wanted = logits(model, prompts)
    with model.disable_adapter():
        base = logits(model, prompts)
    merged = model.merge_and_unload(safe_merge=True).to(getattr(torch, dtype))
    merged.save_pretrained(folder)
    # Before it is loaded again: two of them may not fit into memory.
    del merged
    saved = logits(load_model(ModelSpec(path=str(folder), device="cpu")), prompts)
    error, change = (divergence(wanted.log_softmax(-1), other.log_softmax(-1)) for other in (saved, base))
    if not error <= max(NOISE, LOST * change):
        raise UserError(
            f"--merge: the merged {dtype} model differs from model and adapter (KL divergence {error:.2g}, of {change:.2g} "
            "that the adapter makes); try --dtype float32, or export the adapter without --merge"
        )
    furthest, moved = ((wanted - other).abs().max() for other in (saved, base))
    return (
        f"the saved {dtype} model against base and adapter on {len(wanted)} tokens of {len(prompts)} prompts: largest "
        f"difference of logits {furthest:.2g}, of {moved:.2g} that the adapter makes"
    )


@torch.no_grad()
def logits(model: Any, prompts: list[list[int]]) -> torch.Tensor:
    """[tokens of all prompts, V] float32, for the next token."""
    return torch.cat([model(input_ids=torch.tensor([ids])).logits[0].float() for ids in prompts])


def divergence(wanted: torch.Tensor, other: torch.Tensor) -> float:
    """Mean KL(wanted || other) over rows of log-probabilities."""
    return float((wanted.exp() * (wanted - other)).sum(-1).mean())


def check_prompts(trained: Trained, tokenizer: Any) -> list[list[int]]:
    """Ids of a few prompts as the model knows them."""
    encoder, prompts = TextEncoder(tokenizer), trained.prompts
    if trained.kind == "PolicyRL":
        return [encoder.prompt(prompts.policy, {"question": question}, prompts.chat) for question in QUESTIONS]
    fields = {"answer": "Beijing", "query": "capital of China", "count": "3"}
    templates = (prompts.simulator_useful, prompts.simulator_noisy)
    return [encoder.prompt(t, {"question": q, **fields}, prompts.chat) for t in templates for q in QUESTIONS]
