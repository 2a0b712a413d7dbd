"""Adapters of all kinds on bases of all kinds: merged and loaded again, or written alone, they do what was trained."""

import json
import re

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from support.tiny import make_model, make_tokenizer
from zs_lightning.commands.export.command import write
from zs_lightning.commands.export.trained import Trained, divergence
from zs_lightning.models.loading import load_model
from zs_lightning.models.lora import add_lora
from zs_lightning.models.specs import LoraSpec, ModelSpec
from zs_lightning.text.prompts import get_prompts

IDS = torch.arange(7, 60)[None]
KINDS = {"plain": LoraSpec(r=4), "rslora": LoraSpec(r=4, rslora=True), "dora": LoraSpec(r=4, dora=True)}


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def base(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    sizes = {"hidden_size": 64, "intermediate_size": 128}
    make_model("qwen2", tie_word_embeddings=request.param, **sizes).save_pretrained(folder)
    make_tokenizer("raw").save_pretrained(folder)
    return folder


def trained(base, folder, lora, **spec):
    """As a run would leave it, with an adapter that does something."""
    spec = ModelSpec(path=str(base), device="cpu", **spec)
    model, generator = add_lora(load_model(spec), lora, 0), torch.Generator().manual_seed(1)
    state = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    for tensor in state.values():
        tensor += 0.05 * torch.randn(tensor.shape, generator=generator)
    torch.save({"state_dict": {f"policy.{name}": tensor for name, tensor in state.items()}}, folder / "last.ckpt")
    return Trained(folder / "last.ckpt", "PolicyRL", {}, {}, spec, lora, get_prompts("zerosearch"))


@torch.no_grad()
def predicted(model):
    return model.eval()(input_ids=IDS).logits[0].float().log_softmax(-1)


def plain(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spec", [{}, {"dtype": "bfloat16"}, {"dtype": "bfloat16", "quantization": "nf4"}], ids=str)
def test_what_was_merged_does_what_base_and_adapter_do(kind, spec, base, tmp_path):
    run = trained(base, tmp_path, KINDS[kind], **spec)
    write(run, tmp_path / "adapter", True, str(base), None)
    said, _ = write(run, tmp_path / "merged", False, str(base), None)
    wanted = predicted(PeftModel.from_pretrained(plain(base), tmp_path / "adapter"))
    merged, before = predicted(plain(tmp_path / "merged")), predicted(plain(base))
    change = divergence(wanted, before)
    assert change > 0.01
    assert divergence(wanted, merged) < (0.02 * change if spec else 1e-6)
    furthest, moved = map(float, re.search(r"largest difference of logits (\S+), of (\S+) that", said).groups())
    assert 0 <= furthest < 0.2 * moved
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert ("quantization_config" in config, config["dtype"]) == (False, spec.get("dtype", "float32"))


def test_an_adapter_holds_its_own_matrices_and_nothing_else(base, tmp_path):
    """What vLLM and others refuse: embeddings, heads, modules_to_save; and what makes an adapter as large as its base."""
    write(trained(base, tmp_path, LoraSpec(r=4)), tmp_path / "adapter", True, str(base), None)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["modules_to_save"] is None
    assert "lm_head" not in config["target_modules"]
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {name.rsplit(".", 2)[1] for name in tensors} == {"lora_A", "lora_B"}
    assert not [name for name in tensors if "lm_head" in name or "embed" in name]
    sizes = [p.shape for name, p in plain(base).named_parameters() if "proj.weight" in name]
    size = (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    assert 0 < size - 4 * 4 * sum(map(sum, sizes)) < 10_000
