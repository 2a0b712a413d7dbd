"""The whole way in English, gone with a tiny model and a dictionary of made-up machines; stages that ended badly go on."""

import json
import signal
from pathlib import Path

import pytest

import dictionary
import real
from support.dictd import write_dictionary
from support.encoders import make_encoder
from support.tiny import make_model, make_tokenizer
from zs_lightning.cli import main

ROOT = Path(__file__).parents[2]
NAMES = [a + b + c for a in ("Ka", "Mo", "Ti", "Ru") for b in ("ra", "li", "po") for c in ("", "n", "s", "x", "th")]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder with a dictionary, a model and an encoder; commands are calls, and what was called is kept."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    entries = []
    for i, name in enumerate(NAMES):
        entry = f"{name}\n\n   <language> A language developed by {NAMES[i - 1]} Smith in {1950 + i}.\n"
        entries.append(([name.lower()], entry))
    write_dictionary(tmp_path, "foldoc", entries)
    make_model("llama", max_position_embeddings=4096).save_pretrained("model")
    make_tokenizer("chat").save_pretrained("model")
    make_encoder(tmp_path / "encoder", ["language", "Smith"])
    called = []

    def call(words):
        called.append(words)
        try:
            if words[0].endswith("dictionary.py"):
                dictionary.main(words[1:])
            else:
                main(words[2:])
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    monkeypatch.setattr(real, "call", call)
    monkeypatch.setattr(
        real, "TURNS", "{max_turns: 1, max_new_tokens: 120, max_observation_tokens: 150, max_length: 2000, slots: 4}"
    )
    yield called
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Lightning ignores Ctrl-C once it has seen one.


OPTIONS = ["--model", "model", "--encoder", "encoder", "--dictionary", ".", "--share", "0.001"]


STAGES = ["dictionary", "records", "simulator", "measured", "start", "policy"]
TESTS = ["base", "begun", "trained", "trained_dense", "no_search"]


def test_the_whole_way(full, here):
    if not full:
        pytest.skip("half a minute: the full run has it")
    real.main(OPTIONS)
    report = json.loads(Path("runs/real/report/results.json").read_text())
    assert [run["name"] for run in report["runs"]] == TESTS
    assert len(here) == len([*STAGES, *TESTS, "compare"])


def test_a_stage_is_done_once_and_one_that_failed_goes_on(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "foldoc.index").write_text("")
    called = []
    monkeypatch.setattr(real, "call", lambda words: called.append(words) or (3 if "fit" in words else 0))
    with pytest.raises(SystemExit, match="simulator ended with 3; the same line goes on"):
        real.main(OPTIONS)
    book = Path("runs/real/stages.json")
    stopped = json.loads(book.read_text())
    stopped["stages"]["test base"] = {"lives": 1, "seconds": 1.0, "done": False}
    book.write_text(json.dumps(stopped))
    half = Path("runs/real/base/config.yaml")
    half.parent.mkdir()
    half.write_text("what a test has left that was killed")
    monkeypatch.setattr(real, "call", lambda words: called.append(words) or 0)
    real.main(OPTIONS)
    real.main(OPTIONS)
    said = capsys.readouterr().out
    assert said.count("dictionary: done before") == 2
    assert said.count("simulator: goes on") == 1
    assert len(called) == len([*STAGES, *TESTS, "compare"]) + 1
    assert called[2] == called[3]
    book = json.loads(Path("runs/real/stages.json").read_text())["stages"]
    assert set(book) == {*STAGES, *(f"test {name}" for name in TESTS), "compare"}
    assert {name: stage["lives"] for name, stage in book.items() if stage["lives"] > 1} == {"simulator": 2, "test base": 2}
    assert not half.exists()


def test_other_options_are_not_mixed_into_a_run(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    Path("runs/real").mkdir(parents=True)
    Path("runs/real/stages.json").write_text(
        '{"options": {"model": "m", "encoder": "e", "share": 1.0, "dictionary": "d"}, "stages": {}}'
    )
    with pytest.raises(SystemExit, match=r"was begun with --model m --encoder e --share 1\.0"):
        real.main(OPTIONS)
    with pytest.raises(SystemExit):
        real.main(["--share", "2"])
    assert "--share: expected more than 0 and at most 1; got 2.0" in capsys.readouterr().err
    real.main(["--stages"])
    assert capsys.readouterr().out.splitlines()[0] == "dictionary          not begun"
