"""Row 16: rows of a user's file that cannot be used, at random places among good and odd ones."""

import json
import math
import random
import re
import unicodedata

import pyarrow as pa
import pytest
from pyarrow import parquet

from support.runfolders import trajectory
from zs_lightning.data import FileSource
from zs_lightning.errors import UserError
from zs_lightning.rl.rewards import AnswerReward, judge

BAD = {
    "the question is missing": {"answer": "me"},
    "the question is empty": {"question": "\u200b\ufeff", "answer": "me"},
    "the question is not a text but of type int": {"question": 3, "answer": "me"},
    "the question has more than 10000 characters": {"question": "x" * 1_000_000, "answer": "me"},
    "the question holds a NUL character": {"question": "Wh\0?", "answer": "me"},
    "the question is not UTF-8 or holds half a character": {"question": "Wh\ud83d?", "answer": "me"},
    "there is no golden answer": {"question": "Who?", "answer": []},
    "a golden answer is empty": {"question": "Who?", "answer": ["me", "\u200b"]},
    "a golden answer is not a text but of type list": {"question": "Who?", "answer": [["me"]]},
    "a golden answer is not a text but of type dict": {"question": "Who?", "answer": {"text": "me"}},
    "a golden answer is not a text but of type bool": {"question": "Who?", "answer": True},
    "a golden answer has more than 10000 characters": {"question": "Who?", "answer": ["x" * 1_000_000]},
    "the golden answers look like a list but are not JSON": {"question": "Who?", "answer": "['me', 'I']"},
    "the line is not JSON": '{"question": "half',
    "the row is not an object with columns": [1, 2],
}
ODD = ["The", "+", "A", "10", "café", "東京", "“Foo”", "o'clock", "ﬁne", "x" * 9000]
"""Golden answers that normalise to nothing, to little, or to another spelling."""


def test_bad_rows_are_reported_by_number_and_the_others_are_used(tmp_path, capsys, times, figure):
    named, trials = 0, times(20)
    for number in range(trials):
        rng = random.Random(number)
        kinds = rng.sample(list(BAD), 3)
        odd = rng.sample(ODD, 4)
        good = [{"question": f"Who is {gold[:99]} {number}?", "answer": [gold]} for gold in odd]
        lines = good + [BAD[kind] for kind in kinds]
        rng.shuffle(lines)
        path = tmp_path / f"{number}.jsonl"
        path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
        examples = FileSource(str(path)).questions("test")
        said = capsys.readouterr().out
        rows = {kind: next(i for i, line in enumerate(lines, 1) if line is BAD[kind]) for kind in kinds}
        found = [re.search(rf"skipped: {re.escape(kind)}.*\(row {row}\)", said) for kind, row in rows.items()]
        same = sorted(example.question for example in examples) == sorted(row["question"] for row in good)
        named += all(found) and same and f"{len(lines)} rows read, 4 used" in said
        with pytest.raises(UserError, match=r"(1 bad: .*){3}correct them or set data\.source\.bad"):
            FileSource(str(path), bad_rows="error").questions("test")
        check_rewards(examples)
    held = f"{named} of {trials} files: each bad row by number and reason, the others used, rewards finite"
    figure(16, "bad rows at random places of a file", held)
    assert named == trials


def check_rewards(examples):
    """Each golden answer is right in both of its Unicode forms, and nothing else is."""
    for example in examples:
        (gold,) = example.golden_answers
        forms = [unicodedata.normalize(form, gold) for form in ("NFC", "NFD")]
        rows = [trajectory(0, answer, golden_answers=example.golden_answers) for answer in (*forms, "another", None)]
        judge(rows, AnswerReward())
        assert [row.reward for row in rows] == [1.0, 1.0, 0.0, 0.0], gold
        assert all(math.isfinite(row.reward) for row in rows)


def test_repeated_questions_and_a_broken_file_are_said(tmp_path, capsys, figure):
    rows = [{"question": f"Is the cafe\u0301 {i % 3} open?", "answer": "x"} for i in range(9)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len({example.key for example in FileSource(str(path)).questions("test")}) == 9
    counted = "6 used, but an earlier row has the same question" in capsys.readouterr().out
    broken = tmp_path / "b.parquet"
    parquet.write_table(pa.table({"question": ["Who?"] * 99, "answer": ["me"] * 99}), broken)
    content, refused = broken.read_bytes(), 0
    for cut in (len(content) // 3, len(content) - 4, 10):
        broken.write_bytes(content[:cut])
        with pytest.raises(UserError, match=r"b\.parquet cannot be read as parquet: "):
            FileSource(str(broken)).questions("test")
        refused += 1
    figure(16, "repeated questions; parquet that is cut", f"repeats counted: {counted}; {refused} of 3 files named")
    assert counted
