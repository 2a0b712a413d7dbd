"""export: what other programs load says what the trained module says, and nothing half-written or wrong is left."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from zs_lightning.cli import main
from zs_lightning.export.trained import divergence
from zs_lightning.models.loading import SHIPPED, LoraSpec, ModelSpec, load_model
from zs_lightning.modules import PolicyRL, SimulatorSFT
from zs_lightning.search import BM25Search
from zs_lightning.text.prompts import MINIATURE

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs" / "miniature"
POLICY = [
    f"--config={CONFIGS / 'policy.yaml'}",
    "--model.search=BM25Search",
    "--data.steps=1",
    "--data.batch_size=2",
    "--model.group_size=2",
    "--model.estimator=reinforce",
    "--model.format_weight=0.5",
    "--model.warmup_steps=0",
    "--trainer.callbacks=null",
]
IDS = torch.tensor([[5, 9, 77, 300, 12, 6, 41, 8]])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Run folders of one step each: a simulator's adapter, a policy's adapter on a 4-bit base, all weights of a policy."""
    folder = tmp_path_factory.mktemp("runs")
    sft = ["--data.steps=1", "--data.batch_size=4", "--data.validation_rows=4", "--model.warmup_steps=0", "--model.lora.r=4"]
    sft += ["--run.save_every=1", "--trainer.limit_val_batches=0", "--trainer.val_check_interval=1"]
    main(["fit", f"--config={CONFIGS / 'simulator.yaml'}", f"--run.folder={folder / 'simulator'}", *sft])
    quantized = ["--model.model.quantization=nf4", "--model.lora.r=4", "--model.optimizer.init_args.lr=0.01"]
    main(["fit", *POLICY, f"--run.folder={folder / 'nf4'}", *quantized])
    main(["fit", *POLICY, f"--run.folder={folder / 'full'}"])
    return folder


def trained(module, run):
    """The module as Lightning restores it."""
    checkpoint = torch.load(run / "last.ckpt", weights_only=True)
    module.setup("test")
    module.on_load_checkpoint(checkpoint)
    module.load_state_dict(checkpoint["state_dict"], strict=False)
    return module.eval()


def export(*args):
    main(["export", *map(str, args)])


def plain(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


# ---------------------------------------------------------------------- what comes out


def test_an_adapter_loads_with_plain_peft_and_says_the_same(runs, tmp_path, capsys):
    export("--ckpt", runs / "simulator", "--out", tmp_path / "adapter")
    module = trained(SimulatorSFT(ModelSpec(device="cpu"), LoraSpec(r=4), "miniature"), runs / "simulator")
    found = logits(PeftModel.from_pretrained(plain(SHIPPED), tmp_path / "adapter").eval())
    assert torch.allclose(found, logits(module.language_model), atol=1e-5)
    assert (found - logits(plain(SHIPPED))).abs().max() > 1e-2
    said = capsys.readouterr().out
    assert f"--max-lora-rank 8 --lora-modules adapter={tmp_path / 'adapter'}" in said
    assert f"convert_lora_to_gguf.py {tmp_path / 'adapter'} --base {SHIPPED}" in said
    files = {"README.md", "adapter_config.json", "adapter_model.safetensors", "prompts.json"}
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == files | {"tokenizer.json", "tokenizer_config.json"}
    assert AutoTokenizer.from_pretrained(tmp_path / "adapter").encode("Foo") == module.tokenizer.encode("Foo")
    assert json.loads((tmp_path / "adapter" / "prompts.json").read_text())["policy"] == MINIATURE.policy
    assert not any(str(ROOT).encode() in path.read_bytes() for path in (tmp_path / "adapter").iterdir())


def test_a_merged_model_needs_transformers_alone(runs, tmp_path, capsys):
    export("--ckpt", runs / "simulator" / "last.ckpt", "--out", tmp_path / "new" / "merged", "--merge")
    module = trained(SimulatorSFT(ModelSpec(device="cpu"), LoraSpec(r=4), "miniature"), runs / "simulator")
    merged = plain(tmp_path / "new" / "merged")
    assert type(merged).__module__.startswith("transformers.")
    assert not [path.name for path in (tmp_path / "new" / "merged").iterdir() if "adapter" in path.name]
    assert torch.allclose(logits(merged), logits(module.language_model), atol=1e-4)
    assert f"vllm serve {tmp_path / 'new/merged'}" in capsys.readouterr().out


def test_a_run_on_a_4_bit_base_exports_its_adapter_and_merges_into_the_whole_base(runs, tmp_path):
    export("--ckpt", runs / "nf4", "--out", tmp_path / "adapter")
    export("--ckpt", runs / "nf4", "--out", tmp_path / "merged", "--merge", "--dtype", "bfloat16")
    spec = ModelSpec(quantization="nf4", device="cpu")
    module = trained(PolicyRL(BM25Search(), spec, "miniature", LoraSpec(r=4)), runs / "nf4")
    on_quantized = PeftModel.from_pretrained(load_model(spec), tmp_path / "adapter").eval()
    assert torch.allclose(logits(on_quantized), logits(module.policy), atol=1e-4)
    merged, whole = plain(tmp_path / "merged"), PeftModel.from_pretrained(plain(SHIPPED), tmp_path / "adapter").eval()
    assert plain(tmp_path / "merged", "auto").dtype == torch.bfloat16
    assert not hasattr(merged.config, "quantization_config")
    wanted, found, base = (logits(model).log_softmax(-1)[0] for model in (whole, merged, plain(SHIPPED)))
    assert divergence(wanted, found) < 0.1 * divergence(wanted, base)


def test_all_weights_are_a_plain_model(runs, tmp_path):
    export("--ckpt", runs / "full", "--out", tmp_path / "model")
    module = trained(PolicyRL(BM25Search(), ModelSpec(device="cpu"), "miniature", None), runs / "full")
    assert torch.allclose(logits(plain(tmp_path / "model")), logits(module.policy), atol=1e-5)
    assert not torch.allclose(logits(plain(tmp_path / "model")), logits(plain(SHIPPED)), atol=1e-3)


# ---------------------------------------------------------------------- what is refused


def copy(run, folder, change=None, config=None):
    """The run with another checkpoint or another config."""
    folder.mkdir()
    checkpoint = torch.load(run / "last.ckpt", weights_only=True)
    if change:
        change(checkpoint["state_dict"])
    torch.save(checkpoint, folder / "last.ckpt")
    content = yaml.safe_load((run / "config.yaml").read_text())
    if config:
        config(content["model"]["init_args"])
    (folder / "config.yaml").write_text(yaml.safe_dump(content))
    return folder


def first(state):
    return next(iter(state))


REFUSED = {
    "tensor missing": (lambda s: s.pop(first(s)), None, [], "1 tensors differ, first base_model.model"),
    "tensor too many": (lambda s: s.update({"x.y": torch.ones(1)}), None, [], "1 tensors differ, first y"),
    "not a number": (lambda s: s[first(s)].fill_(float("nan")), None, [], "holds values that are not numbers"),
    "other rank": (None, lambda a: a["lora"].update(r=8), [], "does not fit the model of its config"),
    "other option": (None, lambda a: a["model"].update(colour="red"), [], "is not the config of a `fit`"),
    "no adapter": (None, lambda a: a.pop("lora"), [], "is not the config of a `fit`"),
    "base of its own": (None, lambda a: a["model"].update(adapter="other"), [], "export with --merge"),
    "4 bits trained": (None, lambda a: a.update(lora=None, model={"quantization": "nf4"}), [], "nothing to export"),
    "all weights": (None, lambda a: a.update(lora=None), ["--merge"], "trained all weights; export it without --merge"),
    "dtype": (None, None, ["--dtype=float32"], "--dtype is for --merge"),
    "unknown option": (None, None, ["--quick"], "unrecognized arguments: --quick"),
    "push nowhere": (None, None, ["--push=a/b/c"], "--push a/b/c: Repo id must be"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_leaves_nothing(name, runs, tmp_path, capsys):
    change, config, more, sentence = REFUSED[name]
    run = copy(runs / "simulator", tmp_path / "run", change, config)
    with pytest.raises(SystemExit) as end:
        export("--ckpt", run, "--out", tmp_path / "out", *more)
    assert end.value.code == 2
    assert sentence in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_what_is_no_checkpoint_is_refused(runs, tmp_path, capsys):
    run = copy(runs / "simulator", tmp_path / "run")
    damaged = (run / "last.ckpt").read_bytes()
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "last.ckpt").write_bytes(damaged[: len(damaged) // 2])
    (run / "config.yaml").unlink()
    places = {"nowhere": "there is no file", "run": "no config.yaml beside", "half": "is damaged or not a checkpoint"}
    for place, sentence in places.items():
        with pytest.raises(SystemExit):
            export("--ckpt", tmp_path / place, "--out", tmp_path / "out")
        assert sentence in capsys.readouterr().err


def test_an_existing_folder_is_never_overwritten(runs, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    with pytest.raises(SystemExit):
        export("--ckpt", runs / "simulator", "--out", tmp_path / "out")
    assert "already exists" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


def test_a_merge_that_loses_the_adapter_is_refused(runs, tmp_path, capsys):
    """An adapter whose changes are smaller than what the weights can hold in bfloat16; in float32 they can."""

    def shrink(state):
        for name, tensor in state.items():
            if "lora_B" in name:
                tensor.mul_(0.05)

    run = copy(runs / "simulator", tmp_path / "run", shrink)
    with pytest.raises(SystemExit):
        export("--ckpt", run, "--out", tmp_path / "out", "--merge", "--dtype", "bfloat16")
    assert "try --dtype float32" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    export("--ckpt", run, "--out", tmp_path / "out", "--merge", "--dtype", "float32")


# ---------------------------------------------------------------------- card


def measured(folder, checkpoint):
    """The results of a test of two data sets, as far as the card reads them."""

    def scores(mean):
        return {name: {"mean": mean, "low": mean - 0.1, "high": mean + 0.1} for name in ("em", "cover_em", "f1")}

    greedy = {"questions": 30, **scores(0.3), "searches_per_question": 1.5, "mean_of_sources": scores(0.25)}
    greedy["sources"] = {"nq": {"questions": 20, **scores(0.4)}, "a|b<script>": {"questions": 10, **scores(0.1)}}
    folder.mkdir()
    results = {"schema": 1, "seed": 3, "engine": "bm25", "decodings": {"greedy": greedy}}
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "config.yaml").write_text(yaml.safe_dump({"ckpt_path": None if checkpoint is None else str(checkpoint)}))
    return folder


def test_the_card_says_what_made_it_and_how_good_it_is(runs, tmp_path):
    test = measured(tmp_path / "test", runs / "full" / "last.ckpt")
    export("--ckpt", runs / "full", "--out", tmp_path / "model", "--results", test)
    text = (tmp_path / "model" / "README.md").read_text()
    _, head, body = text.split("---\n", 2)
    assert yaml.safe_load(head)["library_name"] == "transformers"
    assert "license" not in yaml.safe_load(head)  # The shipped folder names none.
    assert "| all | 30 | 30.0 (20.0–40.0) | 30.0 (20.0–40.0) | 30.0 (20.0–40.0) |" in body
    assert "| mean of data sets |  | 25.0 (15.0–35.0)" in body
    assert "| a&#124;b&#60;script&#62; | 10 |" in body
    assert "\nbm25; greedy; 1.50 searches per question; seed 3:\n" in body
    settings = yaml.safe_load(body.split("```yaml\n")[1].split("```")[0])
    assert settings["PolicyRL"]["search"] == "BM25Search"  # Its options are left out.
    assert settings["data"]["batch_size"] == 2
    assert f"torch {torch.__version__}" in body
    assert MINIATURE.policy in body


@pytest.mark.parametrize("checkpoint", ["other.ckpt", None])
def test_results_of_another_model_do_not_get_onto_the_card(checkpoint, runs, tmp_path, capsys):
    with pytest.raises(SystemExit):
        export("--ckpt", runs / "full", "--out", tmp_path / "m", "--results", measured(tmp_path / "test", checkpoint))
    assert f"tested {checkpoint or 'the untrained model'} and not" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("files", "identifier", "sentence"),
    [
        ({"README.md": "---\nlicense: apache-2.0\n---\n# x"}, "apache-2.0", "licence is apache-2.0"),
        ({"README.md": "# x\nlicense: mit\n", "LICENSE.txt": "x"}, "", "in its folder (LICENSE.txt)"),
        ({}, "", "names no licence"),
    ],
)
def test_licence_of_the_base(files, identifier, sentence, tmp_path):
    from zs_lightning.export.card import base_licence

    for name, text in {"config.json": "{}", **files}.items():
        (tmp_path / name).write_text(text)
    found = base_licence(str(tmp_path))
    assert found[0] == identifier
    assert sentence in found[1]


def test_help_loads_no_heavy_library():
    code = "import sys\nfrom zs_lightning.cli import main\ntry: main(['export', '--help'])\nexcept SystemExit: pass\n"
    code += "print([m for m in ('torch', 'lightning', 'peft', 'transformers', 'huggingface_hub') if m in sys.modules])"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert "--merge" in said
    assert said.endswith("[]\n")
