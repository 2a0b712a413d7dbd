"""Builds the records that a simulator learns from: a model searches for the answers of training
questions, a judge labels what it found.

Whatever stops it, the same command goes on.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from zs_lightning.commands.build_simulator_data.builder import Builder
from zs_lightning.commands.build_simulator_data.card import write
from zs_lightning.commands.build_simulator_data.labelled import Labelled
from zs_lightning.commands.work import Line, held
from zs_lightning.configuration.arguments import given
from zs_lightning.configuration.lightning_cli import quiet
from zs_lightning.text.prompts import NOISY, USEFUL


def main(args: Sequence[str]) -> None:
    """Runs the command; `args` is what stands after its name."""
    quiet()
    builder, settings = given("build-simulator-data", __doc__, Builder, args)
    with held(builder.place):
        labelled = builder.labelled(settings, Progress(builder.pairs))
        say(write(builder, labelled, settings), builder)


class Progress:
    """A line after a batch."""

    def __init__(self, pairs: int) -> None:
        self.pairs = pairs
        self.line = Line("build")

    def __call__(self, labelled: Labelled, done: int, batches: int) -> None:
        useful, noisy = (len(labelled.of(label)) for label in (USEFUL, NOISY))
        share = max(done / batches, min(1, 2 * useful / self.pairs))
        self.line(share, f"{useful} useful, {noisy} noisy of {self.pairs} pairs, batch {done} of {batches}")


def say(numbers: dict[str, Any], builder: Builder) -> None:
    """What was built, and what to do with it."""
    records = builder.place / builder.records
    counts = ", ".join(f"{count} {label}" for label, count in numbers["records"].items())
    print(f"{records}: {counts}, from {numbers['questions']} questions in {numbers['seconds']:g} s")
    if numbers["kappa"] is not None:
        print(f"rule and model agree with kappa {numbers['kappa']:.2f} over {numbers['judged_twice']} pairs")
    counted = Counter(numbers["counts"])
    if builder.judge != "rule" and (unclear := counted["unclear"]):
        print(f"{unclear} verdicts of the model were neither useful nor noisy: the rule's count there")
    if failed := counted["judge_failed"]:
        print(f"{failed} calls of the judge failed: the rule's verdicts count there")
    for split, shared in numbers["overlap"].items():
        if shared:
            print(f"{shared} {split} questions of the source are also in the records: do not test on them")
    if builder.served is not None:
        read, written = counted["served_read_tokens"], counted["served_written_tokens"]
        kept = f"{counted['served_cached']} answers were known already"
        print(f"the server read {read} and wrote {written} tokens; {kept}")
    print(f"what is in it: {builder.place / 'card.md'}")
    source = f"--data.source FileSource --data.source.path {records}"
    shares = "--data.source.splits '{train: 0.8, validation: 0.1, test: 0.1}'"
    print(f"next: python -m zs_lightning fit --config SIMULATOR.yaml {source} {shares}")
