"""A user's runs with a simulator that another process serves, as a few lines under a shipped configuration."""

import json
import shutil
import time
from pathlib import Path

import pytest
import yaml

from support.faultserver import searching
from support.modelserver import start_process
from zs_lightning.cli import main
from zs_lightning.configuration.arguments import instantiate, search_options
from zs_lightning.search import SearchEngine, ServedSimulatorSearch

pytestmark = pytest.mark.usefixtures("environment")

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "zs_lightning"
POLICY, TEST = (str(ROOT / "configs" / "miniature" / name) for name in ("policy.yaml", "test.yaml"))
SMALL = ["--model.rollout.max_turns=2", "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]


@pytest.fixture(scope="module")
def process():
    """The address of the shipped base model's server, and the process."""
    server = start_process()
    yield server.stdout.readline().strip(), server
    server.kill()
    server.wait()
    server.stdout.close()


def overlay(file, url, **options):
    """What a user writes under a shipped configuration so that another process simulates, as an option."""
    engine = {"class_path": "zs_lightning.search.ServedSimulatorSearch", "init_args": {"hosts": url, **options}}
    noise = {"class_path": "NoiseAnnealing", "init_args": {"start": 0.0, "end": 1.0}}
    lines = {"model": {"init_args": {"search": engine}}, "trainer": {"callbacks": [noise]}}
    Path(file).write_text(yaml.safe_dump(lines))
    return f"--config={file}"


def lines(file):
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


def test_a_policy_is_trained_and_tested_with_a_simulator_elsewhere_until_it_is_gone(process, capsys):
    url, server = process
    before, there = searching(), overlay("served.yaml", url, model="tiny", max_new_tokens=24)
    options = [*SMALL, "--data.steps=2", "--data.batch_size=6", "--model.group_size=2", "--model.rollout.noise_draw=call"]
    main(["fit", f"--config={POLICY}", there, "--run.folder=trained", "--run.keep_trajectories=12", *options])
    rows = lines("trained/trajectories/train.jsonl")
    assert [row["noise_prob"] for row in rows] == pytest.approx([1 / 3] * 12 + [1.0] * 12)
    turns = [[turn for row in half for turn in row["turns"] if turn["documents"]] for half in (rows[:12], rows[12:])]
    assert 0 < sum(turn["noise"] for turn in turns[0]) < len(turns[0])
    assert all(turn["noise"] for turn in turns[1])
    assert min(map(len, turns)) > 2
    config = yaml.safe_load(Path("trained/config.yaml").read_text())["model"]["init_args"]["search"]["init_args"]
    assert (config["prompts"], config["count"], config["max_new_tokens"]) == ("miniature", 3, 24)
    counted = json.loads(Path("trained/search.json").read_text())
    assert counted["searches"] >= sum(map(len, turns))
    assert counted["calls"] == counted["searches"] - counted["cached"] + 1, "a first result"
    assert counted["failures"] == 0

    there = overlay("test.yaml", [url], prompts="miniature")
    options = [*SMALL, "--data.eval_batch_size=8", "--data.test_rows=8", "--model.decodings=[sampled]"]
    main(["test", f"--config={TEST}", there, "--run.folder=tested", *options])
    assert json.loads(Path("tested/results.json").read_text())["engine"] == "served_simulator"
    assert json.loads(Path("tested/search.json").read_text())["searches"] > 0

    server.kill()
    server.wait()
    begun = time.monotonic()
    assert refused(capsys, overlay("served.yaml", url)).startswith(
        f"error: search: served_simulator cannot be used: {url}/v1/completions: no connection"
    )
    assert time.monotonic() - begun < 20
    assert not searching() - before


def refused(capsys, *options):
    """The sentence with which a run ends before anything is trained."""
    with pytest.raises(SystemExit) as end:
        main(["fit", f"--config={POLICY}", "--run.folder=refused", *SMALL, *options])
    assert end.value.code == 2
    assert not Path("refused/trajectories").exists()
    return capsys.readouterr().err.splitlines()[-1]


def test_an_address_without_a_scheme_is_one_sentence(capsys):
    sentence = "search.hosts: expected an address such as http://127.0.0.1:8000; got 127.0.0.1:8000"
    assert sentence in refused(capsys, overlay("served.yaml", "127.0.0.1:8000"))


def test_a_server_that_is_down_is_reported_before_the_policy_is_loaded(capsys):
    """Which may take minutes. The policy here has no weights at all."""
    shutil.copytree(PACKAGE / "miniature" / "base", "policy", ignore=shutil.ignore_patterns("*.safetensors"))
    there = overlay("served.yaml", "http://127.0.0.1:9")
    assert "http://127.0.0.1:9/v1/completions: no connection" in refused(capsys, there, "--model.model.path=./policy")


@pytest.mark.parametrize("hosts", ["http://a:1", '["http://a:1", "http://b:2"]'])
def test_hosts_are_named_on_the_command_line_too(hosts):
    options = search_options(["--search=ServedSimulatorSearch", f"--search.hosts={hosts}"], [])
    engine = instantiate(SearchEngine, "search", options)
    assert isinstance(engine, ServedSimulatorSearch)
    named = ("http://a:1", "http://b:2")[: 1 + ("b" in hosts)]
    assert engine.addresses == [f"{address}/v1/chat/completions" for address in named]
