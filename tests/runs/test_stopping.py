"""Signals, in processes of their own: a forked one where nothing of a run is needed, commands where it is."""

import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support.commandline import POLICY, SMALL_RL
from support.ports import free_port
from support.warm import running
from zs_lightning.cli import main
from zs_lightning.errors import RunError
from zs_lightning.runs import stopping
from zs_lightning.runs.stopping import SIGNALS, STOPPING

ROOT = Path(__file__).parents[2]
TERM, INT, HUP, USR1 = signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1


class Child:
    """A forked process that runs a function as the command line runs a command; what it writes is read by `text`."""

    def __init__(self, work, signals=SIGNALS, before=lambda: None):
        self.reader, writer = os.pipe()
        self.pid = os.fork()
        if self.pid:
            os.close(writer)
            return
        try:
            os.dup2(writer, 1)
            os.dup2(writer, 2)
            before()
            with STOPPING.watching(signals, process=False):
                os.write(1, b"ready\n")
                work()
            os.write(1, b"done\n")
            os._exit(0)
        except KeyboardInterrupt as stopped:
            os.write(1, f"{stopped}\n".encode())
            os._exit(getattr(stopped, "code", 99))
        finally:
            os._exit(98)

    def wait_for(self, text):
        said = b""
        while text.encode() not in said:
            assert select.select([self.reader], [], [], 20)[0], said
            more = os.read(self.reader, 4096)
            assert more, said
            said += more
        return self

    def deaf(self):
        return self.in_its_call("deaf")

    def in_its_call(self, text):
        """It is in its long call, not just before it, where a signal would wait for its end: asleep, several times
        running."""
        self.wait_for(text)
        asleep = 0
        while asleep < 5:
            state = Path(f"/proc/{self.pid}/stat").read_text().rsplit(") ", 1)[1][0]
            assert state != "Z", "it has ended"
            asleep = asleep + 1 if state == "S" else 0
            time.sleep(0.01)
        return self

    def send(self, *numbers, pause=0.0):
        # Not behind them: who sends may be kept waiting as well.
        self.sent = time.monotonic()
        for number in numbers:
            os.kill(self.pid, number)
            time.sleep(pause)
        return self

    def end(self):
        """Exit code, seconds from the last `send` until then, and what it said."""
        said = b""
        while more := os.read(self.reader, 4096):
            said += more
        os.close(self.reader)
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return code, time.monotonic() - self.sent, said.decode()


def hears():
    time.sleep(30)


def hears_nothing(save=lambda: Path("last.ckpt")):
    """As inside of one long call of a library: no handler runs in this thread."""

    def work():
        STOPPING.save = save
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        os.write(1, b"deaf\n")
        time.sleep(30)

    return work


@pytest.mark.parametrize(("number", "said"), [(TERM, "stopped by SIGTERM"), (INT, "interrupted"), (HUP, "stopped by SIGHUP")])
def test_a_thread_that_hears_is_stopped_at_once(number, said):
    code, seconds, text = Child(hears).in_its_call("ready").send(number).end()
    assert (code, text) == (128 + number, f"{said}\n")
    assert seconds < 3


def test_a_long_call_delays_nothing(monkeypatch):
    monkeypatch.setattr(stopping, "PATIENCE", 0.3)
    code, seconds, text = Child(hears_nothing()).deaf().send(TERM).end()
    assert (code, text) == (143, "error: stopped by SIGTERM; fit goes on with --ckpt_path last.ckpt\n")
    assert 0.1 < seconds < 3


def test_a_save_that_fails_is_told(monkeypatch):
    def fails():
        raise RunError("step 7 was not saved: the disk is full")

    monkeypatch.setattr(stopping, "PATIENCE", 0.1)
    code, _, text = Child(hears_nothing(fails)).deaf().send(INT).end()
    assert (code, text) == (130, "error: interrupted; step 7 was not saved: the disk is full\n")


def test_a_second_signal_leaves_at_once_and_an_echo_is_no_second():
    code, seconds, text = Child(hears_nothing()).deaf().send(TERM, HUP, pause=0.1).end()
    assert (code, "goes on" in text) == (143, True), "a launcher passes on what the terminal has sent already"
    assert seconds > 2
    child = Child(hears_nothing()).deaf()
    child.send(INT, pause=stopping.ECHO + 1.0)  # It may hear of the first one late.
    assert child.send(INT).end()[::2] == (130, "")


def slow_save():
    os.write(1, b"saving\n")
    time.sleep(1.0)
    return Path("last.ckpt")


def test_launchers_do_not_cut_a_save_and_a_second_of_the_same_does(monkeypatch):
    """When one rank leaves, torchrun and srun send SIGTERM to the others."""
    monkeypatch.setattr(stopping, "PATIENCE", 0.1)
    for first, *later in ((USR1, TERM, HUP), (TERM, TERM)):
        child = Child(hears_nothing(slow_save)).deaf()
        child.send(first).wait_for("saving")
        time.sleep(stopping.ECHO)
        code, _, text = child.send(*later).end()
        assert (code, "goes on" in text) == (128 + first, True)
    monkeypatch.setattr(stopping, "AGAIN", 0.5)
    for first, second in ((TERM, INT), (TERM, TERM), (INT, INT)):
        child = Child(hears_nothing(lambda: slow_save() and time.sleep(30))).deaf()
        child.send(first).wait_for("saving")
        time.sleep(0.6)
        code, seconds, text = child.send(second).end()
        assert (code, text) == (128 + first, "")
        assert seconds < 3


def test_who_hears_and_does_not_end_is_ended(monkeypatch):
    """A command that catches what stops it, or whose closing hangs."""

    def work():
        try:
            os.write(1, b"begun\n")
            time.sleep(30)
        except KeyboardInterrupt:
            os.write(1, b"heard\n")
        time.sleep(30)

    monkeypatch.setattr(stopping, "PATIENCE", 0.2)
    monkeypatch.setattr(stopping, "TO_END", 0.2)
    code, seconds, text = Child(work).wait_for("begun").send(TERM).end()
    assert (code, text) == (143, "heard\nerror: stopped by SIGTERM\n")
    assert 0.2 < seconds < 4


def test_what_was_switched_off_stays_off():
    """As nohup does it."""
    child = Child(lambda: time.sleep(0.5), before=lambda: signal.signal(HUP, signal.SIG_IGN)).wait_for("ready")
    assert child.send(HUP).end()[::2] == (0, "done\n")


def test_handlers_are_those_of_before_afterwards():
    before = [signal.getsignal(number) for number in SIGNALS]
    with STOPPING.watching(SIGNALS, process=False):
        assert signal.getsignal(TERM) == STOPPING._raise
    assert [signal.getsignal(number) for number in SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A scontrol that writes down what it is asked for."""
    script = tmp_path / "bin" / "scontrol"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    return tmp_path / "asked"


@pytest.mark.parametrize("work", [hears, hears_nothing()])
def test_the_warning_of_slurm_has_the_job_begin_again(work, slurm, monkeypatch):
    def told():
        try:
            os.write(1, b"begun\n")
            work()
        finally:
            STOPPING.finish()  # As the command line does it.

    monkeypatch.setattr(stopping, "PATIENCE", 0.1)
    code, _, text = Child(told).wait_for("begun").send(USR1, pause=0.3).end()
    assert (code, slurm.read_text()) == (138, "requeue 42\n")
    assert "Slurm job 42 will begin again\n" in text


def test_only_the_first_process_asks_and_only_after_the_warning(slurm, monkeypatch):
    monkeypatch.setattr(stopping, "PATIENCE", 0.1)
    assert Child(hears_nothing()).deaf().send(TERM).end()[0] == 143
    monkeypatch.setenv("SLURM_PROCID", "1")
    assert Child(hears_nothing()).deaf().send(USR1).end()[0] == 138
    assert not slurm.exists()
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "40")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    child = Child(hears_nothing()).deaf()
    child.send(USR1).end()
    assert slurm.read_text() == "requeue 40_3\n"


# ------------------------------------------------------------------------------------------- commands


def fit(folder, *options):
    sizes = ["--data.batch_size=16", "--model.group_size=8", "--data.steps=3", "--model.search=BM25Search"]
    return [sys.executable, "-m", "zs_lightning", "fit", POLICY, *SMALL_RL, f"--run.folder={folder}", *sizes, *options]


def until(condition, process=None):
    """For ten minutes: without what is awaited the test would fail, and not hang."""
    deadline = time.monotonic() + 600
    while not condition():
        assert time.monotonic() < deadline
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.05)


def test_a_closed_terminal_loses_nothing(tmp_path):
    """The terminal is gone when the bar and the sentence would be written."""
    pid, terminal = pty.fork()
    if not pid:
        os.chdir(ROOT)
        command = fit(tmp_path / "run")
        os.execv(command[0], command)
    while not (tmp_path / "run" / "last.ckpt").is_file():
        if select.select([terminal], [], [], 0.1)[0]:
            os.read(terminal, 65536)
    time.sleep(0.5)
    os.close(terminal)
    sent = time.monotonic()
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code == 129
    assert time.monotonic() - sent < 5
    assert (tmp_path / "run" / "last.ckpt").is_file()


def test_every_rank_ends(tmp_path):
    """The first starts the second; the signal reaches the first alone."""
    command = fit(tmp_path / "run", "--trainer.devices=2", "--trainer.accelerator=cpu")
    place = os.environ | {"MASTER_PORT": str(free_port())}
    process = subprocess.Popen(command, cwd=ROOT, env=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until((tmp_path / "run" / "trajectories").is_dir, process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(TERM)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 143, err
    assert "error: stopped by SIGTERM" in err
    assert children
    until(lambda: not any(map(running, children)))


def test_a_job_of_slurm_begins_again_and_lightning_saves_nothing_of_its_own(tmp_path, slurm, warm):
    job = {"SLURM_NTASKS": "1", "SLURM_JOB_NAME": "night", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_PROCID": "0"}
    job |= {"SLURM_JOB_ID": "42", "PATH": os.environ["PATH"]}
    command = warm.begin(fit(tmp_path / "run")[3:], tmp_path, **job)
    until(lambda: (tmp_path / "run" / "last.ckpt").is_file() or not command.runs())
    command.send(USR1)
    code, _, err = command.end()
    assert code == 138, err
    assert "error: stopped by SIGUSR1; fit goes on with --ckpt_path" in err
    assert slurm.read_text() == "requeue 42\n"
    assert not list((tmp_path / "run").glob("hpc_ckpt*"))


def test_the_served_engine_ends_with_the_code(tmp_path, warm):
    """Ctrl-C is how it is ended otherwise, and then all is well."""
    (tmp_path / "notes.txt").write_text("red harbor")
    command = warm.begin(["serve", "--port=0", "--search=BM25Search", f"--search.corpus={tmp_path}"], tmp_path)
    said = tmp_path / "said.out"
    until(lambda: (said.is_file() and "passages at" in said.read_text()) or not command.runs())
    command.send(TERM)
    code, out, _ = command.end()
    assert (code, out.endswith("\nstopped\n")) == (143, True)


def test_names_of_files_do_not_steer_the_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"quest\\u001b]0;owned\\u0007ion": "a", "answer": "b"}\n')
    options = ["--model.search=BM25Search", "--data.source=FileSource", f"--data.source.path={rows}"]
    with pytest.raises(SystemExit):
        main(["fit", POLICY, *options, f"--run.folder={tmp_path / 'run'}"])
    said = capsys.readouterr()
    assert "\x1b" not in said.err + said.out
    assert "quest␛]0;owned␇ion" in said.err
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
