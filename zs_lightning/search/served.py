"""A model that runs elsewhere, behind any server that speaks OpenAI's API, and a simulator
there."""

import asyncio
import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from zs_lightning.errors import UserError
from zs_lightning.generation import Sampling
from zs_lightning.search.base import answered
from zs_lightning.search.http import Call, Failed, Found, HttpSpec, Rejected, check_address, field
from zs_lightning.search.orders import Guard, Orders, Part, Plan
from zs_lightning.search.remote import RemoteSearch
from zs_lightning.search.simulator import fitted, written_documents
from zs_lightning.text.prompts import USEFUL, fill, get_prompts
from zs_lightning.text.protocol import disarm
from zs_lightning.types import Document, QAExample, SearchRequest, SearchResult

SEEDS = 1 << 31
"""Some servers keep a seed in 32 bits."""
ROOMS = (2000, 400, 100)
"""Characters that a query and the golden answers after the first may have together."""

_SQUARE_TOKEN = re.compile(r"\[(/?[a-z]?[A-Z_]+)\]")
"""Control tokens of Mistral, GLM and others that have no angle brackets, such as [INST]."""
_SECRET = re.compile(
    r"key|token|(.*[_-])?((api|access|secret|private)[_-]?key|secret|passw(or)?d|(proxy-)?authorization|auth|credentials?|bearer"
    r"|(access|api|auth|bearer|hf|secret)[_-]?token)",
    re.IGNORECASE,
)
"""Names of what is secret; max_tokens and prompt_cache_key are not."""


@dataclass(eq=False, repr=False)
class ServedModel(RemoteSearch):
    """A model behind OpenAI's API, which writes on with what was said, by us first and then by
    it."""

    # A prompt that is too long, for example.
    rejects = (400, 413, 422)

    endpoint: str = dataclasses.field(init=False)
    http: HttpSpec = HttpSpec(timeout=120.0, concurrency=256)
    hosts: list[str] | str = "http://127.0.0.1:8000"
    model: str | None = None
    api: Literal["chat", "completions"] | None = None
    options: dict[str, Any] | None = None
    api_key_env: str = ""

    def __post_init__(self) -> None:
        hosts = [self.hosts] if isinstance(self.hosts, str) else self.hosts
        if not hosts:
            raise UserError(f"{self.place}.hosts: expected at least one")
        for host in hosts:
            check_address(host, f"{self.place}.hosts", "http://127.0.0.1:8000")
        if found := _key_like(self.options):
            reason = f"{found} seems to be a key, and options stand in config.yaml"
            raise UserError(f"{self.place}.options: {reason}; name its environment variable in {self.place}.api_key_env")
        self.endpoint = base_address(hosts[0])
        super().__post_init__()
        self.refused = f"see {self.place}.api_key_env"
        path = "/chat/completions" if self.api == "chat" else "/completions"
        self.addresses = [base_address(host) + path for host in hosts]
        # Answers are kept under the model's name, whichever server wrote them.
        self.endpoint = self.model or self.endpoint

    def asked(
        self,
        said: Sequence[str],
        most: int,
        sampling: Sampling,
        seed: int,
        stop: Sequence[str] = (),
        system: str | None = None,
        thinking: bool | None = None,
    ) -> dict[str, Any]:
        """The JSON of a request for `most` tokens after what was said in turn."""
        messages = [] if system is None else [{"role": "system", "content": system}]
        for number, text in enumerate(said):
            messages.append({"role": ("user", "assistant")[number % 2], "content": text})
        is_chat = self.api == "chat"
        # OpenAI's API has no top_k: a server that does not know it refuses it, even 0.
        # In this order, since the answers are kept under the text of the whole.
        body = {
            "max_tokens": most,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": seed % SEEDS,
            "model": self.model,
            "top_k": sampling.top_k or None,
            "stop": list(stop) or None,
            "prompt": None if is_chat else "".join(said),
            "messages": messages if is_chat else None,
            "chat_template_kwargs": {"enable_thinking": thinking} if is_chat and thinking is not None else None,
        }
        return {name: value for name, value in body.items() if value is not None} | (self.options or {})

    def posted(self, body: dict[str, Any]) -> Call:
        return Call(json=body, headers={"Authorization": f"Bearer {self.key}"} if self.key else {})

    def written(self, answer: Any) -> tuple[str | None, dict[str, Any], Any]:
        """The text of an answer, the message around it, and why it ends."""
        choices = field(answer, "choices")
        if not isinstance(choices, list) or len(choices) != 1:
            got = len(choices) if isinstance(choices, list) else type(choices).__name__
            raise Failed(f"expected 1 choice; got {got}")
        is_chat = self.api == "chat"
        message = field(choices[0], "message") if is_chat else choices[0]
        text = field(message, "content" if is_chat else "text")
        if text is not None and not isinstance(text, str):
            raise Failed(f"the model's text is no text but {type(text).__name__}")
        return text, message, choices[0].get("finish_reason")


@dataclass(eq=False, repr=False)
class ServedRequests(ServedModel):
    """Asks for what is no search: a query is the JSON of a request, its one document the answer."""

    count: int = 1

    async def result(self, request: SearchRequest) -> SearchResult:
        documents = await self.look_up(request.query, self.posted(json.loads(request.query)))
        return SearchResult(key=request.key, documents=documents)

    def answers(self, bodies: Mapping[str, dict[str, Any]]) -> dict[str, SearchResult]:
        """What the model writes for each JSON of a request, by the same keys."""
        nobody = QAExample(id="", question="", golden_answers=(), source="")
        asked = {key: json.dumps(body) for key, body in bodies.items()}
        return answered(self, [SearchRequest(key=key, query=asked[key], example=nobody, turn=0, seed=0) for key in asked])


@dataclass(eq=False, repr=False)
class ServedSimulatorSearch(ServedModel):
    """SimulatorSearch with a model on a server: vLLM, SGLang, llama.cpp, Ollama and others.

        search:
          class_path: zs_lightning.search.ServedSimulatorSearch
          init_args: {hosts: "http://127.0.0.1:8000", model: simulator, prompts: zerosearch}

    Prompts, documents, kinds of noise and their draws are those of SimulatorSearch. All waiting
    rollouts are searched for at the same time, while the others write on. Each request carries a
    seed, which makes its documents reproducible as far as the server does.

    Servers have sampling defaults of their own. vLLM takes the model's: start it with
    `--generation-config vllm`. llama.cpp has a top_k and a min_p: `options: {top_k: 0, min_p: 0}`
    turns them off. `transformers serve` is greedy, unless the model's own file or
    `options: {generation_config: '{"do_sample": true}'}` says otherwise; leave `model` null there.

    Args:
        hosts: address of a server, or a list of servers that hold the same model and are asked in
            turn; a search that one of them fails goes to the next.
        model: name by which the servers know it; null sends none, for servers that hold only one.
        prompts: template set: zerosearch for a model trained by SimulatorSFT, zerosearch_prompted
            for an instruct model, or a .yaml or .json file with one.
        count: documents per search.
        max_new_tokens: most tokens of one result.
        sampling: how documents are drawn; the reference uses temperature 0.8. top_k is sent only
            if it is not 0.
        api: `chat` sends the prompt as a message, `completions` as plain text; null takes what the
            template set says. A model without a chat template needs completions.
        options: more fields of each request, such as
            {chat_template_kwargs: {enable_thinking: false}}.
        noise: kinds of noise with their weights, see SimulatorSearch.
        mixed: noise is drawn for each document, see SimulatorSearch.
        guard: when golden answers are withheld, see SimulatorSearch.
        variants: results of a query and kind that are told apart, see SimulatorSearch.
        http: how a server is asked; its cache keeps what was written. A search's time begins when
            it is sent: set concurrency to no more than all servers together write at the same time.
        api_key_env: name of the environment variable that holds the key; empty for none.
    """

    name = "served_simulator"
    prompts: str = "zerosearch"
    max_new_tokens: int = 600
    sampling: Sampling = Sampling(temperature=0.8)
    noise: dict[str, float] | None = None
    mixed: bool = False
    guard: Guard = "rule"
    variants: int | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"search.max_new_tokens: expected 1 or more; got {self.max_new_tokens}")
        self.templates = get_prompts(self.prompts)
        self.api = self.api or ("chat" if self.templates.chat else "completions")
        super().__post_init__()
        self.orders = Orders(self.templates, self.count, self.noise, self.mixed, self.guard, self.variants)
        self.plans: dict[str, Plan] = {}
        self.thinks = self.api == "chat" and self.templates.thinking is True
        tried = f"search.model {self.model or 'null'}, search.api {self.api}, search.options"
        self.advice = f"see whether it runs and can write with {tried} and search.max_new_tokens, or set search.hosts"

    # ------------------------------------------------------------------ what is asked

    def setup(self) -> None:
        super().setup()
        self.orders.load()

    def submit(self, requests: Sequence[SearchRequest]) -> None:
        # Here they come together; the thread has one at a time.
        for request, plan in zip(requests, self.orders.plans(requests), strict=True):
            self.plans[request.key] = plan
        super().submit(requests)

    def body(self, request: SearchRequest, part: Part, blind: bool = False) -> dict[str, Any]:
        """The JSON that is sent for a part of a search; a blind one withholds golden answers."""
        template = self.templates.order(part.label, blind)
        fields = self.orders.fields(request, part.count)
        safe = {name: safe_text(text) for name, text in fields.items()}
        sets = self.templates
        options = (part.seed, sets.simulator_stop, sets.simulator_system, sets.thinking)
        return self.asked([fill(template, **safe)], self.max_new_tokens, self.sampling, *options)

    async def result(self, request: SearchRequest) -> SearchResult:
        plan = self.plans.pop(request.key)
        parts = [self._part(request, part, plan.withheld) for part in plan.parts]
        return plan.result(request.key, plan.assembled(await asyncio.gather(*parts)))

    async def _part(self, request: SearchRequest, part: Part, blind: bool) -> tuple[Document, ...]:
        # A server does not say how many tokens it has room for. When it rejects a request, less of
        # the query and of further golden answers is sent.
        rejected: dict[str, Rejected] = {}
        for room in ROOMS:
            shorter = fitted(request, partial(_fits, room))
            body = self.body(shorter, part, blind)
            text = json.dumps(body)
            if text not in rejected:
                self.counters["cut"] += not rejected and len(shorter.query) < len(request.query)
                try:
                    found = await self.look_up(text, self.posted(body))
                    return found[: part.count]
                except Rejected as error:
                    rejected[text] = error
        first = next(iter(rejected.values()))
        longer = "lower search.max_new_tokens or give the server a longer context"
        raise Rejected(f"{first}; if its prompt is too long, {longer}")

    # ------------------------------------------------------------------ what is answered

    def parse(self, answer: Any) -> Found:
        written, message, ending = self.written(answer)
        text = written or ""
        # A chat template may open the thought itself: then the text has a tag at the thought's end
        # alone, and none if it was cut.
        self.thinks |= self.api == "chat" and "</think>" in text and "<think>" not in text
        is_cut = self.thinks and ending == "length" and "</think>" not in text
        documents = () if is_cut else written_documents(text, self.templates, self.count)
        apart = message.get("reasoning_content") or message.get("reasoning")
        is_thought = is_cut or "<think>" in text or bool(apart)
        # A model that runs here may end at once, too; all else did not come to write.
        if not documents and (is_thought or ending != "stop" or written is None):
            reason = f"the model writes no document in {self.max_new_tokens} tokens"
            to = "raise search.max_new_tokens"
            if is_thought:
                reason += ", only thoughts"
                to += ", or turn thoughts off with search.options"
            raise Failed(f"{reason} (finish_reason {ending}); {to}")
        return list(documents)

    def call(self, query: str) -> Call:
        """What setup asks; searches are asked by `documents`."""
        example = QAExample(id="", question=query, golden_answers=(query,), source="setup")
        request = SearchRequest(key="", query=query, example=example, turn=0, seed=0)
        return self.posted(self.body(request, Part(USEFUL, self.count, 0)))


def safe_text(text: str) -> str:
    """Text from outside as it is sent: a server reads control tokens in any text."""
    return _SQUARE_TOKEN.sub(r"(\1)", disarm(text))


def _fits(room: int, request: SearchRequest) -> bool:
    return len(", ".join([request.query, *request.example.golden_answers[1:]])) <= room


def _key_like(options: Any) -> str:
    """The name of an option, at any depth, that holds what nobody may read; empty for none."""
    if isinstance(options, list):
        return next(filter(None, map(_key_like, options)), "")
    for name, value in options.items() if isinstance(options, dict) else ():
        if _SECRET.fullmatch(str(name)):
            return str(name)
        if found := _key_like(value):
            return found
    return ""


def base_address(address: str) -> str:
    """The address with the API's version at its end, which some write and others do not."""
    address = re.sub(r"/+((chat/)?completions|models)?/*$", "", address)
    return address if re.search(r"/v\d+$", address) else f"{address}/v1"
