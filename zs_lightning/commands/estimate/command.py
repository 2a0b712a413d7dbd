"""Says, without loading a model, what memory a training step of a configuration takes on a card, and
with --measure how long it takes here."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from zs_lightning.configuration.arguments import CommandParser
from zs_lightning.errors import UserError
from zs_lightning.text.shown import visible

if TYPE_CHECKING:
    from rich.console import Console

    from zs_lightning.commands.estimate.job import Job
    from zs_lightning.commands.estimate.memory import Card
    from zs_lightning.commands.estimate.speed import Rate

ENDING = """Everything else is as for fit: --config FILE, and options that change what stands in it.

examples:
  python -m zs_lightning estimate --config configs/qwen2.5-3b/policy_24gb.yaml --card 24
  python -m zs_lightning estimate --config configs/own/policy.yaml --model.checkpointing false
  python -m zs_lightning estimate --config configs/own/policy.yaml --measure

The shapes of usual models ship with the package; for others config.json is looked for in the
folder that is named, in the hub's cache and then on the hub.

Memory and times are those of one card. Exit code 1 if it does not fit.
"""


def parse(args: Sequence[str]) -> tuple[Namespace, list[str]]:
    """The command's own options, and those of the configuration."""
    parser = CommandParser("estimate", __doc__, ENDING)
    said = "GB of memory of a card, such as 24; if not given, those of the card here"
    parser.add_argument("--card", metavar="GB", type=int, help=said)
    said = "time the model's layers, with random weights, on the card here, or without one on the CPU"
    parser.add_argument("--measure", action="store_true", help=said)
    options, rest = parser.parse_known_args(args)
    if options.card is not None and options.card < 1:
        raise UserError(f"--card: expected GB of memory, such as 24; got {options.card}")
    return options, rest


def main(args: Sequence[str]) -> None:
    """Runs the command; `args` is what stands after its name."""
    options, rest = parse(args)
    # bitsandbytes, which peft imports, would have torch.compile loaded: more than a second.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    from rich.console import Console

    from zs_lightning.commands.estimate.job import read_job, warn_of_formats
    from zs_lightning.commands.estimate.memory import plan
    from zs_lightning.configuration.lightning_cli import quiet

    quiet()
    capacity = (check_measured(options.card) if options.measure else options.card or card_here()[0]) * 10**9
    job = read_job(rest, options.measure)
    warn_of_formats(job, is_here=options.card is None or options.measure)
    console = Console(highlight=False)
    cards = plan(job, capacity)
    for card in cards:
        show_card(console, card)
    if not all(card.fits for card in cards):
        change = "take a larger card or a smaller model, or lower model.micro_batch_tokens"
        if changes := advise(rest, job, capacity):
            change = f"it would with {' '.join(changes)}"
        console.out(f"does not fit; {change}")
        raise SystemExit(1)
    if options.measure:
        from zs_lightning.commands.estimate.speed import measure

        console.print("measuring, about a minute on a card …")
        show_times(console, job, measure(job, [rows for card in cards for rows in card.rows]))


def check_measured(card: int | None) -> int:
    """GB of memory of what is measured: the first card, or without one the machine. Raises
    UserError if `card`, the option, is another."""
    import torch

    from zs_lightning.generation.kv_cache import host_bytes

    here, what = host_bytes() // 10**9, "a CPU, since there is no CUDA card"
    if torch.cuda.is_available():
        here, what = card_here()
        if card in (None, here):
            return here
    elif card is None:
        return here
    found = f"what is here is measured, {what}, {here} GB"
    raise UserError(f"--measure: {found}; got --card {card}; leave --card out, or --measure")


def card_here() -> tuple[int, str]:
    """Memory in GB and name of the first CUDA card. Raises UserError if there is none."""
    import torch

    if not torch.cuda.is_available():
        change = "say how much memory yours has, such as --card 24"
        raise UserError(f"estimate: there is no CUDA card here; {change}")
    card = torch.cuda.get_device_properties(0)
    # In the GB of the makers, of which the driver shows a little less.
    return round(card.total_memory / 2**30 + 0.4), card.name


def show_card(console: Console, card: Card) -> None:
    from rich.table import Table
    from rich.text import Text

    title = f"{card.name}, {card.capacity / 1e9:.0f} GB"
    table = Table("when", "what", title=title, title_justify="left", show_edge=False)
    table.add_column("GB", justify="right")
    table.add_column("")
    phases = {"always": card.always, "rollout": card.rollout, "update": card.update}
    for when, items in phases.items():
        for item in items:
            # The name of a phase stands in its first line.
            first = when if item is items[0] else ""
            cells = (first, item.what, f"{item.bytes / 1e9:.2f}", item.note)
            # As texts: the name of a folder may look like markup.
            table.add_row(*(Text(visible(cell)) for cell in cells))
        if items:
            table.add_section()
    fits = "fits" if card.fits else "does not fit"
    table.add_row("", "most at a time", f"{card.peak / 1e9:.2f}", fits)
    console.print(table)
    for problem in card.problems:
        console.out(visible(problem))


def show_times(console: Console, job: Job, rates: Mapping[str, Rate]) -> None:
    """Most seconds of a step: tokens as the configuration states, by rates as measured here."""
    from rich.table import Table

    title = "most of a step by one device: tokens as stated by the limits, rates as measured here"
    table = Table("tokens", title=title, title_justify="left", show_edge=False)
    for column in ("stated", "measured/s", "spread", "s"):
        table.add_column(column, justify="right")
    seconds = 0.0
    for what, tokens in job.work.items():
        rate = rates[what]
        seconds += tokens / rate.tokens
        spread = f"{rate.spread:.0%} of {rate.repeats}"
        table.add_row(what, f"{tokens:,.0f}", f"{rate.tokens:,.0f}", spread, f"{tokens / rate.tokens:,.2f}")
    table.add_section()
    table.add_row("a step, at most", "", "", "", f"{seconds:,.2f}")
    console.print(table)
    most = f"at most {job.steps * seconds / 3600:,.1f} h, a share of it for each of several devices"
    console.out(f"{job.steps:,} steps: {most}; rollouts mostly end earlier")


def advise(args: Sequence[str], job: Job, capacity: int) -> list[str]:
    """Options, the cheapest first, with which the job of these arguments fits; empty if it does not
    fit even with all of them."""
    from zs_lightning.commands.estimate.job import read_job
    from zs_lightning.commands.estimate.memory import plan

    # Not micro_batch_tokens: how low it can go depends on the longest row.
    options = [] if job.lora else ["--model.lora.r=16"]
    if not job.checkpointing:
        options.append("--model.checkpointing=true")
    if job.simulator is not None and not job.simulator.shared:
        options.append("--model.search.model.quantization=nf4")
    options.append("--model.model.quantization=nf4")
    # Few changes are tried before many, since each costs time or exactness.
    for count in range(1, len(options) + 1):
        if all(card.fits for card in plan(read_job([*args, *options[:count]]), capacity)):
            return options[:count]
    return []
