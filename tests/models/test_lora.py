"""Kinds of adapters, and what checkpointing leaves as it is."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch.utils._python_dispatch import TorchDispatchMode

from support.tiny import make_model
from zs_lightning.generation import Generator
from zs_lightning.models.loading import recompute_activations
from zs_lightning.models.logprobs import token_logprobs
from zs_lightning.models.lora import add_adapter, add_lora
from zs_lightning.models.specs import LoraSpec

KINDS = {
    "plain": LoraSpec(r=4),
    "rslora": LoraSpec(r=4, rslora=True),
    "dora": LoraSpec(r=4, dora=True),
    "orthogonal": LoraSpec(r=4, init="orthogonal"),
}
IDS = torch.arange(30)[None]


@torch.no_grad()
def logits(model):
    return model(IDS).logits.clone()


def moved(model):
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_switched_off_any_adapter_is_the_base_before_and_after_training(kind):
    """It is the reference of the KL term."""
    expected = logits(make_model("qwen3"))
    model = add_lora(make_model("qwen3"), KINDS[kind], 0).eval()
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
    moved(model)
    assert not torch.allclose(logits(model), expected, atol=0.1)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)


def test_rslora_scales_by_the_root_of_the_rank():
    """Alpha is 2 r = 8: scales 8 / 4 and 8 / 2."""
    for kind, scale in (("plain", 2.0), ("rslora", 4.0)):
        model = add_lora(make_model("qwen3"), KINDS[kind], 0)
        assert model.base_model.model.model.layers[0].self_attn.q_proj.scaling == {"default": scale}


def test_dora_trains_a_length_for_each_row():
    plain, dora = (
        {
            name.split(".default")[0].rsplit(".", 1)[-1]
            for name, p in add_lora(make_model("qwen3"), KINDS[kind], 0).named_parameters()
            if p.requires_grad
        }
        for kind in ("plain", "dora")
    )
    assert dora - plain == {"lora_magnitude_vector"}


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_an_adapter_that_moves_the_base_cannot_share_it(start, tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=start)
    get_peft_model(make_model("qwen3"), config).save_pretrained(tmp_path)
    policy = add_lora(make_model("qwen3"), KINDS["plain"], 0).eval()
    expected = logits(policy)
    with pytest.raises(ValueError, match=f"was begun by {start}, which moves the base model that other adapters share"):
        add_adapter(policy, str(tmp_path), "simulator")
    assert torch.equal(logits(policy), expected)


# ---------------------------------------------------------------------- precision


def casts(model):
    """Gradients of the model under autocast, and how often a tensor was made a float32 one."""
    made = []

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made.append(func is torch.ops.aten._to_copy.default and (kwargs or {}).get("dtype") == torch.float32)
            return func(*args, **(kwargs or {}))

    with torch.autocast("cpu", torch.bfloat16), Casts():
        found = gradients(model)
    model.zero_grad()
    return found, sum(made)


@pytest.mark.parametrize(("kind", "saved"), [("plain", 14), ("dora", 0)])
def test_under_autocast_an_adapter_casts_nothing_that_autocast_casts_back(kind, saved):
    """peft makes the input of each layer float32; with 14 adapted layers that is 14 casts, and as many backwards. In DoRA
    they are not taken back: its norms would be rounded."""
    model = moved(add_lora(make_model("qwen3").to(torch.bfloat16), KINDS[kind], 0))
    found, count = casts(model)
    adapted = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    for layer in adapted:
        vars(layer).pop("_cast_input_dtype", None)
    expected, more = casts(model)
    assert len(adapted) == 14
    assert more - count >= saved
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_without_autocast_the_input_is_still_cast():
    model = moved(add_lora(make_model("qwen3").to(torch.bfloat16), KINDS["plain"], 0))
    assert logits(model).dtype == torch.bfloat16


# ---------------------------------------------------------------------- checkpointing


def gradients(model):
    logprobs, _ = token_logprobs(model, IDS, (torch.arange(30) > 5).expand_as(IDS))
    (-logprobs.mean()).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("mixed", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("lora", [KINDS["plain"], KINDS["dora"], None], ids=["lora", "dora", "full"])
@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama"])
def test_checkpointing_keeps_the_gradient(kind, lora, mixed):
    found = []
    for checkpointing in (False, True):
        model = make_model(kind)
        model = model if lora is None else moved(add_lora(model, lora, 0))
        calls = []
        layer = (model if lora is None else model.get_base_model()).model.layers[0].mlp
        # Before the layer: the second run ends as soon as it has what the backward pass needs.
        layer.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        if checkpointing:
            recompute_activations(model)
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            found.append(gradients(model))
        assert len(calls) == 1 + checkpointing, "each layer runs again in the backward pass"
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=0, rtol=0)


def test_a_generator_wants_the_model_back_in_eval_mode():
    model = add_lora(make_model("qwen3"), KINDS["plain"], 0)
    recompute_activations(model)
    generator = Generator(model, 1, 32)
    with pytest.raises(RuntimeError, match="needs a model in eval mode"):
        generator.step()
    model.eval()
    assert generator.step() == []
