"""Signals that end a command: what is saved before, what is said, and the exit code."""

import atexit
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from zs_lightning.errors import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT)
"""SIGUSR1 is what Slurm sends some time before a job's end (`sbatch --signal=USR1@90`)."""
PATIENCE = 3.0
"""Seconds that the main thread has to hear a signal."""
TO_END = 1.5
"""Seconds more that it has to end what it runs, once it has heard."""
ECHO = 0.5
"""Seconds in which a second Ctrl-C is the first one again: shells and launchers pass on what the
terminal has sent to all processes already."""
AGAIN = PATIENCE + TO_END + 1.0
"""The same for other signals: launchers end the other ranks when the first one has left, which may
not cut the save of the rank that saves."""


class Stopping:
    """What a process does with a signal; there is one of it, since a process has one set of
    handlers.

    The main thread raises Stopped. Where it hears nothing, inside of a long call of a library, a
    second thread saves the run and ends the process. A second Ctrl-C, or the same signal again
    after some seconds, ends it at once.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.signals: tuple[int, ...] = ()
        self.forget()

    def forget(self) -> None:
        """Begins a command anew."""
        self.first, self.code = 0.0, 0
        self.heard = self.finished = False
        self.save: Callable[[], Path | None] = lambda: None
        """Writes the last finished step of a run; returns where it is."""
        self.end_others: Callable[[], None] = lambda: None
        """Ends the processes that this one has started."""
        self.said = ""
        """What became of that."""

    @contextmanager
    def watching(self, signals: Sequence[int], process: bool) -> Iterator[None]:
        """In the block, each of the signals ends the command. Of a process that ends with the
        block, the last seconds are watched as well."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self.forget()
        before = {number: signal.getsignal(number) for number in signals}
        # Who began it with nohup, or in the background of a script, has switched signals off.
        self.signals = tuple(number for number in signals if before[number] is not signal.SIG_IGN)
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        self.install()
        others = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=self._stand_by, args=(reader,), daemon=True, name="signals").start()
        if process:
            atexit.register(self._end)
        try:
            yield
            # What ended in order has its own exit code: Ctrl-C is how serve is ended.
            atexit.unregister(self._end)
        finally:
            if not process:
                for number in self.signals:
                    signal.signal(number, before[number])
                signal.set_wakeup_fd(others)
                os.close(writer)

    def install(self) -> None:
        """Sets the handlers, also anew where a library has set others."""
        for number in self.signals:
            signal.signal(number, self._raise)

    def _raise(self, number: int, frame: FrameType | None) -> None:
        if self.heard:
            return  # The other thread has read it too, and knows what a second one means.
        self.heard = True
        self.code = 128 + number
        leave_a_gone_terminal()
        raise Stopped(number)

    def _end(self) -> None:
        """Leaves without taking libraries down piece by piece, which takes seconds. Registered
        first, it is called when all else that libraries registered is done."""
        if self.code:
            with suppress(OSError, ValueError):
                sys.stdout.flush()
            os._exit(self.code)

    def _stand_by(self, reader: int) -> None:
        """Reads the numbers of signals as they come, whatever the main thread does."""
        deadline = None
        while True:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not select.select([reader], [], [], left)[0]:
                if self.heard and deadline == self.first + PATIENCE:
                    deadline += TO_END
                    continue
                why = (self.code, str(Stopped(self.code - 128)))
                deadline = None
                try:
                    threading.Thread(target=self.leave, args=why, daemon=True, name="leave").start()
                except RuntimeError:  # As the interpreter ends, no thread begins any more.
                    self.leave(*why)
                continue
            numbers = os.read(reader, 64)
            if not numbers:
                os.close(reader)
                return
            for number in filter(self.signals.__contains__, numbers):
                now = time.monotonic()
                if not self.first:
                    self.first, self.code = now, 128 + number
                    deadline = now + PATIENCE
                    continue
                again = number == signal.SIGINT or self.code == 128 + number
                if again and now - self.first > (ECHO if number == signal.SIGINT else AGAIN):
                    os._exit(self.code)

    def finish(self) -> None:
        """Saves the last finished step, and has Slurm begin the job again if it gave the warning;
        only once, and a second thread waits for the first."""
        with self.lock:
            if self.finished:
                return
            self.finished = True
            try:
                path = self.save()
                self.said = f"; fit goes on with --ckpt_path {path}" if path else ""
            except (OSError, RuntimeError) as error:
                self.said = f"; {error}"
            if self.code == 128 + signal.SIGUSR1:
                requeue()

    def leave(self, code: int, why: str) -> None:
        """Saves, and ends the process from another thread than the main one, with a sentence."""
        try:
            leave_a_gone_terminal()
            # A bar has hidden the cursor.
            show = "\033[?25h" if os.isatty(2) else ""
            self.finish()
            write(f"{show}error: {why}{self.said}")
            self.end_others()
        finally:
            os._exit(code)


STOPPING = Stopping()


def write(line: str) -> None:
    """To stderr, from any thread, past what may hold its lock."""
    with suppress(OSError):
        os.write(2, f"{line}\n".encode(errors="replace"))


def leave_a_gone_terminal() -> None:
    """Lets output go nowhere where the terminal is closed: an error of a write must not take the
    time that saving needs."""
    for place in (1, 2):
        try:
            os.write(place, b"")
        except OSError:
            with suppress(OSError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, place)
                os.close(nowhere)


def requeue() -> None:
    """Has Slurm begin this job anew, from the first of its processes."""
    job = os.environ.get("SLURM_JOB_ID")
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        job = f"{array}_{os.environ.get('SLURM_ARRAY_TASK_ID', '')}"
    scontrol = shutil.which("scontrol")
    if job is None or scontrol is None or os.environ.get("SLURM_PROCID", "0") != "0":
        return
    done = subprocess.run([scontrol, "requeue", job], capture_output=True, text=True, check=False)
    said = f"failed: {done.stderr.strip()}" if done.returncode else "will begin again"
    write(f"Slurm job {job} {said}")
