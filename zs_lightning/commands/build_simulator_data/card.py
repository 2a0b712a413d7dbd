"""What a build leaves: the records, their card, and its numbers."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zs_lightning.configuration.lightning_cli import versions
from zs_lightning.runs.tables import markdown_table
from zs_lightning.text.prompts import NOISY
from zs_lightning.types import SearchRecord

if TYPE_CHECKING:
    from zs_lightning.commands.build_simulator_data.builder import Builder
    from zs_lightning.commands.build_simulator_data.labelled import Labelled

NUMBERS = "build.json"
CARD = "card.md"


def row_of(record: SearchRecord) -> dict[str, Any]:
    """The columns of FileSource."""
    example = record.example
    return {
        "id": example.id,
        "data_source": example.source,
        "question": example.question,
        "golden_answers": list(example.golden_answers),
        "query": record.query,
        "label": record.label,
        "documents": [{"title": found.title, "text": found.text} for found in record.documents],
        "shown": [{"title": found.title, "text": found.text} for found in record.shown],
        "evidence": list(record.evidence),
    }


def write_records(path: Path, records: Sequence[SearchRecord]) -> str:
    """Writes the records and returns the file's sha256."""
    rows = [row_of(record) for record in records]
    part = path.with_name(path.name + ".part")
    if path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), part)
    else:
        part.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    # A kill leaves no half file that looks whole.
    os.replace(part, path)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write(builder: Builder, labelled: Labelled, settings: dict[str, Any]) -> dict[str, Any]:
    """Writes records, card and numbers into the folder; returns the numbers."""
    records = labelled.chosen(builder.pairs, builder.kinds, builder.seed)
    agreement = labelled.kappa()
    numbers: dict[str, Any] = {
        "records": dict(Counter(record.label for record in records)),
        "pairs": len(labelled.records),
        "questions": len({record.example.key for record in records}),
        "overlap": builder.overlap(records),
        "judged_twice": len(labelled.verdicts),
        "kappa": None if agreement is None else round(agreement, 4),
        "counts": dict(sorted(labelled.counts.items())),
        "seconds": round(labelled.seconds, 1),
        "file": builder.records.name,
        "sha256": write_records(builder.records, records),
        "versions": versions(),
        "settings": settings,
    }
    (builder.folder / NUMBERS).write_text(json.dumps(numbers, indent=1, ensure_ascii=False) + "\n", "utf-8")
    (builder.folder / CARD).write_text(card(numbers, builder.search.name), "utf-8")
    return numbers


def card(numbers: dict[str, Any], engine: str) -> str:
    """The data card."""
    counts = Counter(numbers["counts"])
    settings = numbers["settings"]
    by_label = [[label, str(count)] for label, count in numbers["records"].items()]
    found = numbers["records"].get(NOISY, 0) - counts["twins"]
    searcher = (settings["served"] or {}).get("model") or settings["model"]["path"]
    agreement = "one judge"
    if numbers["kappa"] is not None:
        agreement = f"Cohen's kappa {numbers['kappa']} over {numbers['judged_twice']} pairs"
    facts = {
        "questions": f"{numbers['questions']}, of {settings['source']['class_path']} {settings['source'].get('init_args')}",
        "engine": f"{engine}: {settings['search']['class_path']} {settings['search'].get('init_args')}",
        "searched by": f"{searcher}, {settings['group_size']} rollouts of a question",
        "judge": settings["judge"],
        "agreement of rule and model": agreement,
        "questions held out by the source that are also here": json.dumps(numbers["overlap"]),
        "searches": f"{counts['searches']}, of which {counts['empty']} found nothing and {counts['repeated']} were repetitions",
        "left out": f"{counts['disputed']} disputed, {counts['left_out_useful']} useful and {counts['left_out_noisy']} noisy",
        "failed rollouts": str(counts["failed"]),
        "verdicts of the model that were none": str(counts["unclear"]),
        "cost": f"{counts['tokens']} tokens to search, {counts['judge_tokens']} to judge, {numbers['seconds']} s",
        "seed": str(settings["seed"]),
        "versions": ", ".join(f"{name} {version}" for name, version in numbers["versions"].items()),
        "sha256": numbers["sha256"],
    }
    # What the sources are called is not ours: it stays text.
    table = markdown_table(["", ""], [[name, value] for name, value in facts.items()])
    return f"""# Searches and their results, to train a simulator of a search engine

`{numbers["file"]}` has one search a row: the question with its answers, the query, the documents that were found or
made, the documents `shown` by earlier searches of the same rollout, a `label`, and `evidence`, texts of which a useful
result holds at least one. `useful` results are as the engine gave them, by the verdict of the judge. Of the `noisy` ones
{found} are so as well, all of queries about which nothing was found, and {counts["twins"]} are twins of useful ones, with
near misses in place of what tells: a simulator that knew noise of poor queries alone would write useful documents for every
good one. Other labels are kinds of noise, made of the useful results by rule: off_topic (what another query found), partial
(of what the query names, without the answer), contradicting (another answer in its place), outdated (the same, of a year
long past). No query with its documents stands there twice.

{markdown_table(["label", "records"], by_label)}
{table}
Read it with `FileSource`, and part it by question with `splits: {{train: 0.8, validation: 0.1, test: 0.1}}`.
"""
