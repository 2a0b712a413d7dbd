"""Asks a model, here or on a server, for questions about passages and for their answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from zs_lightning.commands.make_questions.filters import fault, read_questions
from zs_lightning.commands.make_questions.passages import Task
from zs_lightning.commands.served import GREEDY, ServedSpec, Writer
from zs_lightning.errors import RunError
from zs_lightning.models.checks import check_length, check_models
from zs_lightning.models.loading import load_model, load_tokenizer
from zs_lightning.models.specs import ModelSpec
from zs_lightning.search.corpus import Passage
from zs_lightning.search.served import safe_text
from zs_lightning.search.writing import ModelWriter
from zs_lightning.text.answers import f1_score, holds
from zs_lightning.text.asking import WITH, WITHOUT, WRITE, WRITE_TWO
from zs_lightning.text.prompts import fill

SHORT = 32
"""Most tokens of an answer."""
TOO_LONG = "longer than the model reads"
REFUSED = "refused by the server"
FAILED = "the server failed"
NONE = "no question was written"
Order = tuple[str, Mapping[str, str]]
"""A template and its fields, which are texts from outside."""


@dataclass
class Candidate:
    """A question on its way through the filters."""

    task: int
    question: str
    answer: str
    fault: str = ""
    said: dict[str, str] = field(default_factory=dict)
    """What the model answered, by what it was shown."""


class Asker(Protocol):
    """A model that writes greedily."""

    def written(self, orders: Sequence[Order], most: int) -> list[tuple[str, str]]:
        """A text of at most `most` tokens for each order, or why there is none."""

    def counted(self) -> Counter[str]:
        """Tokens so far."""


class Here:
    """A model in memory. Raises UserError if it cannot be loaded."""

    def __init__(self, spec: ModelSpec, slots: int, max_length: int) -> None:
        check_models({"model": spec})
        check_length(spec, max_length, "max_length")
        tokenizer = load_tokenizer(spec.path, "model")
        model = load_model(spec, "model", tokenizer=tokenizer)
        # Questions have several lines, so that no text ends them.
        self.writer = ModelWriter(model, tokenizer, slots, max_length, ())
        self.read = 0

    def written(self, orders: Sequence[Order], most: int) -> list[tuple[str, str]]:
        prompts = [self.writer.prompt(*order) for order in orders]
        # Never cut: a question about half of a passage may ask for the other half.
        room = self.writer.max_length - most
        fitting = [ids for ids in prompts if len(ids) <= room]
        self.read += sum(map(len, fitting))
        texts = iter(self.writer.texts(fitting, most) if fitting else [])
        return [(next(texts), "") if len(ids) <= room else ("", TOO_LONG) for ids in prompts]

    def counted(self) -> Counter[str]:
        return Counter(read=self.read, written=self.writer.tokens)


class Served:
    """A model on a server. Raises UserError if it cannot be asked."""

    def __init__(self, spec: ServedSpec) -> None:
        self.writer = Writer(**vars(spec))
        self.writer.setup()

    def written(self, orders: Sequence[Order], most: int) -> list[tuple[str, str]]:
        bodies: dict[str, dict[str, Any]] = {}
        for number, (template, fields) in enumerate(orders):
            text = fill(template, **{name: safe_text(value) for name, value in fields.items()})
            bodies[str(number)] = self.writer.asked([text], most, GREEDY, 0)
        results = self.writer.answers(bodies)
        found: list[tuple[str, str]] = []
        for key in bodies:
            if results[key].failure is None:
                found.append((results[key].documents[0].text, ""))
            else:
                found.append(("", REFUSED if key in self.writer.rejected else FAILED))
        whys = Counter(why for _, why in found)
        failed, refused = whys[FAILED], whys[REFUSED]
        if 2 * failed > len(orders) or (refused and refused == len(orders)):
            # They would be lost: a batch that is kept is not written again.
            first = next(filter(None, (result.failure for result in results.values())))
            much = f"{failed + refused} of {len(orders)} requests failed"
            raise RunError(f"{much}, the first with: {first}")
        return found

    def counted(self) -> Counter[str]:
        numbers = self.writer.counted()
        names = {"read": "read_tokens", "written": "written_tokens", "cached": "cached"}
        return Counter({name: round(numbers[key]) for name, key in names.items()})


@dataclass
class Questions:
    """Has questions written and answered again.

    Args:
        asker: the model.
        count: most questions about a passage.
        max_new_tokens: of what it writes about a passage.
        f1: least F1 at which an answer is right.
    """

    asker: Asker
    count: int
    max_new_tokens: int
    f1: float

    def batch(self, tasks: Sequence[Task]) -> dict[str, Any]:
        """What the work file keeps of these tasks."""
        before = self.asker.counted()
        found: list[Candidate] = []
        orders = [self._order(task) for task in tasks]
        for number, (text, why) in enumerate(self.asker.written(orders, self.max_new_tokens)):
            written = read_questions(text, 1 if tasks[number].name else self.count)
            if not written:
                found.append(Candidate(number, "", "", why or NONE))
            for question, answer in written:
                shown = Candidate(number, safe_text(question), safe_text(answer))
                # The rules come first: they cost nothing.
                texts = list(map(_whole, tasks[number].passages))
                shown.fault = fault(shown.question, shown.answer, texts)
                found.append(shown)
        self._answer("with", tasks, found)
        self._answer("without", tasks, found)
        for place in (0, 1):
            self._answer(f"passage {place + 1} alone", tasks, found, place)
        # What was thrown away is kept too, for whoever wants to know why.
        tokens = dict(self.asker.counted() - before)
        return {"candidates": [asdict(one) for one in found], "counts": tokens}

    def _order(self, task: Task) -> Order:
        first, *others = task.passages
        fields = {"count": str(self.count), "title": first.title, "text": first.text}
        if not others:
            return WRITE, fields
        fields |= {"name": task.name, "other_title": others[0].title}
        return WRITE_TWO, fields | {"other_text": others[0].text}

    def _answer(self, shown: str, tasks: Sequence[Task], found: Sequence[Candidate], place: int | None = None) -> None:
        """Lets the model answer what is still without fault, and finds the fault in its answers.

        Args:
            shown: what is put before the model.
            place: of a pair's passage that is shown alone; other tasks are left alone then.
        """
        # One passage alone is the whole of most tasks.
        asked = [one for one in found if not one.fault and (place is None or tasks[one.task].name)]
        orders: list[Order] = []
        for one in asked:
            passages = tasks[one.task].passages
            if place is not None:
                passages = passages[place : place + 1]
            fields = {"question": one.question, "passages": "\n\n".join(map(_whole, passages))}
            orders.append((WITHOUT if shown == "without" else WITH, fields))
        for one, (text, why) in zip(asked, self.asker.written(orders, SHORT), strict=True):
            said = short(text)
            one.said[shown] = said
            right = f1_score(said, [one.answer]) >= self.f1
            if why:
                one.fault = why
            elif shown == "with":
                one.fault = "" if right else "answered otherwise with the passage"
            # An answer in a sentence of its own is known as well.
            elif right or holds(said, one.answer):
                one.fault = "answered without the passage" if place is None else "one passage is enough"


def short(text: str) -> str:
    """The answer in what a model wrote: its first line, without a label."""
    text = text.rpartition("</think>")[2]
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return safe_text(line.removeprefix("Answer:").strip())


def _whole(passage: Passage) -> str:
    return f"{passage.title}: {passage.text}" if passage.title else passage.text
