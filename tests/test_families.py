"""Policies with adapters, of five families: the simulator's fine-tuning, RL against it, and a test with BM25."""

import json
from pathlib import Path

import pytest
import torch

from support.commandline import tensors
from support.familyruns import Case, check_family, fit, search_of, served

pytestmark = pytest.mark.usefixtures("environment")

SHARED = Case("llama3", "nf4", True, "adapter")
CASES = [
    SHARED,
    Case("qwen2.5", "bfloat16", True, "adapter", "miniature"),
    Case("qwen3", "nf4", True, "prompted", "no_thinking.yaml"),
    Case("gemma", "float32", True, "prompted"),
    Case("gemma", "nf4", True, "mistral/nf4"),
    Case("mistral", "bfloat16", True, "qwen3/int8"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_a_family_is_trained_and_tested(case, folders, simulators):
    check_family(case, folders, search_of(case, folders, simulators))


def test_a_family_is_trained_and_tested_with_a_simulator_in_another_process(folders, simulators):
    case = Case("qwen2.5", "float32", True, "served qwen3/int8", "no_thinking.yaml")
    with served(case, folders, simulators) as search:
        check_family(case, folders, search)
    counted = json.loads(Path("run/search.json").read_text())
    assert counted["searches"] > 0
    assert counted["failures"] == 0


def test_on_a_quantised_base_an_interrupted_run_goes_on_bit_for_bit(folders, simulators):
    search = search_of(SHARED, folders, simulators)
    fit(SHARED, "whole", folders, search)
    with pytest.raises(SystemExit):
        fit(SHARED, "parts", folders, search, "--trainer.callbacks+=support.commandline.StopAfterOneStep")
    fit(SHARED, "parts", folders, search, "--ckpt_path=parts/last.ckpt")
    whole, parts = (tensors(torch.load(Path(run) / "last.ckpt", weights_only=True)) for run in ("whole", "parts"))
    learned = [name for name in whole if name.startswith(("/state_dict", "/optimizer_states", "/lr_schedulers"))]
    assert len(learned) > 2 * 2 * 7
    for name in learned:
        same = torch.equal(whole[name], parts[name]) if isinstance(whole[name], torch.Tensor) else whole[name] == parts[name]
        assert same, name
