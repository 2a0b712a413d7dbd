"""Which lines of a configuration to change so that it fits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from zs_lightning.commands.estimate.job import Job
from zs_lightning.commands.estimate.memory import Plan, plan
from zs_lightning.models.specs import LoraSpec


def changes(job: Job) -> Iterator[tuple[str, Job]]:
    """What can be changed, the cheapest first, as the line to write and the job with this change and all before it."""
    if job.lora is None:
        job = replace(job, lora=LoraSpec())
        yield "model.init_args.lora: {r: 16}", job
    if not job.checkpointing:
        job = replace(job, checkpointing=True)
        yield "model.init_args.checkpointing: true", job
    if job.tokens > job.row:
        job = replace(job, tokens=job.row)
        yield f"model.init_args.micro_batch_tokens: {job.row}", job
    simulator = job.simulator
    if simulator is not None and not simulator.shared and simulator.model.quantization == "none":
        job = replace(job, simulator=replace(simulator, model=replace(simulator.model, quantization="nf4")))
        yield "model.init_args.search.init_args.model.quantization: nf4", job
    if job.model.quantization == "none":
        job = replace(job, model=replace(job.model, quantization="nf4"))
        yield "model.init_args.model.quantization: nf4", job


def advise(job: Job, capacity: int) -> tuple[list[str], Plan | None]:
    """Lines that make the job fit, and its plan with them; all lines and None if even they do not."""
    lines: list[str] = []
    before = plan(job, capacity)
    for line, changed in changes(job):
        after = plan(changed, capacity)
        if _excess(after) < _excess(before):
            # Of lines about the same key, the last counts.
            lines = [other for other in lines if other.split(":")[0] != line.split(":")[0]] + [line]
        before = after
        if after.fits:
            return lines, after
    return lines, None


def _excess(planned: Plan) -> int:
    return sum(max(0, card.peak - card.capacity) + len(card.problems) for card in planned.cards)
