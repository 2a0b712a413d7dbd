"""Errors that speak to the user: the command line prints their sentence. Other exceptions are bugs
and keep their traceback."""

import signal


class UserError(ValueError):
    """The user has something to change; the message says what was given, what was expected and
    which option to change."""


class RunError(RuntimeError):
    """A run cannot go on, through no mistake in its options; the message says what happened and
    what to do."""


class NotFiniteError(RunError):
    """Numbers are NaN or infinite: a training step is skipped for it, see TrainableModule."""


class Stopped(KeyboardInterrupt):
    """A signal ends the command, with the exit code that shells give it."""

    def __init__(self, number: int) -> None:
        is_key = number == signal.SIGINT
        super().__init__("interrupted" if is_key else f"stopped by {signal.Signals(number).name}")
        self.code = 128 + number


def check_least(group: str, **options: tuple[float, float]) -> None:
    """Raises UserError for the first option of a group, each with its value and the least that it
    may be, that is less, or no number."""
    for name, (value, least) in options.items():
        if not value >= least:
            raise UserError(f"{group}.{name}: expected {least} or more; got {value:g}")


def check_shares(group: str, **options: float) -> None:
    """Raises UserError for the first option of a group that is no number from 0 to 1."""
    for name, value in options.items():
        if not 0 <= value <= 1:
            raise UserError(f"{group}.{name}: expected a number from 0 to 1; got {value:g}")
