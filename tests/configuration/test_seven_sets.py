"""The paper's evaluation as it is shipped, with files, a tiny model and a search engine on this machine instead of theirs."""

import json
from pathlib import Path

import pytest
import yaml

from support.faultserver import FaultServer, Reply
from support.tiny import make_model, make_tokenizer
from zs_lightning.cli import main

CONFIG = Path(__file__).parents[2] / "configs" / "evaluation" / "seven_sets.yaml"
SETS = {"nq", "triviaqa", "popqa", "hotpotqa", "2wikimultihopqa", "musique", "bamboogle"}


@pytest.fixture
def google():
    server = FaultServer(lambda asked: Reply({"organic": [{"title": "Foo", "snippet": "Foo wrote it."}]}))
    yield server
    server.close()


def test_one_shot_retrieval_over_all_seven(google, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SERPER_API_KEY", "secret0123")
    make_model("qwen2").save_pretrained("model")
    make_tokenizer("chat").save_pretrained("model")
    config = yaml.safe_load(CONFIG.read_text())
    model = config["model"]["init_args"]
    model["model"] |= {"path": "model", "device": "cpu"}
    model["search"]["init_args"] |= {"endpoint": google.url()}
    model["rollout"] |= {"max_turns": 0, "retrieve_first": True, "max_new_tokens": 4, "max_length": 1000}
    sources = config["data"]["source"]["init_args"]["sources"]
    assert set(sources) == SETS
    for name, source in sources.items():
        rows = [{"id": str(i), "question": f"Who wrote {name} {i}?", "golden_answers": ["Foo"]} for i in range(2)]
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        del source["init_args"]["config"], source["init_args"]["splits"]
        source["init_args"]["path"] = f"{name}.jsonl"
    Path("config.yaml").write_text(yaml.safe_dump(config))
    main(["test", "--config=config.yaml", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"])
    results = json.loads(Path("runs/seven_sets/results.json").read_text())
    greedy = results["decodings"]["greedy"]
    assert {name: part["questions"] for name, part in greedy["sources"].items()} == dict.fromkeys(SETS, 2)
    assert results["engine"] == "serper"
    assert greedy["searches_per_question"] == 1
    probe, *queries = (asked.body["q"] for asked in google.asked)
    assert sorted(queries) == sorted(f"Who wrote {name} {i}?" for name in SETS for i in range(2))
    assert probe not in queries, "the engine is tried before anything is generated"
    assert Path("runs/seven_sets.sqlite").is_file()
