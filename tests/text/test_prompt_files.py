"""Template sets from files: the words that a published model was trained on, and what is wrong with a file in one sentence."""

import json
from dataclasses import asdict, fields

import pytest
import yaml

from zs_lightning.search import SimulatorSearch
from zs_lightning.text.prompts import MINIATURE, PROMPTS, ZEROSEARCH, Prompts, get_prompts

WHOLE = asdict(ZEROSEARCH)


def written(tmp_path, content, name="prompts.yaml"):
    file = tmp_path / name
    file.write_text(content if isinstance(content, str) else yaml.safe_dump(content), "utf-8")
    return str(file)


@pytest.mark.parametrize("name", sorted(PROMPTS))
def test_an_exported_set_comes_back_as_it_was(tmp_path, name):
    exported = json.dumps(asdict(PROMPTS[name]), indent=2) + "\n"
    assert get_prompts(written(tmp_path, exported, "prompts.json")) == PROMPTS[name]
    assert get_prompts(written(tmp_path, asdict(PROMPTS[name]), "prompts.yml")) == PROMPTS[name]


def test_what_a_file_leaves_out_is_that_of_its_base(tmp_path):
    text = "base: zerosearch\nsimulator_useful: |\n  Wörter zu {query}:\n\n  {first_answer} {x y} {\n"
    prompts = get_prompts(written(tmp_path, text))
    assert prompts.simulator_useful == "Wörter zu {query}:\n\n{first_answer} {x y} {\n"
    others = [field.name for field in fields(Prompts) if field.name != "simulator_useful"]
    assert all(getattr(prompts, name) == getattr(ZEROSEARCH, name) for name in others)


def test_every_field_can_be_set(tmp_path):
    content = {
        "policy": "P {question}",
        "closed_book": "C {question}",
        "retrieved": "R {question}",
        "chat": True,
        "thinking": False,
        "document": "{text};",
        "observation": "[{documents}]",
        "notice": "",
        "simulator_useful": "U {query}",
        "simulator_noisy": "N {query} {question} {answer} {first_answer} {count}",
        "simulator_kinds": {"satire": "S {query} {answer}"},
        "simulator_blind": "B {query} {count}",
        "simulator_stop": ["###", "END"],
        "simulator_system": "",
    }
    assert asdict(get_prompts(written(tmp_path, content))) == {**content, "simulator_stop": ("###", "END")}
    assert content.keys() == {field.name for field in fields(Prompts)}


def test_a_simulator_takes_a_file(tmp_path):
    file = written(tmp_path, "base: miniature\nsimulator_noisy: 'none: {query}'\n")
    assert SimulatorSearch(prompts=file).prompts.simulator_noisy == "none: {query}"
    assert SimulatorSearch(prompts=file).prompts.simulator_stop == MINIATURE.simulator_stop


def without(*names):
    return {key: value for key, value in WHOLE.items() if key not in names}


WRONG = {
    "unknown key": ({"base": "zerosearch", "polcy": "x {question}"}, r"unknown key 'polcy'; expected base, policy, "),
    "key that is no text": ({"base": "zerosearch", 3: "x"}, r"unknown key '3'"),
    "missing keys": (without("policy", "notice"), r"lacks policy, notice; add them, .* `base: zerosearch`"),
    "unknown base": ({"base": "zero"}, r"has the base 'zero'; expected one of miniature, zerosearch"),
    "base that is a list": ({"base": ["zerosearch"]}, r"has the base \['zerosearch'\]; expected one of"),
    "unknown field": ({"base": "zerosearch", "policy": "{question} {answer}"}, r"unknown field \{answer\}; .*: \{question\}"),
    "a field where none is": ({"base": "zerosearch", "notice": "{x}"}, r"unknown field \{x\}; its fields: none"),
    "no question": ({"base": "zerosearch", "policy": "Answer!"}, r"policy in .* has no \{question\}"),
    "no query": ({"base": "zerosearch", "simulator_noisy": "{question}"}, r"simulator_noisy in .* has no \{query\}"),
    "documents twice": ({"base": "zerosearch", "observation": "{documents}{documents}"}, r"\{documents\} twice"),
    "a number": ({"base": "zerosearch", "policy": 3}, r"policy in .* is '3'; expected a text"),
    "null": ({"base": "zerosearch", "policy": None}, r"policy in .* is 'None'; expected a text"),
    "chat": ({"base": "zerosearch", "chat": "yes"}, r"chat in .* is 'yes'; expected true or false"),
    "stop text": ({"base": "zerosearch", "simulator_stop": "###"}, r"is '###'; expected a list of texts"),
    "empty stop text": ({"base": "zerosearch", "simulator_stop": [""]}, r"expected a list of texts that are not empty"),
    "system": ({"base": "miniature", "simulator_system": "x"}, r"only a chat template can take; set chat: true"),
    "a list": ("- policy", r"holds no template set"),
    "nothing": ("", r"holds no template set"),
    "no YAML": ("policy: [", r"cannot be read: .*line 1"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_what_is_wrong_is_one_sentence_that_names_the_file(tmp_path, fault):
    content, sentence = WRONG[fault]
    with pytest.raises(ValueError, match=rf"^prompts: .*prompts\.yaml.*{sentence}|^prompts: {sentence}") as error:
        get_prompts(written(tmp_path, content))
    assert "prompts.yaml" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[" * 100_000, b"[]"])
def test_damaged_json_is_one_sentence(tmp_path, content):
    (tmp_path / "prompts.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"^prompts: .*prompts\.json (cannot be read: |holds no template set)"):
        get_prompts(str(tmp_path / "prompts.json"))


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"prompts: there is no file .*none\.yaml; expected miniature, zerosearch, .* file"):
        get_prompts(str(tmp_path / "none.yaml"))
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(ValueError, match=r"there is no file .*folder\.json"):
        get_prompts(str(tmp_path / "folder.json"))
