"""Formats that the machine multiplies slowly are said before the first step, with what to set; precisions that are none."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from support.commandline import CONFIGS, POLICY, SIMULATOR, failure
from zs_lightning.commands.estimate.job import read_job, warn_of_formats
from zs_lightning.models.checks import check_precision, emulated, slow_format
from zs_lightning.models.loading import load_model
from zs_lightning.models.logprobs import token_logprobs
from zs_lightning.models.specs import SHIPPED, ModelSpec

pytestmark = pytest.mark.usefixtures("environment")

CPU = torch.device("cpu")
BF16 = "cannot multiply bfloat16 itself, which makes it many times as slow as float32; set "
NF4 = "model: nf4 with dtype float32 is multiplied in float32, on a card far slower than in bfloat16; set model.dtype: bfloat16"
ALL = {"bfloat16", "float16"}


@pytest.mark.parametrize(
    ("spec", "device", "mixed", "slow", "sentence"),
    [
        ({}, "cpu", False, ALL, None),
        ({}, "cpu", True, set(), None),
        ({"dtype": "bfloat16"}, "cpu", False, {"float16"}, None),
        ({"dtype": "float16"}, "cpu", True, {"float16"}, None),
        ({}, "cpu", True, ALL, f"model: this processor {BF16}trainer.precision: 32-true"),
        ({"dtype": "bfloat16"}, "cpu", False, ALL, f"model: this processor {BF16}model.dtype: float32"),
        (
            {"dtype": "bfloat16", "quantization": "nf4"},
            "cpu",
            True,
            ALL,
            f"model: this processor {BF16}model.dtype: float32 and trainer.precision: 32-true",
        ),
        (
            {"dtype": "float16"},
            "cpu",
            False,
            {"float16"},
            f"model: this processor {BF16}model.dtype: float32".replace("bfloat16", "float16"),
        ),
        ({"dtype": "bfloat16"}, "cuda", False, {"bfloat16"}, f"model: this card {BF16}model.dtype: float32"),
        ({"quantization": "nf4"}, "cuda", False, set(), NF4),
        ({"quantization": "nf4"}, "cuda", False, {"bfloat16"}, None),
    ],
)
def test_what_is_said_of_a_format(spec, device, mixed, slow, sentence):
    assert slow_format("model", ModelSpec(**spec), device, mixed, slow) == sentence


def test_what_this_processor_cannot_do():
    """As torch says, also of one that is made to look like an older one."""
    assert ("bfloat16" in emulated(CPU)) != torch.ops.mkldnn._is_mkldnn_bf16_supported()
    code = "import torch, zs_lightning.models.checks as c; print(sorted(c.emulated(torch.device('cpu'))))"
    older = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=older)
    assert ended.stdout == "['bfloat16', 'float16']\n"


@pytest.fixture
def older(monkeypatch):
    """A processor without products of bfloat16; models without weights, which nobody gets so far as to load."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    for name in ("policy", "simulator"):
        shutil.copytree(SHIPPED, name, ignore=shutil.ignore_patterns("*.safetensors"))
    return ["--model.model.path=./policy", "--model.model.dtype=bfloat16", "--model.model.device=cpu"]


SAID = f"model.model: this processor {BF16}model.model.dtype: float32 and trainer.precision: 32-true"
SAID_OF_SIMULATOR = f"model.search.model: this processor {BF16}trainer.precision: 32-true"


@pytest.mark.parametrize("command", ["fit", "validate", "test"])
@pytest.mark.parametrize("config", [POLICY, SIMULATOR])
def test_a_run_says_it_before_weights_are_loaded(config, command, older, capsys, caplog):
    options = ["--trainer.accelerator=cpu", "--trainer.precision=bf16-mixed", "--trainer.limit_val_batches=1"]
    roles = ["--model.search.model.path=./simulator", "--model.search.model.adapter=null"] if config == POLICY else []
    assert "no model could be loaded" in failure(capsys, command, config, *older, *roles, "--model.lora.r=2", *options)[1]
    assert caplog.messages == [SAID, *([SAID_OF_SIMULATOR] if roles else [])]


def test_ask_says_it(older, capsys, caplog):
    config = yaml.safe_load((CONFIGS / "policy.yaml").read_text())
    config["model"]["init_args"]["model"] = {"path": "./policy", "dtype": "bfloat16", "device": "cpu"}
    config["trainer"]["precision"] = "bf16"
    Path("own.yaml").write_text(yaml.safe_dump(config))
    assert "no model could be loaded" in failure(capsys, "ask", "--config=own.yaml", "Why?")[1]
    assert caplog.messages[0] == SAID


def test_estimate_says_it_of_the_machine_that_is_meant(older, caplog):
    options = ["--model.search=BM25Search", "--trainer.precision=bf16-mixed", *older]
    job = ["--config=" + str(CONFIGS / "policy.yaml"), *options, "--model.lora.r=2"]
    warn_of_formats(read_job(job), is_here=True)
    assert caplog.messages == [SAID]
    caplog.clear()
    # Of a card that is elsewhere, unless the model is to lie on the CPU.
    warn_of_formats(read_job([*job, "--model.model.device=cuda"]), is_here=False)
    assert caplog.messages == []


def test_gradients_through_float16_are_wrong_and_through_bfloat16_are_not():
    """Of a mean over a million tokens; with autocast to bfloat16 those through weights of float16 are right too."""
    found = {}
    ids = torch.arange(24)[None] + 20
    for dtype, mixed in (("float32", False), ("bfloat16", False), ("float16", True), ("float16", False)):
        model = load_model(ModelSpec(dtype=dtype, device="cpu")).requires_grad_(False)
        last = model.get_decoder().layers[0].self_attn.q_proj.weight.requires_grad_(True)
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            logprobs, _ = token_logprobs(model, ids, ids > 20)
        (-logprobs.sum() / 1e6).backward()
        found[dtype, mixed] = last.grad.float()
    exact = found.pop(("float32", False))
    wrong = [float((gradient - exact).norm() / exact.norm()) for gradient in found.values()]
    assert max(wrong[:2]) < 0.2, wrong
    assert wrong[2] > 0.5, wrong


def test_names_of_precisions():
    names = {None: "32-true", 32: "32-true", "32": "32-true", "32-true": "32-true", "bf16": "bf16-mixed"}
    assert {name: check_precision(name) for name in names} == names
    for name in ("16", "16-true", "bf16-true", "64"):
        with pytest.raises(ValueError, match=f"^trainer.precision: expected 32-true or bf16-mixed; got {name}"):
            check_precision(name)
