"""Search records made from a run with a real engine: what a simulator can be taught with (paper section 3.3)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from zs_lightning.data.columns import BadRow, Columns, example_of, record_of
from zs_lightning.data.reading import Reading
from zs_lightning.data.tables import Row, read_file
from zs_lightning.text.answers import cover_match
from zs_lightning.types import SearchRecord


def build_records(trajectories: Path, target: Path) -> Reading:
    """Writes a search record for each different search of a run's trajectories/*.jsonl. It is labelled useful if a golden
    answer stands in its documents as whole words, else noisy.

    One JSON object per line: id, question, golden_answers, query, label (useful or noisy), documents [{title, text}].

    Returns:
        Lines read, records written, and which lines or searches were left out and why.

    Raises:
        ValueError: the target exists, or there is no search with the documents of a real engine.
    """
    if target.exists():
        raise ValueError(f"records: {target} exists already; choose another file")
    reading, lines = Reading(str(trajectories)), dict[str, None]()
    for row in read_file(trajectories):
        reading.rows += 1
        for found in _records(row):
            line = found if isinstance(found, BadRow) else json.dumps(_line(found), ensure_ascii=False)
            if isinstance(line, BadRow) or line in lines:
                reading.skip(str(line) if isinstance(line, BadRow) else "the same search was made before", str(row.number))
            else:
                lines[line] = None
    reading.used = len(lines)
    if not lines:
        raise ValueError(f"records: {trajectories} has no search of a real engine: {'; '.join(reading.bad())}")
    target.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return reading


def _records(row: Row) -> Iterator[SearchRecord | BadRow]:
    """A record, or the reason why it is none, for each search of a trajectory."""
    turns = row.values.get("turns")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        yield BadRow(row.problem or "the line is not a trajectory")
        return
    for turn in turns:
        if turn.get("kind") == "search" and turn.get("observation_span") is not None:
            try:
                yield _record(row.values, turn)
            except BadRow as error:
                yield error


def _record(trajectory: Mapping[str, Any], search: Mapping[str, Any]) -> SearchRecord:
    if search.get("noisy") is not None:
        raise BadRow("the documents are a simulator's")
    values = {name: trajectory.get(name) for name in ("id", "question", "golden_answers")}
    documents = search.get("documents")
    texts = [f"{d.get('title')} {d.get('text')}" for d in documents or () if isinstance(d, dict)]
    golds = example_of(values, Columns(None), "").golden_answers
    found = any(cover_match(text, golds) for text in texts)
    return record_of(
        values | {"query": search.get("content"), "documents": documents, "noisy": not found}, Columns(None), "run"
    )


def _line(record: SearchRecord) -> dict[str, Any]:
    return {
        "id": record.example.id,
        "question": record.example.question,
        "golden_answers": list(record.example.golden_answers),
        "query": record.query,
        "label": "noisy" if record.noisy else "useful",
        "documents": [{"title": document.title, "text": document.text} for document in record.documents],
    }
