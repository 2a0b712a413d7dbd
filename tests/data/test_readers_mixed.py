"""Several sources as one, the way from a configuration file to rows, and records from a run with a real engine."""

import json
from collections import Counter

import pytest
import yaml

from support.commandline import TEST, failure
from support.rows import write_csv, write_jsonl
from zs_lightning.cli import main
from zs_lightning.configuration.lightning_cli import ZeroSearchCLI
from zs_lightning.data import FileSource, MixedSource, QADataModule
from zs_lightning.data.sources import MiniatureSource, MissingSplit, QASource
from zs_lightning.types import QAExample, SearchRecord

pytestmark = pytest.mark.usefixtures("environment")


class Counted(QASource):
    """So many rows of each split; the same ids and the same source in every one of them."""

    def __init__(self, **sizes):
        self.sizes = sizes

    def questions(self, split):
        if split not in self.sizes:
            raise MissingSplit(split)
        name = f"{split} of {sorted(self.sizes.items())}"
        return [
            QAExample(id=str(n), question=f"{name} {n}", golden_answers=("x",), source="same") for n in range(self.sizes[split])
        ]

    def search_records(self, split, count):
        return [SearchRecord(example=e, query="q", label="useful", documents=()) for e in self.questions(split)[:count]]


def subsets(rows):
    return Counter(row.subset for row in rows)


# ------------------------------------------------------------------------------------------------ mixed


def test_a_mix_is_a_function_of_its_seed_and_its_head_a_sample():
    def mixed(seed):
        return MixedSource({"a": Counted(train=200), "b": Counted(train=200)}, seed=seed).questions("train")

    assert mixed(0) == mixed(0) != mixed(1)
    assert subsets(mixed(0)) == subsets(mixed(1)) == {"a": 200, "b": 200}
    assert 15 < subsets(mixed(0)[:50])["a"] < 35


def test_sources_without_a_split_are_left_out(capsys):
    source = MixedSource({"a": Counted(train=5), "b": Counted(test=4), "c": Counted(train=3, test=2)})
    assert subsets(source.questions("train")) == {"a": 5, "c": 3}
    assert "data: b: no train split, left out of it" in capsys.readouterr().out
    assert subsets(source.questions("test")) == {"b": 4, "c": 2}
    assert len({row.key for row in source.questions("test")}) == 6
    with pytest.raises(MissingSplit, match="none of a, b, c has a validation split"):
        source.questions("validation")


def test_records_are_mixed_too():
    source = MixedSource({"a": Counted(train=90), "b": Counted(train=90)})
    records = source.search_records("train", 60)
    assert len(records) == len({record.example.key for record in records}) == 60
    assert 15 < sum(record.example.subset == "a" for record in records) < 45


def test_subsets_of_a_source_stay_below_its_name(tmp_path):
    rows = [{"question": f"q{n}", "answer": "x", "data_source": "nq" if n % 2 else "popqa"} for n in range(6)]
    files = FileSource(write_jsonl(tmp_path / "test.jsonl", rows))
    found = subsets(MixedSource({"web": files, "mini": MiniatureSource()}).questions("test"))
    assert found["web/nq"] == found["web/popqa"] == 3
    assert found["mini/new/one_hop"] > 0


@pytest.mark.parametrize("sources", [{}, {"a/b": Counted()}, {"": Counted()}])
def test_wrong_names(sources):
    with pytest.raises(ValueError, match=r"data\.source\.sources: expected sources with names without a slash"):
        MixedSource(sources)


# ------------------------------------------------------------------------------------------------ configuration files


def data_of(tmp_path, source):
    """The data module that `test` would use."""
    config = tmp_path / "mine.yaml"
    config.write_text(yaml.safe_dump({"data": {"source": source}}))
    options = ["test", TEST, f"--config={config}", f"--run.folder={tmp_path / 'run'}"]

    class NoRun(ZeroSearchCLI):
        def _run_subcommand(self, subcommand):
            pass

    return NoRun(options).datamodule


def test_a_file_of_ones_own(tmp_path):
    path = write_csv(tmp_path / "my_questions.csv", [["question", "answer"], ["Who?", "me"], ["What?", '["a", "b"]']])
    data = data_of(tmp_path, {"class_path": "FileSource", "init_args": {"path": path, "splits": {"test": 1.0}}})
    assert isinstance(data, QADataModule)
    (batch,) = data.test_dataloader()
    assert {row.golden_answers for row in batch} == {("me",), ("a", "b")}


def test_a_mix_in_a_file(tmp_path):
    path = write_jsonl(tmp_path / "nq.jsonl", [{"q": f"q{n}", "answer": "x"} for n in range(3)])
    file = {"class_path": "FileSource", "init_args": {"path": path, "columns": {"question": "q"}}}
    mix = {"sources": {"nq": file, "mini": {"class_path": "MiniatureSource"}}}
    data = data_of(tmp_path, {"class_path": "MixedSource", "init_args": mix})
    assert len(data.source.questions("train")) == 3 + len(MiniatureSource().questions("train"))


def test_a_wrong_class_in_a_mix(tmp_path, capsys):
    (tmp_path / "mix.yaml").write_text("data: {source: {class_path: MixedSource, init_args: {sources: {nq: FileSorce}}}}")
    code, printed = failure(capsys, "test", TEST, f"--config={tmp_path / 'mix.yaml'}")
    assert (code, printed) == (2, "error: data.source.sources: there is no class FileSorce; did you mean FileSource?")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--data.source.path=nope.csv"], "data.source.path: there is no file or folder nope.csv; expected a file (.parquet"),
        (
            ["--data.source.path=my.csv"],
            "data.source: my.csv has no column question; found Frage, answer; name the right one by ",
        ),
        (
            ["--data.source.path=my.csv", "--data.source.bad_rows=drop"],
            "data.source.bad_rows: expected skip or error; got drop",
        ),
        (["--data.source.path=my.csv", "--data.source.colums=1"], "unknown option data.source.colums (FileSource has no such"),
        (
            ["--data.source.path=my.csv", "--data.source.limit=few"],
            "data.source.limit: expected a whole number or null; got few",
        ),
        (["--data.source.path=owner/name"], "data.source: owner/name is no file or folder here, and could not be loaded from"),
        ([], "data.source.path is missing: FileSource needs it"),
    ],
)
def test_what_a_user_reads_of_an_error(capsys, tmp_path, options, said):
    write_csv(tmp_path / "my.csv", [["Frage", "answer"], ["Wer?", "ich"]])
    code, printed = failure(capsys, "test", TEST, "--data.source=FileSource", *options)
    assert code == 2
    assert printed.startswith(f"error: {said}")
    assert "\n" not in printed


def test_a_test_of_ones_own_questions(tmp_path, capsys):
    asked = MiniatureSource().questions("test")[:24]
    rows = [{"question": e.question, "answer": list(e.golden_answers), "data_source": "ab"[n % 2]} for n, e in enumerate(asked)]
    path = write_jsonl(tmp_path / "test.jsonl", [*rows, {"question": "", "answer": "x"}])
    main(
        [
            "test",
            TEST,
            "--data.source=FileSource",
            f"--data.source.path={path}",
            "--run.folder=run",
            "--model.decodings=[sampled]",
        ]
    )
    assert "1 skipped: the question is missing (row 25)" in capsys.readouterr().out
    subset = json.loads((tmp_path / "run" / "results.json").read_text())["decodings"]["sampled"]["subsets"]
    assert {name: part["questions"] for name, part in subset.items()} == {"a": 12, "b": 12}
