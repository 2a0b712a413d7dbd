"""The card of an export: what it says is true of the model beside it."""

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from support.exports import CONFIGS, export
from zs_lightning.cli import main
from zs_lightning.commands.export.card import card
from zs_lightning.commands.export.trained import read_trained
from zs_lightning.runs.checkpoints import identity
from zs_lightning.runs.tables import markdown_cell
from zs_lightning.text.prompts import MINIATURE
from zs_lightning.text.protocol import STOP_TAGS


def measured(folder, checkpoint):
    """The results of a test of two data sets, as far as the card reads them."""

    def scores(mean):
        return {name: {"mean": mean, "low": mean - 0.1, "high": mean + 0.1} for name in ("em", "cover_em", "f1")}

    greedy = {"questions": 30, **scores(0.3), "searches_per_question": 1.5, "mean_of_sources": scores(0.25)}
    greedy["sources"] = {"nq": {"questions": 20, **scores(0.4)}, "a|b<script>": {"questions": 10, **scores(0.1)}}
    folder.mkdir()
    results = {"schema": 1, "seed": 3, "engine": "bm25", "decodings": {"greedy": greedy}}
    (folder / "results.json").write_text(json.dumps(results))
    head = f"# command: test\n# checkpoint: {identity(checkpoint)}\n" if checkpoint else "# command: test\n"
    content = {"ckpt_path": checkpoint and "runs/of/then/last.ckpt"}
    (folder / "config.yaml").write_text(head + yaml.safe_dump(content))
    return folder


def test_the_card_says_what_made_it_and_how_good_it_is(runs, tmp_path):
    test = measured(tmp_path / "test", runs / "full" / "last.ckpt")
    export("--ckpt", runs / "full", "--out", tmp_path / "model", "--results", test)
    text = (tmp_path / "model" / "README.md").read_text()
    _, head, body = text.split("---\n", 2)
    assert yaml.safe_load(head)["library_name"] == "transformers"
    assert yaml.safe_load(head)["license"] == "apache-2.0"
    assert "| all | 30 | 30.0 (20.0–40.0) | 30.0 (20.0–40.0) | 30.0 (20.0–40.0) |" in body
    assert "| mean of data sets |  | 25.0 (15.0–35.0)" in body
    assert "| a&#124;b&#60;script&#62; | 10 |" in body
    assert "\nbm25; greedy; 1.50 searches per question; seed 3:\n" in body
    settings = yaml.safe_load(body.split("```yaml\n")[1].split("```")[0])
    assert settings["PolicyRL"]["search"] == "BM25Search"  # Its options are left out.
    assert settings["data"]["batch_size"] == 2
    assert f"torch {torch.__version__}" in body
    assert MINIATURE.policy in body
    assert "95 % interval" in body
    assert "EM is exact match" in body


def test_a_card_without_results_explains_none(runs, tmp_path):
    export("--ckpt", runs / "full", "--out", tmp_path / "model")
    body = (tmp_path / "model" / "README.md").read_text()
    assert "\nNot measured yet.\n\n## Use\n" in body
    assert "exact match" not in body


def test_a_test_says_which_weights_it_tested_whatever_they_are_called(runs, tmp_path, monkeypatch):
    """The run was trained and tested in another folder, and was moved since."""
    (tmp_path / "then").mkdir()
    shutil.copytree(runs / "simulator", tmp_path / "then" / "simulator")
    monkeypatch.chdir(tmp_path / "then")
    options = ["--run.folder=tested", "--data.validation_rows=4", "--data.test_rows=4", "--model.lora.r=4"]
    main(["test", f"--config={CONFIGS / 'simulator.yaml'}", "--ckpt_path=simulator", *options])
    monkeypatch.chdir(tmp_path)
    Path("then/simulator").rename("moved")
    config = Path("moved/config.yaml")
    config.write_text("# checkpoint: 0123456789abcdef\n" + config.read_text())  # It went on from another's weights.
    export("--ckpt", "moved", "--out", "model", "--results", "then/tested")
    body = (tmp_path / "model" / "README.md").read_text()
    assert "Share of results that hold the asked fact" in body
    assert "exact match" not in body
    assert "0123456789abcdef" not in body


@pytest.mark.parametrize("case", ["another", "untrained", "unsaid", "comparison"])
def test_results_of_another_model_do_not_get_onto_the_card(case, runs, tmp_path, capsys):
    checkpoints = {"another": runs / "nf4" / "last.ckpt", "untrained": None}
    folder = measured(tmp_path / "test", checkpoints.get(case, runs / "full" / "last.ckpt"))
    if case == "unsaid":
        (folder / "config.yaml").write_text("ckpt_path: a.ckpt\n")
    if case == "comparison":
        (folder / "config.yaml").unlink()
    said = {
        "another": "tested other weights, runs/of/then/last.ckpt, and not",
        "untrained": "tested the untrained model and not",
        "unsaid": "does not say which weights it tested; run the test again",
        "comparison": "is not the run folder of a `test`, which holds results.json and config.yaml",
    }
    with pytest.raises(SystemExit):
        export("--ckpt", runs / "full", "--out", tmp_path / "m", "--results", folder)
    assert f"--results: {folder} {said[case]}" in capsys.readouterr().err
    assert not (tmp_path / "m").exists()


def test_texts_of_others_stay_texts_and_places_of_this_machine_stay_here(runs, tmp_path):
    mine = tmp_path / "my folder"
    mine.mkdir()
    link = "![x](https://evil.example)"
    trained = read_trained(runs / "full")
    config = copy.deepcopy(trained.config)
    config["data"]["source"] = {"init_args": {"path": str(mine), "note": f"```\n{link}", "files": ["~/secret/a.csv"]}}
    config["model"]["init_args"]["other"] = "plain"
    results = {"setting": link, "seed": 3, "decodings": {"<b>": {"questions": 40, "searches_per_question": 1.0}}}
    results["decodings"]["<b>"] |= {name: {"mean": 0.5} for name in ("em", "cover_em", "f1")}
    page = card(replace(trained, config=config), "mine", None, [results], "")
    before, shown = page.split("\n````yaml\n")
    shown = shown.split("\n````\n")[0]
    assert link not in before
    assert "<b>" not in before
    found = yaml.safe_load(shown)["data"]["source"]["init_args"]
    assert found == {"path": "my folder", "note": f"```\n{link}", "files": ["a.csv"]}
    assert "plain" in shown


@pytest.mark.parametrize("kind", ["PolicyRL", "SimulatorSFT", "<b>Mine"])
def test_prompts_and_versions_of_others_stay_where_they_belong(kind, runs):
    link = "![x](https://evil.example)"
    prompts = replace(MINIATURE, policy=f"p\n````\n{link}\n", simulator_useful=f"s\n````\n{link}\n", simulator_stop=("<u>",))
    trained = replace(read_trained(runs / "full"), kind=kind, prompts=prompts, versions={"torch": f"2.9.1+cpu {link}\n# a"})
    page = card(trained, "mine", None, [], "")
    _, prompt, between, _, after = page.split("\n`````")
    assert prompt == f"\n{'p' if kind == 'PolicyRL' else 's'}\n````\n{link}"
    assert page.count(link) == 1
    assert f"\nVersions: torch 2.9.1+cpu {markdown_cell(link)} &#35; a.\n" in after
    stops = STOP_TAGS if kind == "PolicyRL" else ["<u>"]
    assert f"\nStop at {', '.join(map(markdown_cell, stops))}." in between
    assert "<b>" not in page.split("## Training")[0]


@pytest.mark.parametrize("damage", [{"seed": None}, {"decodings": {"greedy": 3}}, {"decodings": {"greedy": {"questions": 1}}}])
def test_damaged_results_are_one_sentence(damage, runs, tmp_path, capsys):
    folder = measured(tmp_path / "test", runs / "full" / "last.ckpt")
    content = json.loads((folder / "results.json").read_text())
    (folder / "results.json").write_text(json.dumps(content | damage))
    with pytest.raises(SystemExit):
        export("--ckpt", runs / "full", "--out", tmp_path / "m", "--results", folder)
    assert f"--results: those in {folder} are damaged" in capsys.readouterr().err
