"""A language model that plays the search engine: the heart of ZeroSearch (paper section 3.3).

An empty text and one that is no list, such as a refusal, are what this search engine said: results
without a document. They are counted, and are no failures.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

from zs_lightning.errors import UserError
from zs_lightning.generation import Generated, Generator, Request, Sampling, StopTags
from zs_lightning.generation.memory import Fitting
from zs_lightning.models.checks import check_adapter, check_length, check_mixable, check_models
from zs_lightning.models.encoding import TextEncoder
from zs_lightning.models.loading import load_model, load_tokenizer
from zs_lightning.models.specs import LoraSpec, ModelSpec, naming, weights_key
from zs_lightning.models.vocabulary import end_ids
from zs_lightning.search.base import SearchEngine, beginning, most
from zs_lightning.search.cache import Cache, Key
from zs_lightning.search.http import MOST_CHARACTERS
from zs_lightning.search.orders import Guard, Orders, Part, Plan
from zs_lightning.streams import derive_seed
from zs_lightning.text.listing import listed_documents
from zs_lightning.text.prompts import EMPTY, USEFUL, Prompts, get_prompts
from zs_lightning.text.protocol import THOUGHT, THOUGHT_END, split_documents
from zs_lightning.types import Document, QAExample, SearchRequest, SearchResult

POLICY = "policy"
"""This model path means the policy's base model."""
ADAPTER = "simulator"
"""Name of the simulator's adapter on the policy's base model."""
OWN_ROWS = "documents for "
"""Begins the keys of the simulator's rows: the policy's rows may be in the same generator."""


def fitted(request: SearchRequest, fits: Callable[[SearchRequest], bool]) -> SearchRequest:
    """The request with as much of its query, and then as many of its golden answers, as fit.

    The first answer always stays.
    """
    # What the policy writes must never make its search fail: that would be a way out of a bad
    # reward, since failed searches are not trained on.
    if fits(request):
        return request
    answers = request.example.golden_answers

    def with_only(query: str, count: int) -> SearchRequest:
        example = replace(request.example, golden_answers=answers[:count])
        return replace(request, query=query, example=example)

    query = beginning(request.query, lambda text: fits(with_only(text, 1)))
    more = most(len(answers) - 1, lambda count: fits(with_only(query, 1 + count)))
    return with_only(query, 1 + more)


def written_documents(text: str, prompts: Prompts, count: int, thinking: bool = False) -> tuple[Document, ...]:
    """The documents of a simulator's text; `thinking` says that it begins inside of a thought."""
    if prompts.chat:
        _, closed, rest = text.rpartition(THOUGHT_END)
        before = "" if thinking else text.split(THOUGHT)[0]
        text = rest if closed else before
    for ending in prompts.simulator_stop:
        text = text.split(ending)[0]
    # Where the set numbers documents, a chat model's text without any list is no result: it may be
    # a thought or a refusal.
    read = listed_documents if prompts.chat and "{number}" in prompts.document else split_documents
    return tuple(Document(text=piece[:MOST_CHARACTERS]) for piece in read(text, count))


@dataclass
class _Waiting:
    """A search whose parts are being written."""

    plan: Plan
    written: dict[int, tuple[Document, ...]]


class SimulatorSearch(SearchEngine):
    """A frozen model writes useful or noisy documents for a query.

    A model of its own lives outside of the module tree: precision, strategy and checkpoints of
    training do not touch it. With `path: policy` it is the policy's base model with another
    adapter, or without one: it takes no memory of its own, and documents are written in the same
    batch as the policy's turns. Then `adapter` is its only other option; dtype, quantization and
    device are those of model.model. A model that was not trained to be a simulator takes
    `prompts: zerosearch_prompted`.

    Args:
        model: the simulator's weights; `path: policy` shares the policy's base model. `adapter` is
            the folder that SimulatorSFT wrote.
        prompts: template set: zerosearch, zerosearch_prompted, miniature, or a .yaml or .json file
            with one, whose orders decide what useful documents and each kind of noise are.
        count: documents per search.
        max_new_tokens: most tokens of one result.
        sampling: how documents are drawn; the reference uses temperature 0.8.
        slots: searches answered at the same time.
        max_length: most tokens of a prompt and its result. What is too long for it of a query, and
            golden answers after the first, do not come into the prompt.
        noise: kinds of noise with their weights, such as {off_topic: 2, contradicting: 1}; null is
            the paper's, {noisy: 1}. Others are partial, outdated, empty (nothing is found) and
            those of a file of prompts.
        mixed: noise is drawn for each document of a result, as real engines mix them. The paper
            draws once for all of them.
        guard: rule does not tell the golden answers to a simulator whose query names nothing of the
            question, of its answers and of what was found before, or holds the answer; one without
            a word of content finds nothing. {model: FOLDER, threshold: 0.45} asks a sentence
            embedder where a query shares no word with them, see GuardModel. paper always tells
            them.
        cache: sqlite file that keeps what was written, for other runs; null keeps nothing.
        variants: so many results of each query and kind are told apart, so that other seeds find
            them in the cache; null draws each result anew.
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
        noise: dict[str, float] | None = None,
        mixed: bool = False,
        guard: Guard = "rule",
        cache: str | None = None,
        variants: int | None = None,
    ) -> None:
        if count < 1 or slots < 1 or not 1 <= max_new_tokens < max_length:
            wanted = "count and slots >= 1, and max_new_tokens from 1 to below max_length"
            raise UserError(f"search: expected {wanted}; got {count}, {slots}, {max_new_tokens}, {max_length}")
        self.spec = model
        self.prompts = get_prompts(prompts)
        self.orders = Orders(self.prompts, count, noise, mixed, guard, variants)
        self.count = count
        self.max_new_tokens = max_new_tokens
        self.sampling = sampling
        self.slots = slots
        # Of SimulatorSFT, which gives its own model to `attach`.
        self.fitting = Fitting("data.batch_size", slots, "set model.model.quantization: nf4, or take a smaller model")
        self.max_length = max_length
        self.shared = model.path == POLICY
        """Whether it writes with the policy's base model, in the policy's generator."""
        self.generator: Generator | None = None
        self.model: Any = None
        self.waiting: dict[str, _Waiting] = {}
        self.done: list[SearchResult] = []
        self.counters: Counter[str] = Counter()
        self.cache_path = cache
        self.cache: Cache | None = None
        for option in fields(ModelSpec) if self.shared else ():
            value = getattr(model, option.name)
            if option.name not in ("path", "adapter") and value != option.default:
                reason = "with path: policy the simulator is the policy's own base, as model.model loads it"
                to = f"leave it out, or set model.model.{option.name}"
                raise UserError(f"search.model.{option.name}: {reason}; got {value}; {to}")

    @property
    def simulator(self) -> SimulatorSearch:
        return self

    @property
    def room(self) -> int:
        """Most tokens of a prompt."""
        return self.max_length - self.max_new_tokens

    def setup(self) -> None:
        if self.model is None and not self.shared:
            tokenizer = load_tokenizer(self.spec.path, "model.search.model")
            # Loading takes minutes: what cannot work is said before.
            self.check_room(tokenizer)
            model = load_model(self.spec, "model.search.model", tokenizer=tokenizer)
            self.fitting.key = "model.search.slots"
            self.fitting.instead = "lower model.search.max_length, or set its quantization: nf4"
            self.attach(model, tokenizer)

    def attach(self, model: Any, tokenizer: Any) -> None:
        """Uses a model that is already in memory, in eval mode."""
        self.model = model
        self.tokenizer = tokenizer
        self.encoder = TextEncoder(tokenizer)
        self.stop = StopTags(tokenizer, self.prompts.simulator_stop)
        self.stop.end_ids = end_ids(tokenizer, model)
        self.orders.load(str(model.device))
        if self.cache_path and self.cache is None:
            self.cache = Cache(self.cache_path, option="search.cache")
            config = model.config
            base = weights_key(str(config._name_or_path if self.shared else self.spec.path))
            adapter = weights_key(self.spec.adapter) if self.spec.adapter else ""
            quantised = getattr(config, "quantization_config", None)
            self.identity = f"{base} {adapter} {model.dtype} {quantised}"
            """What the documents depend on besides the prompt and the draws."""

    def check_room(self, tokenizer: Any) -> None:
        """Raises UserError if no search fits a prompt, or the chat template cannot take it."""
        self.encoder = TextEncoder(tokenizer)
        nothing = QAExample(id="", question="", golden_answers=(), source="setup")
        request = SearchRequest(key="", query="", example=nothing, turn=0, seed=0)
        labels = [USEFUL, *self.orders.weights]
        least = max(len(self.prompt_ids(request, label)) for label in labels if label != EMPTY)
        if least >= self.room:
            prompt = f"the simulator's prompt has {least} tokens without question and query"
            room = f"search.max_length - search.max_new_tokens = {self.room}"
            raise UserError(f"search: {prompt}, and {room}; raise search.max_length")

    def join(self, generator: Generator) -> None:
        """Uses the generator of the policy, which is stepped by the rollout."""
        self.generator = generator
        self.done = []
        self.waiting = {}

    def close(self) -> None:
        self.generator = None

    def prompt_ids(
        self,
        request: SearchRequest,
        label: str,
        count: int | None = None,
        blind: bool = False,
    ) -> list[int]:
        """The order of `count` documents, None as many as a search has; a blind one withholds
        question and golden answers."""
        prompts = self.prompts
        template = prompts.order(label, blind)
        fields = self.orders.fields(request, self.count if count is None else count)
        return self.encoder.prompt(template, fields, prompts.chat, prompts.simulator_system, prompts.thinking)

    def _fitting_ids(self, request: SearchRequest, part: Part, blind: bool) -> list[int]:
        """They exceed the room only if there is none for the question and its first answer."""

        def ids_of(request: SearchRequest) -> list[int]:
            return self.prompt_ids(request, part.label, part.count, blind)

        ids = ids_of(request)
        if len(ids) <= self.room:
            return ids
        return ids_of(fitted(request, lambda shorter: len(ids_of(shorter)) <= self.room))

    def submit(self, requests: Sequence[SearchRequest]) -> None:
        self.setup()
        if self.generator is None:
            self.waiting = {}
            if self.shared:
                raise UserError("search: `model.path: policy` needs a policy that is trained or tested at the same time")
            self.generator = Generator(self.model, self.fitting, self.max_length)
        for request, plan in zip(requests, self.orders.plans(requests), strict=True):
            self._write(self.generator, request, plan)

    def _write(self, generator: Generator, request: SearchRequest, plan: Plan) -> None:
        """Submits the parts of a search that are not in the cache."""
        written = [self._fitting_ids(request, part, plan.withheld) for part in plan.parts]
        if (longest := max(map(len, written), default=0)) > self.room:
            prompt = f"the simulator's prompt has {longest} tokens without the query"
            reason = f"{prompt}, more than max_length - max_new_tokens = {self.room}; raise search.max_length"
            self.done.append(SearchResult(key=request.key, failure=reason))
            return
        self.waiting[request.key] = _Waiting(plan, {})
        self.counters["results"] += 1
        self.counters[f"results_{plan.label}"] += 1
        self.counters["withheld"] += plan.withheld
        for number, (part, ids) in enumerate(zip(plan.parts, written, strict=True)):
            found = self.cache.get(self._cache_key(part, ids)) if self.cache else None
            if found is not None:
                self.counters["cached"] += 1
                self.waiting[request.key].written[number] = found
                continue
            generator.submit(
                Request(
                    key=f"{OWN_ROWS}{number} {request.key}",
                    ids=ids,
                    max_new_tokens=self.max_new_tokens,
                    seed=part.seed,
                    sampling=self.sampling,
                    stop=self.stop,
                    adapter=ADAPTER if self.shared and self.spec.adapter else "",
                    deliver=partial(self._collect, part=part, ids=ids, blind=plan.withheld),
                )
            )
        self._finish(request.key)

    def _cache_key(self, part: Part, ids: Sequence[int]) -> Key:
        drawn = derive_seed(part.seed, self.sampling, self.max_new_tokens)
        return (self.name, self.identity, f"{part.label} {drawn} {list(ids)}", part.count)

    def _collect(self, generated: Generated, part: Part, ids: list[int], blind: bool) -> None:
        number, _, key = generated.key.removeprefix(OWN_ROWS).partition(" ")
        sampled = generated.token_ids
        text = self.encoder.decode(sampled[:-1] if sampled[-1] in self.stop.end_ids else sampled)
        prompts = self.prompts
        template = prompts.order(part.label, blind)
        thinking = self.encoder.opens_thought(template, prompts.chat, prompts.simulator_system, prompts.thinking)
        documents = written_documents(text, prompts, part.count, thinking)
        self.counters["written"] += 1
        self.counters["tokens"] += len(sampled)
        if self.cache:
            self.cache.put(self._cache_key(part, ids), documents)
        self.waiting[key].written[int(number)] = documents
        self._finish(key)

    def _finish(self, key: str) -> None:
        """Makes the result of a search if all of its parts are written."""
        waiting = self.waiting[key]
        plan = waiting.plan
        if len(waiting.written) < len(plan.parts):
            return
        del self.waiting[key]
        documents = plan.assembled([waiting.written[n] for n in range(len(plan.parts))])
        # Without documents it is a result all the same: a simulator that fails to write must not
        # take its rollout out of the batch.
        self.counters["empty_results"] += not documents
        self.done.append(plan.result(key, documents))

    def hit_rate(self) -> float | None:
        if not self.cache:
            return None
        return self.counters["cached"] / max(1, self.counters["cached"] + self.counters["written"])

    def counted(self) -> dict[str, float]:
        """Results, also by label; those without a document (nothing, only thoughts, or text that is
        no list), and those without golden answers; orders that were written or found in the cache;
        tokens that were written."""
        names = ("results", "empty_results", "withheld", "tokens", *(["cached"] if self.cache else []))
        return {name: float(self.counters[name]) for name in dict.fromkeys([*names, *self.counters])}

    def poll(self) -> list[SearchResult]:
        # A shared generator is stepped by the rollout, which collects with `ready`.
        if self.generator is not None and not self.shared:
            self.generator.run()
        return self.ready()

    def ready(self) -> list[SearchResult]:
        results = self.done
        self.done = []
        return results


def specs_of(policy: ModelSpec, search: SearchEngine) -> dict[str, ModelSpec]:
    """The models of a policy and its search engine, by their keys."""
    specs = {"model.model": policy}
    if search.simulator is not None and not search.simulator.shared:
        specs["model.search.model"] = search.simulator.spec
    return specs


def check_weights(policy: ModelSpec, lora: LoraSpec | None, search: SearchEngine) -> None:
    """Raises UserError for what is wrong with a policy or its simulator, before weights load."""
    simulator = search.simulator
    check_models(specs_of(policy, search))
    if simulator is not None:
        if simulator.shared:
            _check_shared(policy, lora, simulator)
        spec = policy if simulator.shared else simulator.spec
        check_length(spec, simulator.max_length, "model.search.max_length")


def _check_shared(policy: ModelSpec, lora: LoraSpec | None, simulator: SimulatorSearch) -> None:
    # Without an adapter of the policy's own, training would change what the simulator writes.
    if lora is None:
        raise UserError("search: `model.path: policy` shares the policy's base model, which `lora: null` would train")
    if lora.dora:
        shares = "with `model.path: policy` the simulator shares a batch with the policy, which DoRA cannot"
        raise UserError(f"model.lora.dora: {shares}; set dora: false, or give the simulator a model of its own")
    adapters = {"model.model": policy.adapter, "model.search.model": simulator.spec.adapter}
    for key, folder in adapters.items():
        if folder:
            with naming(key):
                check_mixable(policy, folder)
                check_adapter(policy, folder)
