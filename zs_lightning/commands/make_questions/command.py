"""Writes questions with short answers about texts of yours, and keeps those that need the texts.

Whatever stops it, the same command goes on.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from zs_lightning.commands.make_questions.card import write
from zs_lightning.commands.make_questions.maker import Maker, sifted
from zs_lightning.commands.work import Line, held
from zs_lightning.configuration.arguments import given
from zs_lightning.configuration.lightning_cli import quiet


def main(args: Sequence[str]) -> None:
    """Runs the command; `args` is what stands after its name."""
    quiet()
    maker, settings = given("make-questions", __doc__, Maker, args)
    line = Line("make-questions")

    def tell(good: int, written: int, done: int, every: int) -> None:
        asked = f"{done} of {every} passages and pairs"
        line(done / every, f"{good} good of {written} questions, {asked}")

    with held(maker.kept, "out"):
        tasks, batches = maker.made(settings, tell)
        rows, counts = sifted(maker, tasks, batches)
        write(maker, rows, counts, settings, len(tasks))
        say(maker, rows, counts)


def say(maker: Maker, rows: list[dict[str, Any]], counts: Counter[str]) -> None:
    """What was made, and what to do with it."""
    parts = Counter(row["part"] for row in rows)
    hops = Counter(row["hops"] for row in rows)
    shown = ", ".join(f"{count} {part}" for part, count in parts.items())
    print(f"{maker.place}: {len(rows)} questions ({shown}), {hops[2]} of them of two steps")
    for kind in ("one-hop", "two-hop"):
        # Those of passages and documents stand in the card.
        mine = [name for name in counts if name.startswith(f"{kind}: ")]
        faults = Counter({name.partition(": ")[2]: counts[name] for name in mine})
        said = ", ".join(f"{count} {fault}" for fault, count in faults.most_common())
        print(f"{kind}: {said or 'none was asked for'}")
    read, wrote, known = (counts[f"tokens {name}"] for name in ("read", "written", "cached"))
    # What is in memory knows nothing from before.
    cached = f"; {known} answers were known already" if maker.served is not None else ""
    print(f"the model read {read} and wrote {wrote} tokens{cached}")
    card, work = maker.place / "card.md", maker.kept / "work.jsonl"
    print(f"what is in it: {card}; all that was written: {work}")
    source = f"--data.source FileSource --data.source.path {maker.place}"
    print(f"next: python -m zs_lightning fit --config POLICY.yaml {source}")
