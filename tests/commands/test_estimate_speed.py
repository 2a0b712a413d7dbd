"""Rates with a clock that counts the layers that really ran, so that seconds are known; and what is made of rates."""

import io
import re

import pytest
import torch
from rich.console import Console
from torch.nn.modules.module import register_module_forward_hook

from support.detached import NoEngine
from support.tiny import make_model
from zs_lightning.cli import main
from zs_lightning.commands.estimate import command, speed
from zs_lightning.commands.estimate.command import check_measured, show_times
from zs_lightning.commands.estimate.job import READING, SCORING, SIMULATOR, TRAINING, WRITING, Job, job_of
from zs_lightning.commands.estimate.speed import Bench, Rate, measure
from zs_lightning.errors import UserError
from zs_lightning.generation import mixed_adapters
from zs_lightning.generation.kv_cache import host_bytes
from zs_lightning.models.specs import LoraSpec, ModelSpec
from zs_lightning.modules import PolicyRL
from zs_lightning.rollout import RolloutSpec
from zs_lightning.search import SimulatorSearch


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of a model of five layers: its config.json alone."""
    path = tmp_path_factory.mktemp("model")
    make_model("qwen3", num_hidden_layers=5).config.save_pretrained(path)
    return str(path)


@pytest.fixture(autouse=True)
def shallow(monkeypatch):
    monkeypatch.setattr(speed, "DEPTHS", (1, 3))
    monkeypatch.setattr(speed, "REPEATS", 2)
    monkeypatch.setattr(speed, "SECONDS", float("inf"))


def job(folder, **options):
    made = {"model": ModelSpec(folder, device="cpu"), "lora": LoraSpec(r=2), "optimizer": torch.optim.AdamW}
    made |= {"precision": "32-true", "checkpointing": True, "tokens": 80, "slots": 4, "length": 40}
    return Job("policy", **{**made, **options})


def work(**tokens):
    return dict.fromkeys((WRITING, READING, SCORING, TRAINING), 100.0) | tokens


def test_rates_are_of_all_layers_by_those_that_ran(folder, monkeypatch):
    def clock(self, work):
        ran = set()
        hook = register_module_forward_hook(lambda module, *_: ran.add(getattr(module, "layer_idx", None)))
        work()
        hook.remove()
        return 3.0 + len(ran - {None})

    monkeypatch.setattr(Bench, "clock", clock)
    spec = ModelSpec(folder, dtype="bfloat16", quantization="nf4", device="cpu")
    other = SimulatorSearch(spec, slots=2, max_length=100, max_new_tokens=30)
    rates = measure(job(folder, simulator=other, work=work()), [4, 2])
    # 3 s and 1 s a layer: 8 s. Four rows draw 8 tokens each and read 20, a pass has two rows of 40; the simulator's two
    # rows read 50.
    expected = {WRITING: 4 * 8, READING: 4 * 20, SCORING: 80, TRAINING: 80}
    expected |= {SIMULATOR + WRITING: 2 * 8, SIMULATOR + READING: 2 * 50}
    assert rates == {what: Rate(tokens / 8, 0.0, 2) for what, tokens in expected.items()}
    shared = SimulatorSearch(ModelSpec("policy"), slots=2, max_length=30, max_new_tokens=10)
    both = measure(job(folder, simulator=shared, work=work()), [6])
    assert both[SIMULATOR + WRITING] == both[WRITING] == Rate(6 * 8 / 8, 0.0, 2)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_turns_are_written_as_in_rollouts(precision, folder, monkeypatch):
    """With the adapter as the generator mixes it, and in the autocast of the run."""
    seen, before = set(), mixed_adapters._forward

    def forward(adapters, base, first, second, states):
        seen.add((tuple(adapters.names), bool(adapters.mask.all()), first.dtype, torch.is_autocast_enabled("cpu")))
        return before(adapters, base, first, second, states)

    monkeypatch.setattr(mixed_adapters, "_forward", forward)
    measure(job(folder, work={WRITING: 1.0, TRAINING: 1.0}, precision=precision), [2])
    cast = precision == "bf16-mixed"
    assert seen == {(("default",), True, torch.bfloat16 if cast else torch.float32, cast)}


def test_a_rate_is_the_median_and_its_spread_is_said(folder, monkeypatch):
    monkeypatch.setattr(speed, "DEPTHS", (9,))  # No more than there are: all of them, and no second depth.
    monkeypatch.setattr(speed, "REPEATS", 3)
    seconds = iter([100.0, 4.0, 1.0, 2.0])  # The first warms up.
    rate = Bench(ModelSpec(folder, device="cpu")).rate(10, lambda: lambda: next(seconds))
    assert rate == Rate(5.0, 1.5, 3)


def test_a_deeper_model_that_seems_faster_costs_no_less(folder):
    seconds = iter([9.0, 9.0, 5.0, 4.0, 5.0, 4.0])
    rate = Bench(ModelSpec(folder, device="cpu")).rate(10, lambda: lambda: next(seconds))
    assert rate.tokens == 2.0


def test_tokens_of_a_step():
    limits = {"max_turns": 2, "max_new_tokens": 100, "max_observation_tokens": 50, "max_length": 500}
    options = {"estimator": "rloo", "group_size": 4, "updates_per_rollout": 2, "rollout": RolloutSpec(**limits)}
    module = PolicyRL(NoEngine(), model=ModelSpec(device="cpu"), lora=LoraSpec(), **options)
    # Three turns of 100 and two results of 50 behind a prompt of 200 would be 600: three quarters of them fit.
    tokens = {WRITING: 12 * 225, READING: 12 * 75 + 3 * 200, TRAINING: 2 * 12 * 500}
    if module.loss.kl_coef > 0:
        tokens[SCORING] = 12 * 500
    assert job_of(module, 3, "32-true").work == tokens


def test_twice_the_rate_is_half_the_time(folder):
    said = []
    for rate in (10, 20):
        file = io.StringIO()
        made = job(folder, work={TRAINING: 1000.0, WRITING: 500.0}, steps=36)
        rates = {TRAINING: Rate(rate, 0.25, 5), WRITING: Rate(rate, 0.0, 5)}
        show_times(Console(file=file, width=100), made, rates)
        said.append(file.getvalue())
    assert [re.search(r"a step, at most.* (\S+) ", text)[1] for text in said] == ["150.00", "75.00"]
    assert "36 steps: at most 1.5 h, a share of it for each of several devices" in said[0]
    assert "25% of 5" in said[0]


CONFIG = (
    "schema: 1\nmodel:\n  class_path: PolicyRL\n  init_args:\n    model: {path: %s}\n    lora: {r: 2}\n    search: BM25Search\n"
)


def test_the_command_measures_the_cpu_where_there_is_no_card(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    file = tmp_path / "policy.yaml"
    file.write_text(CONFIG % folder)
    small = ["--model.rollout.slots=2", "--model.rollout.max_length=250", "--model.micro_batch_tokens=250"]
    main(["estimate", f"--config={file}", "--measure", "--data.steps=7", *small])
    said = capsys.readouterr().out
    assert f"cpu, {host_bytes() // 10**9} GB" in said
    assert "7 steps: at most" in said


def test_only_what_is_here_can_be_measured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"^--measure: .* a CPU, since there is no CUDA card, \d+ GB; got --card 24; leave"):
        check_measured(24)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(command, "card_here", lambda: (24, "NVIDIA L4"))
    assert check_measured(24) == check_measured(None) == 24
    with pytest.raises(UserError, match=r"^--measure: what is here is measured, NVIDIA L4, 24 GB; got --card 80; leave"):
        check_measured(80)
