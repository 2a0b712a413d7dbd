"""Rows and files that cannot be used: each is named with its reason and number, and nothing fails later."""

import json
import os
import re
import time

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from zs_lightning.data import FileSource, QADataModule
from zs_lightning.data.columns import BadRow, Columns, example_of
from zs_lightning.data.parts import read_file
from zs_lightning.errors import UserError
from zs_lightning.streams import derive_seed
from zs_lightning.text.answers import exact_match

GOOD = {"question": "Who?", "answer": "me"}
MEGABYTE = "x" * 1_000_000
BAD = {
    "the question is missing": {"answer": "me"},
    "the question is missing ": {"question": "  ", "answer": "me"},
    "the question is empty": {"question": "\u200b\ufeff", "answer": "me"},
    "the question is not a text but of type int": {"question": 3, "answer": "me"},
    "the question is not a text but of type list": {"question": ["Who?"], "answer": "me"},
    "the question has more than 10000 characters": {"question": MEGABYTE, "answer": "me"},
    "the question holds a NUL character": {"question": "Wh\0?", "answer": "me"},
    "the question is not UTF-8 or holds half a character": {"question": "Wh\ud83d?", "answer": "me"},
    "there is no golden answer": {"question": "Who?"},
    "there is no golden answer ": {"question": "Who?", "answer": None},
    "there is no golden answer  ": {"question": "Who?", "answer": []},
    "there is no golden answer   ": {"question": "Who?", "answer": ["", None, " "]},
    "there is no golden answer    ": {"question": "Who?", "answer": ""},
    "a golden answer is empty": {"question": "Who?", "answer": "\u200b"},
    "a golden answer is not a text but of type list": {"question": "Who?", "answer": [["me"]]},
    "a golden answer is not a text but of type dict": {"question": "Who?", "answer": {"text": "me"}},
    "a golden answer is not a text but of type float": {"question": "Who?", "answer": ["me", 1.5]},
    "a golden answer is not a text but of type bool": {"question": "Who?", "answer": True},
    "a golden answer has more than 10000 characters": {"question": "Who?", "answer": ["me", MEGABYTE]},
    "a golden answer holds a NUL character": {"question": "Who?", "answer": ["\0"]},
    "the golden answers look like a list but are not JSON": {"question": "Who?", "answer": "['me', 'I']"},
    "the id is not a text but of type bool": GOOD | {"id": True},
    "the source is not a text but of type int": GOOD | {"data_source": 3},
}


def write(path, *lines):
    path.write_bytes(b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines))
    return str(path)


@pytest.mark.parametrize("reason", BAD)
def test_a_bad_row_is_skipped_with_its_number_and_reason(tmp_path, capsys, reason):
    path = write(tmp_path / "a.jsonl", GOOD, BAD[reason], GOOD | {"question": "Where?"})
    assert {example.question for example in FileSource(path).questions("test")} == {"Who?", "Where?"}
    first, *rest = capsys.readouterr().out.splitlines()
    assert first == f"data: {path}: 3 rows read, 2 used"
    assert len(rest) == 1
    assert re.fullmatch(rf"  1 skipped: {re.escape(reason.strip())}.*\(row 2\)", rest[0])
    with pytest.raises(
        ValueError, match=rf"1 bad: {re.escape(reason.strip())}.*\(row 2\); correct them or set data\.source\.bad"
    ):
        FileSource(path, bad_rows="error").questions("test")


def test_lines_that_are_no_rows(tmp_path, capsys):
    deep = b"[" * 100_000
    lines = [b'{"question": "half', b"[1, 2]", b"7", b"", deep, b'{"question": "Wh\xe4?", "answer": "x"}', GOOD]
    (example,) = FileSource(write(tmp_path / "a.jsonl", *lines)).questions("test")
    assert example.question == "Who?"
    assert capsys.readouterr().out.splitlines()[1:] == [
        "  2 skipped: the line is not JSON (rows 1, 5)",
        "  2 skipped: the row is not an object with columns (rows 2, 3)",
        "  1 skipped: the question is not UTF-8 or holds half a character (row 6)",
    ]


def test_spreadsheet_rows_that_are_no_rows(tmp_path, capsys):
    lines = [b"question,answer", b"one,1", b"two,2,3", b'"x"y,1', b"three", b"f\xfcr,1", b"four,4", b'"open,5', b"five,6"]
    lines += [b'"s', b'ix"x,1', b'"a poem, in', b'two, lines",7']
    found = FileSource(write(tmp_path / "a.csv", *lines)).questions("test")
    answers = {example.question: example.golden_answers for example in found}
    assert answers == {"one": ("1",), "four": ("4",), "five": ("6",), "a poem, in\ntwo, lines": ("7",)}
    said = capsys.readouterr().out
    assert "11 rows read, 4 used" in said
    assert "1 skipped: the row has more cells than there are columns (row 3)" in said
    assert "1 skipped: the row is not CSV, see the quotes (',' expected after '\"') (row 4)" in said
    assert "1 skipped: there is no golden answer (row 5)" in said
    assert "1 skipped: the question is not UTF-8 or holds half a character (row 6)" in said
    assert "1 skipped: its quote goes on from line 8 to 10, over lines that are rows; read on in the next one (row 8)" in said
    assert "2 skipped: the lines 10 to 11 are not CSV, see the quotes (',' expected after '\"') (rows 10, 11)" in said


@pytest.mark.parametrize("closing", [b'"Is it ""91""?",91', b"91 is 5'10\",91", b"the end"])
def test_a_stray_quote_takes_no_rows_away(tmp_path, capsys, closing):
    """Line 6 opens a quote; the next one, if there is any, is the opening or the last one of a cell in line 91."""
    lines = [b"question,answer", *(b"Is it %d?,%d" % (n, n) for n in range(2, 101))]
    lines[5] = b'"' + lines[5]
    lines[90] = closing
    found = FileSource(write(tmp_path / "a.csv", *lines)).questions("test")
    assert len(found) == (97 if closing == b"the end" else 98)
    assert {f"Is it {n}?" for n in range(7, 91)} < {row.question for row in found}
    said = capsys.readouterr().out
    assert "99 rows read" in said
    assert f"1 skipped: its quote goes on from line 6 to {100 if closing == b'the end' else 91}" in said
    assert "(row 6)" in said


BETWEEN = st.integers(3, 8).flatmap(
    lambda rows: st.integers(0, rows // 4).flatmap(
        lambda longer: st.integers(0, 9).flatmap(
            lambda blank: st.permutations(["row"] * rows + ["longer"] * longer + [""] * blank)
        )
    )
)


@settings(max_examples=60, deadline=None)
@given(before=st.integers(0, 3), between=BETWEEN, after=st.integers(0, 3))
def test_whatever_a_stray_quote_takes_is_used_or_counted(tmp_path_factory, before, between, after):
    """Rows behind the quote, a quarter as many with a cell too much at most, and blank lines, in any order."""
    kinds = [*["row"] * before, "opening", *between, "closing", *["row"] * after]
    spelt = {"row": "Is it %d?,%d", "longer": "Is it, %d?,%d", "opening": '"Is it %d?,%d', "closing": "%d is 5'10\",%d", "": ""}
    lines = [spelt[kind] % ((n, n) if kind else ()) for n, kind in enumerate(kinds, 2)]
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    path.write_text("\n".join(["question,answer", *lines]))
    rows = list(read_file(path))
    assert [row.number for row in rows] == [n for n, kind in enumerate(kinds, 2) if kind]
    used = [n for n, kind in enumerate(kinds, 2) if kind in ("row", "closing")]
    assert [row.number for row in rows if not row.problem] == used
    (problem,) = [row.problem for row in rows if "quote" in row.problem]
    assert f"from line {before + 2} to {before + 3 + len(between)}," in problem


def test_lines_that_a_quote_took_and_that_are_no_rows_are_counted(tmp_path, capsys):
    """A list of documents over lines that are no rows: nothing is made of them."""
    lines = [b"question,answer", b'"who', b"what", b"where, when", b'why"x,1', b"three,3"]
    assert len(FileSource(write(tmp_path / "a.csv", *lines)).questions("test")) == 1
    said = capsys.readouterr().out
    assert "5 rows read, 1 used" in said
    assert "4 skipped: the lines 2 to 5 are not CSV" in said


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.json", "a.parquet"])
def test_two_columns_of_one_name_are_refused(tmp_path, capsys, name):
    path, row = tmp_path / name, b'{"question": "Who?", "answer": "me", "question": "What?"}'
    if name == "a.csv":
        write(path, b"question,answer,,,question", b"Who?,me,,,What?")
    elif name == "a.parquet":
        parquet.write_table(pa.table([["Who?"], ["me"], ["What?"]], names=["question", "answer", "question"]), path)
    else:
        content = [row, json.dumps(GOOD).encode()]
        write(path, *content) if name == "a.jsonl" else path.write_bytes(b"[" + b",".join(content) + b"]")
        assert len(FileSource(str(path)).questions("test")) == 1
        assert "1 skipped: the row has two columns question (row 1)" in capsys.readouterr().out
        return
    with pytest.raises(UserError, match=f"{name} has two columns question; give one of them"):
        FileSource(str(path)).questions("test")


def test_a_column_that_nobody_wants_may_hold_what_python_cannot(tmp_path):
    when = pa.array([2**60, 0, None]).cast(pa.int64()).view(pa.timestamp("us"))
    parquet.write_table(pa.table({"question": ["a", "b", "c"], "answer": ["x"] * 3, "when": when}), tmp_path / "a.parquet")
    assert len(FileSource(str(tmp_path / "a.parquet")).questions("test")) == 3


def test_the_delimiter_is_that_of_the_file_and_not_of_a_name(tmp_path):
    for name, header, rest in (
        ("a.tsv", "question, of, all\tanswer", "Who?\tme"),
        ("b.csv", "question, in English\tanswer", "Who?\tme"),
        ("c.csv", '"a;b;c",question,answer', "x,Who?,me"),
    ):
        path = write(tmp_path / name, header.encode(), rest.encode())
        column = header.split("\t")[0] if "\t" in header else "question"
        (row,) = FileSource(path, columns={"question": column}).questions("test")
        assert (row.question, row.golden_answers) == ("Who?", ("me",))


def test_folders_and_files_of_odd_names(tmp_path, capsys):
    folder = tmp_path / "data[1]"
    folder.mkdir()
    name = os.fsdecode(b"caf\xe9.jsonl")
    write(folder / name, GOOD)
    (row,) = FileSource(str(folder / name)).questions("test")
    assert row.source == "caf\\xe9"
    assert "caf\\xe9.jsonl: 1 rows read" in capsys.readouterr().out
    assert len(FileSource(str(folder)).questions("test")) == 1


def test_files_without_a_split_beside_others_are_named_once(tmp_path, capsys):
    for number, name in enumerate(("train", "test", "extra", "test-split-train")):
        write(tmp_path / f"{name}.jsonl", {"question": f"q{number}", "answer": "x"})
    source = FileSource(str(tmp_path))
    assert {row.question for row in source.questions("train")} == {"q0", "q3"}
    assert {row.question for row in source.questions("test")} == {"q1"}
    said = capsys.readouterr().out
    assert said.count(f"left out, as no split is in their names: {tmp_path}/extra.jsonl; name them") == 1


def test_json_with_one_row_is_a_row(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"question": "Who?", "answer": ["me", "I"]}))
    (row,) = FileSource(str(tmp_path / "a.json")).questions("test")
    assert row.golden_answers == ("me", "I")


def test_a_long_cell_is_a_bad_row_and_not_the_end(tmp_path, capsys):
    lines = [b"question,answer", MEGABYTE.encode() + b",1", b"two,2"]
    assert len(FileSource(write(tmp_path / "a.csv", *lines)).questions("test")) == 1
    assert "1 skipped: the question has more than 10000 characters (row 2)" in capsys.readouterr().out


def test_only_the_first_numbers_of_a_reason_are_shown(tmp_path, capsys):
    FileSource(write(tmp_path / "a.jsonl", *[{"question": ""}] * 9, GOOD)).questions("test")
    assert "9 skipped: the question is missing (rows 1, 2, 3, 4, 5, ...)" in capsys.readouterr().out


def test_many_files_name_the_file_of_a_row_and_are_summed_up_once(tmp_path, capsys):
    for name in "ab":
        write(tmp_path / f"{name}.jsonl", GOOD | {"id": name}, {"question": "x"})
    source = FileSource(str(tmp_path))
    for split in ("train", "test", "train"):
        source.questions(split)
    said = capsys.readouterr().out
    assert said.count("rows read") == 1
    assert f"(rows {tmp_path}/a.jsonl:2, {tmp_path}/b.jsonl:2)" in said
    assert {example.source for example in source.questions("test")} == {tmp_path.name}


# ------------------------------------------------------------------------------------------------ whole files


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b"", "a.jsonl is empty"),
        ("a.csv", b"", "a.csv is empty"),
        ("a.csv", b"question,answer\n", "no row of .*a.csv can be used: it has none"),
        ("a.jsonl", b"\n\n", "no row of .*a.jsonl can be used: it has none"),
        (
            "a.jsonl",
            b'{"question": 1, "answer": 2}\n{',
            "no row .*: 1 skipped: .* of type int .*; 1 skipped: the line is not JSON",
        ),
        ("a.json", b'[{"question": "a"},', "a.json is not JSON: .* line 1 column"),
        ("a.json", b'{"a": [{}], "b": [{}]}', "a.json holds no list of rows"),
        ("a.json", b"3", "a.json holds no list of rows"),
        ("a.parquet", b"PAR1 but not really", "a.parquet cannot be read as parquet: "),
        ("a.txt", b"Who?", "a.txt has an unknown kind; expected a file that ends with .parquet, "),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=said):
        FileSource(str(tmp_path / name), columns=None).questions("test")


@pytest.mark.parametrize("damage", ["cut", "page"])
def test_damaged_parquet(tmp_path, damage):
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.Table.from_pylist([{"question": f"Who is {n}?", "answer": "x"} for n in range(5000)]), path)
    content = bytearray(path.read_bytes())
    if damage == "cut":
        content = content[: len(content) // 2]
    else:
        content[20:400] = bytes(380)
    path.write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read as parquet"):
        FileSource(str(path)).questions("test")


def test_parquet_text_that_is_not_utf8(tmp_path, capsys):
    raw = pa.array([b"Who?", b"Wh\xff?", b"What?", b"Where?"]).view(pa.string())
    table = pa.table({"question": raw, "answer": ["a", "b", "c", "d"]})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert len(FileSource(str(tmp_path / "a.parquet")).questions("test")) == 3
    assert "1 skipped: the question is not UTF-8 or holds half a character (row 2)" in capsys.readouterr().out


def test_a_missing_column_names_those_that_are_there(tmp_path):
    path = write(tmp_path / "a.csv", b"Question,Reply", b"Who?,me")
    with pytest.raises(ValueError, match=r"has no column question; found Question, Reply; .* columns: {question: COLUMN};"):
        FileSource(path).questions("test")
    with pytest.raises(ValueError, match=r"has no column golden_answers or answer or .* columns: {golden_answers: COLUMN}"):
        FileSource(path, columns={"question": "Question"}).questions("test")
    with pytest.raises(ValueError, match="has no column reply; found Question, Reply"):
        FileSource(path, columns={"question": "Question", "golden_answers": "reply"}).questions("test")
    with pytest.raises(ValueError, match="there is nothing called answer; expected id, question, golden_answers"):
        FileSource(path, columns={"answer": "Reply"})


@pytest.mark.parametrize(
    "path", ["nope.csv", "./nope", "nope*.jsonl", "a/b/c", "nope", "here/nq", "~nobody-is-called-so/x", "n" * 300]
)
def test_a_missing_file(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    with pytest.raises(ValueError, match=r"data\.source\.path: there is no file or folder " + re.escape(path)):
        FileSource(path)


def test_a_folder_without_rows(tmp_path):
    write(tmp_path / "readme.md", b"hello")
    with pytest.raises(ValueError, match=r"or none in it that ends with \.parquet"):
        FileSource(str(tmp_path)).questions("test")


# ------------------------------------------------------------------------------------------------ odd, but usable


def test_odd_golden_answers_are_used(tmp_path):
    answers = [["The"], "+", 1998, ["", "Beijing"], ["cafe\u0301", "caf\u00e9"]]
    path = write(tmp_path / "a.jsonl", *[{"question": f"q{n}", "answer": answer} for n, answer in enumerate(answers)])
    found = {example.question: example.golden_answers for example in FileSource(path).questions("test")}
    assert found == {"q0": ("The",), "q1": ("+",), "q2": ("1998",), "q3": ("Beijing",), "q4": ("cafe\u0301", "caf\u00e9")}
    assert exact_match("+", found["q1"]) == exact_match("the", found["q0"]) == 1
    assert exact_match("a", found["q0"]) == 0


def test_repeated_ids_are_made_unique(tmp_path):
    rows = [
        GOOD | {"id": 1},
        GOOD | {"id": "1", "question": "Where?"},
        GOOD | {"id": 1},
        GOOD | {"id": "1#2", "question": "Why?"},
    ]
    rows += [{"question": "Is the cafe\u0301 open?", "answer": "x"}, {"question": "is caf\u00e9 open", "answer": "x"}]
    examples = FileSource(write(tmp_path / "a.jsonl", *rows)).questions("test")
    assert len({example.key for example in examples}) == len(examples) == 6
    assert {"1", "1#2", "1#3", "1#2#2"} < {example.id for example in examples}


def test_one_id_for_every_row_takes_no_longer(tmp_path):
    ids, seconds = [], []
    for name, number in (("own", lambda n: n), ("one", lambda n: 0)):
        rows = [GOOD | {"id": number(n), "question": f"q{n}"} for n in range(8000)]
        path = write(tmp_path / f"{name}.jsonl", *rows)
        begun = time.process_time()
        ids.append({example.id for example in FileSource(path).questions("test")})
        seconds.append(time.process_time() - begun)
    assert ids == [{str(n) for n in range(8000)}, {"0", *(f"0#{n}" for n in range(2, 8001))}]
    # With every number tried anew for each row, more than twenty times as long.
    assert seconds[1] < 8 * seconds[0], seconds


def test_questions_without_a_word_are_different_questions(tmp_path):
    rows = [{"question": question, "answer": "x"} for question in ("+?", "*?")]
    examples = FileSource(write(tmp_path / "a.jsonl", *rows)).questions("test")
    assert len({example.id for example in examples}) == 2


def test_questions_that_only_punctuation_tells_apart_have_ids_in_any_order(tmp_path):
    rows = [{"question": f"Who made {name}?", "answer": name} for name in ("C", "C++", "C#", "Ada")]
    read = []
    for name in ("a", "b"):
        found = FileSource(write(tmp_path / f"{name}.jsonl", *rows)).questions("test")
        read.append({row.question: row.id for row in found})
        rows.reverse()
    assert read[0] == read[1]
    assert len(set(read[0].values())) == 4
    assert not any("#" in name for name in read[0].values())


def test_rows_do_not_follow_the_name_of_a_file(tmp_path):
    rows = [{"question": f"Is it {n}?", "answer": "x"} for n in range(60)]
    samples = []
    for name in ("one.jsonl", "moved/two.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        source = FileSource(write(path, *rows), limit=30)
        data = QADataModule(source, test_rows=10)
        order = [row.question for row in source.questions("train")]
        samples.append((order, [row.question for batch in data.test_dataloader() for row in batch]))
        rows.reverse()
    assert samples[0] == samples[1]
    assert len(samples[0][0]) == 30
    assert len(samples[0][1]) == 10


def test_a_single_file_for_every_split_is_said(tmp_path, capsys):
    path = write(tmp_path / "one.jsonl", GOOD)
    FileSource(path).questions("test")
    assert "every split" not in capsys.readouterr().out
    FileSource(path).questions("train")
    assert "every split has the same rows; data.source.splits parts them" in capsys.readouterr().out
    FileSource(path, splits={"train": 1.0}).questions("train")
    assert "every split" not in capsys.readouterr().out


def test_repeated_questions_are_counted_and_ids_made_unique(tmp_path, capsys):
    rows = [GOOD | {"id": 1}, GOOD | {"id": "1", "question": "Where?"}, GOOD | {"id": 1}]
    rows += [{"question": "Is the cafe\u0301 open?", "answer": "x"}, {"question": "is caf\u00e9 open", "answer": "x"}]
    examples = FileSource(write(tmp_path / "a.jsonl", *rows)).questions("test")
    assert len({example.key for example in examples}) == len(examples) == 5
    assert "2 used, but an earlier row has the same question" in capsys.readouterr().out


def test_questions_that_are_in_train_and_held_out_are_counted(tmp_path, capsys):
    write(tmp_path / "train.jsonl", *[{"question": f"Is it {n}?", "answer": "x"} for n in range(10)])
    write(tmp_path / "test.jsonl", *[{"question": f"is IT the {n}", "answer": "x"} for n in range(8, 14)])
    write(tmp_path / "dev.jsonl", {"question": "Is it 3?"}, {"answer": ""})
    data = QADataModule(FileSource(str(tmp_path)), batch_size=2, steps=2)
    data.train_dataloader()
    said = capsys.readouterr().out
    assert "data: 2 of 6 test questions are also in train" in said
    assert "data: validation questions were not looked for in train: data.source: no row of" in said


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["\ud800", "\0", "[1", "[]"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=5,
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.fixed_dictionaries({}, optional={name: VALUES for name in ("id", "question", "answer", "data_source", "reward_model")})
)
def test_whatever_a_row_holds_it_is_an_example_or_a_reason(values):
    try:
        example = example_of(values, Columns(None), "name")
    except BadRow:
        return
    assert example.golden_answers
    for text in (example.id, example.question, example.source, *example.golden_answers):
        assert isinstance(text, str)
        assert text.strip() == text != ""
        derive_seed(text)
    assert all(exact_match(gold, example.golden_answers) == 1 for gold in example.golden_answers)


def test_a_spreadsheet_of_nothing_but_its_mark_is_empty(tmp_path):
    path = tmp_path / "q.csv"
    path.write_bytes(b"\xef\xbb\xbf")
    with pytest.raises(UserError, match="is empty"):
        FileSource(str(path)).questions("train")
