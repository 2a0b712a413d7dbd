"""Ctrl-C in the middle of a rollout, in a process of its own."""

import json
import signal
import subprocess
import sys
import time

import pytest

from support.commandline import POLICY, SMALL_RL
from support.faultserver import Reply

CHILD = """
import json, sys, threading, time
from zs_lightning.cli import main
from zs_lightning.rollout import Rollouter

run = Rollouter.run

def told(self, *args, **options):
    print("rolling", flush=True)
    return run(self, *args, **options)

Rollouter.run = told
try:
    main(sys.argv[1:])
finally:
    left = [t.name for t in threading.enumerate() if t is not threading.main_thread() and not t.daemon or "search" in t.name]
    print(json.dumps({"at": time.monotonic(), "left": left}), flush=True)
"""


@pytest.mark.parametrize("waiting", [False, True])
def test_a_rollout_ends_within_a_second(waiting, serve, tmp_path):
    """While the policy writes, and while it waits for a server that answers its first question and no other."""
    server = serve(
        lambda asked: {"result": [[{"document": {"contents": "text"}}]]} if len(server.asked) < 2 else Reply({}, delay=60)
    )
    engine = ["--model.search=RetrieveSearch", f"--model.search.endpoint={server.url()}"]
    # Too many rows for the rollout to end by itself before it is stopped.
    sizes = ["--data.batch_size=32", "--model.group_size=8"]
    arguments = ["fit", POLICY, *SMALL_RL, f"--run.folder={tmp_path}", *(engine if waiting else ["--model.search=BM25Search"])]
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, *arguments, *sizes],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )
    assert child.stdout is not None
    while "rolling" not in (line := child.stdout.readline()):
        assert line, child.stderr.read() if child.stderr else ""
    deadline = time.monotonic() + 30
    while waiting and len(server.asked) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(server.asked) >= 2 * waiting
    time.sleep(0.3)
    sent = time.monotonic()
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=60)
    end = json.loads(out.splitlines()[-1])
    assert child.returncode == 130, err
    assert "error: interrupted" in err
    assert end["left"] == []
    assert end["at"] - sent < 1, "seconds from Ctrl-C to the end of the command"
