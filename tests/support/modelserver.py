"""A server of a real model with OpenAI's API, as far as a simulator needs it: in the test, or as a process of its own.

    PYTHONPATH=tests python -m support.modelserver [FOLDER [ADAPTER]]

serves the shipped base model, or that of a folder, and prints its address.
"""

import os
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

from support.faultserver import FaultServer, Reply, searching
from zs_lightning.generation import Generator, Request, Sampling, StopTags
from zs_lightning.models.loading import load_model, load_tokenizer
from zs_lightning.models.specs import ModelSpec
from zs_lightning.search import ServedSimulatorSearch, remote
from zs_lightning.search.http import HttpSpec
from zs_lightning.search.remote import FIRST_QUERY

GREEDY = Sampling(temperature=0.0)


def start_process(*files):
    """A process that serves the model of FOLDER, with ADAPTER merged; its address is the first line that it prints."""
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "support.modelserver", *files]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path})


class ModelServer:
    """Answers of a FaultServer: what the model writes, one request at a time. `names` are those of the model."""

    def __init__(self, model, tokenizer, names=("tiny",), length=640):
        self.model, self.tokenizer, self.names, self.length = model, tokenizer, names, length
        self.stops, self.lock = {}, threading.Lock()

    def __call__(self, asked):
        if asked.path == "/v1/models":
            return models(*self.names)
        body = asked.body
        if body.get("model", self.names[0]) not in self.names:
            return wrong(404, f"there is no model {body['model']}")
        if asked.path == "/v1/completions":
            return self.write(body["prompt"], body, completion)
        assert asked.path == "/v1/chat/completions"
        if not self.tokenizer.chat_template:
            return wrong(400, "there is no chat template")
        options = body.get("chat_template_kwargs", {})
        text = self.tokenizer.apply_chat_template(body["messages"], tokenize=False, add_generation_prompt=True, **options)
        return self.write(text, body, chat)

    def write(self, prompt, body, answer):
        endings = tuple(body.get("stop", ()))
        ids = self.tokenizer(prompt)["input_ids"]
        if len(ids) + body["max_tokens"] > self.length:
            return wrong(400, f"the prompt has {len(ids)} tokens")
        with self.lock:
            if endings not in self.stops:
                self.stops[endings] = StopTags(self.tokenizer, endings)
            engine = Generator(self.model, 1, self.length)
            engine.submit(
                Request(
                    key="",
                    ids=ids,
                    max_new_tokens=body["max_tokens"],
                    seed=body["seed"],
                    sampling=Sampling(body["temperature"], body["top_p"], body.get("top_k", 0)),
                    stop=self.stops[endings],
                )
            )
            generated = engine.run()[0]
        text = self.tokenizer.decode(generated.token_ids)
        for ending in (*endings, self.tokenizer.eos_token):
            text = text.split(ending)[0]
        return answer(text, "stop" if generated.stopped else "length")


def wrong(status, message):
    return Reply({"error": {"message": message, "type": "invalid_request_error", "code": status}}, status=status)


def models(*names):
    return {"object": "list", "data": [{"id": name, "object": "model", "created": 1, "owned_by": "me"} for name in names]}


def completion(text, reason="stop"):
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": reason}
    return {"id": "1", "object": "text_completion", "created": 1, "model": "tiny", "choices": [choice]}


def chat(text, reason="stop"):
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": reason}
    return {"id": "1", "object": "chat.completion", "created": 1, "model": "tiny", "choices": [choice]}


def writing(text, reason="stop"):
    """Answers of a server whose model writes the same on everything, in either API."""
    return well_at_first(lambda asked: (chat if "messages" in asked.body else completion)(text, reason), always=True)


def well_at_first(answer, always=False):
    """Answers of a server that lists its model and writes a first document; then it does as told (or at once, if always)."""

    def answers(asked):
        if asked.method == "GET":
            return models("tiny")
        if always or not is_first(asked):
            return answer(asked)
        return (chat if "messages" in asked.body else completion)("Doc 1: a.")

    return answers


def is_first(asked):
    """Whether it is the request that setup makes."""
    prompt = asked.body.get("prompt") or asked.body["messages"][-1]["content"]
    return FIRST_QUERY in prompt


def searches(server):
    """What the server was asked to write after its first word."""
    return [asked for asked in server.asked if asked.method == "POST" and not is_first(asked)]


@contextmanager
def clients(monkeypatch):
    """Makes clients of servers; they wait little between repetitions, and end here."""
    monkeypatch.setattr(remote, "BACKOFF", 0.01)
    made, before = [], searching()

    def make(*servers, timeout=60.0, concurrency=8, cache=None, mode="cache", **options):
        spec = HttpSpec(timeout, concurrency, cache, mode)
        settings = {"prompts": "miniature", "count": 3, "max_new_tokens": 24, "sampling": GREEDY, "http": spec, **options}
        made.append(ServedSimulatorSearch(hosts=[server.url("") for server in servers], **settings))
        return made[-1]

    yield make
    for engine in made:
        engine.close()
    assert not searching() - before


def found(engine, requests):
    """Results by key."""
    engine.submit(requests)
    results = {}
    while ready := engine.poll():
        results |= {result.key: result for result in ready}
    assert results.keys() == {request.key for request in requests}
    assert not any(result.documents for result in results.values() if result.failure)
    return results


if __name__ == "__main__":
    spec = ModelSpec(**dict(zip(("path", "adapter"), sys.argv[1:], strict=False)), device="cpu")
    server = FaultServer(ModelServer(load_model(spec), load_tokenizer(spec.path)))
    print(server.url(""), flush=True)
    server.thread.join()
