"""Ctrl-C in the middle of a rollout, in a process of its own."""

import json
import signal
import time

import pytest

from support.commandline import POLICY, SMALL_RL
from support.faultserver import Reply


@pytest.mark.parametrize("waiting", [False, True])
def test_a_rollout_ends_at_once(waiting, serve, warm, tmp_path):
    """While the policy writes, and while it waits for a server that answers its first question and no other."""
    server = serve(
        lambda asked: {"result": [[{"document": {"contents": "text"}}]]} if len(server.asked) < 2 else Reply({}, delay=60)
    )
    engine = ["--model.search=RetrieveSearch", f"--model.search.endpoint={server.url()}"]
    # Too many rows for the rollout to end by itself before it is stopped.
    sizes = ["--data.batch_size=32", "--model.group_size=8", "--trainer.callbacks+=support.killhooks.Rolling"]
    arguments = ["fit", POLICY, *SMALL_RL, "--run.folder=run", *(engine if waiting else ["--model.search=BM25Search"])]
    command = warm.begin([*arguments, *sizes], tmp_path)
    deadline = time.monotonic() + 600
    while command.runs() and time.monotonic() < deadline:
        if len(server.asked) >= 2 if waiting else (tmp_path / "rolling").exists():
            break
        time.sleep(0.02)
    time.sleep(0.3)
    sent = time.monotonic()
    command.send(signal.SIGINT)
    code, _, err = command.end()
    assert code == 130, err
    assert "error: interrupted" in err
    assert (tmp_path / "rolling").exists()
    assert len(server.asked) >= 2 * waiting
    end = json.loads((tmp_path / "end").read_text())
    assert end["left"] == []
    # A second, but for a machine with more to do.
    assert end["at"] - sent < 3, "seconds from Ctrl-C to the end of the command"
