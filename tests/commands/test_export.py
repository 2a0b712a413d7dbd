"""export: what other programs load says what the trained module says, and nothing half-written or wrong is left."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from support.exports import ROOT, export
from zs_lightning.commands.export.trained import divergence
from zs_lightning.models.loading import load_model
from zs_lightning.models.specs import SHIPPED, LoraSpec, ModelSpec
from zs_lightning.modules import PolicyRL, SimulatorSFT
from zs_lightning.rollout import RolloutSpec
from zs_lightning.search import BM25Search
from zs_lightning.text.prompts import MINIATURE

IDS = torch.tensor([[5, 9, 77, 300, 12, 6, 41, 8]])


def trained(module, run):
    """The module as Lightning restores it."""
    checkpoint = torch.load(run / "last.ckpt", weights_only=True)
    module.setup("test")
    module.on_load_checkpoint(checkpoint)
    module.load_state_dict(checkpoint["state_dict"], strict=False)
    return module.eval()


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
    files = {"README.md", "adapter_config.json", "adapter_model.safetensors", "prompts.json", "base"}
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == files | {"tokenizer.json", "tokenizer_config.json"}
    assert AutoTokenizer.from_pretrained(tmp_path / "adapter").encode("Foo") == module.tokenizer.encode("Foo")
    assert json.loads((tmp_path / "adapter" / "prompts.json").read_text())["policy"] == MINIATURE.policy
    written = [path for path in (tmp_path / "adapter").rglob("*") if path.is_file()]
    assert not any(str(ROOT).encode() in path.read_bytes() for path in written)
    assert {path.stat().st_mode & 0o777 for path in written} == {0o644}


def test_the_miniature_travels_with_its_adapter(runs, tmp_path, capsys, monkeypatch):
    """Without a hub: where it was written, plain PEFT finds the base by itself, and the lines of the card work anywhere."""
    monkeypatch.chdir(tmp_path)
    export("--ckpt", runs / "simulator", "--out", "mine")
    wanted = logits(
        trained(SimulatorSFT(ModelSpec(device="cpu"), LoraSpec(r=4), "miniature"), runs / "simulator").language_model
    )
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    found = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "mine", dtype=torch.float32)
    assert torch.allclose(logits(found), wanted, atol=1e-5)
    (tmp_path / "mine").rename(tmp_path / "elsewhere" / "mine")
    blocks = (tmp_path / "elsewhere" / "mine" / "README.md").read_text().split("```\n")
    (code,) = (block for block in blocks if "from_pretrained" in block)
    names = {}
    exec(code, names)
    assert torch.allclose(logits(names["model"].float()), wanted, atol=1e-5)
    assert names["tokenizer"].decode([300])


def test_a_base_in_a_folder_is_found_from_anywhere(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(SHIPPED, "models/mine")
    run = copy(runs / "simulator", tmp_path / "run", config=lambda a: a["model"].update(path="models/mine"))
    export("--ckpt", run, "--out", "out")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    found = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.allclose(logits(found), logits(PeftModel.from_pretrained(plain(SHIPPED), tmp_path / "out")))
    assert f'AutoModelForCausalLM.from_pretrained("{tmp_path}/models/mine")' in (tmp_path / "out" / "README.md").read_text()
    assert not (tmp_path / "out" / "base").exists()


def test_a_merged_model_needs_transformers_alone(runs, tmp_path, capsys):
    export("--ckpt", runs / "simulator" / "last.ckpt", "--out", tmp_path / "new" / "merged", "--merge")
    module = trained(SimulatorSFT(ModelSpec(device="cpu"), LoraSpec(r=4), "miniature"), runs / "simulator")
    merged = plain(tmp_path / "new" / "merged")
    assert type(merged).__module__.startswith("transformers.")
    assert not [path.name for path in (tmp_path / "new" / "merged").iterdir() if "adapter" in path.name]
    assert torch.allclose(logits(merged), logits(module.language_model), atol=1e-4)
    said = capsys.readouterr().out
    found = re.search(
        r"^Checked: the saved float32 model against base and adapter on (\d+) tokens: largest difference of logits (\S+), "
        r"of (\S+) that the adapter makes$",
        said,
        re.MULTILINE,
    )
    assert found
    assert int(found[1]) > 20
    assert 0 <= float(found[2]) < 1e-3 < float(found[3])


def test_a_run_on_a_4_bit_base_exports_its_adapter_and_merges_into_the_whole_base(runs, tmp_path):
    export("--ckpt", runs / "nf4", "--out", tmp_path / "adapter")
    export("--ckpt", runs / "nf4", "--out", tmp_path / "merged", "--merge", "--dtype", "bfloat16")
    spec = ModelSpec(quantization="nf4", device="cpu")
    module = trained(PolicyRL(BM25Search(), spec, "miniature", LoraSpec(r=4), RolloutSpec(max_length=640)), runs / "nf4")
    on_quantized = PeftModel.from_pretrained(load_model(spec), tmp_path / "adapter").eval()
    assert torch.allclose(logits(on_quantized), logits(module.policy), atol=1e-4)
    merged, whole = plain(tmp_path / "merged"), PeftModel.from_pretrained(plain(SHIPPED), tmp_path / "adapter").eval()
    assert plain(tmp_path / "merged", "auto").dtype == torch.bfloat16
    assert not hasattr(merged.config, "quantization_config")
    wanted, found, base = (logits(model).log_softmax(-1)[0] for model in (whole, merged, plain(SHIPPED)))
    assert divergence(wanted, found) < 0.1 * divergence(wanted, base)


def test_all_weights_are_a_plain_model(runs, tmp_path):
    export("--ckpt", runs / "full", "--out", tmp_path / "model")
    module = trained(
        PolicyRL(BM25Search(), ModelSpec(device="cpu"), "miniature", None, RolloutSpec(max_length=640)), runs / "full"
    )
    assert torch.allclose(logits(plain(tmp_path / "model")), logits(module.policy), atol=1e-5)
    assert not torch.allclose(logits(plain(tmp_path / "model")), logits(plain(SHIPPED)), atol=1e-3)
    export("--ckpt", runs / "full", "--out", tmp_path / "small", "--dtype", "bfloat16")
    small = plain(tmp_path / "small", "auto")
    assert small.dtype == torch.bfloat16
    assert all(torch.equal(p, q.bfloat16()) for p, q in zip(small.parameters(), module.policy.parameters(), strict=True))


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
    "tensor missing": (lambda s: s.pop(first(s)), None, [], "(1 differ, first base_model.model"),
    "tensor too many": (lambda s: s.update({"x.y": torch.ones(1)}), None, [], "(1 differ, first y)"),
    "not a number": (lambda s: s[first(s)].fill_(float("nan")), None, [], "holds values that are not numbers"),
    "other rank": (None, lambda a: a["lora"].update(r=8), [], "its weights do not fit model and lora of this config"),
    "other option": (None, lambda a: a["model"].update(colour="red"), [], "is not the config of a `fit`"),
    "no adapter": (None, lambda a: a.pop("lora"), [], "is not the config of a `fit`"),
    "no first adapter": (None, lambda a: a["model"].update(adapter="other"), [], "there is no adapter in other"),
    "4 bits trained": (None, lambda a: a.update(lora=None, model={"quantization": "nf4"}), [], "nothing to export"),
    "all weights": (None, lambda a: a.update(lora=None), ["--merge"], "trained all weights; export it without --merge"),
    "dtype": (None, None, ["--dtype=float32"], "--dtype: it is for all weights"),
    "unknown option": (None, None, ["--quick"], "unrecognized arguments: --quick"),
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
    places = {"nowhere": "there is no file", "run": "no config.yaml beside", "half": "is damaged or no checkpoint"}
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


def test_no_folder_is_made_in_a_file(runs, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    with pytest.raises(SystemExit) as end:
        export("--ckpt", runs / "simulator", "--out", tmp_path / "file" / "a" / "b")
    assert end.value.code == 2
    assert f"--out: {tmp_path / 'file'} is a file" in capsys.readouterr().err


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


def test_help_loads_no_heavy_library():
    code = "import sys\nfrom zs_lightning.cli import main\ntry: main(['export', '--help'])\nexcept SystemExit: pass\n"
    code += "print([m for m in ('torch', 'lightning', 'peft', 'transformers', 'huggingface_hub') if m in sys.modules])"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert "--merge" in said
    assert said.endswith("[]\n")
