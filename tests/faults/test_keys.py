"""Row 21: a key of the environment is in no file that a run leaves, no log and no cache, though servers send it back. What
commands leave that ask a served model is tested in tests/commands/test_canary.py."""

import logging
import threading
from pathlib import Path

import pytest

from support.commandline import POLICY, SMALL_RL, TEST, failure
from support.faultserver import Reply
from support.providers import CANARY, ENGINES, KEYED
from zs_lightning.cli import main
from zs_lightning.search import remote

pytestmark = pytest.mark.usefixtures("environment")

SPELLED = [CANARY, CANARY.replace("/", "\\/"), CANARY.replace("/", "%2F").replace("+", "%2b"), CANARY.replace("/", "&#47;")]
QUIET = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
# By itself the policy may search for nothing.
SHORT = ["--model.rollout.max_new_tokens=12", "--model.lora.r=2", "--model.rollout.retrieve_first=true"]


class Echo:
    """A provider that sends the key back: in documents, and, when it is told so, in errors of every kind."""

    def __init__(self, answer):
        self.answer, self.fails, self.count = answer, threading.Event(), 0

    def __call__(self, asked):
        self.count += 1
        if not self.fails.is_set():
            return spoken(self.answer(asked))
        status = (401, 403, 500, 429, 301, 200, 404)[self.count % 7]
        body = f"{{broken {SPELLED[self.count % 4]}".encode()
        return Reply(body, status, headers={"Location": f"http://h/{CANARY}?k={CANARY}", "X-Echo": CANARY})


def spoken(value):
    if isinstance(value, dict):
        return {name: spoken(item) for name, item in value.items()}
    if isinstance(value, list):
        return [spoken(item) for item in value]
    return f"{value} {CANARY}" if isinstance(value, str) and value.startswith(("About ", "a ")) else value


def hits(said):
    """Files and outputs that hold the key; and whether some hold what stands in its place."""
    texts = {str(path): path.read_bytes() for path in Path().rglob("*") if path.is_file()} | {"said": said.encode()}
    # Also as it is in UTF-16, and the half that is left where a text was cut.
    cut = [CANARY[:15].encode(), CANARY[:15].encode("utf-16-le"), CANARY[-10:].encode()]
    return [name for name, text in texts.items() if any(part in text for part in cut)], any(
        b"[key]" in t for t in texts.values()
    )


def test_no_provider_gets_a_key_into_what_a_run_leaves(serve, monkeypatch, capfd, caplog, times, figure):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setattr(remote, "BACKOFF", 0.01)
    found, said = [], ""
    chosen = list(KEYED.items())[: times(4)]
    for name, engine in chosen:
        monkeypatch.setenv(name, CANARY)
        echo = Echo(ENGINES[engine])
        server = serve(echo)
        options = {"endpoint": server.url("/x"), "http.cache": f"kept/{name}"}

        def searching(group, engine=engine, options=options):
            return [f"--{group}={engine.__name__}", *(f"--{group}.{key}={value}" for key, value in options.items())]

        run, tested = f"--run.folder={name}/run", f"--run.folder={name}/tested"
        main(["fit", POLICY, *SMALL_RL, *QUIET, *SHORT, "--data.steps=1", run, *searching("model.search")])
        test = ["test", TEST, *QUIET, *SHORT, "--data.test_rows=2", f"--ckpt_path={name}/run", *searching("model.search")]
        main([*test, tested])
        main(["ask", f"--ckpt={name}/run", f"--html={name}.html", "Who wrote it?", *searching("search")])
        assert "[key]" in Path(f"{name}/tested/trajectories/test.jsonl").read_text(), "it was found"
        echo.fails.set()
        code, last = failure(capfd, *test, "--model.search.http.mode=record", f"--run.folder={name}/failed")
        assert code, last
        said += last
        assert CANARY in str([(asked.headers, asked.params) for asked in server.asked]), "it was sent"
    said += "".join(capfd.readouterr()) + caplog.text
    where, hidden = hits(said)
    found += where
    figure(
        21,
        "a key that providers send back, in results and in errors",
        f"{len(found)} hits, {len(chosen)} providers, 4 commands",
    )
    assert (found, hidden) == ([], True)
