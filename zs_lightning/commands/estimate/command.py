"""Estimates, without loading a model, what a training step of a configuration takes of a card's memory and time."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from zs_lightning.commands.estimate.cards import card_asked, rates_of
from zs_lightning.configuration.arguments import CommandParser
from zs_lightning.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from zs_lightning.commands.estimate.job import Job
    from zs_lightning.commands.estimate.memory import Card, Plan

ENDING = """Everything else is as for fit: --config FILE, and options that change what stands in it.

examples:
  python -m zs_lightning estimate --config configs/qwen2.5-3b/policy_24gb.yaml --card 24
  python -m zs_lightning estimate --config configs/qwen2.5-3b/policy_24gb.yaml --card RTX3090 --model.checkpointing false

The shapes of usual models ship with the package; for others config.json is looked for in the folder that is named, in the
hub's cache and then on the hub.

Exit code 1 if it does not fit.
"""


def parse(args: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The command's own options, and those of the configuration."""
    parser = CommandParser("estimate", __doc__, ENDING)
    parser.add_argument(
        "--card", metavar="CARD", help="memory in GB (24, 48, 80 …) or name (RTX4090 …) of a card; if not given, the card here"
    )
    options, rest = parser.parse_known_args(args)
    if options.card is not None:
        options.card = card_asked(options.card)
    return options, rest


def main(args: Sequence[str]) -> None:
    """Runs the command; `args` is what stands after its name."""
    options, rest = parse(args)
    # bitsandbytes, which peft imports, asks torch.compile for functions that are not used here: more than a second.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    from rich.console import Console

    from zs_lightning.commands.estimate.advice import advise
    from zs_lightning.commands.estimate.memory import plan
    from zs_lightning.commands.estimate.reading import read_config
    from zs_lightning.configuration.lightning_cli import quiet

    quiet()
    job = read_config(rest)
    gigabytes, name = options.card or card_here()
    console = Console(highlight=False)
    capacity = gigabytes * 10**9
    planned = plan(job, capacity)
    for card in planned.cards:
        show_card(console, card)
    for sentence in slow_formats(job, here=options.card is None):
        console.out(sentence)
    show_time(console, job, planned, gigabytes, name)
    if not planned.fits:
        lines, after = advise(job, capacity)
        say = console.out
        if after is None:
            say("does not fit" + (", not even with" if lines else "") + "; take a larger card or a smaller model")
        else:
            say(f"does not fit; it would, with {max(card.peak for card in after.cards) / 1e9:.1f} GB, with")
        for line in lines:
            say(f"  {line}")
        raise SystemExit(1)


def card_here() -> tuple[int, str]:
    """Memory in GB and name of the first CUDA card.

    Raises:
        UserError: there is none.
    """
    import torch

    if not torch.cuda.is_available():
        raise UserError("estimate: there is no CUDA card here; say how much memory yours has, such as --card 24")
    card = torch.cuda.get_device_properties(0)
    # In the GB of the makers, of which the driver shows a little less.
    return round(card.total_memory / 2**30 + 0.4), card.name


def show_card(console: Console, card: Card) -> None:
    from rich.table import Table

    table = Table(title=f"{card.name}, {card.capacity / 1e9:.0f} GB", title_justify="left", show_edge=False)
    for heading, justify in (("when", "left"), ("what", "left"), ("GB", "right"), ("", "left")):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    for when, items in (("always", card.always), ("rollout", card.rollout), ("update", card.update)):
        for item in items:
            table.add_row(when, item.what, f"{item.bytes / 1e9:.2f}", item.note)
            when = ""
        if items:
            table.add_section()
    table.add_row("", "most at a time", f"{card.peak / 1e9:.2f}", "fits" if card.fits else "does not fit")
    console.print(table)
    for problem in card.problems:
        console.out(problem)


def slow_formats(job: Job, here: bool) -> list[str]:
    """What makes a model of the job slow, with its key. The cards are `here`, or known by name: all those have bfloat16."""
    import torch

    from zs_lightning.commands.estimate.memory import place
    from zs_lightning.models.checks import AUTOCAST, emulated, slow_format

    specs = {"model.model": job.model}
    if job.simulator is not None and not job.simulator.shared:
        specs["model.search.model"] = job.simulator.model
    found = []
    for key, spec in specs.items():
        device = torch.device(place(spec))
        slow = emulated(device) if here or device.type == "cpu" else ()
        found.append(slow_format(key, spec, device.type, AUTOCAST[job.precision] is not None, slow))
    return [sentence for sentence in found if sentence]


def show_time(console: Console, job: Job, planned: Plan, gigabytes: int, name: str) -> None:
    from zs_lightning.commands.estimate import speed

    rates = rates_of(gigabytes, name)
    seconds = speed.step_seconds(job, planned, rates)
    parts = ", ".join(f"{phase} {value:.0f}" for phase, value in seconds.items())
    total = sum(seconds.values()) * job.steps
    whole = f"{total / 3600:.1f} hours" if total >= 3600 else f"{total / 60:.0f} minutes"
    console.out(f"\na step: about {sum(seconds.values()):.0f} s ({parts}); the {job.steps} steps of the run: about {whole}")
    console.out(
        f"estimated, not measured: {rates.name}, {rates.bandwidth / 1e12:.2f} TB/s and {rates.flops / 1e12:.0f} TFLOP/s, of "
        f"which decoding {speed.DECODE:.0%}, prefill {speed.PREFILL:.0%} and training {speed.TRAIN:.0%}; "
        f"{speed.LAUNCH * 1e3:.1f} ms a layer to launch a decoding step"
    )
    if (work := job.rollouts) is not None:
        console.out(
            f"assumed: {work.count} rollouts of {work.searches} searches, {work.turn} tokens a turn, {work.result} a result, "
            f"{work.context} in all; {planned.rows} at a time"
        )
