"""A language model that plays the search engine: the heart of ZeroSearch (paper section 3.3).

What a simulator writes is not to be trusted, but it is what a search engine said: an empty text and one that is no list, such
as a refusal, are results without a document. They are counted, and are no failures.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from zs_lightning.errors import UserError
from zs_lightning.generation import Generated, Generator, Request, Sampling, StopTags
from zs_lightning.models.checks import check_length, check_mixable, check_there
from zs_lightning.models.encoding import TextEncoder
from zs_lightning.models.loading import (
    LoraSpec,
    ModelSpec,
    check_model,
    check_models,
    load_model,
    load_tokenizer,
    read_config,
)
from zs_lightning.models.vocabulary import end_ids
from zs_lightning.search.base import SearchEngine, beginning
from zs_lightning.search.json_documents import MOST_CHARACTERS
from zs_lightning.streams import derive_seed, uniform
from zs_lightning.text.listing import listed_documents
from zs_lightning.text.prompts import Prompts, get_prompts
from zs_lightning.text.protocol import THOUGHT, THOUGHT_END, split_documents
from zs_lightning.types import Document, QAExample, SearchRequest, SearchResult

POLICY = "policy"
"""As a model path: the policy's base model."""
ADAPTER = "simulator"
"""Name of the simulator's adapter on the policy's base model."""
OWN_ROWS = "documents for "
"""Before the keys of the simulator's rows: the policy's rows may be in the same generator."""


def draw_noisy(seed: int, noise_prob: float) -> bool:
    """One draw per search: all its documents are of one kind (paper: u > p is useful)."""
    return uniform(seed, "noise") < noise_prob


def order(prompts: Prompts, request: SearchRequest, noisy: bool, count: int) -> tuple[str, dict[str, str]]:
    """The template that asks a simulator for documents, and its fields: the request's own question and answer (the reference
    pairs them by batch position)."""
    answers = request.example.golden_answers
    fields = {
        "question": request.example.question,
        "answer": ", ".join(answers),
        "first_answer": answers[0] if answers else "",
        "query": request.query,
        "count": str(count),
    }
    return prompts.simulator_noisy if noisy else prompts.simulator_useful, fields


def fitted(request: SearchRequest, fits: Callable[[SearchRequest], bool]) -> SearchRequest:
    """The request with as much of its query, and then as many of its golden answers, as a prompt has room for. The first answer
    always stays. What the policy writes must never make its search fail: that would be a way out of a bad reward."""
    if fits(request):
        return request
    answers = request.example.golden_answers

    def with_only(query: str, count: int) -> SearchRequest:
        return replace(request, query=query, example=replace(request.example, golden_answers=answers[:count]))

    query = beginning(request.query, lambda text: fits(with_only(text, 1)))
    more = bisect_left(range(2, len(answers) + 1), True, key=lambda count: not fits(with_only(query, count)))
    return with_only(query, 1 + more)


def written_documents(text: str, prompts: Prompts, count: int, thinking: bool = False) -> tuple[Document, ...]:
    """The documents of a simulator's text. The thoughts of a chat model are none of them; `thinking` says that the text
    begins inside of one. Where the set numbers documents, a chat model's text without any list is not a result either."""
    if prompts.chat:
        _, closed, rest = text.rpartition(THOUGHT_END)
        text = rest if closed else "" if thinking else text.split(THOUGHT)[0]
    for ending in prompts.simulator_stop:
        text = text.split(ending)[0]
    read = listed_documents if prompts.chat and "{number}" in prompts.document else split_documents
    return tuple(Document(text=piece[:MOST_CHARACTERS]) for piece in read(text, count))


class SimulatorSearch(SearchEngine):
    """A frozen model writes useful or noisy documents for a query.

    A model of its own lives outside of the module tree: precision, strategy and checkpoints of training do not touch it.
    With path `policy` it is the policy's base model with another adapter, or without one: it takes no memory of its own,
    and documents are written in the same batch as the policy's turns. A model that was not trained to be a simulator takes
    `prompts: zerosearch_prompted`.

    Args:
        model: the simulator's weights; `path: policy` shares the policy's base model. `adapter` is the folder that
            SimulatorSFT wrote.
        prompts: template set: zerosearch, zerosearch_prompted, miniature, or a .yaml or .json file with one.
        count: documents per search.
        max_new_tokens: most tokens of one result.
        sampling: how documents are drawn; the reference uses temperature 0.8.
        slots: searches answered at the same time.
        max_length: most tokens of a prompt and its result. What is too long for it of a query, and golden answers after the
            first, do not come into the prompt.
    """

    name = "simulator"

    def __init__(
        self,
        model: ModelSpec = ModelSpec(),
        prompts: str = "zerosearch",
        count: int = 5,
        max_new_tokens: int = 600,
        sampling: Sampling = Sampling(temperature=0.8),
        slots: int = 64,
        max_length: int = 1536,
    ) -> None:
        if count < 1 or slots < 1 or not 1 <= max_new_tokens < max_length:
            raise UserError(
                "search: expected count and slots >= 1, and max_new_tokens from 1 to below max_length; got "
                f"{count}, {slots}, {max_new_tokens}, {max_length}"
            )
        self.spec, self.prompts, self.count = model, get_prompts(prompts), count
        if self.shared and model != (alone := ModelSpec(POLICY, adapter=model.adapter)):
            wrong = ", ".join(n for n, value in vars(alone).items() if value != getattr(model, n))
            raise UserError(
                f"search.model: with path: policy the simulator is the policy's own base, as model.model loads it; got another "
                f"{wrong}: leave it out, or set it in model.model"
            )
        self.max_new_tokens, self.sampling, self.slots, self.max_length = max_new_tokens, sampling, slots, max_length
        self.generator: Generator | None = None
        self.model: Any = None
        self.noisy: dict[str, bool] = {}
        self.done: list[SearchResult] = []
        self.results = self.empty = 0

    @property
    def room(self) -> int:
        """Most tokens of a prompt."""
        return self.max_length - self.max_new_tokens

    @property
    def shared(self) -> bool:
        """Whether the simulator writes with the policy's base model, in the policy's generator."""
        return self.spec.path == POLICY

    def setup(self) -> None:
        if self.model is None and not self.shared:
            self.tokenizer = load_tokenizer(self.spec.path)
            self.check_room(self.tokenizer)
            self.attach(load_model(self.spec, "model.search.model", tokenizer=self.tokenizer), self.tokenizer)

    def attach(self, model: Any, tokenizer: Any) -> None:
        """Uses a model that is already in memory, in eval mode."""
        self.model, self.tokenizer, self.encoder = model, tokenizer, TextEncoder(tokenizer)
        self.stop = StopTags(tokenizer, self.prompts.simulator_stop)
        self.stop.end_ids = end_ids(tokenizer, model)

    def check_room(self, tokenizer: Any) -> None:
        """Raises UserError if no search can fit into a prompt, or the chat template cannot take it."""
        if (least := self.least(tokenizer)) >= self.room:
            raise UserError(
                f"search: the simulator's prompt has {least} tokens without question and query, and search.max_length - "
                f"search.max_new_tokens = {self.room}; raise search.max_length"
            )

    def least(self, tokenizer: Any) -> int:
        """Tokens of a prompt without question and query. Raises UserError if the chat template cannot take it."""
        self.encoder = TextEncoder(tokenizer)
        nothing = QAExample(id="", question="", golden_answers=(), source="setup")
        request = SearchRequest(key="", query="", example=nothing, turn=0, seed=0)
        return max(len(self.prompt_ids(request, noisy)) for noisy in (False, True))

    def join(self, generator: Generator) -> None:
        """Uses the generator of the policy, which is stepped by the rollout."""
        self.generator, self.done = generator, []

    def close(self) -> None:
        self.generator = None

    def prompt_ids(self, request: SearchRequest, noisy: bool, count: int | None = None) -> list[int]:
        """Of an order of `count` documents; None is as many as a search has."""
        template, fields = order(self.prompts, request, noisy, self.count if count is None else count)
        prompts = self.prompts
        return self.encoder.prompt(template, fields, prompts.chat, prompts.simulator_system, prompts.thinking)

    def _fitting_ids(self, request: SearchRequest, noisy: bool) -> list[int]:
        """Longer than the room only if there is none for the question and its first answer."""
        ids = self.prompt_ids(request, noisy)
        if len(ids) > self.room:
            ids = self.prompt_ids(fitted(request, lambda part: len(self.prompt_ids(part, noisy)) <= self.room), noisy)
        return ids

    def submit(self, requests: Sequence[SearchRequest]) -> None:
        self.setup()
        if self.generator is None:
            if self.shared:
                raise UserError("search: `model.path: policy` needs a policy that is trained or tested at the same time")
            self.generator = Generator(self.model, self.slots, self.max_length)
        for request in requests:
            noisy = draw_noisy(request.seed, request.noise_prob)
            ids = self._fitting_ids(request, noisy)
            if len(ids) > self.room:
                reason = (
                    f"the simulator's prompt has {len(ids)} tokens without the query, more than max_length - max_new_tokens = "
                    f"{self.room}; raise search.max_length"
                )
                self.done.append(SearchResult(key=request.key, failure=reason))
                continue
            self.noisy[request.key] = noisy
            self.generator.submit(
                Request(
                    key=OWN_ROWS + request.key,
                    ids=ids,
                    max_new_tokens=self.max_new_tokens,
                    seed=derive_seed(request.seed, "simulator"),
                    sampling=self.sampling,
                    stop=self.stop,
                    adapter=ADAPTER if self.shared and self.spec.adapter else "",
                    deliver=self._collect,
                )
            )

    def _collect(self, generated: Generated) -> None:
        key, ids = generated.key.removeprefix(OWN_ROWS), generated.token_ids
        text = self.encoder.decode(ids[: -1 if ids[-1] in self.stop.end_ids else None])
        prompts, noisy = self.prompts, self.noisy.pop(key)
        template = prompts.simulator_noisy if noisy else prompts.simulator_useful
        thinking = self.encoder.opens_thought(template, prompts.chat, prompts.simulator_system, prompts.thinking)
        documents = written_documents(text, prompts, self.count, thinking)
        self.results += 1
        self.empty += not documents
        self.done.append(SearchResult(key=key, documents=documents, noisy=noisy))

    def counted(self) -> dict[str, float]:
        """Results, and those without a document: nothing was written, or only thoughts or text without a list."""
        return {"results": float(self.results), "empty_results": float(self.empty)}

    def poll(self) -> list[SearchResult]:
        if self.generator is not None and not self.shared:
            self.generator.run()
        return self.ready()

    def ready(self) -> list[SearchResult]:
        results, self.done = self.done, []
        return results


def specs_of(policy: ModelSpec, search: SearchEngine) -> dict[str, ModelSpec]:
    """The models of a policy and its search engine, by their keys."""
    own = {"model.search.model": search.spec} if isinstance(search, SimulatorSearch) and not search.shared else {}
    return {"model.model": policy, **own}


def check_weights(policy: ModelSpec, lora: LoraSpec | None, search: SearchEngine) -> None:
    """Raises UserError for what is wrong with a policy or its simulator, before the weights of either are loaded."""
    if isinstance(search, SimulatorSearch) and search.shared:
        _check_shared(policy, lora, search)
    check_models(specs_of(policy, search))
    if isinstance(search, SimulatorSearch):
        path = policy.path if search.shared else search.spec.path
        check_length(read_config(path), path, search.max_length, "model.search.max_length")


def _check_shared(policy: ModelSpec, lora: LoraSpec | None, search: SimulatorSearch) -> None:
    if lora is None:
        raise UserError("search: `model.path: policy` shares the policy's base model, which `lora: null` would train")
    if lora.dora:
        raise UserError(
            "model.lora.dora: with `model.path: policy` the simulator shares a batch with the policy, which DoRA cannot; set "
            "dora: false, or give the simulator a model of its own"
        )
    for key, folder in {"model.model": policy.adapter, "model.search.model": search.spec.adapter}.items():
        if folder:
            check_there(folder, f"{key}.adapter")
            check_mixable(read_config(policy.path), folder, f"{key}.adapter")
    check_model(replace(policy, adapter=search.spec.adapter), "model.search.model")
