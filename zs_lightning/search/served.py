"""A simulator that runs elsewhere, behind any server that speaks OpenAI's API."""

from __future__ import annotations

import asyncio
import json
import re
from functools import partial
from typing import Any, Literal

from zs_lightning.errors import UserError
from zs_lightning.generation import Sampling
from zs_lightning.search.hosts import Host, Hosts
from zs_lightning.search.http import BadAnswer, Breaker, Call, Failed, Http, HttpSpec, Late, NoConnection, Rejected
from zs_lightning.search.json_documents import Found, field
from zs_lightning.search.remote import FIRST_ATTEMPTS, FIRST_QUERY, RemoteSearch, check_endpoint
from zs_lightning.search.simulator import draw_noisy, fitted, order, written_documents
from zs_lightning.streams import derive_seed
from zs_lightning.text.prompts import fill, get_prompts
from zs_lightning.text.protocol import disarm
from zs_lightning.types import Document, QAExample, SearchRequest

LISTING_SECONDS = 5.0
"""In setup, until a server has to have named its models. Writing may take longer: some load the model for the first word."""
SEEDS = 1 << 31
"""Some servers keep a seed in 32 bits."""
MOST_NAMED = 10
REJECTS = (400, 413, 422)
"""A prompt that is too long, for example."""
ROOMS = (2000, 400, 100)
"""Characters that a query and the golden answers after the first may have together: a server does not say how many tokens it
has room for, so the next is tried when it rejects a request."""

_SQUARE_TOKEN = re.compile(r"\[(/?[a-z]?[A-Z_]+)\]")
"""Control tokens of Mistral, GLM and others that have no angle brackets, such as [INST]."""


class Unwritten(Rejected):
    """The server is well, but its model did not get to write a document."""


class ServedSimulatorSearch(RemoteSearch):
    """SimulatorSearch with a model on a server: vLLM, SGLang, llama.cpp, Ollama, `transformers serve`.

        search:
          class_path: zs_lightning.search.ServedSimulatorSearch
          init_args:
            hosts: ["http://127.0.0.1:8000", "http://127.0.0.1:8001"]
            model: simulator
            prompts: zerosearch
            count: 5
            http: {timeout: 120.0, concurrency: 256}

    These lines take the place of `search:` in a policy's configuration. A shipped one needs two options more than before:
    `--model.search ServedSimulatorSearch --model.search.hosts http://127.0.0.1:8000`; prompts and count stay.

    Prompts, documents and the draw of useful or noisy are those of SimulatorSearch. All waiting rollouts are searched for at
    the same time, while the others write on. A search whose server fails, or takes half of its time, goes to the next one.
    Text from outside is sent with ‹ › in place of angle brackets, since a server takes what looks like a control token for
    one. Each request carries a seed, which makes its documents reproducible as far as the server does.

    Servers have sampling defaults of their own. vLLM takes the model's: start it with `--generation-config vllm`.
    llama.cpp has a top_k and a min_p: `options: {top_k: 0, min_p: 0}` turns them off. `transformers serve` is greedy, unless
    the model's own file or `options: {generation_config: '{"do_sample": true}'}` says otherwise; leave `model` null there.

    Args:
        hosts: address of a server such as http://127.0.0.1:8000, or a list of servers that hold the same model.
        model: name by which the servers know it; null sends none, for servers that hold only one.
        prompts: template set: zerosearch for a model trained by SimulatorSFT, zerosearch_prompted for an instruct model, or a
            .yaml or .json file with one.
        count: documents per search.
        max_new_tokens: most tokens of one result.
        sampling: how documents are drawn; the reference uses temperature 0.8. top_k is sent only if it is not 0.
        api: `chat` sends the prompt as a message, `completions` as plain text; null takes what the template set says. A model
            without a chat template needs completions.
        options: more fields of each request, such as {chat_template_kwargs: {enable_thinking: false}}.
        http: how a server is asked. A search's time begins when it is sent: set concurrency to no more than all servers
            together write at the same time.
        api_key_env: name of the environment variable that holds the key; empty for servers without one.
    """

    name = "served_simulator"
    refused = "see search.api_key_env"

    def __init__(
        self,
        hosts: list[str] | str = "http://127.0.0.1:8000",
        model: str | None = None,
        prompts: str = "zerosearch",
        count: int = 5,
        max_new_tokens: int = 600,
        sampling: Sampling = Sampling(temperature=0.8),
        api: Literal["chat", "completions"] | None = None,
        options: dict[str, Any] | None = None,
        http: HttpSpec = HttpSpec(timeout=120.0, concurrency=256),
        api_key_env: str = "",
    ) -> None:
        addresses = [hosts] if isinstance(hosts, str) else list(hosts)
        if not addresses or max_new_tokens < 1:
            raise UserError(f"search: expected at least one of hosts and max_new_tokens >= 1; got {hosts}, {max_new_tokens}")
        for address in addresses:
            check_endpoint(address, "search.hosts", "http://127.0.0.1:8000")
        super().__init__(addresses[0], count, http, api_key_env)
        self.bases = [base_address(address) for address in addresses]
        self.breakers = [Breaker() for _ in addresses]
        # What answers are kept under: the model's name, whichever server wrote them.
        self.endpoint = model or self.bases[0]
        self.model, self.prompts, self.max_new_tokens, self.sampling = model, get_prompts(prompts), max_new_tokens, sampling
        self.api = api or ("chat" if self.prompts.chat else "completions")
        self.options = options or {}
        self.thinks = self.api == "chat" and self.prompts.thinking is True

    # ------------------------------------------------------------------ one search

    def _noisy(self, request: SearchRequest) -> bool:
        return draw_noisy(request.seed, request.noise_prob)

    def _asked(self, request: SearchRequest) -> str:
        """The body of the request."""
        template, fields = order(self.prompts, request, self._noisy(request), self.count)
        prompt = fill(template, **{name: _as_text(value) for name, value in fields.items()})
        body: dict[str, Any] = {
            "max_tokens": self.max_new_tokens,
            "temperature": self.sampling.temperature,
            "top_p": self.sampling.top_p,
            "seed": derive_seed(request.seed, "simulator") % SEEDS,
        }
        if self.model is not None:
            body["model"] = self.model
        if self.sampling.top_k:
            body["top_k"] = self.sampling.top_k
        if self.prompts.simulator_stop:
            body["stop"] = list(self.prompts.simulator_stop)
        if self.api == "completions":
            body["prompt"] = prompt
        else:
            system = self.prompts.simulator_system
            body["messages"] = [] if system is None else [{"role": "system", "content": system}]
            body["messages"].append({"role": "user", "content": prompt})
            if self.prompts.thinking is not None:
                body["chat_template_kwargs"] = {"enable_thinking": self.prompts.thinking}
        return json.dumps(body | self.options)

    async def _found(self, request: SearchRequest) -> tuple[Document, ...]:
        """Less and less of the query and of further golden answers is sent while the server rejects it."""
        rejected: dict[str, Rejected] = {}
        for room in ROOMS:
            part = fitted(request, partial(_fits, room))
            body = self._asked(part)
            if body in rejected:
                continue
            self.counters.cut += not rejected and len(part.query) < len(request.query)
            try:
                return await self._documents(body)
            except Unwritten:
                raise
            except Rejected as error:
                rejected[body] = error
        raise next(iter(rejected.values()))

    def call(self, query: str) -> Call:
        path = "/chat/completions" if self.api == "chat" else "/completions"
        return Call(path, json=json.loads(query), headers=self._headers())

    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"} if self.key else {}

    def parse(self, answer: Any) -> Found:
        choices = field(answer, "choices")
        if not isinstance(choices, list) or len(choices) != 1:
            got = len(choices) if isinstance(choices, list) else type(choices).__name__
            raise BadAnswer(f"expected 1 choice; got {got}")
        said = choices[0] if self.api == "completions" else field(choices[0], "message")
        name = "text" if self.api == "completions" else "content"
        text = field(said, name)
        if text is not None and not isinstance(text, str):
            raise BadAnswer(f"the model's text is no text but {type(text).__name__}")
        text, ending = text or "", choices[0].get("finish_reason")
        # A chat template may open the thought: its text has no tag but the one at its end, and none if it was cut.
        self.thinks |= self.api == "chat" and "</think>" in text and "<think>" not in text
        is_cut_thought = self.thinks and ending == "length" and "</think>" not in text
        documents = () if is_cut_thought else written_documents(text, self.prompts, self.count)
        thought = "<think>" in text or is_cut_thought or bool(said.get("reasoning_content") or said.get("reasoning"))
        # To end at once is what a model that runs here may do, too; all else is one that did not come to write.
        if not documents and (thought or ending != "stop" or field(said, name) is None):
            raise Unwritten(
                f"the model writes no document in {self.max_new_tokens} tokens{', only thoughts' * thought} (finish_reason "
                f"{ending}); raise search.max_new_tokens{', or turn thoughts off with search.options' * thought}"
            )
        return Found(documents)

    # ------------------------------------------------------------------ the servers

    def _door(self) -> Hosts:
        return Hosts([self._host(base, breaker) for base, breaker in zip(self.bases, self.breakers, strict=True)])

    def _host(self, base: str, breaker: Breaker) -> Host:
        client = Http(base, self.counters, breaker, self.key, self.refused, self.agent, "search.hosts", REJECTS)
        return Host(base, client)

    async def _first(self) -> None:
        """Asks every server for its models and for a result."""
        await asyncio.gather(*(self._check(base) for base in self.bases))

    async def _check(self, base: str) -> None:
        door = Hosts([self._host(base, Breaker())])
        try:
            await self._first_result(base, door, await self._listed(base, door))
        finally:
            await door.close()

    async def _listed(self, base: str, door: Hosts) -> str:
        """The server's models, as a part of a message; the wanted one is among them."""
        listing, seconds = Call("/models", headers=self._headers()), min(LISTING_SECONDS, self.http.timeout)
        try:
            names = await door.ask(listing, model_names, seconds, FIRST_ATTEMPTS)
        except (NoConnection, Late) as error:
            raise Failed(f"{base}: {error}; see whether the server runs and can be reached, or set search.hosts") from None
        except Failed as error:
            # Some write well without a list: `transformers serve` has none before something was downloaded from the hub.
            return f"not listed, {error}"
        known = ", ".join(names[:MOST_NAMED]) or "none"
        # Ollama lists "name" with its tag, by which it need not be asked for.
        if self.model is not None and not {self.model, f"{self.model}:latest"} & set(names):
            raise Failed(f"{base} lists no model {self.model}; set search.model to one of its models ({known}), or to null")
        return known

    async def _first_result(self, base: str, door: Hosts, known: str) -> None:
        example = QAExample(id="", question=FIRST_QUERY, golden_answers=(FIRST_QUERY,), source="setup")
        call = self.call(self._asked(SearchRequest(key="", query=FIRST_QUERY, example=example, turn=0, seed=0)))
        try:
            await door.ask(call, self.parse, self.http.timeout, FIRST_ATTEMPTS)
        except Failed as error:
            raise Failed(
                f"{base}: {error}; see whether the server can write with search.model {self.model or 'null'} (its models: "
                f"{known}), search.api {self.api}, search.options and search.max_new_tokens, or set search.hosts"
            ) from None


def _fits(room: int, request: SearchRequest) -> bool:
    return len(", ".join([request.query, *request.example.golden_answers[1:]])) <= room


def base_address(address: str) -> str:
    """The address with the API's version at its end, as some write it and others do not."""
    address = re.sub(r"/+((chat/)?completions|models)?/*$", "", address)
    return address if re.search(r"/v\d+$", address) else f"{address}/v1"


def model_names(answer: Any) -> list[str]:
    """Of the answer to GET /v1/models.

    Raises:
        BadAnswer: it is no list of models.
    """
    models = field(answer, "data")
    if not isinstance(models, list):
        raise BadAnswer(f"the models are no list but {type(models).__name__}")
    return [str(model["id"]) for model in models if isinstance(model, dict) and "id" in model]


def _as_text(value: str) -> str:
    """A server reads control tokens in any text: nothing from outside may look like one."""
    return _SQUARE_TOKEN.sub(r"(\1)", disarm(value))
