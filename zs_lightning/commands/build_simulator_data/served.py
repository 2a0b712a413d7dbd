"""A model behind OpenAI's API that searches, or judges."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from zs_lightning.commands.served import CHARACTERS, GREEDY, Writer
from zs_lightning.generation import Sampling
from zs_lightning.rollout import RolloutSpec
from zs_lightning.search import SearchEngine
from zs_lightning.search.base import answered, beginning
from zs_lightning.search.judges import JUDGE, VERDICT_TOKENS, Case, judge_fields, read_verdict
from zs_lightning.streams import derive_seed
from zs_lightning.text.prompts import Prompts, ask, fill
from zs_lightning.text.protocol import ANSWER_END, SEARCH_END, STOP_TAGS, disarm, parse_action
from zs_lightning.types import ActionKind, Document, QAExample, SearchRequest, Status, Trajectory, Turn


@dataclass
class _Row:
    trajectory: Trajectory
    said: list[str]
    seed: int


class ServedActor:
    """Rolls a served model out as Actor does one that is here, all rows a turn at a time."""

    def __init__(self, writer: Writer, search: SearchEngine, prompts: Prompts, spec: RolloutSpec) -> None:
        self.writer = writer
        self.search = search
        self.prompts = prompts
        self.spec = spec
        self.sampling = Sampling(temperature=spec.temperature, top_p=spec.top_p)
        search.setup()

    def roll_out(self, examples: Sequence[QAExample], group_size: int, seed: int) -> list[Trajectory]:
        """As Actor.roll_out; tokens are counted in loss_mask, but are not known."""
        rows: dict[str, _Row] = {}
        for example in examples:
            opening = fill(self.spec.template(self.prompts), question=disarm(ask(example.question)))
            for sample in range(group_size):
                key = f"{example.key}#{sample}"
                trajectory = Trajectory(example=example, sample=sample, prompt_ids=[])
                rows[key] = _Row(trajectory, [opening], derive_seed(seed, key))
        going = dict(rows)
        while going:
            going = self._turn(going)
        return [row.trajectory for row in rows.values()]

    def _turn(self, rows: dict[str, _Row]) -> dict[str, _Row]:
        """One turn of each row, and its search; returns the rows that go on."""
        bodies: dict[str, dict[str, Any]] = {}
        for key, row in rows.items():
            seed = derive_seed(row.seed, len(row.trajectory.turns))
            room = self.spec.max_length - sum(map(len, row.said)) // CHARACTERS
            if room < 1:
                row.trajectory.status = Status.LENGTH_LIMIT
                continue
            most = min(self.spec.max_new_tokens, room)
            bodies[key] = self.writer.asked(row.said, most, self.sampling, seed, STOP_TAGS)
        searches: list[SearchRequest] = []
        going: dict[str, _Row] = {}
        for key, result in self.writer.answers(bodies).items():
            row = rows[key]
            if key in self.writer.rejected and row.trajectory.turns:
                # The server took what it began with: it is too long now.
                row.trajectory.status = Status.LENGTH_LIMIT
            elif result.failure is not None:
                self._fail(row, result.failure)
            elif self._go_on(row, result.documents[0]):
                going[key] = row
                number, turn = len(row.trajectory.turns), row.trajectory.turns[-1]
                if turn.kind is ActionKind.SEARCH:
                    example, seed = row.trajectory.example, derive_seed(row.seed, "call", number)
                    searches.append(SearchRequest(key=key, query=turn.content, example=example, turn=number, seed=seed))
        for key, result in answered(self.search, searches).items():
            if result.failure is not None:
                self._fail(going.pop(key), result.failure)
            else:
                self._observe(rows[key], result.documents)
        return going

    def _go_on(self, row: _Row, written: Document) -> bool:
        """Takes what the model wrote; whether the rollout goes on."""
        trajectory = row.trajectory
        tokens, _, ending = written.title.partition(" ")
        # Caches of former versions have no ending.
        text = closed(written.text) if ending in ("stop", "") else written.text
        trajectory.loss_mask += [True] * int(tokens)
        action = parse_action(text)
        trajectory.turns.append(Turn(text=text, kind=action.kind, content=action.content, span=(0, 1)))
        if action.kind is ActionKind.ANSWER:
            trajectory.status = Status.ANSWERED
        if action.kind is ActionKind.ANSWER or len(trajectory.turns) > self.spec.max_turns:
            return False
        row.said += [text, self.prompts.notice]
        return True

    def _observe(self, row: _Row, documents: tuple[Document, ...]) -> None:
        turn = row.trajectory.turns[-1]
        turn.documents = documents
        turn.observation_span = (1, 2)
        most = CHARACTERS * self.spec.max_observation_tokens
        row.said[-1] = fill(self.prompts.observation, documents=self.prompts.listed(documents)[:most])

    def _fail(self, row: _Row, reason: str) -> None:
        row.trajectory.failure = reason
        row.trajectory.status = Status.FAILED

    def close(self) -> None:
        self.writer.close()
        self.search.close()


def closed(text: str) -> str:
    """The text, which ended by itself, with the end tag that a server has cut off as a stop
    text."""
    for tag in (SEARCH_END, ANSWER_END):
        opening = tag.replace("/", "")
        if text.rfind(opening) > text.rfind(tag):
            return text + tag
    return text


class ServedJudge:
    """A served model's verdicts, see ModelJudge; `failed` counts cases of which it said nothing."""

    def __init__(self, writer: Writer, max_length: int) -> None:
        self.writer = writer
        self.room = CHARACTERS * (max_length - VERDICT_TOKENS)
        self.tokens = 0
        self.failed = 0

    def verdicts(self, cases: Sequence[Case]) -> list[bool | None]:
        bodies: dict[str, dict[str, Any]] = {}
        for number, case in enumerate(cases):
            bodies[str(number)] = self.writer.asked([self._prompt(case)], VERDICT_TOKENS, GREEDY, 0)
        written = self.writer.answers(bodies)
        said: list[bool | None] = []
        for key in bodies:
            found = written[key].documents
            self.tokens += int(found[0].title.split()[0]) if found else 0
            self.failed += not found
            # One that the server does not take is no verdict; a server that is gone ends the run.
            said.append(read_verdict(found[0].text) if found else None)
        return said

    def _prompt(self, case: Case) -> str:
        fields = {name: disarm(text) for name, text in judge_fields(case).items()}

        def prompt(documents: str) -> str:
            return fill(JUDGE, **fields | {"documents": documents})

        return prompt(beginning(fields["documents"], lambda text: len(prompt(text)) <= self.room))[-self.room :]
