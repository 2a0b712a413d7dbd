"""One batch of a build: rollouts of the questions, and a verdict about each of their searches."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from zs_lightning.commands.build_simulator_data.served import ServedActor, ServedJudge
from zs_lightning.commands.served import Writer
from zs_lightning.data.columns import LONGEST_DOCUMENT
from zs_lightning.errors import RunError, UserError
from zs_lightning.models.checks import check_length, check_models
from zs_lightning.models.loading import load_model, load_tokenizer
from zs_lightning.rollout import Actor
from zs_lightning.search import SearchEngine
from zs_lightning.search.base import answered
from zs_lightning.search.judges import Case, ModelJudge, by_rule
from zs_lightning.streams import derive_seed
from zs_lightning.types import ActionKind, Document, QAExample, SearchRequest, Status, Trajectory, Turn

if TYPE_CHECKING:
    from zs_lightning.commands.build_simulator_data.builder import Builder


class Searcher:
    """The model that searches and the judges of a build, in memory. Raises UserError if a model
    cannot be loaded, or the engine cannot be used."""

    def __init__(self, options: Builder) -> None:
        self.options = options
        limits = options.rollout
        asks = limits.retrieve_first and not limits.max_turns
        # Nobody writes queries there, and who does not judge either need not be loaded.
        idle = asks and (options.judge == "rule" or options.judge_model is not None)
        specs = {} if options.served or idle else {"model": options.model}
        if options.judge_model is not None:
            specs["judge_model"] = options.judge_model
        if options.served is not None and limits.retrieve_first and limits.max_turns:
            change = "set rollout.max_turns: 0, which sends the questions alone, or leave it out"
            raise UserError(f"rollout.retrieve_first: a served model does not search after it; {change}")
        # What cannot work is said before weights are loaded.
        check_models(specs)
        for key, spec in specs.items():
            check_length(spec, limits.max_length, f"rollout.max_length ({key})")
        self.engines: dict[str, SearchEngine] = {"engine": options.search}
        self.judge: ModelJudge | ServedJudge | None = None
        self.actor: Actor | ServedActor | Questions
        model, tokenizer = None, None
        if options.served is not None and not idle:
            writer = Writer(**vars(options.served))
            self.engines["served"] = writer
            self.judge = ServedJudge(writer, limits.max_length)
            writer.setup()
            if not asks:
                self.actor = ServedActor(writer, options.search, options.templates, limits)
        if asks:
            self.actor = Questions(options.search)
        if options.served is None and not idle:
            tokenizer = load_tokenizer(options.model.path, "model")
            model = load_model(options.model, "model", tokenizer=tokenizer)
            if not asks:
                actor = Actor(tokenizer, options.search, options.templates, limits)
                actor.attach(model)
                self.actor = actor
        if options.judge_model is not None:
            tokenizer = load_tokenizer(options.judge_model.path, "judge_model")
            model = load_model(options.judge_model, "judge_model", tokenizer=tokenizer)
        if options.judge == "rule":
            self.judge = None
        elif model is not None:
            self.judge = ModelJudge(model, tokenizer, limits.slots, limits.max_length)
        self.counted: Counter[str] = Counter()

    def batch(self, examples: Sequence[QAExample]) -> dict[str, Any]:
        """What the work file keeps of these questions: pairs with verdicts, counts and seconds.
        Raises RunError if most rollouts of the batch failed, or the engine is gone."""
        begun = time.monotonic()
        seed = derive_seed(self.options.seed, "build")
        trajectories = self.actor.roll_out(examples, self.options.group_size, seed)
        counts: Counter[str] = Counter(questions=len(examples), trajectories=len(trajectories))
        cases: list[Case] = []
        for trajectory in trajectories:
            counts["tokens"] += sum(trajectory.loss_mask)
            counts["answered"] += trajectory.answer is not None
            counts["failed"] += trajectory.failure is not None
            counts["too_long"] += trajectory.status is Status.LENGTH_LIMIT
            cases += cases_of(trajectory)
        counts["searches"] = len(cases)
        if 2 * counts["failed"] > len(trajectories):
            # They would be lost: a batch that is kept is not searched for again.
            reason = next(t.failure for t in trajectories if t.failure is not None)
            much = f"{counts['failed']} of {len(trajectories)} rollouts of a batch failed"
            raise RunError(f"search: {much}, the first with: {reason}")
        found = [case for case in cases if case.documents]
        counts["empty"] = len(cases) - len(found)
        pairs = self._judged(found, counts)
        counts.update(self._engine())
        seconds = round(time.monotonic() - begun, 3)
        return {"pairs": pairs, "counts": dict(counts), "seconds": seconds}

    def _judged(self, cases: Sequence[Case], counts: Counter[str]) -> list[dict[str, Any]]:
        said: list[bool | None] = [None] * len(cases)
        if self.judge is not None:
            before = self.judge.tokens
            said = self.judge.verdicts(cases)
            counts["judge_tokens"] = self.judge.tokens - before
            if isinstance(self.judge, ServedJudge):
                counts["judge_failed"], self.judge.failed = self.judge.failed, 0
            counts["unclear"] = said.count(None) - counts["judge_failed"]
        pairs: list[dict[str, Any]] = []
        for case, model in zip(cases, said, strict=True):
            rule = by_rule(case)
            documents, shown = ([(found.title, found.text) for found in part] for part in (case.documents, case.shown))
            pair = {"key": case.example.key, "query": case.query, "documents": documents, "shown": shown}
            pairs.append(pair | {"rule": rule.useful, "model": model, "evidence": rule.evidence})
        return pairs

    def _engine(self) -> Counter[str]:
        """What the engine, and a server, counted since the last batch."""
        before, self.counted = self.counted, Counter()
        for name, engine in self.engines.items():
            for what, value in engine.counted().items():
                self.counted[f"{name}_{what}"] = round(value)
        return self.counted - before

    def close(self) -> None:
        self.actor.close()


class Questions:
    """Sends each question as it is, which takes no model."""

    def __init__(self, search: SearchEngine) -> None:
        self.search = search
        search.setup()

    def roll_out(self, examples: Sequence[QAExample], group_size: int, seed: int) -> list[Trajectory]:
        """As Actor.roll_out, but of each question once: the rest of a group would be the same."""
        requests = []
        for example in examples:
            own = derive_seed(seed, example.key)
            requests.append(SearchRequest(key=example.key, query=example.question, example=example, turn=0, seed=own))
        results = answered(self.search, requests)
        trajectories = []
        for example in examples:
            found = results[example.key]
            turn = Turn(text="", kind=ActionKind.SEARCH, content=example.question, span=(0, 0), documents=found.documents)
            if found.failure is None:
                turn.observation_span = (0, 0)
            whole = Trajectory(example=example, sample=0, prompt_ids=[], turns=[turn], failure=found.failure)
            trajectories.append(whole)
        return trajectories

    def close(self) -> None:
        self.search.close()


def cases_of(trajectory: Trajectory) -> list[Case]:
    """The searches of a trajectory that were answered, each with what was found before it."""
    cases: list[Case] = []
    shown: tuple[Document, ...] = ()
    for turn in trajectory.searches:
        documents = tuple(filter(None, map(_readable, turn.documents)))
        query = " ".join(turn.content.encode("utf-8", "replace").decode().split())
        cases.append(Case(trajectory.example, query, documents, shown))
        shown += documents
    return cases


def _readable(document: Document) -> Document | None:
    """The document as a file of records can hold it; None without a letter or digit."""
    # Halves of characters cannot be written, and NUL not be read.
    parts = (part.encode("utf-8", "replace").decode().replace("\0", "") for part in (document.title, document.text))
    title, text = (part[:LONGEST_DOCUMENT].strip() for part in parts)
    return Document(title=title, text=text) if any(map(str.isalnum, text)) else None
