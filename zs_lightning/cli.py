"""The command line: help, dispatch and what a user sees of an error. Imports Lightning only for a command that needs it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, NoReturn

from zs_lightning import __version__
from zs_lightning.configuration.messages import nearest
from zs_lightning.errors import RunError, UserError

COMMANDS = {
    "fit": "train a simulator (SimulatorSFT) or a policy (PolicyRL)",
    "validate": "measure on the validation rows",
    "test": "measure on the test rows and write results.json",
    "estimate": "say what memory a configuration takes, without loading a model",
    "compare": "compare the results of runs",
    "ask": "ask a trained policy, and watch it search and answer",
    "serve": "serve a search engine over HTTP",
    "export": "write a trained model or adapter for other programs",
}

HELP = f"""usage: python -m zs_lightning COMMAND [options]

ZeroSearch on one workstation: teach a language model to search by RL, without a search engine.

commands:
{chr(10).join(f"  {name:<9} {line}" for name, line in COMMANDS.items())}

examples:
  python -m zs_lightning fit --config configs/miniature/simulator.yaml
  python -m zs_lightning fit --config configs/miniature/policy.yaml --run.folder runs/second --model.group_size 4
  python -m zs_lightning test --config configs/miniature/test.yaml --ckpt_path runs/policy/last.ckpt

options of a command:  python -m zs_lightning fit --help
options of a class:    python -m zs_lightning fit --model.help PolicyRL
version:               python -m zs_lightning --version
"""

OUT_OF_MEMORY = (
    "the card's memory is full; lower model.micro_batch_tokens, model.rollout.slots or model.search.slots, set "
    "model.checkpointing: true or model.model.quantization: nf4; `python -m zs_lightning estimate` says what needs how much"
)


def main(args: Sequence[str] | None = None) -> None:
    """Runs one command; callable many times in a process.

    Args:
        args: what stands after the program's name; None takes it from sys.argv.

    Raises:
        SystemExit: 0 after a help text; 1 when a run failed, 2 when the user has something to change and 130 when
            interrupted, each after one sentence on stderr. A bug keeps its exception.
    """
    # Read when torch is loaded. Threads that spin while they wait for each other take the core that they wait for, where
    # another program is busy: rollouts in miniature were 3 to 7 times as slow. On a quiet machine nothing is lost.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    words = sys.argv[1:] if args is None else list(args)
    command = words[0] if words else ""
    if command in ("-h", "--help"):
        print(HELP, end="")
    elif command == "--version":
        print(f"zs_lightning {__version__}")
    elif command not in COMMANDS:
        said = f"there is no command {command}" if command else "no command is given"
        stop(f"{said}{nearest(command, COMMANDS) or '; expected one of ' + ', '.join(COMMANDS)}", 2)
    else:
        _run(command, words[1:], args)


def _run(command: str, options: list[str], args: Sequence[str] | None) -> None:
    try:
        from zs_lightning.configuration.paths import check_paths

        check_paths(command, options)
        _main_of(command)(options if command not in ("fit", "validate", "test") else args)
        sys.stdout.flush()
    except KeyboardInterrupt as stopped:
        _interrupted(stopped)
    except SystemExit as end:
        # Lightning answers Ctrl-C with an orderly end and exit code 1.
        if isinstance(end.__context__, KeyboardInterrupt):
            _interrupted(end.__context__)
        raise
    except ModuleNotFoundError as error:
        if _package(_innermost(error)) != "zs_lightning":
            raise
        stop(
            f"the package {error.name} is missing for {sys.executable}; activate the environment that has it with `source "
            ".venv/bin/activate`, or make it with `bash scripts/quickstart.sh`",
            2,
        )
    except BrokenPipeError:
        # Whoever reads what is printed, such as `head`, has seen enough; what the interpreter still flushes goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":
            stop(OUT_OF_MEMORY, 1)
        reason = _speaking(error)
        if reason is None:
            raise
        stop(str(reason), 1 if isinstance(reason, RunError) else 2)


def _main_of(command: str) -> Callable[[Any], None]:
    if command == "compare":
        from zs_lightning.commands.compare.command import main as run
    elif command == "export":
        from zs_lightning.commands.export.command import main as run
    elif command == "estimate":
        from zs_lightning.commands.estimate.command import main as run
    elif command == "ask":
        from zs_lightning.commands.ask.command import main as run
    elif command == "serve":
        from zs_lightning.commands.serve.command import main as run
    else:
        from zs_lightning.configuration.lightning_cli import run
    return run


def _speaking(error: BaseException) -> BaseException | None:
    """The error, or the one it was made from, if it speaks to the user: one of ours, or of Lightning about its options."""
    cause: BaseException | None = error
    while cause is not None:
        kinds = {kind.__name__ for kind in type(cause).__mro__}
        lightning = _package(_innermost(cause)) == "lightning" and kinds & {"ValueError", "MisconfigurationException"}
        if isinstance(cause, UserError | RunError) or lightning:
            return cause
        cause = cause.__cause__
    return None


def _innermost(error: BaseException) -> TracebackType | None:
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    return place


def _package(place: TracebackType | None) -> str:
    return "" if place is None else str(place.tb_frame.f_globals.get("__name__", "")).split(".")[0]


def _interrupted(stopped: KeyboardInterrupt) -> NoReturn:
    """With what a run says of the files that it leaves."""
    stop("; ".join(["interrupted", *getattr(stopped, "__notes__", [])]), 130)


def stop(sentence: str, code: int) -> NoReturn:
    print(f"error: {' '.join(sentence.split())}", file=sys.stderr)
    raise SystemExit(code)
