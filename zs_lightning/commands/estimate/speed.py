"""How fast what is at hand writes, reads and trains as a configuration asks for, measured."""

# Measured is the code that `fit` runs, on a model of the job's shape, format and precision with
# random weights: no weight is downloaded, and what a device does at its best is not taken for what
# it does here. Layers are alike, so that two depths tell any depth, as in traced.py.

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch

from zs_lightning.commands.estimate.architectures import architecture
from zs_lightning.commands.estimate.job import READING, SCORING, SIMULATOR, TRAINING, WRITING, Job
from zs_lightning.commands.estimate.traced import shallow
from zs_lightning.generation import Generator, Request, Sampling, StopTags, own_adapter
from zs_lightning.generation.prefill import PREFILL_TOKENS
from zs_lightning.models.checks import AUTOCAST
from zs_lightning.models.loading import load_model, recompute_activations
from zs_lightning.models.logprobs import token_logprobs
from zs_lightning.models.lora import TRAINED, add_lora
from zs_lightning.models.specs import ModelSpec, choose_device, without_code

DEPTHS = (2, 6)
"""Layers of the two models that are timed."""
REPEATS, SECONDS = 5, 4.0
"""Most repeats of a measurement, and seconds after which no other is begun."""
DRAWN = 8
"""Tokens that a row draws in one of them."""
Timed = Callable[[], float]  # Does the work once; returns its seconds.


@dataclass(frozen=True)
class Rate:
    """How fast something is done."""

    tokens: float
    """A second: the median of the repeats."""
    spread: float
    """Between the fastest and the slowest of them, as a share of the median."""
    repeats: int


class Bench:
    """A model of the job's shape on its device, whose depth can be changed."""

    def __init__(self, spec: ModelSpec) -> None:
        from transformers import AutoModelForCausalLM
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        self.layers = architecture(spec.path).num_hidden_layers
        self.depths: tuple[int, ...] = DEPTHS if self.layers > max(DEPTHS) else (self.layers,)
        config = shallow(spec.path, max(self.depths))
        with tempfile.TemporaryDirectory() as folder:
            with torch.device(choose_device(spec.device)):
                dtype = getattr(torch, spec.dtype)
                model = without_code(AutoModelForCausalLM.from_config, config, dtype=dtype)
            model.save_pretrained(folder)
            del model
            # Through a folder, since quantising is a matter of loading.
            self.model = load_model(replace(spec, path=folder, adapter=None))
        self.device = self.model.device

    @contextmanager
    def depth(self, layers: int) -> Iterator[None]:
        """The model with its first layers alone."""
        config = self.model.config
        before, config.num_hidden_layers = config.num_hidden_layers, layers
        try:
            yield
        finally:
            config.num_hidden_layers = before

    def rate(self, tokens: int, make: Callable[[], Timed]) -> Rate:
        """Of work on so many tokens, which is made and warmed up for each depth."""
        timed: dict[int, Timed] = {}
        for layers in self.depths:
            with self.depth(layers):
                timed[layers] = make()
                timed[layers]()
        taken: list[float] = []
        start = time.perf_counter()
        while len(taken) < REPEATS and (not taken or time.perf_counter() - start < SECONDS):
            taken.append(self._whole(timed))
        middle = median(taken)
        return Rate(tokens / middle, (max(taken) - min(taken)) / middle, len(taken))

    def _whole(self, timed: dict[int, Timed]) -> float:
        """Seconds of the work with all layers of the job's model."""
        seconds = []
        for layers, work in timed.items():
            with self.depth(layers):
                seconds.append(work())
        if len(seconds) == 1:
            return seconds[0]
        (few, many), (less, more) = self.depths, seconds
        # Beside other work the deeper one may seem the faster one.
        layer = max(0.0, more - less) / (many - few)
        return max(less, more) + (self.layers - many) * layer

    def clock(self, work: Callable[[], Any]) -> float:
        """Seconds that work takes; a card is waited for."""
        self._wait()
        start = time.perf_counter()
        work()
        self._wait()
        return time.perf_counter() - start

    def cast(self, precision: Any) -> Any:
        """The autocast of a run in this precision."""
        dtype = AUTOCAST[precision]
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def measure(job: Job, rows: Sequence[int]) -> dict[str, Rate]:
    """Rates of what a step of the job does, by the names of `job.work`; `rows` are those that the
    generators hold at a time, the trained model's first."""
    bench = Bench(job.model)
    policy = bench.model if job.lora is None else add_lora(bench.model, job.lora, 0).eval()
    rates: dict[str, Rate] = {}
    if WRITING in job.work:
        rates = _generation(bench, policy, rows[0], job.length, job.precision)
        if job.simulator is not None:
            # What is written on a shared base is in the same batch as the policy's turns.
            found = rates
            if not job.simulator.shared:
                other, most = Bench(job.simulator.spec), job.simulator.max_length
                found = _generation(other, other.model, rows[-1], most, job.precision)
            rates |= {SIMULATOR + name: rate for name, rate in found.items()}
    # The last, since a model that recomputes can generate no more.
    rates |= _passes(bench, policy, job)
    return rates


def _generation(bench: Bench, model: Any, rows: int, length: int, precision: str) -> dict[str, Rate]:
    """Of what so many rows write at a time, half of their contexts before them, and read."""
    most = PREFILL_TOKENS[bench.device.type]
    # Fewer where that would be more to read than it takes to draw a few tokens.
    context = max(1, min(length // 2, 4 * most // rows, length - DRAWN - 2))
    readers = min(rows, max(1, most // context))

    # Without stop texts and an end token nothing is asked of a tokenizer.
    nothing = SimpleNamespace(eos_token_id=None, batch_decode=lambda ids, **_: ids)
    adapters = own_adapter(model, TRAINED)
    request = partial(Request, sampling=Sampling(), stop=StopTags(nothing, []), adapter=TRAINED if adapters else "")

    def turns(count: int, tokens: int, untimed: int) -> Timed:
        generator = Generator(model, rows, length, adapters)

        def once() -> float:
            for row in range(count):
                # Prompts that are the same would be read once.
                ids = [row % bench.model.config.vocab_size] * context
                generator.submit(request(key=str(row), ids=ids, max_new_tokens=tokens, seed=row))
            for _ in range(untimed):
                generator.step()
            return bench.clock(generator.run)

        return once

    with bench.cast(precision), adapters or nullcontext():
        read = bench.rate(readers * context, lambda: turns(readers, 1, 0))
        # The first step reads the contexts and draws two tokens.
        written = bench.rate(rows * DRAWN, lambda: turns(rows, DRAWN + 2, 1))
    return {READING: read, WRITING: written}


def _passes(bench: Bench, model: Any, job: Job) -> dict[str, Rate]:
    """Of passes with and without gradient over as many tokens as one of the job has."""
    width = min(job.length, job.tokens)
    shape = (job.tokens // width, width)
    ids = torch.randint(bench.model.config.vocab_size, shape, device=bench.device)
    # About half of a rollout is its own.
    mask = torch.arange(width, device=bench.device).expand(shape) % 2 == 1

    def score() -> torch.Tensor:
        with bench.cast(job.precision):
            return token_logprobs(model, ids, mask)[0]

    def train() -> None:
        score().sum().backward()
        model.zero_grad()

    rates = {}
    if SCORING in job.work:
        with torch.no_grad():
            rates[SCORING] = bench.rate(ids.numel(), lambda: lambda: bench.clock(score))
    if job.checkpointing:
        recompute_activations(model)
    rates[TRAINING] = bench.rate(ids.numel(), lambda: lambda: bench.clock(train))
    return rates
