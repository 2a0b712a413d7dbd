"""What real_servers.py makes of servers: a process of its own, and what a tiny model would have written."""

import json
import re
import sys
import urllib.request

import pytest
import torch
import yaml

import real_servers
from support.faultserver import FaultServer
from support.ports import free_port
from support.tiny import make_model, make_tokenizer
from zs_lightning.data import FileSource

SLOW_START = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    asked = 0
    def do_GET(self):
        Handler.asked += 1
        self.send_response(503 if Handler.asked < 3 else 200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What real.sh leaves, as far as it is read: a model, an adapter on it, records."""
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("real")
    model = make_model("llama", max_position_embeddings=4096)
    model.save_pretrained(folder / "model")
    make_tokenizer("chat").save_pretrained(folder / "model")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    adapted.save_pretrained(folder / "simulator" / "best")
    (folder / "policy" / "model").mkdir(parents=True)
    (folder / "records").mkdir()
    kept = {"golden_answers": ["x"], "query": "a", "label": "useful", "documents": ["x"]}
    rows = [{"question": f"What is a{i}?", **kept} for i in range(30)]
    (folder / "records" / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    parted = {"splits": {"train": 0.6, "validation": 0.2, "test": 0.2}, "seed": 0}
    (folder / "simulator" / "config.yaml").write_text(yaml.safe_dump({"data": {"source": {"init_args": parted}}}))
    (folder / "stages.json").write_text(json.dumps({"options": {"model": str(folder / "model")}}))
    return folder


@pytest.fixture
def trial(made, tmp_path):
    words = ["llama.cpp", "--real", str(made), "--folder", str(tmp_path / "servers"), "--rows", "3"]
    return real_servers.Trial(real_servers.options(words))


def test_a_server_is_waited_for_and_gone_afterwards(tmp_path):
    port = free_port()
    command = [sys.executable, "-c", SLOW_START, str(port)]
    with real_servers.serving(command, port, tmp_path / "log") as server:
        assert server.ready(30) > 0.5  # Twice it was not ready.
    assert server.process.poll() is not None
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(server.address, timeout=2)


def test_a_server_that_dies_is_said_with_its_log(tmp_path):
    with (
        real_servers.serving([sys.executable, "-c", "raise SystemExit(3)"], 1, tmp_path / "log") as server,
        pytest.raises(SystemExit, match=r"the server ended with 3; see .*log"),
    ):
        server.ready(30)


def test_tokens_of_a_server_are_ours_or_named(made, trial):
    adapter = made / "simulator" / "best"
    ours = real_servers.Ours(str(made / "model"), adapter)
    written, wrong = [], []

    def answer(asked):
        assert asked.body["model"] == "simulator"
        ids = ours.written(asked.body["prompt"], asked.body["max_tokens"])
        written.append(len(ids))
        if wrong:
            ids[2] = (ids[2] + 7) % 50 + 10
        return {"choices": [{"token_ids": ids}]}

    server = FaultServer(answer)
    served = real_servers.Served(None, server.url(""), trial.log)
    said = trial.same(served, "simulator", adapter)
    assert min(written) > 2
    assert said == f"{sum(written)} tokens of 3 prompts are equal to ours, 0 prompts go apart at a tie"
    wrong.append(True)
    first = re.escape(repr(trial.first()[0].example.question))
    with pytest.raises(SystemExit, match=rf"token 2 of {first} differs by"):
        trial.same(served, "simulator", adapter)
    server.close()


def test_what_is_asked_was_not_taught(made, trial):
    parts = {"train": 0.6, "validation": 0.2, "test": 0.2}
    taught = FileSource(path=str(made / "records" / "records.jsonl"), splits=parts).search_records("train", 30)
    asked = {record.example.question for record in trial.first()}
    assert len(asked) == 3
    assert not asked & {record.example.question for record in taught}


def test_what_real_sh_has_not_made_and_servers_that_are_none_are_named(tmp_path, capsys):
    with pytest.raises(SystemExit, match=r"--real: .*stages\.json.*; bash scripts/real\.sh --share 0\.02 makes them"):
        real_servers.main(["--real", str(tmp_path / "none"), "--folder", str(tmp_path / "servers")])
    with pytest.raises(SystemExit):
        real_servers.main(["ollama"])
    assert "expected llama.cpp or vllm; got ollama" in capsys.readouterr().err
