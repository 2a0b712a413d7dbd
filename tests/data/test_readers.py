"""Files of every known schema, written here, read as questions or as search records."""

import json
import random
import sys
from collections import Counter

import pyarrow as pa
import pytest
from pyarrow import parquet

from support.rows import write_csv, write_jsonl
from zs_lightning.data import FileSource, QADataModule
from zs_lightning.data.parts import hub_parts
from zs_lightning.data.sources import MissingSplit
from zs_lightning.text.answers import normalize_answer
from zs_lightning.types import Document

ANSWERS = [["Beijing"], ["1998", "in 1998"], ["Foo Bar"]]


def searched(number, source="nq"):
    """A row as Search-R1 makes it."""
    return {
        "id": f"train_{number}",
        "question": f"What is number {number}?",
        "golden_answers": ANSWERS[number % 3],
        "data_source": source,
        "prompt": [{"role": "user", "content": "A prompt of somebody else. Question: another one?"}],
        "ability": "fact-reasoning",
        "reward_model": {"style": "rule", "ground_truth": {"target": ANSWERS[number % 3]}},
        "extra_info": {"split": "train", "index": number},
    }


def write_parquet(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


def by_question(examples):
    return {example.question: example for example in examples}


# ------------------------------------------------------------------------------------------------ schemas


def test_search_r1_parquet(tmp_path, capsys):
    path = write_parquet(tmp_path / "train.parquet", [searched(n) for n in range(6)])
    found = by_question(FileSource(path).questions("test"))
    assert len(found) == 6
    example = found["What is number 4?"]
    assert example.id == "train_4"
    assert example.golden_answers == ("1998", "in 1998")
    assert example.source == example.subset == "nq"
    assert capsys.readouterr().out == f"data: {path}: 6 rows read, 6 used\n"


def test_zerosearch_parquet_has_no_ids_and_indices_that_collide(tmp_path):
    rows = [searched(n % 3, source) | {"question": f"{source} {n}"} for source in ("nq", "popqa") for n in range(3)]
    rows = [{name: value for name, value in row.items() if name not in ("id", "golden_answers")} for row in rows]
    path = write_parquet(tmp_path / "test.parquet", rows)
    examples = FileSource(path).questions("test")
    assert len({example.key for example in examples}) == 6
    assert {example.golden_answers for example in examples} == {tuple(answers) for answers in ANSWERS}
    again = write_parquet(tmp_path / "other" / "test.parquet", rows[::-1])
    assert {e.key for e in FileSource(again).questions("test")} == {e.key for e in examples}  # Ids do not hang on places.


def test_flashrag_folder(tmp_path):
    for split, count in (("train", 5), ("dev", 3), ("test", 2)):
        rows = [
            {"id": f"{split}_{n}", "question": f"{split} {n}", "golden_answers": ["x"], "metadata": {"n": n}}
            for n in range(count)
        ]
        write_jsonl(tmp_path / "hotpotqa" / f"{split}.jsonl", rows)
    write_jsonl(tmp_path / "hotpotqa" / "corpus.jsonl", [{"contents": "no question"}])
    source = FileSource(str(tmp_path / "hotpotqa"))
    assert [len(source.questions(split)) for split in ("train", "validation", "test")] == [5, 3, 2]
    assert {example.key for example in source.questions("validation")} == {f"hotpotqa/dev_{n}" for n in range(3)}


@pytest.mark.parametrize("suffix", ["jsonl", "json", "lines.json", "parquet"])
def test_plain_rows_with_one_answer(tmp_path, suffix):
    rows = [{"question": "Wer?", "answer": "Ärzte <b>"}, {"question": "Was?", "answer": "ein Lied"}]
    path = tmp_path / f"mine.{suffix}"
    if suffix == "parquet":
        write_parquet(path, rows)
    else:
        path.write_text(json.dumps({"version": 1, "data": rows}) if suffix == "json" else "\n".join(map(json.dumps, rows)))
    found = by_question(FileSource(str(path)).questions("train"))
    assert found["Wer?"].golden_answers == ("Ärzte <b>",)
    assert found["Was?"].source in ("mine", "mine.lines")


@pytest.mark.parametrize(("delimiter", "encoding"), [(",", "utf-8"), (";", "utf-8-sig"), ("\t", "utf-8")])
def test_spreadsheets(tmp_path, delimiter, encoding):
    rows = [["question", " answer"], ["Who, then?", '["A", "B; C"]'], ["Zwei\nZeilen", "1998"], [], ["x", "[sic] y"]]
    found = by_question(FileSource(write_csv(tmp_path / "my.csv", rows, delimiter, encoding)).questions("test"))
    answers = {question: example.golden_answers for question, example in found.items()}
    assert answers == {"Who, then?": ("A", "B; C"), "Zwei\nZeilen": ("1998",), "x": ("[sic] y",)}


def test_columns_of_other_names(tmp_path):
    rows = [{"n": 7, "q": "Who?", "meta": {"said": ["me", "me", "I"]}, "set": "mine", "question": "not this"}]
    columns = {"id": "n", "question": "q", "golden_answers": "meta.said", "source": "set"}
    (example,) = FileSource(write_jsonl(tmp_path / "a.jsonl", rows), columns=columns).questions("test")
    assert (example.key, example.question, example.golden_answers) == ("mine/7", "Who?", ("me", "I"))


def test_a_pattern_reads_many_sets_and_the_limit_is_for_each(tmp_path):
    for name, count in (("nq", 80), ("bamboogle", 12), ("popqa", 50)):
        write_jsonl(tmp_path / name / "test.jsonl", [{"question": f"{name} {n}", "answer": "x"} for n in range(count)])
    whole = FileSource(str(tmp_path / "*" / "test.jsonl")).questions("test")
    some = FileSource(str(tmp_path / "*" / "test.jsonl"), limit=20).questions("test")
    other = FileSource(str(tmp_path / "*" / "test.jsonl"), limit=20, seed=1).questions("test")
    assert len(whole) == 142
    assert [sum(e.subset == name for e in some) for name in ("nq", "bamboogle", "popqa")] == [20, 12, 20]
    assert some == [example for example in whole if example in some]
    assert {e.key for e in some} != {e.key for e in other}
    assert {e.subset for e in whole[:15]} == {"nq", "bamboogle", "popqa"}  # The head is a sample of all.


# ------------------------------------------------------------------------------------------------ splits


def test_shares_part_the_rows_by_question(tmp_path):
    rows = [{"id": n, "question": f"Is it number {n}?", "answer": "x"} for n in range(1000)]
    rows += [{"id": 1000 + n, "question": f"is it THE number {n}", "answer": "x"} for n in range(0, 1000, 10)]
    random.Random(0).shuffle(rows)
    path = write_jsonl(tmp_path / "all.jsonl", rows)
    splits = {"train": 0.7, "validation": 0.1, "test": 0.2}
    source = FileSource(path, splits=splits)
    parts = {split: {normalize_answer(e.question) for e in source.questions(split)} for split in splits}
    assert sum(len(source.questions(split)) for split in splits) == 1100
    assert sum(map(len, parts.values())) == len(set.union(*parts.values())) == 1000
    assert [len(part) for part in parts.values()] == pytest.approx([700, 100, 200], abs=45)
    again = FileSource(write_jsonl(tmp_path / "again.jsonl", rows[::-1]), splits=splits)
    assert {normalize_answer(e.question) for e in again.questions("test")} == parts["test"]


def test_splits_by_file_and_by_name(tmp_path):
    first = write_jsonl(tmp_path / "a.jsonl", [{"question": f"a{n}", "answer": "x"} for n in range(4)])
    write_jsonl(tmp_path / "b.jsonl", [{"question": "b", "answer": "x"}])
    source = FileSource(first, splits={"train": "a.jsonl", "test": "b.jsonl"})
    assert (len(source.questions("train")), len(source.questions("test"))) == (4, 1)
    with pytest.raises(MissingSplit, match=r"has no validation split: data\.source\.splits names only train, test"):
        source.questions("validation")
    for name in ("nq_train-00000-of-00002", "nq_train-00001-of-00002", "nq_test"):
        write_parquet(tmp_path / "shards" / f"{name}.parquet", [searched(n, None) | {"id": name + str(n)} for n in range(3)])
    source = FileSource(str(tmp_path / "shards" / "*"))
    assert (len(source.questions("train")), len(source.questions("test"))) == (6, 3)
    assert {example.source for example in source.questions("train")} == {"nq"}
    with pytest.raises(MissingSplit, match=r"no validation split: found .*nq_test"):
        source.questions("validation")


@pytest.mark.parametrize(
    ("splits", "said"),
    [
        ({"dev": "x.jsonl"}, "there is no split dev; expected train, validation, test"),
        ({"train": 0.5, "test": "x.jsonl"}, "shares between 0 and 1 only"),
        ({"train": 0.9, "test": 0.2}, "a sum of at most 1"),
        ({"test": "x.jsonl"}, "there is no file .*x.jsonl"),
    ],
)
def test_wrong_splits(tmp_path, splits, said):
    with pytest.raises(ValueError, match=said):
        FileSource(write_jsonl(tmp_path / "a.jsonl", [{"question": "a", "answer": "x"}]), splits=splits)


def test_data_sets_of_the_hub(tmp_path, monkeypatch):
    """The library of the hub, with a data set's folder."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for split in ("train", "test"):
        write_parquet(tmp_path / "data" / f"{split}.parquet", [searched(n) | {"split": split} for n in range(3)])
    found = hub_parts(str(tmp_path / "data"), None)
    assert {part.split: len(list(part.rows())) for part in found} == {"train": 3, "test": 3}
    assert {part.name for part in found} == {"data"}
    (part,) = hub_parts(str(tmp_path / "data"), None, "test[1:]")
    row = next(part.rows())
    assert (row.number, row.values) == (1, searched(1) | {"split": "test"})
    with pytest.raises(ValueError, match="owner/name is no file or folder here, and could not be loaded from the hub"):
        FileSource("owner/name").questions("test")


def test_local_files_do_not_need_the_library_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    for path in (write_parquet(tmp_path / "a.parquet", [searched(0)]), write_jsonl(tmp_path / "b.jsonl", [searched(0)])):
        assert len(FileSource(path).questions("test")) == 1


# ------------------------------------------------------------------------------------------------ data module


def test_a_test_sees_all_3125_rows(tmp_path):
    sizes = {"nq": 500, "triviaqa": 500, "popqa": 500, "hotpotqa": 500, "2wiki": 500, "musique": 500, "bamboogle": 125}
    rows = [searched(n, name) | {"question": f"{name} {n}", "id": str(n)} for name, size in sizes.items() for n in range(size)]
    source = FileSource(write_parquet(tmp_path / "test.parquet", rows))
    seen = [row for batch in QADataModule(source=source, eval_batch_size=64).test_dataloader() for row in batch]
    assert len(seen) == len({row.key for row in seen}) == 3125
    assert {name: sum(row.subset == name for row in seen) for name in sizes} == sizes


RECORD = {"question": "Who wrote it?", "golden_answers": ["Foo Bar"], "query": "author", "label": "useful"}


def test_search_records_in_both_spellings(tmp_path):
    rows = [
        RECORD | {"documents": [{"title": "T", "text": "by Foo Bar"}, "plain"]},
        RECORD | {"documents": "Doc 1: first by Foo Bar Doc 2: second", "label": "noisy"},
        RECORD | {"documents": ["nothing"], "query": "weather"},
    ]
    module = QADataModule(source=FileSource(write_jsonl(tmp_path / "r.jsonl", rows)), task="records", batch_size=1, steps=3)
    records = {(r.query, r.label): r for (r,) in module.train_dataloader()}
    assert records["author", "useful"].documents == (Document(title="T", text="by Foo Bar"), Document(text="plain"))
    assert records["author", "noisy"].documents == (Document(text="first by Foo Bar"), Document(text="second"))
    assert {key: r.evidence for key, r in records.items()} == {
        ("author", "useful"): ("Foo Bar",),
        ("author", "noisy"): (),
        ("weather", "useful"): (),
    }


def test_yes_is_no_evidence(tmp_path):
    row = RECORD | {"golden_answers": ["Yes", "Foo"], "documents": ["Yes, Foo wrote it."]}
    (record,) = FileSource(write_jsonl(tmp_path / "r.jsonl", [row])).search_records("test", 9)
    assert record.evidence == ("Foo",)


def test_each_label_is_taught_as_often_as_any_other(tmp_path):
    rows = [RECORD | {"documents": [str(i)], "query": f"q{i}"} for i in range(10)]
    for kind, times in (("noisy", 30), ("off_topic", 20)):
        rows += [RECORD | {"documents": [f"{kind} {i}"], "query": f"q{i}", "label": kind} for i in range(times)]
    source = FileSource(write_jsonl(tmp_path / "r.jsonl", rows))
    counts = Counter(row.label for row in source.search_records("train", 10_000))
    assert counts == {"useful": 30, "noisy": 30, "off_topic": 30}
    assert set(Counter(row.query for row in source.search_records("train", 90) if row.label == "useful").values()) == {3}
    assert Counter(row.label for row in source.search_records("train", 31)).total() == 31


@pytest.mark.parametrize("options", [{}, {"splits": {"validation": 1.0}}, {"limit": 20}])
def test_held_out_records_are_one_a_query(tmp_path, options):
    """A built file has dozens of rows of each query: some 200 of them would be of four queries."""
    rows = []
    for number in range(30):
        asked = RECORD | {"question": f"Who wrote {number % 10}?", "query": f"q{number}"}
        rows += [asked | {"documents": [f"{i} Foo Bar"]} for i in range(2)]
        for kind in ("noisy", "off_topic", "partial")[: number % 4]:
            rows += [asked | {"documents": [f"{kind} {i}"], "label": kind} for i in range(8)]
    source = FileSource(write_jsonl(tmp_path / "r.jsonl", rows), **options)
    held = source.search_records("validation", 20)
    assert len({row.query for row in held}) == 20
    counts = Counter(row.label for row in held)
    assert set(counts) == {"useful", "noisy", "off_topic", "partial"}
    assert counts["useful"] >= 10
    # A noisy row without evidence has that of the useful row.
    assert {row.evidence for row in held} == {("Foo Bar",)}
    assert len(source.search_records("validation", 999)) == options.get("limit", 30)


def test_records_of_the_training_questions_have_all_splits(tmp_path):
    """A simulator's data is built of them: by the same draw it would have no validation."""
    rows = [RECORD | {"question": f"Who wrote {i}?", "documents": ["Foo Bar"]} for i in range(200)]
    path = write_jsonl(tmp_path / "q.jsonl", rows)
    shares = {"train": 0.8, "validation": 0.1, "test": 0.1}
    asked = {row.question for row in FileSource(path, splits=shares).questions("train")}
    kept = write_jsonl(tmp_path / "r.jsonl", [row for row in rows if row["question"] in asked])
    counts = {split: len(FileSource(kept, splits=shares).search_records(split, 999)) for split in shares}
    assert counts["train"] > 100
    assert min(counts.values()) > 5


def test_records_with_unknown_columns_show_their_first_row(tmp_path):
    path = tmp_path / "SimulationTuning.json"
    path.write_text(json.dumps([{"instruction": "You are an engine " + "x" * 5000, "output": "Doc 1: y"}] * 3))
    with pytest.raises(ValueError, match="has no column question; found instruction, output;") as failure:
        FileSource(str(path)).search_records("train", 5)
    assert '{"instruction": "You are an engine xxx' in str(failure.value)
    assert "data.source.columns" in str(failure.value)
    assert len(str(failure.value)) < 1000
