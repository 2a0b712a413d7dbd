"""build-simulator-data: a tiny model searches the miniature world, and the world's facts judge what comes of it."""

import json
import os
import shutil
from collections import Counter, defaultdict
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from support.commandline import ROOT, failure
from support.worldtruth import is_of_kind, is_useful, names_in
from zs_lightning.cli import main
from zs_lightning.commands.build_simulator_data.kinds import KINDS, Kinds, object_of
from zs_lightning.data.files import FileSource
from zs_lightning.data.sources import MiniatureSource
from zs_lightning.runs.folder import hold
from zs_lightning.search import BM25Search
from zs_lightning.streams import stream
from zs_lightning.types import Document, QAExample, SearchRecord, SearchResult

pytestmark = pytest.mark.usefixtures("environment")

CONFIG = f"--config={ROOT / 'configs' / 'miniature' / 'build_simulator_data.yaml'}"
SMALL = [
    CONFIG,
    "--kinds=[off_topic,partial,contradicting,outdated]",
    "--pairs=60",
    "--variants=1",
    "--batch_size=12",
    "--group_size=2",
]


def build(folder, *options):
    main(["build-simulator-data", *SMALL, f"--folder={folder}", *map(str, options)])
    return json.loads((folder / "build.json").read_text())


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder of a small build."""
    folder = tmp_path_factory.mktemp("build") / "data"
    build(folder)
    return folder


def rows_of(folder):
    return [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------------- what is built


def test_the_rule_agrees_with_the_worlds_truth(built):
    questions = {question.key: question.question for question in MiniatureSource().questions("train")}
    agreed = []
    for line in (built / "work.jsonl").read_text().splitlines()[1:]:
        for pair in json.loads(line)["pairs"]:
            truth = is_useful(questions[pair["key"]], pair["query"], [text for _, text in pair["documents"]])
            agreed.append(truth == pair["rule"])
    assert len(agreed) > 60
    assert sum(agreed) >= 0.98 * len(agreed)


def test_records_are_balanced_distinct_and_what_their_labels_say(built):
    rows = rows_of(built)
    counts = Counter(row["label"] for row in rows)
    assert counts["useful"] == counts["noisy"] == 30
    assert all(25 <= counts[kind] <= 30 for kind in KINDS)
    pairs = [(row["query"], json.dumps(row["documents"])) for row in rows if row["label"] in ("useful", "noisy")]
    assert len(pairs) == len(set(pairs))
    for row in rows:
        texts = [document["text"] for document in row["documents"]]
        if row["label"] in KINDS:
            assert is_of_kind(row["label"], row["question"], row["query"], texts), row
        else:
            assert is_useful(row["question"], row["query"], texts) == (row["label"] == "useful"), row


def test_three_of_four_noisy_records_are_twins_of_useful_ones(built):
    """Label and query would be one thing if all noise were of poor queries."""
    rows = rows_of(built)
    useful = {row["query"]: row for row in rows if row["label"] == "useful"}
    noisy = [row for row in rows if row["label"] == "noisy"]
    twins = [row for row in noisy if row["query"] in useful]
    assert len(twins) == json.loads((built / "build.json").read_text())["counts"]["twins"]
    assert len(twins) >= 0.75 * len(noisy) == 22.5
    for row in twins:
        documents, other = row["documents"], useful[row["query"]]["documents"]
        assert len(documents) == len(other)
        assert not any(text in document["text"] for text in row["evidence"] for document in documents)
    for row in noisy:
        # The searches that are noise by nature found nothing of what they name.
        if row not in twins:
            assert not any(name in row["query"] for d in row["documents"] for name in names_in(d["text"]))


def test_the_file_is_read_as_it_was_written_and_parts_by_question(built):
    shares = {"train": 0.8, "validation": 0.1, "test": 0.1}
    source = FileSource(str(built / "records.jsonl"), splits=shares)
    parts = {split: source.search_records(split, 10_000) for split in shares}
    written = Counter(row["query"] for row in rows_of(built))
    assert set().union(*({record.query for record in part} for part in parts.values())) == set(written)
    questions = [{record.example.question for record in part} for part in parts.values()]
    assert all(questions)
    assert not questions[0] & (questions[1] | questions[2])
    assert not questions[1] & questions[2]
    for record in parts["train"]:
        told = any(text in document.text for text in record.evidence for document in record.documents)
        assert told == (record.label == "useful"), record


def test_the_card_and_the_numbers_say_what_is_in_it(built):
    numbers = json.loads((built / "build.json").read_text())
    assert numbers["records"] == dict(Counter(row["label"] for row in rows_of(built)))
    assert numbers["overlap"] == {"validation": 0, "test": 0}
    counts = numbers["counts"]
    assert counts["searches"] == counts["repeated"] + counts["empty"] + numbers["pairs"]
    assert numbers["kappa"] is None
    card = (built / "card.md").read_text()
    assert f"and {counts['twins']} are twins of useful ones" in card
    assert "| useful | 30 |" in card
    assert numbers["sha256"] in card


# ---------------------------------------------------------------------- stopped, and gone on with


def test_a_build_that_was_killed_ends_with_the_same_file(built, tmp_path):
    """A kill leaves the beginning of the work file, at any byte."""
    whole = (built / "work.jsonl").read_bytes()
    rng = stream("kills")
    folder = tmp_path / "killed"
    folder.mkdir()
    for cut in [rng.randrange(20), rng.randrange(len(whole)), len(whole) - 1]:
        (folder / "work.jsonl").write_bytes(whole[:cut])
        build(folder)
        assert (folder / "records.jsonl").read_bytes() == (built / "records.jsonl").read_bytes()
        # Nothing was appended to half a line.
        lines = (folder / "work.jsonl").read_text().splitlines()
        assert len([json.loads(line) for line in lines]) == len(whole.splitlines())


def test_more_pairs_and_other_kinds_go_on_and_other_options_are_refused(built, tmp_path, capsys):
    folder = tmp_path / "more"
    shutil.copytree(built, folder)
    before = (folder / "work.jsonl").read_bytes()
    numbers = build(folder, "--pairs=40", "--kinds=[partial]", "--records=fewer.parquet")
    assert numbers["records"]["useful"] == numbers["records"]["noisy"] == 20
    assert set(numbers["records"]) == {"useful", "noisy", "partial"}
    rows = FileSource(str(folder / "fewer.parquet")).search_records("train", 999)
    assert len(set(map(id, rows))) == sum(numbers["records"].values())
    assert (folder / "work.jsonl").read_bytes() == before
    code, said = failure(capsys, "build-simulator-data", *SMALL, f"--folder={folder}", "--search.count=2")
    assert code == 2
    assert said == f"error: folder: {folder} holds a build with another `search`; set it back, or name another folder"


def test_a_build_that_was_stopped_before_its_first_batch_takes_other_options(built, tmp_path):
    folder = tmp_path / "early"
    folder.mkdir()
    (folder / "work.jsonl").write_text((built / "work.jsonl").read_text().splitlines(keepends=True)[0])
    build(folder, "--search.count=2")
    head = json.loads((folder / "work.jsonl").read_text().splitlines()[0])
    assert head["settings"]["search"]["init_args"]["count"] == 2


def test_questions_are_searched_for_as_they_are_without_a_model(tmp_path):
    """One that writes nothing is not loaded: a folder that is not there does no harm."""
    limits = ["--rollout.retrieve_first=true", "--rollout.max_turns=0", "--model.path=no/such"]
    numbers = build(tmp_path / "data", *limits)
    assert numbers["records"]["useful"] == 30
    assert "| searched by | nobody: each question was sent as it is |" in (tmp_path / "data" / "card.md").read_text()
    assert "tokens" not in {name for name, count in numbers["counts"].items() if count}
    batches = [json.loads(line) for line in (tmp_path / "data" / "work.jsonl").read_text().splitlines()[1:]]
    assert sum(batch["counts"]["searches"] for batch in batches) == sum(batch["counts"]["questions"] for batch in batches)
    questions = {question.key: question.question for question in MiniatureSource().questions("train")}
    engine = BM25Search(world_seed=0, count=3)
    for pair in batches[0]["pairs"]:
        assert pair["query"] == questions[pair["key"]]
        hits = engine.rank([pair["query"]], 3)[0]
        assert [text for _, text in pair["documents"]] == [hit.passage.text for hit in hits]


def test_a_test_split_without_answers_does_not_keep_back_what_was_built(tmp_path, capsys):
    Path("mine").mkdir()
    questions = MiniatureSource().questions("train")[:60]
    rows = [{"question": row.question, "golden_answers": row.golden_answers} for row in questions]
    Path("mine/train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    Path("mine/test.jsonl").write_text(json.dumps({"question": questions[0].question}))
    source = [f"--source={FileSource.__module__}.FileSource", "--source.path=mine"]
    limits = ["--rollout.retrieve_first=true", "--rollout.max_turns=0", "--pairs=6", "--kinds=[]"]
    assert build(tmp_path / "data", *source, *limits)["overlap"] == {}
    assert len(rows_of(tmp_path / "data")) == 6
    assert "build: test questions were not looked for in the records: " in capsys.readouterr().out


def test_a_folder_is_built_in_by_one_process_at_a_time(built, tmp_path, capsys):
    """Two would append the same batch twice, and skip the next one."""
    folder = tmp_path / "held"
    shutil.copytree(built, folder)
    held = hold(folder)
    code, said = failure(capsys, "build-simulator-data", *SMALL, f"--folder={folder}", "--pairs=90")
    assert code == 2
    assert said == f"error: folder: another process builds in {folder}; wait for its end, or name another folder"
    assert (folder / "work.jsonl").read_bytes() == (built / "work.jsonl").read_bytes()
    os.close(held)
    build(folder)
    build(folder)


class DyingSearch(BM25Search):
    """Fails every search from the third batch on, as long as there is a file `down`."""

    batches = 0

    def poll(self):
        if self.pending and Path("down").exists():
            DyingSearch.batches += 1
        results = super().poll()
        if DyingSearch.batches > 4:
            return [SearchResult(key=result.key, failure="the server is gone") for result in results]
        return results


def test_an_engine_that_dies_loses_nothing(tmp_path, capsys):
    options = [*SMALL, f"--folder={tmp_path / 'data'}", f"--search={__name__}.DyingSearch", "--search.count=3"]
    Path("down").touch()
    code, said = failure(capsys, "build-simulator-data", *options)
    assert code == 1
    assert "rollouts of a batch failed, the first with: the server is gone;" in said
    assert said.endswith("pairs are kept, and the same command goes on")
    kept = (tmp_path / "data" / "work.jsonl").read_bytes()
    assert len(kept.splitlines()) > 1
    Path("down").unlink()
    DyingSearch.batches = 0
    main(["build-simulator-data", *options])
    assert (tmp_path / "data" / "work.jsonl").read_bytes().startswith(kept)


def test_a_corpus_without_answers_is_said(tmp_path, capsys):
    Path("notes").mkdir()
    Path("notes/a.txt").write_text("The author of nothing. Birthplace unknown, spouse unknown, employer unknown.")
    lines = [f"What is the author of The Red {word}?,Ada Lowe" for word in ("Harbor", "Garden", "Song", "Door")]
    Path("questions.csv").write_text("\n".join(["question,answer", *lines]))
    source = [f"--source={FileSource.__module__}.FileSource", "--source.path=questions.csv"]
    code, said = failure(capsys, "build-simulator-data", *SMALL, "--folder=none", "--search.corpus=notes", *source)
    assert code == 1
    assert "found anything useful; see whether search.corpus holds answers" in said
    assert len(Path("none/work.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(("size", "batches"), [(16, 16), (100, 4)])
def test_a_corpus_without_answers_is_said_before_all_is_paid_for(size, batches, tmp_path, capsys):
    """After 256 rollouts and four batches."""
    Path("notes").mkdir()
    Path("notes/a.txt").write_text("Who is who. The things are many. Door, song and garden.")
    lines = [f"Who is the author of Red Door {number}?,Ada Lowe" for number in range(600)]
    Path("questions.csv").write_text("\n".join(["question,answer", *lines]))
    source = [f"--source={FileSource.__module__}.FileSource", "--source.path=questions.csv", "--search.corpus=notes"]
    limits = ["--rollout.retrieve_first=true", "--rollout.max_turns=0", f"--batch_size={size}"]
    code, said = failure(capsys, "build-simulator-data", *SMALL, "--folder=none", *source, *limits)
    assert code == 1
    assert f"build: no search of {size * batches} found anything useful; see whether search.corpus holds" in said
    assert len(Path("none/work.jsonl").read_text().splitlines()) == 1 + batches


def test_a_model_that_judges_nonsense_is_counted_and_the_rule_counts(tmp_path, capsys):
    numbers = build(tmp_path / "both", "--judge=both", "--kinds=[]", "--pairs=10")
    counts = numbers["counts"]
    assert counts["judge_tokens"] > 0
    assert counts["unclear"] + numbers["judged_twice"] >= numbers["pairs"]
    assert numbers["records"] == {"useful": 5, "noisy": 5}
    assert "verdicts of the model were neither useful nor noisy" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ("--kinds=[nonsense]", "kinds: 'nonsense' cannot be made by rule; expected off_topic, partial, contradicting"),
        ("--records=a.csv", "records: expected a name that ends in .jsonl or .parquet; got a.csv"),
        ("--pairs=0", "pairs: expected 1 or more; got 0"),
        ("--judge_model.path=miniature", "judge_model: judge: rule asks no model; set judge: model or both"),
        ("--model.path=nope/nope/nope", "model.path: there is no folder nope/nope/nope"),
        ("--paris=3", "unknown option paris; did you mean pairs?"),
    ],
)
def test_options_that_cannot_be_are_named(option, sentence, tmp_path, capsys):
    code, said = failure(capsys, "build-simulator-data", *SMALL, f"--folder={tmp_path / 'data'}", option)
    assert code == 2
    assert said.startswith(f"error: {sentence}")


# ---------------------------------------------------------------------- kinds of noise


def test_kinds_are_what_they_say_over_many_records():
    """By the world's truth, of the rule-made searches of the world."""
    records = MiniatureSource().search_records("validation", 400)
    maker = Kinds(records, seed=3)
    useful = [r for r in records if r.label == "useful"]
    right = defaultdict(list)
    for record in useful:
        for kind in KINDS:
            if made := maker.made(kind, record):
                texts = [document.text for document in made.documents]
                right[kind].append(is_of_kind(kind, record.example.question, record.query, texts))
    for kind in KINDS:
        assert len(right[kind]) > 0.9 * len(useful), kind
        assert sum(right[kind]) >= 0.98 * len(right[kind]), kind


def record_about(question, gold, query, *texts, title=""):
    example = QAExample(id=question, question=question, golden_answers=(gold, "Great " + gold), source="s")
    documents = tuple(Document(text=text, title=title) for text in texts)
    return SearchRecord(example=example, query=query, label="useful", documents=documents, evidence=(gold,))


def test_an_answer_is_replaced_by_one_of_its_sort_wherever_it_stands():
    texts = ("Rim is by ADA  LOWE. Great Ada Lowe! Calada lowed.", "Ada Lowe")
    lowe = record_about("Who wrote Rim?", "Ada Lowe", "Rim author", *texts)
    others = [
        record_about("Who wrote Sea?", "Bo Lee", "Sea author", "Sea is by Bo Lee."),
        record_about("When was Sea written?", "1912", "Sea year", "Sea is of 1912."),
    ]
    maker = Kinds([lowe, *others], seed=0)
    wrong, near = maker.made("contradicting", lowe).documents
    assert wrong.text == "Rim is by Bo Lee. Bo Lee! Calada lowed."
    # One statement of it: the others that tell give way to near misses.
    assert near.text in ("Sea is by Bo Lee.", "Sea is of 1912.")
    past = maker.made("outdated", lowe).documents
    assert all(document.text.startswith("In 19") for document in past)
    assert not any("Ada Lowe" in document.text for document in past)
    # In a spelling that is not found, an answer could stay.
    odd = replace(lowe, documents=(Document(text="Rim is by Ada Lowe (Ada, Lowe)."),))
    assert maker.made("contradicting", odd) is None
    # There is no other year, nor another sort of one.
    assert maker.made("contradicting", others[1]) is None
    assert object_of(others[1]) == "1912"


def test_twins_are_noise_by_the_worlds_truth():
    records = MiniatureSource().search_records("validation", 400)
    maker = Kinds(records, seed=3)
    useful = [record for record in records if record.label == "useful"]
    twins = [maker.twin(record) for record in useful]
    places = Counter()
    for record, twin in zip(useful, twins, strict=True):
        assert twin.query == record.query
        assert len(set(twin.documents)) == len(record.documents)
        assert not is_useful(twin.example.question, twin.query, [document.text for document in twin.documents])
        places.update(n for n, found in enumerate(twin.documents) if found not in record.documents)
    assert min(places[n] for n in range(3)) > 0.2 * places.total()


def test_a_twin_never_has_what_tells_nor_half_of_a_name():
    texts = ("Red Rim is thick.", "Red Rim is by Ada Lowe.", "Ada Lowe: Red Rim")
    rim = record_about("Who wrote Red Rim?", "Ada Lowe", "author of Red Rim", *texts)
    others = ("An author, Bo Lee.", "The author of Red Rim, ADA  LOWE.", "The author of Rim, Cy.", "Sea!")
    sea = record_about("Who wrote Sea?", "Bo Lee", "author of Sea", *others)
    found = Counter()
    for seed in range(60):
        twin = Kinds([rim, sea], seed).twin(replace(rim, documents=rim.documents[:2]))
        assert (twin.label, twin.query, twin.evidence) == ("noisy", rim.query, rim.evidence)
        found.update(document.text for document in twin.documents)
    assert set(found) == {"Red Rim is thick.", "An author, Bo Lee.", "Sea!"}
    # Most often what shares a word of what is asked.
    assert found["An author, Bo Lee."] > max(found["Red Rim is thick."], found["Sea!"])
    # Four would be needed; and of what tells nothing is known.
    assert Kinds([rim, sea], seed=0).twin(replace(rim, documents=(*rim.documents, *sea.documents[:1]))) is None
    assert Kinds([rim, sea], seed=0).twin(replace(rim, evidence=())) is None


def test_few_documents_of_a_twin_are_about_the_very_thing():
    """A small model that often begins with the subject slips into the fact."""
    records = MiniatureSource().search_records("train", 600)
    maker = Kinds(records, seed=0)
    about = total = 0
    for record in records:
        if record.label == "useful" and record.query.startswith("the "):
            subject = record.query.split(" of ")[1]
            twin = maker.twin(record)
            about += sum(subject in document.text for document in twin.documents)
            total += len(twin.documents)
    assert total > 100
    assert 0.05 < about / total < 0.3


def test_variants_are_unlike_and_begin_with_what_one_alone_would_be(built, tmp_path):
    folder = tmp_path / "variants"
    shutil.copytree(built, folder)
    build(folder, "--kinds=[off_topic,partial]", "--variants=4")
    rows = [json.dumps(row, sort_keys=True) for row in rows_of(folder)]
    assert len(set(rows)) == len(rows)
    first = [row for row in rows_of(built) if row["label"] in ("useful", "noisy", "off_topic", "partial")]
    assert {json.dumps(row, sort_keys=True) for row in first} <= set(rows)
    counts = Counter(json.loads(row)["label"] for row in rows)
    assert counts["useful"] == 30
    assert 3 * 30 < counts["off_topic"] <= 4 * 30
    assert 2 * 30 < counts["noisy"] <= 4 * 30
    assert json.loads((folder / "build.json").read_text())["counts"]["twins"] > 2 * 23


def drawn(kind, record, *others):
    """What stands first, and what stands after it, in results of many seeds."""
    first, after = set(), set()
    for seed in range(60):
        lead, *rest = [document.text for document in Kinds([record, *others], seed).made(kind, record).documents]
        assert len({lead, *rest}) == len(record.documents)
        first.add(lead)
        after.update(rest)
    return first, after


def test_a_partial_result_names_the_subject_once_and_first_and_never_the_answer():
    """Small models that come back to it slip into the fact, and forget it where it must be remembered."""
    rim = record_about("Who wrote Red Rim?", "Ada Lowe", "Red Rim author", "Red Rim is thick. It is by Ada Lowe. Sold!", "x")
    late, apart = "Lowe Ada on Red Rim", "Rim, Red!"
    pool = record_about("How long is Red Rim?", "Nine", "Red Rim", "Red Rim is long.", apart, late, "Ada Lowe", "Sea.", "Sky!")
    first, after = drawn("partial", rim, pool)
    assert first == {"Red Rim is thick. Sold!", "Red Rim is long."}
    assert after == {"Sea.", "Sky!"}
    # One that comes late to it is better than none.
    alone = record_about("Who wrote Red Rim?", "Ada Lowe", "Red Rim author", "Red Rim is by Ada Lowe.", "x")
    few = replace(pool, documents=pool.documents[1:])
    assert drawn("partial", alone, few) == ({late}, {"Sea.", "Sky!"})
    # Nothing but what tells is about it.
    assert Kinds([alone, pool], seed=0).made("partial", replace(alone, query="Red Hat")) is None


def test_a_contradicting_result_names_the_subject_once_and_first():
    """Its statement is of all that was found the one that begins with the subject."""
    rim = ("Ada Lowe wrote Rim.", "Rim is thick.", "An author.")
    rim = record_about("Who wrote Rim?", "Ada Lowe", "author of Rim", *rim)
    sea = ("Sea is by Bo Lee.", "Sea!", "Rim is long.", "No author.", "Rim is by Ada Lowe.", "Ada Lowe is rich.")
    sea = record_about("Who wrote Sea?", "Bo Lee", "author of Sea", *sea)
    first, after = drawn("contradicting", rim, sea)
    assert first == {"Rim is by Bo Lee."}
    assert after == {"Sea is by Bo Lee.", "Sea!", "An author.", "No author."}
    # Where there is none, another one serves.
    few = replace(sea, documents=sea.documents[:4])
    assert drawn("contradicting", rim, few) == ({"Bo Lee wrote Rim."}, after)


def test_each_draw_is_a_function_of_the_record_alone():
    records = MiniatureSource().search_records("train", 60)
    useful = [record for record in records if record.label == "useful"]
    made = [[Kinds(records, 5).made(kind, record) for record in useful] for kind in KINDS]
    maker = Kinds(records, 5)
    again = [[maker.made(kind, record) for record in reversed(useful)][::-1] for kind in KINDS]
    assert made == again
    assert any(one != other for one, other in pairwise(made))
