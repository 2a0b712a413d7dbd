"""A dictionary becomes a corpus and questions that it answers: a tiny one, of invented words, in the format of dictd."""

import json
from dataclasses import replace

import pytest

import dictionary
from support.dictd import write_dictionary
from zs_lightning.search.bm25 import BM25Search
from zs_lightning.text.answers import cover_match

ENTRIES = {
    "00-database-info": "00-database-info\n   Of invented words.\n",
    "quorl": "Quorl\n\n   1. <language> /kworl/ A small {language} developed by Dr. Ada\n   Plim and Bo Trent in 1971."
    "\n\n   2. A fish.\n",
    "zemp": "Zemp\n\n   <language> A {dialect} of {Quorl} from Plimco, written in {BOFF}.\n\n   (1999-01-02)\n",
    "odd function forms": "Binary Odd Function Forms\nBOFF\n\n   <language, old> (BOFF) A language designed by J. B. Hark.\n",
    "plimco": "Plimco\n\n   <company> A company founded by Ida Vey in 1969.\n",
    "wb": "wb\n\n   <networking> The {country code} for Blefuria.\n",
    "frob line": "frob line\nfrob wire\n\n   <hardware> A thin cord that joins both halves of a broken desk.\n",
    "gnat flow": "gnat flow\n\n   A flow of gnats that nobody ever wanted to see on a screen.\n",
    "ofp": "OFP\n\n   A protocol. It is defined in STD 9, RFC 99. Others are.\n",
    "unzork": "Unzork\n\n   Tools to open archives created by Zorkware.\n",
    "hulk": "Hulk\n\n   A machine developed by Ada users.\n",
    "yurt": "Yurt\n\n   A shell written in C.\n",
    "zempet": "Zempet\n\n   An extension of {Zemp}.\n",
    "gox": "Gox\n\n   A game produced by {Zork}.\n",
    "zork": "Zork\n\n   A language invented by Uma Ell.\n",
    "pim": "Pim\n\n   A poem written by Olaf J. Pim himself.\n",
    "twin (1)": "Twin\n\n   A pot invented by Ann Oss.\n",
    "twin (2)": "Twin\n\n   A pan invented by Bob Ume.\n",
    "top (1)": "TOP\n\n   Ten Ox Pit.\n",
    "top (2)": "TOP\n\n   Tea Or Pie.\n",
    "top (3)": "TOP\n\n   The Old Pub.\n",
    "lop": "Lone Ox Pen\nLOP\n\n   A pen.\n",
    "list": "list\n\n   A row of ten words [see below] that nobody reads.\n",
    "murk": "Murk\n\n   A machine developed in 1980-84.\n",
    "nulco 9": "Nulco 9\n\n   A chip produced by Nulco.\n",
    "tale": "tale\n\n   " + "word " * 289 + "end\n",
}
QUESTIONS = {
    "Who developed Quorl?": ["Ada Plim and Bo Trent"],
    "In which year was Quorl developed?": ["1971"],
    "What is Zemp a dialect of?": ["Quorl"],
    "From which company, institution or country is Zemp?": ["Plimco"],
    "In which language is Zemp written?": ["BOFF"],
    "Who designed Binary Odd Function Forms?": ["J. B. Hark"],
    "In which language is Yurt written?": ["C"],
    "What is Zempet an extension of?": ["Zemp"],
    "Who produced Gox?": ["Zork"],
    "Who invented Zork?": ["Uma Ell"],
    "Who founded Plimco?": ["Ida Vey"],
    "In which year was Plimco founded?": ["1969"],
    "What is BOFF short for?": ["Binary Odd Function Forms"],
    'Which country has the country code "wb"?': ["Blefuria"],
    'Which term is meant: "A thin cord that joins both halves of a broken desk"?': ["frob line", "frob wire"],
    "Which RFC defines OFP?": ["RFC 99"],
    'Which language is meant: "A small language developed by Dr. Ada Plim and Bo Trent in 1971"?': ["Quorl"],
    'Which language is meant: "A dialect of Quorl from Plimco, written in BOFF"?': ["Zemp"],
    'Which company is meant: "A company founded by Ida Vey in 1969"?': ["Plimco"],
}
TWO_STEPS = {
    "In which language is the language or system that Zempet is an extension of written?": ["BOFF"],
    "From which company, institution or country is the language or system that Zempet is an extension of?": ["Plimco"],
    "Who developed the language or system that Zemp is a dialect of?": ["Ada Plim and Bo Trent"],
    "In which year was the language or system that Zemp is a dialect of developed?": ["1971"],
    "Who founded the company or institution that Zemp is from?": ["Ida Vey"],
    "In which year was the company or institution that Zemp is from founded?": ["1969"],
    "Who designed the language in which Zemp is written?": ["J. B. Hark"],
    "What is the name of the language in which Zemp is written short for?": ["Binary Odd Function Forms"],
}


@pytest.fixture
def made(tmp_path, monkeypatch):
    """The folder with what the script wrote for a dictionary in which one entry has two spellings."""
    spellings = {"quorl": ["quorl", "quorls"]}
    write_dictionary(tmp_path, "tiny", [(spellings.get(word, [word]), entry) for word, entry in ENTRIES.items()])
    monkeypatch.chdir(tmp_path)
    dictionary.main([".", "out"])
    return tmp_path / "out"


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_questions_are_those_of_the_rules_and_each_is_answered_in_the_entry_it_names(made):
    corpus, questions = rows(made / "corpus.jsonl"), rows(made / "questions.jsonl")
    assert {row["question"]: row["golden_answers"] for row in questions} == QUESTIONS | TWO_STEPS
    assert {row["question"] for row in questions if row["id"].startswith("two_steps-")} == set(TWO_STEPS)
    assert len({row["id"] for row in questions}) == len(questions)
    for row in questions:
        texts = [f"{passage['title']} {passage['text']}" for passage in corpus if passage["title"] == row["title"]]
        assert any(cover_match(text, row["golden_answers"]) for text in texts), row


def test_the_corpus_is_plain_text_in_passages_that_a_search_finds(made, tmp_path):
    corpus = rows(made / "corpus.jsonl")
    assert len({row["id"] for row in corpus}) == len(corpus) == len(ENTRIES) - 1 + 2
    assert [len(row["text"].split()) for row in corpus if row["title"] == "tale"] == [96, 97, 97]
    texts = {row["title"]: row["text"] for row in corpus}
    assert texts["Zemp"] == "A dialect of Quorl from Plimco, written in BOFF."
    assert texts["Quorl"].startswith("1. /kworl/ A small language developed by Dr. Ada Plim and Bo Trent in 1971")
    engine = BM25Search(corpus=str(made / "corpus.jsonl"), cache=str(tmp_path / "cache"), count=1)
    assert engine.rank(["Who developed Quorl?"], 1)[0][0].passage.title == "Quorl"


def test_no_kind_of_question_and_no_answer_of_two_steps_is_too_frequent(made, monkeypatch):
    entries = [dictionary.Entry(f"Zemp {i}", [], "", "", "A dialect of Quorl.") for i in range(9)]
    quorl = dictionary.Entry("Quorl", [], "", "", "A language developed in 1971.")
    entries = [replace(entry, text=entry.definition) for entry in [*entries, quorl]]
    monkeypatch.setattr(dictionary, "MOST", 5)
    kinds = [question.kind for question in dictionary.make_questions(entries)]
    assert [kinds.count(kind) for kind in ("kin", "year", "two_steps")] == [5, 1, dictionary.AGAIN]


@pytest.mark.parametrize(
    ("short", "long", "expected"),
    [
        ("SMTP", "Simple Mail Transfer Protocol", True),
        ("UoZ", "University of Zork", True),
        ("UZ", "University of Zork", True),
        ("COMAL", "COMmon Algorithmic Language", True),
        ("FOO", "Simple Mail Transfer Protocol", False),
        ("Z", "Zork", False),
        ("A", "A B", False),
    ],
)
def test_abbreviations(short, long, expected):
    assert dictionary.abbreviates(short, long) is expected


def test_a_folder_without_a_dictionary(tmp_path, capsys):
    with pytest.raises(SystemExit):
        dictionary.main([str(tmp_path), str(tmp_path / "out")])
    assert "NAME.index" in capsys.readouterr().err
