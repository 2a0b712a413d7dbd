"""A base with an adapter on it: nothing of the adapter is lost, and training goes on with it."""

import pytest
import torch
from peft import PeftModel

from support.detached import DetachedPolicy, NoEngine, random_trajectories, step_of
from support.tiny import make_model
from zs_lightning.generation import MixedAdapters
from zs_lightning.models.loading import load_model
from zs_lightning.models.lora import add_lora
from zs_lightning.models.specs import LoraSpec, ModelSpec
from zs_lightning.modules import PolicyRL
from zs_lightning.rl.losses import LossSpec
from zs_lightning.rollout import collate

LORA = LoraSpec(r=4)
FORMATS = [("float32", "none"), ("bfloat16", "none"), ("float16", "none"), ("bfloat16", "nf4")]


@pytest.fixture(scope="module")
def first(tiny_folder, tmp_path_factory):
    """An adapter as RL leaves it: its changes are smaller than half a step of most weights in bfloat16."""
    model = add_lora(load_model(ModelSpec(path=tiny_folder, device="cpu")), LORA, 0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(0, 1e-3, generator=torch.Generator().manual_seed(len(name)))
    folder = tmp_path_factory.mktemp("first")
    model.save_pretrained(folder)
    return str(folder)


def on(tiny_folder, first, dtype="bfloat16", quantization="none"):
    return ModelSpec(path=tiny_folder, dtype=dtype, quantization=quantization, adapter=first, device="cpu")


@pytest.mark.parametrize(("dtype", "quantization"), FORMATS)
def test_weights_that_cannot_hold_an_adapter_stay_as_they_are(dtype, quantization, tiny_folder, first):
    spec = on(tiny_folder, first, dtype, quantization)
    model = load_model(spec)
    assert isinstance(model, PeftModel) == (not spec.merges) == (dtype != "float32")
    if not spec.merges:
        bare = load_model(ModelSpec(path=tiny_folder, dtype=dtype, quantization=quantization, device="cpu"))
        weights = model.get_base_model().state_dict()
        kept = {name.replace(".base_layer", ""): tensor for name, tensor in weights.items() if "lora_" not in name}
        assert all(torch.equal(kept[name], tensor) for name, tensor in bare.state_dict().items())
        assert not any(weight.requires_grad for name, weight in model.named_parameters() if "lora_" in name)
        lora = [weight for name, weight in model.named_parameters() if "lora_B" in name]
        assert {weight.dtype for weight in lora} == {torch.float32}
        assert min(float(weight.std()) for weight in lora) > 5e-4


def module(spec, kl_coef=0.0, lora=LORA, **options):
    made = DetachedPolicy(
        NoEngine(), model=spec, lora=lora, loss=LossSpec(kl_coef=kl_coef), max_grad_norm=0.0, seed=0, **options
    )
    made.setup("fit")
    return made.attach(torch.optim.SGD(made.trainable().values(), lr=1.0))


@pytest.mark.parametrize(("dtype", "quantization"), FORMATS)
@pytest.mark.parametrize("options", [{"kl_coef": 0.1}, {"estimator": "ppo"}], ids=["kl", "ppo"])
def test_training_goes_on_with_the_adapter(options, dtype, quantization, tiny_folder, first):
    made = module(on(tiny_folder, first, dtype, quantization), **options)
    policy = {name: weight for name, weight in made.trainable().items() if ".critic." not in name and "lora_" in name}
    saved = PeftModel.from_pretrained(make_model("qwen3", initializer_range=0.1), first).state_dict()
    began = {name.removeprefix("policy."): weight.clone() for name, weight in policy.items()}
    assert began
    assert all(torch.equal(weight, saved[name]) for name, weight in began.items()), "the adapter itself, not a fresh one"
    if "estimator" in options:
        return
    rows = random_trajectories(0)
    batch = collate(rows, 0, made.device)
    reference = made.update.reference_logprobs(batch)
    moved, sums = step_of(made, rows)
    assert sums["kl"] == pytest.approx(0, abs=1e-6), "it is its own reference before the first step"
    assert any(float(change.abs().max()) > 0 for change in moved.values())
    torch.testing.assert_close(made.update.reference_logprobs(batch), reference, atol=0, rtol=0)
    assert set(made.trainable()) == set(policy), "the reference stays frozen"


def test_what_was_trained_on_is_saved_as_a_plain_adapter(tiny_folder, first, tmp_path):
    made = module(on(tiny_folder, first), kl_coef=0.1)
    step_of(made, random_trajectories(0))
    made.save_model(tmp_path)
    again = load_model(on(tiny_folder, str(tmp_path)), tokenizer=made.tokenizer)
    ids = torch.arange(30)[None]
    assert torch.equal(again(ids).logits, made.policy.eval()(ids).logits)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    with MixedAdapters(made.policy, ["default"]) as adapters, torch.no_grad():
        adapters.select(["default"])
        torch.testing.assert_close(made.policy(ids).logits, again(ids).logits, atol=0.02, rtol=0.02)


@pytest.mark.parametrize(
    ("other", "said"),
    [({"r": 8}, "r: 4"), ({"alpha": 2}, "alpha: 8"), ({"rslora": True}, "rslora: false"), ({"dora": True}, "dora: false")],
)
def test_options_that_the_adapter_has_not_are_refused_before_its_model_is_loaded(other, said, tiny_folder, first):
    spec = on("nowhere", first)
    with pytest.raises(ValueError, match=rf"^model\.lora\.{said.split(':')[0]}: .* set model\.lora\.{said}$"):
        PolicyRL(NoEngine(), model=spec, lora=LoraSpec(**{"r": 4, **other})).setup("fit")


def test_dropout_may_change(tiny_folder, first):
    made = module(on(tiny_folder, first), lora=LoraSpec(r=4, dropout=0.5))
    assert made.policy.peft_config["default"].lora_dropout == 0.5
    assert {layer.p for name, layer in made.policy.named_modules() if name.endswith("lora_dropout.default")} == {0.5}
