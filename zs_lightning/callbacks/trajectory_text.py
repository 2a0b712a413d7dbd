"""Trajectories as Markdown, for TensorBoard's texts: which ones, and how they are written."""

import re
from collections.abc import Callable, Iterator, Sequence
from zlib import crc32

from zs_lightning.text.answers import exact_match
from zs_lightning.text.protocol import DOC, pieces
from zs_lightning.text.shown import visible
from zs_lightning.types import ActionKind, Trajectory, Turn

VERBS = {"think": "thinks: ", "search": "searches: ", "answer": "answers: ", "information": "forges a result: "}
"""What stands before a part of a turn, by the tag around it."""


def best_and_worst(trajectories: Sequence[Trajectory]) -> list[Trajectory]:
    """The first with the highest and the first with the lowest reward, two different ones."""
    best = max(trajectories, key=lambda t: t.reward)
    rest = [t for t in trajectories if t is not best]
    return [best, *([min(rest, key=lambda t: t.reward)] if rest else [])]


def wrong_and_right(trajectories: Sequence[Trajectory]) -> list[Trajectory]:
    """Two with a wrong answer and two with a right one, or more of a kind where the other has too
    few. They are drawn by their questions' names, so that validations show the same ones."""
    kinds: dict[bool, list[Trajectory]] = {False: [], True: []}
    for trajectory in sorted(trajectories, key=lambda t: crc32(t.example.key.encode())):
        kinds[is_right(trajectory)].append(trajectory)
    first = [*kinds[False][:2], *kinds[True][:2]]
    return [*first, *kinds[False][2:], *kinds[True][2:]][:4]


def is_right(trajectory: Trajectory) -> bool:
    return bool(exact_match(trajectory.answer, trajectory.example.golden_answers))


def trajectory_text(trajectory: Trajectory, decode: Callable[[list[int]], str]) -> str:
    """A trajectory as nested Markdown lists of what the policy wrote and read, turn by turn;
    `decode` makes text of ids."""
    # Not as a table: TensorBoard breaks the words of narrow columns.
    lines = [*_head(trajectory), ""]
    for number, turn in enumerate(trajectory.turns, 1):
        for who, span, items in (("policy", turn.span, _wrote), (_answered(turn), turn.observation_span, _read)):
            if span is not None and span[1] > span[0]:
                sampled = "sampled" if all(trajectory.loss_mask[slice(*span)]) else "not sampled"
                lines.append(f"- **{number} {escape(who)}** ({sampled})")
                lines += items(decode(trajectory.token_ids[slice(*span)]))
    return "\n".join(lines)


def _head(trajectory: Trajectory) -> Iterator[str]:
    example, answer = trajectory.example, trajectory.answer
    yield f"**{escape(example.question)}**"
    yield ""
    right = "right" if is_right(trajectory) else "wrong"
    said = "no answer" if answer is None else f"answer: **{escape(answer)}**, {right}"
    yield f"{said}; golden answers: {escape(' / '.join(example.golden_answers))}"
    yield ""
    reason = f": {trajectory.failure}" if trajectory.failure else ""
    yield f"{escape(f'{trajectory.status}{reason}')}{_reward(trajectory)}"


def _reward(trajectory: Trajectory) -> str:
    """Of a validation none is known."""
    if not trajectory.reward_parts:
        return ""
    parts = ", ".join(f"{escape(name)} {value:.2f}" for name, value in trajectory.reward_parts.items() if value)
    return f"; reward {trajectory.reward:.2f}{f' ({parts})' if parts else ''}, advantage {trajectory.advantage:+.2f}"


def _answered(turn: Turn) -> str:
    """What answered a turn, and of a simulator what it was told to write."""
    if turn.kind is not ActionKind.SEARCH:
        return f"notice, {turn.content}"
    count = len(turn.documents)
    said = [f"engine, {count} document{'' if count == 1 else 's'}"]
    if turn.label is not None and turn.noise is not None:
        said.append(turn.label if turn.noise in (0, 1) else f"{turn.label} in {turn.noise:.0%} of them")
    if turn.withheld:
        said.append("answers withheld")
    if turn.repeated:
        said.append("as before")
    return ", ".join(said)


def _wrote(text: str) -> Iterator[str]:
    """A turn's thought, query and answer as list items."""
    for kind, content in pieces(text):
        yield f"    - {VERBS.get(kind, '')}{escape(content)}"


def _read(text: str) -> Iterator[str]:
    """A result's documents and lines as list items."""
    text = re.sub(f"</?information>|(?={DOC})", "\n", text)
    for line in text.splitlines():
        if line.strip():
            yield f"    - {escape(line.strip())}"


def escape(text: str) -> str:
    """Untrusted text for one line: no markup, no end of a line."""
    line = visible(" ⏎ ".join(text.splitlines()))
    # Also the dot, or "1. " would begin a list.
    return "".join(c if c.isalnum() or c in " ,:;?'" else f"&#{ord(c)};" for c in line)
