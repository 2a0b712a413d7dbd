"""Trajectories of tests and of a training, packed for the page's reader."""

import base64
import hashlib
import json
import math
import re
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup

from zs_lightning.commands.compare.spelling import Spelling, read_spelling
from zs_lightning.runs.folder import ALARMS, TRAJECTORIES, Run
from zs_lightning.runs.outcomes import Outcome, scores
from zs_lightning.streams import derive_seed
from zs_lightning.text.protocol import pieces
from zs_lightning.text.shown import visible

MOST = 5_000
"""Trajectories on a page."""
FIT = {"train": "training", "validation": "validation", "real": "validation, real engine"}
"""Files of a fit, and what the page calls them."""
LARGE = 50_000_000
"""Bytes of files of which the user is told that they are being read."""
BROKEN = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)
"""What reading a line raises that is no trajectory."""
_STEP = re.compile(rb'\{"schema": 1, "step": (\d+),')


class Line(NamedTuple):
    """A line of a file of trajectories."""

    kind: str
    """What is to be told apart when lines are left out."""
    draw: int
    start: int
    """Its place in the file, in bytes."""
    outcome: Outcome | None


@dataclass(frozen=True)
class Kept:
    """A file of trajectories."""

    name: str
    path: Path
    spelling: Spelling | None
    outcomes: Sequence[Outcome] = ()
    """Of a test, in the order of the lines."""

    def lines(self) -> list[Line]:
        """Those of a training in their order, those of a test in one that the questions give."""
        found, start, first, last = [], 0, 0, None
        with self.path.open("rb") as file:
            for place, line in enumerate(file):
                # The line that a running fit is writing.
                if not line.endswith(b"\n"):
                    break
                if place < len(self.outcomes):
                    outcome = self.outcomes[place]
                    # The same questions of every run, so that they can be read side by side.
                    draw = derive_seed("reader", outcome.id)
                    found.append(Line(outcome.decoding, draw, start, outcome))
                else:
                    step = found_step[1].decode() if (found_step := _STEP.match(line)) else ""
                    first, last = (first, last) if step == last else (place, step)
                    # Of validations the same questions, too.
                    draw = derive_seed("reader", place - first)
                    found.append(Line(step, draw, start, None))
                start += len(line)
        return sorted(found, key=lambda line: line[:2]) if self.outcomes else found


def shared(counts: Sequence[int], most: int) -> list[int]:
    """Of `most` things as many to each as to the others, but to none more than it can take."""
    given = [0] * len(counts)
    for done, place in enumerate(sorted(range(len(counts)), key=counts.__getitem__)):
        given[place] = min(counts[place], (most - sum(given)) // (len(counts) - done))
    return given


def thinned(kinds: Sequence[str], draws: Sequence[int], most: int) -> set[int]:
    """Places of up to `most` things, of each kind as many, the lowest draws of it."""
    seen: Counter[str] = Counter()
    ranked = []
    for draw, place in sorted(zip(draws, range(len(draws)), strict=True)):
        seen[kinds[place]] += 1
        ranked.append((seen[kinds[place]], draw, place))
    return {place for _, _, place in sorted(ranked)[:most]}


@dataclass(frozen=True)
class Reader:
    """What the page's reader needs."""

    data: Markup
    """Trajectories as JSON, deflated, in base64: no text in it can be markup."""
    script: Markup
    counts: list[tuple[str, int, int]]
    """For each run its name, how many trajectories are shown, and how many there are."""
    damaged: int
    """Lines that are no trajectories."""

    @property
    def thinned(self) -> bool:
        return any(shown < count for _, shown, count in self.counts)

    @property
    def script_hash(self) -> Markup:
        """What the page's policy names the script by."""
        digest = hashlib.sha256(self.script.encode()).digest()
        return Markup(base64.b64encode(digest).decode())


def read_trajectories(runs: Sequence[Run], training: Path | None, most: int = MOST) -> Reader | None:
    """Up to `most` trajectories of the runs and of the run folder of a training, beside tests half
    of them; None if none was kept."""
    files = _files(runs, training)
    if (size := sum(file.path.stat().st_size for file in files)) > LARGE:
        print(f"Reading trajectories, {size / 1e6:,.0f} MB …", flush=True)
    listed = [file.lines() for file in files]
    counts = list(map(len, listed))
    # Those of the fit are the first, and have no outcomes.
    fit = sum(not file.outcomes for file in files)
    trained = shared(counts[:fit], most // 2 if fit < len(files) else most)
    shares = trained + shared(counts[fit:], most - sum(trained))
    packed, shown = Packed(), []
    for file, lines, share in zip(files, listed, shares, strict=True):
        before = len(packed.rows)
        places = thinned([line.kind for line in lines], [line.draw for line in lines], share)
        packed.add(file, [lines[place] for place in sorted(places)])
        shown.append((file.name, len(packed.rows) - before, len(lines)))
    if not packed.rows:
        return None
    script = Path(__file__).with_name("reader.js").read_text("utf-8")
    return Reader(packed.data(), Markup(script), shown, packed.damaged)


def _files(runs: Sequence[Run], training: Path | None) -> list[Kept]:
    found = []
    if training:
        spelling = read_spelling(training)
        for split, name in FIT.items():
            found.append(Kept(name, training / TRAJECTORIES / f"{split}.jsonl", spelling))
    for run in runs:
        name = f"{run.name}@{run.label}" if run.label else run.name
        path = run.folder / TRAJECTORIES / "test.jsonl"
        found.append(Kept(name, path, read_spelling(run.folder), run.outcomes))
    return [file for file in found if file.path.is_file()]


class Packed:
    """Trajectories as the script of the page reads them: texts that recur stand once."""

    def __init__(self) -> None:
        self.runs: list[str] = []
        self.rows: list[dict[str, Any]] = []
        self.prompts: dict[str, int] = {}
        self.tokens: dict[str, int] = {}
        self.spelt: dict[tuple[Spelling, int], int] = {}
        self.damaged = 0

    def add(self, kept: Kept, lines: Sequence[Line]) -> None:
        """Adds lines of a file."""
        self.runs.append(kept.name)
        with kept.path.open("rb") as file:
            for line in lines:
                file.seek(line.start)
                try:
                    row = self.row(json.loads(file.readline()), kept.spelling)
                except BROKEN:
                    self.damaged += 1
                    continue
                row["run"] = len(self.runs) - 1
                if line.outcome:
                    row["decoding"] = line.outcome.decoding
                    row["source"] = visible(line.outcome.source)
                    row["subset"] = visible(line.outcome.subset)
                self.rows.append(row)

    def row(self, line: dict[str, Any], spelling: Spelling | None) -> dict[str, Any]:
        """A trajectory of which the types are known. Raises as reading what is not there does."""
        key, parts = str(line["id"]), line.get("reward_parts") or {}
        prompt = line.get("prompt_ids") or []
        # Of another tokenizer, whatever its name: better no texts than wrong ones.
        spelling = spelling if spelling and spelling.agrees(line) else None
        told = spelling.text(prompt) if spelling else ""
        golds, answer = list(map(str, line["golden_answers"])), line["answer"]
        earned = parts.get("answer", line.get("reward"))
        found = scores(None if answer is None else str(answer), golds)
        # A test gives no rewards.
        earned = earned if parts else found["f1"]
        return {
            "step": int(line.get("step") or 0),
            "id": visible(key),
            "source": visible(key.partition("/")[0]),
            "sample": int(line.get("sample") or 0),
            "question": visible(str(line["question"])),
            "golds": list(map(visible, golds)),
            "status": visible(str(line["status"])),
            "failure": visible(str(line.get("failure") or "")),
            "em": found["em"],
            "f1": number(found["f1"]),
            "answer": visible(str(answer or "")),
            "grade": grade(earned, found),
            "reward": number(line.get("reward")) if parts else None,
            "parts": {visible(str(name)): number(part) for name, part in parts.items()},
            "advantage": number(line.get("advantage")) if parts else None,
            "noise": number(line.get("noise_prob")),
            "prompt": self.prompts.setdefault(visible(told), len(self.prompts)),
            "asked": len(prompt),
            "turns": [self.turn(turn, line, spelling) for turn in line["turns"]],
        }

    def turn(self, turn: dict[str, Any], line: dict[str, Any], spelling: Spelling | None) -> dict[str, Any]:
        """One of the trajectory's turns."""
        ids, logprobs = line.get("token_ids") or [], line.get("old_logprobs") or []
        start, end = turn["span"]
        span = turn.get("observation_span")
        inserted = ids[span[0] : span[1]] if span else []
        kind = str(turn["kind"])
        noise = turn.get("noise", turn.get("noisy"))
        # A file of before there were kinds says only whether a result was noise.
        label = turn.get("label") or (None if noise is None else "noisy" if noise else "useful")
        found: dict[str, Any] = {
            "kind": kind,
            "content": visible(str(turn["content"])),
            "pieces": [[name, visible(text)] for name, text in pieces(str(turn["text"]))],
            "sampled": end - start,
            # In hundredths, which take a third of the room.
            "logprobs": [round(-100 * value) for value in logprobs[start:end]],
            "told": len(inserted),
            "answered": span is not None,
        }
        if spelling:
            found["tokens"] = [self.token(spelling, token) for token in ids[start:end]]
        if kind == "search" and span:
            found["label"] = visible(str(label or ""))
            found["repeated"] = bool(turn.get("repeated"))
            found["documents"] = [
                [visible(str(document.get("title") or "")), visible(str(document["text"]))]
                for document in turn.get("documents") or []
            ]
        elif span:
            found["notice"] = visible(spelling.text(inserted)) if spelling else ""
        return found

    def token(self, spelling: Spelling, token: int) -> int:
        """The number of a token's text on the page."""
        if (spelling, token) not in self.spelt:
            text = visible(spelling.token(token))
            self.spelt[spelling, token] = self.tokens.setdefault(text, len(self.tokens))
        return self.spelt[spelling, token]

    def data(self) -> Markup:
        """All of it."""
        content = {
            "runs": list(map(visible, self.runs)),
            "prompts": list(self.prompts),
            "tokens": list(self.tokens),
            "rows": self.rows,
        }
        text = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        return Markup(base64.b64encode(zlib.compress(text.encode())).decode())


def number(value: Any) -> float | None:
    """A number with the digits that are shown; None where JSON has none."""
    found = float(value) if isinstance(value, int | float) else math.nan
    return round(found, 4) if math.isfinite(found) else None


def grade(earned: Any, found: Mapping[str, float]) -> int:
    """What the answer earned: 0 nothing, 1 a part, 2 all that it could."""
    value = number(earned) or 0.0
    if value <= 0:
        return 0
    # A reward may have parts beside the answer's, so that no answer earns 1.
    return 2 if value >= 1 or max(found["f1"], found["em_folded"]) == 1 else 1


@dataclass
class Alarm:
    """What a run said of its health."""

    step: int
    name: str
    reason: str
    hint: str
    over: int | None = None
    """The step at which it was over."""


def read_alarms(folder: Path) -> list[Alarm]:
    """Those of a run folder, of which the last line may be half written."""
    path, found = folder / ALARMS, []
    on: dict[str, Alarm] = {}
    for line in path.read_bytes().split(b"\n") if path.is_file() else []:
        with suppress(*BROKEN):
            said = json.loads(line)
            name, step = str(said["name"]), int(said["step"])
            if said["is"] == "over":
                on.pop(name).over = step
            else:
                on[name] = Alarm(step, name, str(said["reason"]), str(said["hint"]))
                found.append(on[name])
    return found
