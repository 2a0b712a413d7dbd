"""Errors that speak to the user: the command line prints their sentence. Other exceptions are bugs
and keep their traceback."""

from __future__ import annotations


class UserError(ValueError):
    """The user has something to change; the message says what was given, what was expected and
    which option to change."""


class RunError(RuntimeError):
    """A run cannot go on, through no mistake in its options; the message says what happened and
    what to do."""
