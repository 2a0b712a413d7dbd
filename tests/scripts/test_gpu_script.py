"""What scripts/gpu.py does on a card, gone through without one: short real steps with stand-ins, tables, heads of presets."""

import json
import shutil
import signal
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

import gpu
from benches import gpu_presets
from zs_lightning.cli import main
from zs_lightning.text.prompts import get_prompts

ROOT = Path(__file__).parents[2]

POLICY = ROOT / "configs" / "qwen2.5-3b" / "policy_24gb.yaml"
CARD = {"name": "NVIDIA Test 24", "gigabytes": 24, "count": 1, "cuda": "13.0"}
STEP = {"steps": 3, "each_seconds": [9.0, 2.5, 2.0], "step_seconds": 2.0, "peak_bytes": [17_700_000_000]}
ROW = {
    "preset": "qwen2.5-3b/policy_24gb",
    "estimated": {"fits": True, "peak_bytes": [18_200_000_000]},
    "measured": STEP | {"reserved_bytes": [19_000_000_000]},
}


@pytest.fixture
def in_this_process(monkeypatch, tmp_path):
    """The processes of the parts are calls here: to start one takes as long as what it does."""

    def process(command, limit):
        assert command[1:4] == ["-m", "zs_lightning", "fit"]
        main(command[3:])
        return ""

    monkeypatch.setattr(gpu, "process", process)
    monkeypatch.setattr(gpu, "child", lambda work, limit, *arguments: gpu.CHILDREN[work](*arguments))
    monkeypatch.setattr(gpu, "run_tests", lambda limit: {"tests": 1, "failures": 0, "errors": 0, "skipped": 1, "failed": []})
    yield
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Lightning ignores Ctrl-C once it has seen one.


def options(out, **changes):
    made = {"presets": [], "out": out, "minutes": 9.0, "dry": True, "fill": False, "began": gpu.time.time()}
    return Namespace(**made | changes)


def numbers(found):
    """Every number in a JSON value."""
    if isinstance(found, dict | list):
        return [n for value in (found.values() if isinstance(found, dict) else found) for n in numbers(value)]
    return [found] if isinstance(found, int | float) and not isinstance(found, bool) else []


def test_a_dry_run_goes_through_every_part_and_keeps_no_figure(in_this_process, tmp_path, capsys):
    assert gpu.run(options(tmp_path / "out")) == 0
    report = json.loads((tmp_path / "out" / "gpu_results.json").read_text())
    assert report["dry"] is True
    assert len(report["gpu-step"]) == 2
    assert [row["preset"] for row in report["presets"]] == ["small/policy_8gb", "small/simulator_8gb"]
    assert all(row["measured"]["each_seconds"] == ["dry"] * 3 for row in report["presets"])
    assert numbers([report[part] for part in ("seconds", "tests", "gpu-step", "presets")]) == []
    assert (tmp_path / "out" / "gpu_results.md").read_text().startswith(f"# {gpu.DRY}")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["gpu_results.json", "gpu_results.md"]


def test_without_time_every_part_says_so(in_this_process, tmp_path, capsys):
    assert gpu.run(options(tmp_path, began=gpu.time.time() - 600)) == 1
    report = json.loads((tmp_path / "gpu_results.json").read_text())
    assert {report[key]["skipped_part"] for key in ("tests", "gpu-step")} == {gpu.NO_TIME}
    assert {row["skipped"] for row in report["presets"]} == {gpu.NO_TIME}


def test_without_a_card_that_is_what_is_said(capsys):
    with pytest.raises(SystemExit) as end:
        gpu.main(["--out", "nowhere"])
    assert end.value.code == 2
    assert "there is no CUDA card" in capsys.readouterr().err
    assert not Path("nowhere").exists()


def test_a_process_that_fails_or_takes_too_long_is_a_sentence():
    with pytest.raises(gpu.Missing, match=r"failed with 3: \[1\]"):
        gpu.process([sys.executable, "-c", "print([1]); raise SystemExit(3)"], 60)
    with pytest.raises(gpu.Missing, match=r"its limit of 0 s"):
        gpu.process([sys.executable, "-c", "import time; time.sleep(9)"], 0.2)


def test_presets_for_the_card_come_first_and_what_does_not_fit_is_said(tmp_path):
    chosen = [f"{path.parent.name}/{path.stem}" for path in gpu.choose([], False)]
    assert (chosen[0], chosen[2], chosen[-1]) == ("small/policy_8gb", "llama-3.2-3b/policy_48gb", "qwen2.5-7b/simulator_24gb")
    assert len(chosen) == len(list(ROOT.glob("configs/*/*gb.yaml"))) == 17
    presets = gpu.Presets(tmp_path, CARD, False)
    large, two = (presets.measure(POLICY.with_name(f"policy_{name}.yaml"), lambda: 99.0) for name in ("80gb", "2x24gb"))
    assert (large["skipped"], two["skipped"]) == ("does not fit 24 GB, says estimate", "needs 2 cards")


def test_the_fastest_later_step_counts(tmp_path):
    steps = [{"seconds": s, "peak_bytes": [n], "reserved_bytes": [n + 1]} for s, n in ((9.0, 5), (2.5, 7), (2.0, 7))]
    (tmp_path / "steps.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    expected = {**STEP, "peak_bytes": [7], "reserved_bytes": [8]}
    assert gpu_presets.measured(tmp_path) == expected
    (tmp_path / "steps.jsonl").write_text(json.dumps(steps[0]) + "\n")
    assert gpu_presets.measured(tmp_path) is None


def test_the_stand_ins_tokenizer_has_the_models_vocabulary_and_prompts_of_usual_length(tmp_path):
    tokenizer = gpu_presets.make_tokenizer(2048)
    assert len(tokenizer) == 2048
    assert tokenizer.decode([2047, 1999]) == " w2047 w1999"
    gpu_presets.make_rows(tmp_path / "rows.jsonl")
    row, prompts = json.loads((tmp_path / "rows.jsonl").read_text().splitlines()[0]), get_prompts("zerosearch")
    tokens = [len(tokenizer(text)["input_ids"]) for text in (prompts.policy + row["question"], *row["documents"])]
    assert tokens[0] == pytest.approx(200, rel=0.1)
    assert sum(tokens[1:]) == pytest.approx(600, rel=0.15)


def test_measured_figures_stand_in_the_presets_head_once_for_each_card(tmp_path):
    preset = tmp_path / "policy_24gb.yaml"
    shutil.copy(POLICY, preset)
    before = preset.read_text().splitlines()
    gpu.fill(preset, ROW | {"measured": ROW["measured"] | {"step_seconds": 7.0}}, "NVIDIA Test 24")
    gpu.fill(preset, ROW, "NVIDIA Test 240")
    gpu.fill(preset, ROW, "NVIDIA Test 24")
    said = "in short steps with random weights: 17.7 / 18.2 GB (measured / estimated), 2.0 s."
    added = [f"# Measured on NVIDIA Test {name} {said}" for name in ("24", "240")]
    at = next(i for i, line in enumerate(before) if line.startswith("# Estimated")) + 1
    assert preset.read_text().splitlines() == [*before[:at], *added, *before[at:]]


def test_what_a_run_said_of_its_speed_stands_beside_its_figures(monkeypatch, tmp_path):
    said = "generation goes on without CUDA graphs, which is slower: why\nSeed set to 0\n"
    monkeypatch.setattr(gpu, "process", lambda command, limit: said)
    monkeypatch.setattr(gpu_presets, "measured", lambda folder: ROW["measured"])
    found = gpu.Presets(tmp_path, CARD, False)._fit("a", [], lambda: 99.0)
    expected = "3 steps; generation goes on without CUDA graphs, which is slower: why"
    assert gpu.cells({**ROW, "measured": found}) == ["17.7 / 18.2", "2.0", expected]


def test_a_dry_run_fills_nothing(capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--dry", "--fill"])
    assert "--dry measures nothing" in capsys.readouterr().err


def test_no_card_is_touched_by_the_parent():
    assert not torch.cuda.is_initialized()
