"""A build: the file of what was paid for so far, a batch a line, of which a kill loses no whole
one; and how far it is."""

import json
import os
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from zs_lightning.errors import RunError, UserError
from zs_lightning.runs.folder import hold

FORMAT = 1
CONNECTION = ("hosts", "http", "api_key_env")
"""Options of `served` that may always change between two parts of a build."""
EVERY = 10
"""Seconds between two lines of progress where there is no terminal."""


@contextmanager
def held(folder: Path, option: str = "folder") -> Iterator[None]:
    """Makes the folder of a build, and takes it for this process alone. Raises UserError, with the
    option that names it, if another one has it."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        number = hold(folder)
    except UserError as error:
        change = "wait for its end, or name another folder"
        raise UserError(f"{option}: another process builds in {folder}; {change}") from error
    try:
        yield
    finally:
        os.close(number)


def going_on(error: RunError, kept: str) -> RunError:
    """The error of a server that is gone, as a build says it, which has no checkpoint."""
    reason = str(error).removesuffix(", then go on with --ckpt_path or begin anew")
    return RunError(f"{reason}; {kept} are kept, and the same command goes on")


def binding(settings: Mapping[str, Any], free: Collection[str]) -> dict[str, Any]:
    """The settings that batches depend on, as JSON gives them back."""
    kept = {name: value for name, value in settings.items() if name not in free}
    if kept.get("served"):
        kept["served"] = {name: value for name, value in kept["served"].items() if name not in CONNECTION}
    bound: dict[str, Any] = json.loads(json.dumps(kept))
    return bound


class Work:
    """The batches of a build in its folder. Made or gone on with.

    Args:
        settings: all options of the build, and what else its batches depend on.
        free: names of those that may change between two parts: no batch depends on them.
        option: the one that names the folder, for messages.

    Raises:
        UserError: the folder holds a build with other options, or something else.
    """

    def __init__(self, path: Path, settings: dict[str, Any], free: Collection[str], option: str = "folder") -> None:
        self.path = path
        self.option = option
        self.batches: list[dict[str, Any]] = []
        head: dict[str, Any] = {"format": FORMAT, "settings": binding(settings, free)}
        first, *rest = self._whole_lines() or [head]
        if not isinstance(first, dict) or first.get("format") != FORMAT:
            raise UserError(f"{option}: {path} is no work of this version; name another folder")
        if not rest:
            # What was stopped before its first batch holds nobody to its options.
            path.unlink(missing_ok=True)
            self._append(head)
            return
        # A former version kept all of `served`.
        before = binding(first["settings"], free)
        for name in head["settings"].keys() | before.keys():
            if head["settings"].get(name) != before.get(name):
                change = "set it back, or name another folder"
                raise UserError(f"{option}: {path.parent} holds a build with another `{name}`; {change}")
        self.batches = rest

    def add(self, batch: dict[str, Any]) -> None:
        """Keeps a batch for good."""
        self._append(batch)
        self.batches.append(batch)

    def _whole_lines(self) -> list[Any]:
        """The lines that were written to their end; a half last one is cut off."""
        if not self.path.is_file():
            return []
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            with self.path.open("r+b") as file:
                file.truncate(len(whole))
        try:
            return [json.loads(line) for line in whole.splitlines()]
        except ValueError as error:
            raise UserError(f"{self.option}: {self.path} is damaged: {error}; name another folder") from error

    def _append(self, line: dict[str, Any]) -> None:
        with self.path.open("ab") as file:
            # ASCII, because a text may hold half a character, which UTF-8 cannot.
            file.write(json.dumps(line).encode() + b"\n")
            file.flush()
            # What was paid for must survive a machine that goes down as well.
            os.fsync(file.fileno())


class Line:
    """A line after a batch, which begins with the name of what is built: in a terminal in place of
    the one before, else now and then."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.told = time.monotonic()
        self.first: tuple[float, float] | None = None
        """What was done after the first batch, and when."""

    def __call__(self, share: float, done: str) -> None:
        """Says what is done, which is this share of everything."""
        now = time.monotonic()
        # What an earlier part of the build did says nothing of the time that this one takes.
        first, begun = self.first = self.first or (share, now)
        left = f", about {(now - begun) * (1 - share) / (share - first):.0f} s left" if share > first else ""
        line = f"{self.name}: {done}{left}"
        if sys.stdout.isatty():
            print(f"\r{line:<79}", end="\n" if share == 1 else "", flush=True)
        elif share == 1 or now - self.told >= EVERY:
            self.told = now
            print(line, flush=True)
