"""A run goes on in other ways than it began: with other micro-batches or slots, an engine that moved, more or fewer ranks."""

import shutil
import time

import pytest

from support.killed import Run, alive, answered, fit, judged, server
from support.warm import second_rank


def two_ranks(run):
    """Options and environment of two processes on this machine."""
    options = ("--trainer.devices=2", "--trainer.accelerator=cpu")
    return options, second_rank(run.home)


def said(run, warm, *options, code=0, **environment):
    """What a command writes; none of its processes is there soon after."""
    command = run.begin(warm, *options, **environment)
    ended, out, err = command.end()
    assert ended == code, err[-3000:]
    deadline = time.monotonic() + 60
    while alive(command.child):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return out + err


STOP = ("--trainer.callbacks+=support.commandline.StopAfterOneStep", "--trainer.callbacks.step=2")


def config(**search):
    return fit("PolicyRL", {"class_path": "NoiseAnnealing"}, estimator="reinforce", lora={"r": 2}, **search)


@pytest.fixture(scope="module")
def begun(warm, tmp_path_factory):
    """Runs of one process and of two that stopped after two of their three steps, and the whole one."""
    runs = {name: Run(tmp_path_factory.mktemp("ways") / name, config()) for name in ("whole", "1", "2")}
    said(runs["whole"], warm)
    said(runs["1"], warm, *STOP, code=130)
    options, environment = two_ranks(runs["2"])
    said(runs["2"], warm, *STOP, *options, code=130, **environment)
    assert (runs["1"].done(), runs["2"].done()) == (2, 2)
    return runs


def copy(run, home):
    other = Run(home, run.config)
    shutil.copytree(run.folder, other.folder)
    return other


ROUNDED = "equal up to rounding, not bit for bit: model."
RANKS = "the checkpoint is of %d ranks, this run has %d: sums are added up in another order"


@pytest.mark.parametrize(
    ("name", "way", "sentence", "verdicts"),
    [
        ("1", "--model.micro_batch_tokens=300", f"{ROUNDED}micro_batch_tokens was ", ("equal", "rounded")),
        ("1", "--model.rollout.slots=1", f"{ROUNDED}rollout.slots was ", ("equal", "rounded")),
        ("1", "--model.checkpointing=true", "", ("equal",)),
        ("1", "two ranks in place of one", RANKS % (1, 2), ("equal", "rounded")),
        ("2", "one rank in place of two", RANKS % (2, 1), ("equal", "rounded")),
    ],
)
def test_a_run_goes_on_in_another_way(name, way, sentence, verdicts, begun, warm, figure, tmp_path):
    run, options, environment = copy(begun[name], tmp_path / "run"), [way], {}
    if way.startswith("two"):
        options, environment = two_ranks(run)
    elif way.startswith("one"):
        options = []
    text = said(run, warm, *options, **environment)
    verdict = judged(run.result(), begun["whole"].result())
    told = "says what is not exact" if sentence and sentence in text else "says nothing of it"
    figure(18, f"goes on with {way}", f"{verdict}; {told}")
    assert "goes on after 2 of 3 steps" in text
    assert sentence in text
    assert bool(sentence) == ("rounding" in text or "ranks" in text)
    assert verdict in verdicts
    assert not run.left()


def test_a_run_goes_on_with_an_engine_that_moved(warm, serve, full, figure, tmp_path):
    if not full:
        pytest.skip("three runs, with --full")
    whole, run = (Run(tmp_path / name, config(search=server(serve(answered).url()))) for name in ("whole", "run"))
    said(whole, warm)
    said(run, warm, *STOP, code=130)
    text = said(run, warm, f"--model.search.endpoint={serve(answered).url()}")
    # A server answers in any order, which decides what is computed together.
    verdict = judged(run.result(), whole.result())
    figure(18, "goes on with an engine that moved", f"{verdict}, as two runs that nothing stops are with a server")
    assert "goes on after 2 of 3 steps" in text
    assert verdict in ("equal", "rounded")


def test_machines_that_do_not_share_the_folder_end(begun, warm, tmp_path):
    """The first one sees the checkpoint, the second does not."""
    run, other = copy(begun["1"], tmp_path / "first"), Run(tmp_path / "second", begun["1"].config)
    options, environment = two_ranks(other)
    text = said(run, warm, *options, code=1, **environment)
    assert "error: run.folder: not every machine sees the same run; share it" in text
    assert "error: another process of this run has ended" in text
    assert run.checked() == 1
