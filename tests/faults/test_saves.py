"""kill -9 inside of a save, between any two of its calls and with a file half written; the temporary files of libraries lie
on another disk."""

import os
import random
import shutil
import signal
import tempfile
from pathlib import Path

import pytest

from support.killed import Run, differing, fit, spread


@pytest.fixture
def elsewhere(tmp_path):
    """A folder on another file system than the runs'."""
    if os.stat("/dev/shm").st_dev == os.stat(tmp_path).st_dev:
        pytest.skip("the folder of the tests is in memory too")
    folder = Path(tempfile.mkdtemp(dir="/dev/shm"))
    yield folder
    shutil.rmtree(folder)


def test_no_kill_inside_of_a_save_leaves_less_than_a_checkpoint(warm, times, figure, elsewhere, tmp_path):
    config = fit("SimulatorSFT", {"class_path": "support.killhooks.KillInSave"}) | {"run": {"save_every": 1, "folder": "run"}}
    environment = {"TMPDIR": str(elsewhere), "KILL_AT": "0"}
    run = Run(tmp_path / "whole", config, environment)
    whole, moments = run.end(warm), int((run.home / "moments").read_text())
    count, rng = times(50, default=2), random.Random("second kills")
    readable, wrong, left = 0, [], []
    for i, moment in enumerate(spread(moments, count, "saves")):
        run = Run(tmp_path / str(i), config, environment)
        assert run.live(warm, KILL_AT=str(1 + int(moment)))[0] == -signal.SIGKILL
        before = run.checked()
        # Once more, as it goes on: what it finds is swept, and may be moved.
        run.live(warm, KILL_AT=str(rng.randint(1, moments // 2))) if i % 2 else None
        readable += run.checked() >= before
        differs = differing(run.end(warm), whole)
        wrong += [(i, moment, differs)] if differs else []
        left += [*run.left(), *elsewhere.iterdir()]
    held = f"{count} killed, at as many of {moments} moments: {count - readable} without the checkpoint that they had"
    figure(2, "kill -9 inside of a save", f"{held}, {count - len(wrong)} go on equal, {len(left)} temporary files left")
    assert readable == count
    assert not wrong
    assert not left
