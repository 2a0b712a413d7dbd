"""What a build leaves: the records, their card, and its numbers."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zs_lightning.commands.build_simulator_data.builder import Builder
from zs_lightning.commands.build_simulator_data.labelled import Labelled
from zs_lightning.configuration.lightning_cli import versions
from zs_lightning.runs.checkpoints import json_lines, write_whole
from zs_lightning.runs.pages import markdown
from zs_lightning.runs.tables import markdown_cell
from zs_lightning.search.judges import kappa
from zs_lightning.types import SearchRecord

NUMBERS = "build.json"
CARD = "card.md"


def row_of(record: SearchRecord) -> dict[str, Any]:
    """The columns of FileSource."""
    example = record.example
    row: dict[str, Any] = {"id": example.id, "data_source": example.source, "question": example.question}
    row |= {"golden_answers": list(example.golden_answers), "query": record.query, "label": record.label}
    for column in ("documents", "shown"):
        row[column] = [{"title": found.title, "text": found.text} for found in getattr(record, column)]
    return row | {"evidence": list(record.evidence)}


def write_records(path: Path, records: Sequence[SearchRecord]) -> str:
    """Writes the records and returns the file's sha256."""
    rows = [row_of(record) for record in records]
    if path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        buffer = pyarrow.BufferOutputStream()
        parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
        content = buffer.getvalue().to_pybytes()
    else:
        content = json_lines(rows).encode()
    write_whole(path, content)
    return hashlib.sha256(content).hexdigest()


def write(builder: Builder, labelled: Labelled, settings: dict[str, Any]) -> dict[str, Any]:
    """Writes records, card and numbers into the folder; returns the numbers."""
    records = labelled.chosen(builder.pairs, list(dict.fromkeys(builder.kinds)), builder.variants, builder.seed)
    agreement = kappa(labelled.verdicts)
    numbers: dict[str, Any] = {
        "records": dict(Counter(record.label for record in records)),
        "pairs": len(labelled.records),
        "questions": len({record.example.key for record in records}),
        "overlap": builder.overlap(records),
        "judged_twice": len(labelled.verdicts),
        "kappa": None if agreement is None else round(agreement, 4),
        "counts": dict(sorted(labelled.counts.items())),
        "seconds": round(labelled.seconds, 1),
        "file": builder.records,
        "sha256": write_records(builder.place / builder.records, records),
        "versions": versions(),
        "settings": settings,
    }
    write_whole(builder.place / NUMBERS, json.dumps(numbers, indent=1, ensure_ascii=False) + "\n")
    # What the sources are called is not ours: in a cell it stays text.
    said = {"counts": Counter(numbers["counts"]), "engine": builder.search.name, "cell": markdown_cell}
    served, judging = settings["served"], settings["judge_model"]
    said["searched_by"] = (served["model"] or "a served model without a name") if served else settings["model"]["path"]
    said["judged_by"] = judging["path"] if judging else said["searched_by"]
    write_whole(builder.place / CARD, markdown(Path(__file__).with_name(CARD), numbers | said))
    return numbers
