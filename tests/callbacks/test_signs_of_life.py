"""What is shown of a step while it goes on, what is said of one that takes long, and how one that hangs is ended."""

import errno
import io
import threading
import time
from types import SimpleNamespace

import pytest
from rich.console import Console

from zs_lightning.callbacks import signs_of_life
from zs_lightning.callbacks.progress import StepProgress
from zs_lightning.callbacks.run_files import RunFiles
from zs_lightning.callbacks.signs_of_life import SignsOfLife
from zs_lightning.modules import phases as room
from zs_lightning.modules.phases import Phases
from zs_lightning.runs.stopping import STOPPING

WATCH = "signs of life"
"""The thread that watches."""


class Clock:
    """Time that passes when the test says so: however busy the machine is, nobody is late."""

    def __init__(self):
        self.now, self.looks = 0.0, 0

    def look(self):
        """The time, for the thread that watches, which asks for it once in each look."""
        self.looks += threading.current_thread().name == WATCH
        return self.now

    def passes(self, seconds):
        """Waits for the second look from then on: in the first one all was done that the new time brings."""
        self.now += seconds
        seen, deadline = self.looks, time.monotonic() + 60
        while self.looks < seen + 2:
            assert time.monotonic() < deadline
            time.sleep(0.001)


CLOCK = Clock()


def run(callback, module, seconds, bar=None, work=lambda: None, hook="on_train_start"):
    """The callback watches for so many seconds, and looks once in each ten at least."""
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_idx=4))
    strategy = SimpleNamespace(launcher=None)
    state = SimpleNamespace(fn="fit")
    trainer = SimpleNamespace(
        progress_bar_callback=bar, is_global_zero=True, training=True, fit_loop=loop, strategy=strategy, state=state
    )
    before = set(threading.enumerate())
    getattr(callback, hook)(trainer, module)
    (watch,) = set(threading.enumerate()) - before
    for _ in range(seconds // 10):
        work()
        CLOCK.passes(10)
    callback.teardown(trainer, module, "fit")
    watch.join(60)
    assert not watch.is_alive()


@pytest.fixture
def watched(tmp_path, monkeypatch):
    monkeypatch.setattr(signs_of_life, "EVERY", 0.001)
    monkeypatch.setattr(signs_of_life, "time", SimpleNamespace(monotonic=CLOCK.look))
    monkeypatch.setattr(room, "time", SimpleNamespace(monotonic=lambda: CLOCK.now))
    monkeypatch.setattr(STOPPING, "install", lambda: None)
    return SignsOfLife(RunFiles(str(tmp_path))), SimpleNamespace(phases=Phases())


def test_without_a_terminal_a_line_a_minute(watched, capsys):
    callback, module = watched
    module.phases("generate", 3, 8)
    run(callback, module, 200, StepProgress())
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("step 5: generate 3/8, ")
    run(callback, module, 100)
    assert capsys.readouterr().out == "", "no bar, no lines"


def test_a_phase_that_takes_ten_times_its_usual_time_is_named_once(watched, caplog):
    callback, module = watched
    module.phases.took = {"update": [1.0, 4.0, 90.0], "generate": [100.0]}
    module.phases("generate")
    run(callback, module, 990)
    assert caplog.messages == []
    module.phases("update")
    run(callback, module, 100)
    assert caplog.messages == ["update has taken 40 seconds so far, where 4.0 are usual"]


def test_what_takes_ten_times_nothing_is_not_named(watched, caplog):
    callback, module = watched
    module.phases.took = {"score": [0.0001]}
    module.phases("score")
    run(callback, module, 20)
    assert caplog.messages == []


def hang(watched, monkeypatch, moves, bar=None, hook="on_train_start"):
    callback, module = watched
    left = []
    monkeypatch.setattr(STOPPING, "leave", lambda *said: left.append(said))

    def work():
        module.phases("generate", 0, 8, int(CLOCK.now) if moves else 0)

    run(callback, module, 1860, bar, work, hook)
    return left


def test_a_step_that_hangs_is_ended_with_the_stacks(watched, monkeypatch, tmp_path):
    stuck = threading.Event()
    # Else it would outlive a test that fails.
    thread = threading.Thread(target=stuck.wait, daemon=True)
    thread.start()
    (code, said), *_ = hang(watched, monkeypatch, moves=False)
    stuck.set()
    thread.join()
    assert code == 1
    assert said == f"generate has not moved for 30 minutes; where all threads are stands in {tmp_path / 'stacks.txt'}"
    stacks = (tmp_path / "stacks.txt").read_text()
    assert "in wait" in stacks
    assert "test_signs_of_life.py" in stacks


@pytest.mark.parametrize("hook", ["on_validation_start", "on_test_start"])
def test_a_validation_and_a_test_are_watched_too(hook, watched, monkeypatch):
    assert hang(watched, monkeypatch, moves=False, hook=hook)[0][1].startswith("generate has not moved for 30 minutes")


def test_a_full_disk_neither_ends_the_watch_nor_keeps_the_run(watched, monkeypatch, tmp_path):
    (tmp_path / "stacks.txt").mkdir()
    told = []

    def full(*args, **options):
        told.append(args)
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(signs_of_life, "print", full, raising=False)
    assert hang(watched, monkeypatch, moves=False, bar=StepProgress())[0] == (1, "generate has not moved for 30 minutes")
    assert told


def test_reading_adds_no_names():
    """The main thread goes through them."""
    phases = Phases()
    assert phases.seconds() < 1
    phases("score", 1, 2)
    phases("update", 1, 2)
    phases.tokens = 9
    phases.spent.pop("update")
    before = dict(phases.spent)
    assert phases.line().startswith("update 1/2, 9 tokens/s")
    assert phases.spent == before


def test_a_step_that_moves_or_is_usually_as_long_does_not_hang(watched, monkeypatch):
    assert hang(watched, monkeypatch, moves=True) == []
    watched[1].phases.took = {"generate": [93.0]}
    assert hang(watched, monkeypatch, moves=False) == [], "less than twenty times its usual time"


def test_metrics_and_phase_stand_below_the_bar_on_80_columns():
    """Long numbers, with the metrics of a policy."""
    bar, phases = StepProgress(), Phases()
    bar._init_progress(SimpleNamespace(lightning_module=SimpleNamespace(phases=phases)))
    bar.progress.add_task("fit", total=1000)
    bar._metric_component.update({"reward": 0.6314, "noise": 0.21, "val/em": 0.625, "real/em": 0.75})
    phases("generate", 1234, 1280, 0)
    phases.since -= 12_345.0
    phases("generate", 1234, 1280, 98_765_432)

    def shown():
        file = io.StringIO()
        console = Console(file=file, width=80, force_terminal=True, color_system=None)
        console.print(*bar.progress.get_renderables())
        return file.getvalue().rstrip().splitlines()

    metrics = "    reward: 0.631 noise: 0.210 val/em: 0.625 real/em: 0.750"
    assert shown()[1:] == [metrics, "    generate 1234/1280, 8,000 tokens/s, 460 s left"]
    phases.end()
    assert shown()[1:] == [metrics]
    bar._stop_progress()
