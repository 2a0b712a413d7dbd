"""What make-questions leaves: the questions, a file a part, and their card."""

import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

from zs_lightning.commands.make_questions.maker import Maker
from zs_lightning.data.sources import SPLITS
from zs_lightning.runs.checkpoints import json_lines, write_whole
from zs_lightning.runs.pages import markdown
from zs_lightning.runs.tables import markdown_cell

CARD = "card.md"
# Not where it runs, and how fast: a card of the same questions is the same.
SAID = "corpus count passages pairs splits f1 batch_size max_new_tokens max_length seed".split()


Row = dict[str, Any]


def write(maker: Maker, rows: list[Row], counts: Counter[str], settings: Row, tasks: int) -> None:
    """Writes the questions and the card. The same questions make the same files, to the byte."""
    parts: list[tuple[str, int, int, str]] = []
    for split in SPLITS:
        file = maker.place / f"{split}.jsonl"
        mine = [row for row in rows if row["part"] == split]
        # An empty file is none that could be read, and an older one is of other questions.
        file.unlink(missing_ok=True)
        if mine:
            content = json_lines(mine).encode()
            write_whole(file, content)
            two = sum(row["hops"] == 2 for row in mine)
            parts.append((file.name, len(mine), two, hashlib.sha256(content).hexdigest()))
    served = settings["served"]
    model = settings["model"]["path"]
    if served:
        model = served["model"] or "a served model without a name"
    said = {name: settings[name] for name in SAID}
    # What was read from a server, or known already, depends on what stopped the command.
    shown = {name: n for name, n in sorted(counts.items()) if n and not name.startswith("tokens")}
    # What a corpus or a model is called is not ours: in a cell it stays text.
    fields = {"parts": parts, "model": model, "said": said, "counts": shown, "tasks": tasks}
    card = markdown(Path(__file__).with_name(CARD), fields | {"cell": markdown_cell})
    write_whole(maker.place / CARD, card)
