"""Estimates against tensors that are counted on tiny real models, and against figures from elsewhere."""

import copy
import io
import re
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from transformers import Qwen3MoeConfig

from support.tiny import make_model, make_tokenizer
from zs_lightning.cli import main
from zs_lightning.commands.estimate.architectures import architecture
from zs_lightning.commands.estimate.command import show_card
from zs_lightning.commands.estimate.job import WRITING, Job
from zs_lightning.commands.estimate.memory import Card, Item, adapter_count, plan, skeleton, weights_item
from zs_lightning.commands.estimate.traced import LiveBytes, optimizer_bytes, training_pass
from zs_lightning.generation import Generator, own_adapter
from zs_lightning.models.loading import load_model, recompute_activations
from zs_lightning.models.logprobs import token_logprobs
from zs_lightning.models.lora import TRAINED, add_lora
from zs_lightning.models.sizes import weight_bytes
from zs_lightning.models.specs import LoraSpec, ModelSpec
from zs_lightning.search import SimulatorSearch

NEAR = 0.15


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Folders of saved tiny models; llama's head is not tied to its embedding."""
    paths = {}
    for kind in ("qwen2", "qwen3", "llama"):
        paths[kind] = str(tmp_path_factory.mktemp("models") / kind)
        make_model(kind, hidden_size=64, intermediate_size=160, num_hidden_layers=5, seed=1).save_pretrained(paths[kind])
        make_tokenizer("bos" if kind == "llama" else "chat").save_pretrained(paths[kind])
    return paths


def trainable(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def counted(tensors):
    """Bytes of the storages behind the tensors, each once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def weights_of(model):
    """Every tensor that the model's weights are made of, those of quantisation included."""
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            yield parameter.data
            state = getattr(parameter, "quant_state", None)
            yield from (state.absmax, state.code) if state is not None else ()
        # Since the first forward pass, int8 has its scales here.
        yield from (module.state.SCB,) if hasattr(module, "state") and module.state.SCB is not None else ()


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
@pytest.mark.parametrize(("quantization", "dtype"), [("none", "bfloat16"), ("nf4", "bfloat16"), ("int8", "float32")])
def test_weights(kind, quantization, dtype, folders):
    model = load_model(ModelSpec(path=folders[kind], dtype=dtype, quantization=quantization, device="cpu"))
    expected = counted(weights_of(model))
    assert weight_bytes(skeleton(folders[kind], dtype), quantization) == pytest.approx(expected, rel=0.02)


def test_experts_that_stay_in_full_size_are_named(tmp_path):
    config = Qwen3MoeConfig(hidden_size=1024, moe_intermediate_size=512, num_hidden_layers=4, num_experts=64)
    config.save_pretrained(tmp_path)
    spec = ModelSpec(path=str(tmp_path), dtype="bfloat16", quantization="nf4")
    item = weights_item("policy", spec)
    # Four layers of 64 experts, each with gate and up [2 * 512, 1024] and down [1024, 512] in two bytes a weight.
    stacked = 4 * 64 * 3 * 512 * 1024 * 2
    assert item.note.endswith("nf4, the rest bfloat16, of which experts 0.81 GB")
    assert item.bytes > stacked
    assert "experts" not in weights_item("policy", replace(spec, quantization="none")).note


@pytest.mark.parametrize("lora", [LoraSpec(r=4), LoraSpec(r=4, dora=True)], ids=["lora", "dora"])
def test_adapter(lora, folders):
    spec = ModelSpec(path=folders["qwen3"], dtype="bfloat16", device="cpu")
    real = trainable(add_lora(load_model(spec), lora, 0))
    assert 4 * adapter_count(spec, lora) == counted(p.data for p in real)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, lr=1e-3),
        lambda p: torch.optim.SGD(p, lr=1e-3),
        lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9),
    ],
    ids=["AdamW", "SGD", "momentum"],
)
@pytest.mark.parametrize("lora", [LoraSpec(r=4), None], ids=["lora", "full"])
def test_optimizer_state_after_a_step(make, lora, folders):
    model = load_model(ModelSpec(path=folders["llama"], device="cpu"))
    parameters = trainable(model if lora is None else add_lora(model, lora, 0))
    optimizer = make(parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    expected = sum(t.nbytes for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor))
    assert optimizer_bytes(make, torch.float32, counted(p.data for p in parameters)) == pytest.approx(expected, rel=NEAR)


def saved_bytes(model, tokens):
    """What autograd keeps of a real forward pass, weights aside."""
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = []

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in known:
            kept.append(tensor)
        return tensor

    ids = torch.randint(0, 300, (1, tokens + 1))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        # One trained token: what is left is the decoder's.
        token_logprobs(model, ids, torch.arange(tokens + 1)[None] == tokens)
    return counted(kept)


def live_bytes(model, tokens):
    """What is alive after a real forward pass. The hooks above do not see what checkpoints hold."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    with LiveBytes([*model.parameters(), *model.buffers()]) as live:
        states = base.get_decoder()(input_ids=torch.randint(0, 300, (1, tokens)), use_cache=False).last_hidden_state
        assert states.requires_grad
        return live.now


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("way", ["lora", "full", "nf4", "bf16"])
def test_saved_activations(way, kind, checkpointing, folders):
    lora = None if way == "full" else LoraSpec(r=4)
    dtype, precision = ("bfloat16", "bf16-mixed") if way == "bf16" else ("float32", "32-true")
    spec = ModelSpec(path=folders[kind], dtype=dtype, quantization="nf4" if way == "nf4" else "none", device="cpu")
    model = load_model(spec)
    model = model if lora is None else add_lora(model, lora, 0)
    if checkpointing:
        recompute_activations(model)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=way == "bf16"):
        expected = (live_bytes if checkpointing else saved_bytes)(model, 512)
    found = training_pass(spec, lora, 512, checkpointing, precision)
    assert found.saved == pytest.approx(expected, rel=NEAR)
    assert found.peak > found.saved


def test_a_pass_of_a_deep_model_follows_from_two_shallow_ones(folders, tmp_path):
    deep = copy.deepcopy(architecture(folders["qwen3"]))
    spec = ModelSpec(path=folders["qwen3"], device="cpu")
    five = training_pass(spec, LoraSpec(), 512, False, "32-true")
    deep.num_hidden_layers, deep.layer_types = 3, deep.layer_types[:3]
    deep.save_pretrained(tmp_path)
    three = training_pass(ModelSpec(path=str(tmp_path)), LoraSpec(), 512, False, "32-true")
    model = add_lora(load_model(spec), LoraSpec(), 0)
    layer = (saved_bytes(model, 512) - three.saved) / 2
    assert five.saved - three.saved == pytest.approx(2 * layer, rel=NEAR)


def test_live_bytes():
    start = torch.zeros(250)
    with LiveBytes([start]) as live:
        one = start + 1
        two = one.view(50, 5) * 2
        assert (live.now, live.peak) == (2000, 2000)
        del one
        assert (live.now, live.peak) == (1000, 2000)
        start.add_(1)
        del two
    assert (live.now, live.peak) == (0, 2000)


def job(path, **options):
    made = {"model": ModelSpec(path=path), "lora": LoraSpec(r=4), "optimizer": lambda p: torch.optim.AdamW(p, lr=1e-3)}
    made |= {"precision": "32-true", "checkpointing": False, "tokens": 512, "slots": 6, "length": 200}
    return Job("policy", **{**made, **options})


def items(card):
    return {item.what: item.bytes for item in [*card.always, *card.rollout, *card.update]}


def rows(card):
    return next(item.note for item in card.rollout if item.what == "keys and values")


def test_keys_and_values_are_those_of_the_engine(folders):
    model = load_model(ModelSpec(path=folders["qwen2"], device="cpu"))
    cache = Generator(model, 6, 200).cache
    (card,) = plan(job(folders["qwen2"]), 10**9)
    assert items(card)["keys and values"] == cache.keys.nbytes + cache.values.nbytes
    assert rows(card) == "6 of 6 rows of 200 tokens"
    # The base has 0.96 MB, a row 2 · 5 layers · 2 heads · 16 · 200 tokens · 4 bytes = 0.256 MB: 60 % of the other 2.04 MB.
    (tight,) = plan(job(folders["qwen2"]), 3 * 10**6)
    assert rows(tight) == "4 of 6 rows of 200 tokens"
    assert not tight.fits


@pytest.mark.parametrize(("precision", "cast"), [("32-true", False), ("bf16-mixed", True)])
def test_rollouts_copy_a_plain_adapter(precision, cast, folders):
    lora = LoraSpec(r=4)
    model = add_lora(load_model(ModelSpec(folders["qwen3"], device="cpu")), lora, 0)
    with torch.autocast("cpu", torch.bfloat16, enabled=cast), own_adapter(model, TRAINED) as adapters:
        copied = [matrix for layer in adapters.layers for matrix in layer.forward.args[2:]]
    asked = {"work": {WRITING: 1.0}, "precision": precision}
    assert items(plan(job(folders["qwen3"], lora=lora, **asked), 10**9)[0])["adapter's copy"] == counted(copied)
    for others in ({"lora": LoraSpec(dora=True)}, {"lora": None}, {"work": {}}):
        assert "adapter's copy" not in items(plan(job(folders["qwen3"], **{**asked, **others}), 10**9)[0])


def test_a_shared_base_counts_once_and_another_card_has_its_own_table(folders):
    path, slots = folders["qwen2"], {"slots": 4, "max_length": 100, "max_new_tokens": 30}
    (shared,) = plan(job(path, simulator=SimulatorSearch(ModelSpec(path="policy", adapter="none"), **slots)), 10**9)
    assert [name for name in items(shared) if "weights" in name] == ["policy's weights"]
    assert "simulator's adapter" in items(shared)
    assert rows(shared) == "10 of 10 rows of 200 tokens"
    cards = plan(job(path, simulator=SimulatorSearch(ModelSpec(path=folders["llama"], device="cuda:1"), **slots)), 10**9)
    assert [card.name for card in cards] == ["cuda:0", "cuda:1"]
    real = counted(weights_of(load_model(ModelSpec(path=folders["llama"], device="cpu"))))
    assert items(cards[1])["simulator's weights"] == real
    assert not cards[1].update


def test_the_reference_is_free_with_an_adapter_and_a_copy_without(folders):
    with_lora, without = (
        items(plan(job(folders["qwen3"], reference=True, lora=lora), 10**9)[0]) for lora in (LoraSpec(), None)
    )
    assert "reference model" not in with_lora
    assert without["reference model"] == without["policy's weights"] == without["gradients"] == without["optimizer"] / 2


# ---------------------------------------------------------------------- figures from elsewhere


@pytest.mark.parametrize(
    ("name", "billions"),  # As the makers give them: 3.09 B, 7.61 B, 4.0 B and 3.21 B.
    [
        *[("Qwen/Qwen2.5-3B", 3.09), ("Qwen/Qwen2.5-7B-Instruct", 7.61), ("Qwen/Qwen3-4B-Base", 4.0), ("x/Llama-3.2-3B", 3.21)],
        *[("x/Qwen2.5-0.5B", 0.494), ("Qwen/Qwen2.5-1.5B-Instruct", 1.54), ("Qwen/Qwen2.5-14B", 14.77), ("x/Qwen3-8B", 8.19)],
        *[
            ("Qwen/Qwen3-0.6B", 0.596),
            ("Qwen/Qwen3-1.7B", 1.72),
            ("x/SmolLM2-135M-Chat", 0.1345),
            ("x/SmolLM2-360M", 0.362),
        ],
        *[("x/SmolLM2-1.7B", 1.71), ("x/Llama-3.2-1B", 1.236), ("x/Llama-3.1-8B", 8.03), ("x/TinyLlama-1.1B-Chat-v1.0", 1.10)],
    ],
)
def test_shipped_architectures_have_the_published_size(name, billions):
    count = sum(p.numel() for p in skeleton(name, "bfloat16").parameters())
    assert count / 1e9 == pytest.approx(billions, rel=0.006)


# ---------------------------------------------------------------------- the command


CONFIG = (
    "schema: 1\nmodel:\n  class_path: PolicyRL\n  init_args:\n    model: {path: %s}\n    lora: {r: 4}\n    search: BM25Search\n"
)


@pytest.fixture
def config(tmp_path, folders, monkeypatch):
    """Of a policy whose folder holds nothing but its config.json."""
    monkeypatch.setenv("COLUMNS", "120")
    architecture("Qwen/Qwen2.5-3B").save_pretrained(tmp_path / "bare")
    (tmp_path / "policy.yaml").write_text(CONFIG % (tmp_path / "bare"))
    return f"--config={tmp_path / 'policy.yaml'}"


def test_what_does_not_fit_is_said_with_options_that_help(config, capsys, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as end:
        main(["estimate", config, "--card", "24", "--data.batch_size=4"])
    said = capsys.readouterr().out
    assert end.value.code == 1
    options = re.search(r"^does not fit; it would with (--.*)$", said, re.MULTILINE)[1].split()
    assert options[0] == "--model.checkpointing=true"
    assert sorted(tmp_path.rglob("*")) == before, "nothing is written"
    main(["estimate", config, "--card", "24", "--data.batch_size=4", *options])
    assert re.search(r"most at a time +│ +\d+\.\d+ +│ fits", capsys.readouterr().out)
    with pytest.raises(SystemExit):
        main(["estimate", config, "--card", "1"])
    assert "does not fit; take a larger card or a smaller model" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ([], "estimate: there is no CUDA card here; say how much memory yours has, such as --card 24"),
        (["--card=0"], "--card: expected GB of memory, such as 24; got 0"),
        (["--card=RTX 2060"], "estimate: argument --card: invalid int value: 'RTX 2060'; see python -m"),
        (
            ["--card=24", "--trainer.precision=bf16-true"],
            "trainer.precision: expected 32-true or bf16-mixed; got bf16-true",
        ),
        (["--card=24", "--model.model.path=some/model"], "model path: no config.json of some/model is at hand"),
        (["--card=24", "--model.group_size=0"], "model.group_size: expected 1 or more; got 0"),
        (
            ["--card=24", "--model.lora=null", "--model.model.dtype=bfloat16"],
            "model: `lora: null` trains all weights, and most",
        ),
        (["--card=24", "--model.groups=4"], "unknown option model.groups (PolicyRL has no such option)"),
    ],
)
def test_a_users_error_is_one_sentence(options, sentence, config, capsys):
    with pytest.raises(SystemExit) as end:
        main(["estimate", config, *options])
    said = capsys.readouterr().err
    assert end.value.code == 2
    assert said.startswith(f"error: {sentence}")
    assert len(said.splitlines()) == 1


def test_names_of_folders_are_no_markup():
    file = io.StringIO()
    held = [Item("simulator's adapter", 10**9, "runs/[/old]/model\x1b[2J")]
    show_card(Console(file=file, width=100), Card("cuda:0", 10**10, always=held))
    assert "runs/[/old]/model" in file.getvalue()
    assert "\x1b" not in file.getvalue()
