"""The command line: help, dispatch and what a user sees of an error.

Imports Lightning only for a command that needs it.
"""

import errno
import logging
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from io import TextIOWrapper
from signal import SIGINT
from traceback import walk_tb
from typing import NoReturn

from zs_lightning import __version__
from zs_lightning.configuration.messages import nearest
from zs_lightning.errors import RunError, Stopped, UserError
from zs_lightning.runs.stopping import SIGNALS, STOPPING
from zs_lightning.text.shown import visible

COMMANDS = {
    "fit": "train a simulator (SimulatorSFT) or a policy (PolicySFT, PolicyRL)",
    "validate": "measure on the validation rows",
    "test": "measure on the test rows and write results.json",
    "estimate": "say what memory a configuration takes, without loading a model",
    "make-questions": "write questions, with answers, about texts of yours",
    "build-simulator-data": "search with a model, judge what is found, write a simulator's records",
    "compare": "compare the results of runs",
    "ask": "ask a trained policy, and watch it search and answer",
    "measure-simulator": "say how good a simulated search engine is",
    "serve": "serve a search engine over HTTP",
    "export": "write a trained model or adapter for other programs",
}

HELP = f"""usage: python -m zs_lightning COMMAND [options]

ZeroSearch on one workstation: teach a language model to search by RL, without a search engine.

commands:
{chr(10).join(f"  {name:<20} {line}" for name, line in COMMANDS.items())}

examples:
  python -m zs_lightning fit --config configs/miniature/simulator.yaml
  python -m zs_lightning fit --config configs/miniature/policy.yaml --run.folder runs/second --model.group_size 4
  python -m zs_lightning test --config configs/miniature/test.yaml --ckpt_path runs/policy/last.ckpt

options of a command:  python -m zs_lightning fit --help
options of a class:    python -m zs_lightning fit --model.help PolicyRL
version:               python -m zs_lightning --version
"""

OUT_OF_MEMORY = (
    "the card's memory is full; lower model.micro_batch_tokens, model.rollout.slots or "
    "model.search.slots, set model.checkpointing: true or model.model.quantization: nf4; "
    "`python -m zs_lightning estimate` says what needs how much"
)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""Errors of a disk that takes no more, which any command may meet."""
INSTALL = "activate the environment that has it with `source .venv/bin/activate`, or make it with `bash scripts/quickstart.sh`"


def main(args: Sequence[str] | None = None) -> None:
    """Runs one command; callable many times in a process.

    Args:
        args: what stands after the program's name; None takes it from sys.argv.

    Raises:
        SystemExit: 0 after a help text; 1 when a run failed, 2 when the user has something to
            change; 130, 143, 129 and 138 when SIGINT, SIGTERM, SIGHUP or SIGUSR1 stopped it;
            each after one sentence on stderr. A bug keeps its exception.
    """
    # Read when torch is loaded. Threads that spin while they wait for each other take the core
    # that they wait for, where another program is busy: rollouts in miniature were 3 to 7 times
    # as slow. On a quiet machine nothing is lost.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for stream in (sys.stdout, sys.stderr):
        # Half of an output is less than one with a sign in place of a letter.
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")
    # What is logged goes there, for want of a handler.
    if logging.lastResort:
        logging.lastResort.setFormatter(_Visible())
    words = sys.argv[1:] if args is None else list(args)
    command = words[0] if words else ""
    if command in ("-h", "--help"):
        print(HELP, end="")
    elif command == "--version":
        print(f"zs_lightning {__version__}")
    elif command not in COMMANDS:
        said = f"there is no command {command}" if command else "no command is given"
        instead = nearest(command, COMMANDS) or f"; expected one of {', '.join(COMMANDS)}"
        stop(said + instead, 2)
    else:
        _run(command, words[1:], args)


class _Visible(logging.Formatter):
    """Names of files and data sets are in what is logged: they steer no terminal, and forge no
    line."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return " ".join(super().formatMessage(record).split())

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


def _run(command: str, options: list[str], args: Sequence[str] | None) -> None:
    # Ctrl-C ends one answer of ask, and not the conversation.
    signals = [number for number in SIGNALS if (command, number) != ("ask", SIGINT)]
    try:
        with STOPPING.watching(signals, process=args is None):
            _dispatch(command, options, args)
    except KeyboardInterrupt as stopped:
        _interrupted(stopped)
    except SystemExit as end:
        # Lightning answers Ctrl-C with an orderly end and exit code 1.
        if isinstance(end.__context__, KeyboardInterrupt):
            _interrupted(end.__context__)
        raise
    except ModuleNotFoundError as error:
        # importlib stands between us and a package that one of our files wants.
        if _package(error) not in ("zs_lightning", "importlib"):
            raise
        stop(f"the package {error.name} is missing for {sys.executable}; {INSTALL}", 2)
    except BrokenPipeError:
        # Whoever reads what is printed, such as `head`, has seen enough; what the interpreter
        # still flushes goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except Exception as error:
        said, code = "", 1
        if type(error).__name__ == "OutOfMemoryError":
            said = OUT_OF_MEMORY
        elif isinstance(error, OSError) and error.errno in FULL:
            said = f"{error.filename or 'a file'} cannot be written: {error.strerror}"
            said += "; make room" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        elif reason := _speaking(error):
            said, code = str(reason), 1 if isinstance(reason, RunError) else 2
        if not said:
            raise
        stop("; ".join([said, *_notes(error)]), code)


def _dispatch(command: str, options: list[str], args: Sequence[str] | None) -> None:
    from zs_lightning.configuration.paths import check_paths

    # Before libraries are loaded, which takes seconds.
    check_paths(command, options)
    if command in ("fit", "validate", "test"):
        # Lightning reads the command too, and sys.argv itself: torchrun starts that again.
        import_module("zs_lightning.configuration.lightning_cli").run(args)
    else:
        package = command.replace("-", "_")
        import_module(f"zs_lightning.commands.{package}.command").main(options)
    sys.stdout.flush()


def _speaking(error: BaseException) -> BaseException | None:
    """The error, or the one it was made from, if it speaks to the user.

    That is one of ours, or of Lightning about its options.
    """
    cause: BaseException | None = error
    while cause is not None:
        kinds = {kind.__name__ for kind in type(cause).__mro__}
        about_options = kinds & {"ValueError", "MisconfigurationException"}
        is_ours = isinstance(cause, UserError | RunError)
        if is_ours or (about_options and _package(cause) == "lightning"):
            return cause
        cause = cause.__cause__
    return None


def _package(error: BaseException) -> str:
    """The package whose code raised an error."""
    name = ""
    for frame, _ in walk_tb(error.__traceback__):
        name = str(frame.f_globals.get("__name__", ""))
    return name.split(".")[0]


def _interrupted(stopped: KeyboardInterrupt) -> NoReturn:
    """Ends with what a run says of the files that it leaves."""
    STOPPING.finish()
    code = stopped.code if isinstance(stopped, Stopped) else 130
    said = "; ".join([str(stopped) or "interrupted", *_notes(stopped)])
    # Past the training no callback notes at the error where the run is.
    stop(said if _notes(stopped) else said + STOPPING.said, code)


def _notes(error: BaseException | None) -> list[str]:
    """What a run has noted at its error, or at the one before it: where it goes on."""
    found: list[str] = []
    while error is not None:
        found += getattr(error, "__notes__", [])
        error = error.__context__
    return list(dict.fromkeys(found))


def stop(sentence: str, code: int) -> NoReturn:
    # Names of files and columns are text of others, which must not steer a terminal.
    said = visible(" ".join(sentence.split()))
    with suppress(OSError):  # The terminal may be closed.
        print(f"error: {said}", file=sys.stderr, flush=True)
    raise SystemExit(code)
