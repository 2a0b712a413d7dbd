"""Commands in processes of their own, forked from one that has loaded the libraries: that takes seconds each time."""

import json
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from support.ports import free_port

SERVER = """
import atexit, gc, json, os, signal, sys
import zs_lightning.cli, zs_lightning.configuration.lightning_cli, zs_lightning.modules, zs_lightning.search
import peft, tensorboard, torch.optim, torch.utils.tensorboard, transformers.models.qwen3.modeling_qwen3
torch.set_num_threads(1)
gc.collect()
gc.freeze()
print("ready", flush=True)
for line in sys.stdin:
    words, folder, said, more = json.loads(line)
    child = os.fork()
    if not child:
        break
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    os._exit(0)
os.setsid()
# Torch makes its pool anew after a fork, when it is first asked: by several threads at once it fails ("Invalid thread pool").
torch.set_num_threads(1)
# Who runs the tests in the background has switched them off.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
os.chdir(folder)
os.environ |= more
for place, name in ((0, os.devnull), (1, said + ".out"), (2, said + ".err")):
    os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC), place)
second = 0
if place := more.get("RANK_1"):  # Two ranks, as a launcher begins them, and where the second one is.
    which = "NODE_RANK" if "--trainer.num_nodes=2" in words else "LOCAL_RANK"
    second = os.fork()
    os.environ[which] = "0" if second else "1"
    torch.set_num_threads(1)
    os.chdir(place if os.environ[which] == "1" else folder)
code = 1


@atexit.register
def leave():  # Registered first, called last: taking down all that was loaded takes more than a second.
    sys.stdout.flush()
    sys.stderr.flush()
    # One that ends well is not done before the other is.
    os._exit(code or (os.waitstatus_to_exitcode(os.waitpid(second, 0)[1]) if second else 0))


sys.argv = ["zs_lightning", *words]
try:
    zs_lightning.cli.main()
    code = 0
except SystemExit as end:
    code = end.code or 0
"""


MOST = 600
"""Seconds that a command may take."""


def running(process: int) -> bool:
    """Whether it has not ended, though nobody may have waited for it yet."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def second_rank(folder: Path) -> dict[str, str]:
    """Environment of a command that two ranks do, and where the second one is."""
    return {"RANK_1": str(folder), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}


class Warm:
    """One command at a time: it is begun, may be sent signals, and is waited for."""

    def __init__(self) -> None:
        self.heard, self.unread = b"", False
        pipe = subprocess.PIPE
        # Commands may name classes of the tests.
        places = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(places)}
        command = [sys.executable, "-c", SERVER]
        self.server = subprocess.Popen(command, stdin=pipe, stdout=pipe, start_new_session=True, env=environment)
        assert self._line() == "ready"

    def _line(self) -> str:
        assert self.server.stdout is not None
        reader, deadline = self.server.stdout.fileno(), time.monotonic() + MOST
        while b"\n" not in self.heard:
            left = max(0.0, deadline - time.monotonic())
            assert select.select([reader], [], [], left)[0], f"nothing for {MOST} s"
            more = os.read(reader, 4096)
            assert more, "the process that forks has ended"
            self.heard += more
        line, _, self.heard = self.heard.partition(b"\n")
        return line.decode()

    def begin(self, words: list[str], folder: Path, **environment: str) -> "Warm":
        self._forget()
        assert self.server.stdin is not None
        self.said = folder / "said"
        for ending in (".out", ".err"):  # It may be killed before it has made them.
            self.said.with_suffix(ending).write_text("")
        self.server.stdin.write(json.dumps([words, str(folder), str(self.said), environment]).encode() + b"\n")
        self.server.stdin.flush()
        self.child, self.unread = int(self._line()), True
        assert self.child > 1
        return self

    def two_ranks(self, words: list[str], folder: Path, second: Path | None = None) -> None:
        """Has a command done by two processes on this machine, of which the second may be in a folder of its own."""
        code, _, err = self.begin([*words, "--trainer.accelerator=cpu"], folder, **second_rank(second or folder)).end()
        assert code == 0, err[-2000:]

    def _forget(self) -> None:
        """Ends a command that nobody has waited for, because its test has failed: its exit code is no number of the next."""
        if self.unread:
            for kill in (os.killpg, os.kill):  # It may not have made its session yet.
                with suppress(ProcessLookupError):
                    kill(self.child, signal.SIGKILL)
            self.end()

    def runs(self) -> bool:
        return running(self.child)

    def send(self, number: int) -> None:
        with suppress(ProcessLookupError):  # It may have come to its end.
            os.kill(self.child, number)

    def end(self) -> tuple[int, str, str]:
        """Exit code, stdout and stderr."""
        code, self.unread = int(self._line()), False
        return code, self.said.with_suffix(".out").read_text(), self.said.with_suffix(".err").read_text()

    def close(self) -> None:
        assert self.server.stdin is not None
        try:
            self._forget()
            self.server.stdin.close()
            self.server.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.server.kill()


@pytest.fixture(scope="session")
def warm():
    """Forks commands; shared by all tests of a process."""
    server = Warm()
    yield server
    server.close()
