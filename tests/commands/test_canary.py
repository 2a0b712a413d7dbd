"""A key that is set through the environment is in nothing that the commands leave or say."""

import logging
from pathlib import Path

import pytest

from support.commandline import POLICY, ROOT, SMALL_RL, TEST
from support.modelserver import chat, completion
from support.providers import CANARY
from zs_lightning.cli import main
from zs_lightning.search import ServedSimulatorSearch

pytestmark = pytest.mark.usefixtures("environment")

BUILD = f"--config={ROOT / 'configs' / 'miniature' / 'build_simulator_data.yaml'}"


def echoing(asked):
    """A model that repeats what it was sent with the request, key and all."""
    heard = f"{asked.headers.get('authorization')} and {CANARY.replace('/', '&#47;')}."
    if "messages" not in asked.body:
        return completion(f"Doc 1: {heard}")
    said = asked.body["messages"]
    if "Verdict:" in said[-1]["content"]:
        return chat("Useful")
    question = said[0]["content"].split("<question>")[-1].split("?")[0]
    return chat(f"{heard} <search> {question} " if len(said) == 1 else f"<answer> {heard} ")


def test_no_command_leaves_or_shows_a_key(serve, monkeypatch, capfd, caplog, figure):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("CANARY_KEY", CANARY)
    server = serve(echoing)

    def searching(group):
        options = {"hosts": server.url(""), "prompts": "miniature", "api_key_env": "CANARY_KEY", "http.cache": "kept/answers"}
        return [f"--{group}=ServedSimulatorSearch", *(f"--{group}.{name}={value}" for name, value in options.items())]

    trainer = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    main(["fit", POLICY, *SMALL_RL, *trainer, "--data.steps=1", "--run.folder=run", *searching("model.search")])
    tested = ["--data.test_rows=2", "--model.decodings=[sampled]", "--ckpt_path=run", "--run.folder=tested", "--model.lora.r=2"]
    main(["test", TEST, *trainer, *tested, *searching("model.search")])
    main(["ask", "--ckpt=run", "--html=answer.html", "Who?", *searching("search")])
    main(["export", "--ckpt=run", "--out=exported", "--results=tested"])
    main(["measure-simulator", "run", "--rows=2", "--out=measured", *searching("search")])
    served = [f"--served.hosts={server.url('')}", "--served.api_key_env=CANARY_KEY", "--served.http.cache=kept/paid"]
    small = ["--batch_size=2", "--group_size=1", "--kinds=[]", "--rollout.max_turns=2", "--pairs=1", "--judge=both"]
    main(["build-simulator-data", BUILD, *served, *small, "--served.api=chat", "--served.model=tiny", "--folder=data"])
    assert sum(asked.headers.get("authorization") == f"Bearer {CANARY}" for asked in server.asked) > 6
    files = list(filter(Path.is_file, Path().rglob("*")))
    assert {Path(name) for name in ("kept/answers", "kept/paid", "run/last.ckpt", "answer.html", "data/build.json")} <= set(
        files
    )
    said = "".join(capfd.readouterr()) + caplog.text
    hits = [b"canary-4f9a0c77" in text for text in (said.encode(), *(path.read_bytes() for path in files))]
    held = f"{sum(hits)} hits in {len(hits)} files and outputs of fit, test, ask, export, measure and build"
    figure(21, "a key that a served model repeats", held)
    assert not any(hits)
    assert any(b"[key]" in path.read_bytes() for path in files), "documents that held it are there"


@pytest.mark.parametrize(
    "name", ["api_key", "key", "X-API-Key", "Authorization", "hf_token", "token", "client_secret", "password"]
)
def test_a_key_does_not_belong_into_options(name):
    for options in ({name: CANARY}, {"extra": {"headers": {name: CANARY}}}, {"more": [{name: CANARY}]}):
        with pytest.raises(ValueError, match=rf"search\.options: {name} seems to be a key, .*search\.api_key_env") as error:
            ServedSimulatorSearch(options=options)
        assert CANARY not in str(error.value)


def test_other_options_are_what_they_are():
    names = ("max_tokens", "min_tokens", "stop_token_ids", "skip_special_tokens", "prompt_cache_key", "keyword", "author")
    assert ServedSimulatorSearch(options=dict.fromkeys(names, 1))
