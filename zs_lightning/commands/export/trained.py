"""What a `fit` left behind, and the model that its checkpoint describes."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from zs_lightning.errors import UserError
from zs_lightning.models.encoding import TextEncoder
from zs_lightning.models.loading import load_model
from zs_lightning.models.lora import add_lora
from zs_lightning.models.specs import LoraSpec, ModelSpec
from zs_lightning.models.value_head import of_critic
from zs_lightning.runs.checkpoints import check_tensors, find_run, load_checkpoint
from zs_lightning.runs.folder import read_config, read_head
from zs_lightning.text.prompts import Prompts, get_prompts

POLICIES = ("PolicyRL", "PolicySFT")
"""What trains a model that asks, and not one that is asked."""
LOST = 0.1
"""Share of the adapter's change that a merged model may lose, as KL divergence."""
NOISE = 1e-7
"""KL divergence below which two models are the same."""


@dataclass(frozen=True)
class Trained:
    """A `fit`: its checkpoint and what its config.yaml says."""

    checkpoint: Path
    kind: str
    """PolicyRL, PolicySFT or SimulatorSFT."""
    config: dict[str, Any]
    versions: dict[str, str]
    """Versions of the libraries and the code that trained it, from the head of the config."""
    spec: ModelSpec
    lora: LoraSpec | None
    prompts: Prompts


def read_trained(path: Path) -> Trained:
    """Reads a run folder, or a checkpoint in it. Raises UserError if a file is missing or wrong."""
    file, checkpoint = find_run(path, "--ckpt")
    config = read_config(file)
    try:
        options = config["model"]["init_args"]
        spec = ModelSpec(**options["model"])
        lora = None if options["lora"] is None else LoraSpec(**options["lora"])
        kind = str(config["model"]["class_path"]).rsplit(".", 1)[-1]
        prompts = get_prompts(str(options["prompts"]))
    except (KeyError, TypeError) as error:
        raise UserError(f"--ckpt: {file} is not the config of a `fit`: {error}") from error
    # Quantised weights are not trained: there is nothing but an adapter to take elsewhere.
    if lora is None and spec.quantization != "none":
        what = "trained no adapter on a quantised model; there is nothing to export"
        raise UserError(f"--ckpt: {checkpoint.parent} {what}")
    return Trained(checkpoint, kind, config, read_head(file), spec, lora, prompts)


def load_trained(trained: Trained, merge: bool) -> tuple[Any, bool]:
    """The trained model on the CPU, and whether it is what training began with. Raises UserError if
    the checkpoint's tensors do not fit the model, or are not numbers.

    Its base is not quantised: an adapter fits both, and only there it can be merged. To `merge`, it
    is float32 whatever the run's dtype is, so that a merged weight is rounded once, when it is
    saved.
    """
    dtype = "float32" if merge else trained.spec.dtype
    spec = replace(trained.spec, quantization="none", device="cpu", dtype=dtype)
    model = load_model(spec, merge=False)
    if trained.lora is not None:
        model = add_lora(model, trained.lora, 0)
    found = {}
    for name, tensor in load_checkpoint(trained.checkpoint, "--ckpt")["state_dict"].items():
        # The first word is the module's name of its model. A critic is of use in training only.
        if not of_critic(name):
            found[name.partition(".")[2]] = tensor
    expected = {name: p for name, p in model.named_parameters() if p.requires_grad}
    check_tensors(found, expected)
    unchanged = True
    for name, tensor in found.items():
        if not tensor.isfinite().all():
            what = "holds values that are not numbers; the training diverged"
            raise UserError(f"--ckpt: {name} in {trained.checkpoint} {what}")
        # The first half of an adapter is drawn, and does nothing while the second is as it began.
        unchanged &= "lora_A" in name or torch.equal(expected[name].data, tensor.to(expected[name]))
        expected[name].data.copy_(tensor)
    return model.eval(), unchanged


def save_merged(model: Any, dtype: str, prompts: list[list[int]], folder: Path) -> str:
    """Merges the adapter into its base, both float32, saves the model in `dtype`, and says how what
    was saved compares with both on the prompts' token ids. Raises UserError if it does not do what
    the adapter does."""
    wanted = logits(model, prompts)
    with model.disable_adapter():
        base = logits(model, prompts)
    # safe_merge refuses weights that are not numbers.
    merged = model.merge_and_unload(safe_merge=True).to(getattr(torch, dtype))
    merged.save_pretrained(folder)
    # Before it is loaded again: two of them may not fit into memory.
    del merged
    # In float32, so that the comparison sees the weights' rounding and not the computation's.
    saved = logits(load_model(ModelSpec(path=str(folder), device="cpu")), prompts)
    error = divergence(wanted.log_softmax(-1), saved.log_softmax(-1))
    change = divergence(wanted.log_softmax(-1), base.log_softmax(-1))
    if not error <= max(NOISE, LOST * change):
        raise UserError(
            f"--merge: the merged {dtype} model differs from model and adapter (KL divergence "
            f"{error:.2g}, of {change:.2g} that the adapter makes); try --dtype float32, or export "
            "the adapter without --merge"
        )
    furthest = (wanted - saved).abs().max()
    moved = (wanted - base).abs().max()
    return (
        f"the saved {dtype} model against base and adapter on {len(wanted)} tokens: largest "
        f"difference of logits {furthest:.2g}, of {moved:.2g} that the adapter makes"
    )


@torch.no_grad()
def logits(model: Any, prompts: list[list[int]]) -> torch.Tensor:
    """[tokens of all prompts, V] float32, for the next token."""
    rows = [model(input_ids=torch.tensor([ids])).logits[0].float() for ids in prompts]
    return torch.cat(rows)


def divergence(wanted: torch.Tensor, other: torch.Tensor) -> float:
    """Mean KL(wanted || other) over rows of log-probabilities [N, V]."""
    return float((wanted.exp() * (wanted - other)).sum(-1).mean())


def check_prompts(trained: Trained, tokenizer: Any) -> list[list[int]]:
    """Ids of what the model is asked, for a question."""
    prompts = trained.prompts
    templates = [prompts.simulator_useful, prompts.simulator_noisy]
    if trained.kind in POLICIES:
        templates = [prompts.policy]
    fields = {"question": "What is the capital of China?", "answer": "Beijing", "count": "3"}
    fields["query"] = "capital of China"
    encoder = TextEncoder(tokenizer)
    return [encoder.prompt(template, fields, prompts.chat) for template in templates]
