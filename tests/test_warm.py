"""The process that forks the commands of tests."""

import os
import signal

import pytest

from support import warm as warmth

MISSING = ["fit", "--config=missing.yaml"]


def test_a_command_that_nobody_waits_for_is_ended_by_the_next(warm, tmp_path):
    for part in ("live", "done"):
        (tmp_path / part).mkdir()
        former = warm.begin(["serve", "--port=0", f"--search.corpus={tmp_path}"], tmp_path / part).child
        while part == "done" and warm.runs():
            warm.send(signal.SIGKILL)
        command = warm.begin(MISSING, tmp_path)
        assert (command.child > 1, command.child != former) == (True, True)
        assert command.end()[0] == 2
        with pytest.raises(ProcessLookupError):
            os.killpg(former, 0)
        command.send(signal.SIGKILL)


def test_a_command_without_an_end_is_an_error(warm, tmp_path, monkeypatch):
    warm.begin(["serve", "--port=0", "--search=BM25Search", f"--search.corpus={tmp_path}"], tmp_path)
    monkeypatch.setattr(warmth, "MOST", 0)
    with pytest.raises(AssertionError, match="nothing for 0 s"):
        warm.end()
