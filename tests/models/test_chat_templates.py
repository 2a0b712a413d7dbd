"""Chat templates that refuse, lose or change a text, or print the date of today."""

from datetime import date

import pytest

from support.detached import NoEngine
from support.families import GEMMA
from support.tiny import CHATML, make_model, make_tokenizer
from zs_lightning.models.encoding import TextEncoder
from zs_lightning.models.specs import ModelSpec
from zs_lightning.modules import PolicyRL, SimulatorSFT
from zs_lightning.rollout import RolloutSpec
from zs_lightning.search import SimulatorSearch


def encoder(template):
    tokenizer = make_tokenizer("chat")
    tokenizer.chat_template = template
    return TextEncoder(tokenizer)


def test_a_template_without_a_system_message_names_the_key():
    made = encoder(GEMMA.replace("{{ bos_token }}", ""))
    assert made.prompt("Q {question}", {"question": "Why?"}, chat=True)
    with pytest.raises(
        ValueError, match=r"refuses the messages: System role not supported; leave prompts\.simulator_system out"
    ):
        made.prompt("Q {question}", {"question": "Why?"}, chat=True, system="")
    with pytest.raises(ValueError, match=r"refuses the messages: never; set prompts\.chat: false"):
        encoder("{{ raise_exception('never') }}").prompt("Q", {}, chat=True, system="")


LOSING = ["content[0]['text']", "content | upper", "content.split('{')[0]", "content.no.such"]


@pytest.mark.parametrize("said", LOSING)
def test_a_template_that_does_not_keep_the_text_is_refused(said):
    with pytest.raises(ValueError, match=r"^prompts: the chat template of .*; set prompts\.chat: false"):
        encoder("{% for m in messages %}{{ m." + said + " }}{% endfor %}").prompt(
            "Hello {question}", {"question": "x"}, chat=True
        )


def test_a_template_that_drops_the_system_message_is_refused():
    template = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    with pytest.raises(ValueError, match=r"changes or loses the text of prompts\.simulator_system"):
        encoder(template).prompt("Hello", {}, chat=True, system="You are a search engine.")


ROLES = {
    "policy": lambda spec, prompts: PolicyRL(NoEngine(), model=spec, prompts=prompts),
    "own simulator": lambda spec, prompts: PolicyRL(
        SimulatorSearch(model=spec, prompts=prompts), model=ModelSpec(device="cpu"), rollout=RolloutSpec(max_length=600)
    ),
    "shared simulator": lambda spec, prompts: PolicyRL(
        SimulatorSearch(model=ModelSpec("policy"), prompts=prompts), model=spec, prompts="miniature"
    ),
    "simulator": lambda spec, prompts: SimulatorSFT(model=spec, prompts=prompts),
}


@pytest.mark.parametrize("role", ROLES)
def test_a_refusal_is_said_before_weights_are_loaded(role, tmp_path):
    """There are none here."""
    make_model("qwen3").config.save_pretrained(tmp_path)
    tokenizer = make_tokenizer("chat")
    tokenizer.chat_template = "{{ raise_exception('never') }}" if role == "policy" else GEMMA.replace("{{ bos_token }}", "")
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "prompts.yaml").write_text("base: zerosearch_prompted\nsimulator_system: You are a search engine.\n")
    module = ROLES[role](ModelSpec(str(tmp_path), device="cpu"), str(tmp_path / "prompts.yaml"))
    refused = "never; set prompts.chat" if role == "policy" else "System role not supported; leave prompts.simulator_system"
    with pytest.raises(ValueError, match=f"refuses the messages: {refused}"):
        module.setup("fit")


DATED = "{{ strftime_now('%d %b %Y') }}\n" + CHATML


def test_a_date_is_that_of_the_encoder():
    made = encoder(DATED)
    for day, text in ((date(2024, 2, 3), "03 Feb 2024\n"), (date(2025, 2, 3), "03 Feb 2025\n")):
        made.date = day
        assert made.decode(made.prompt("Q", {}, chat=True)).startswith(text)
    days = [date.today()]
    made = encoder(DATED)
    days.append(date.today())
    assert made.decode(made.prompt("Q", {}, chat=True)).startswith(tuple(day.strftime("%d %b %Y") for day in days))


def test_what_goes_on_from_a_checkpoint_has_its_date(tmp_path):
    make_model("qwen3").save_pretrained(tmp_path)
    tokenizer = make_tokenizer("chat")
    tokenizer.chat_template = DATED
    tokenizer.save_pretrained(tmp_path)
    spec = ModelSpec(str(tmp_path), device="cpu")
    for make in (lambda: PolicyRL(NoEngine(), model=spec), lambda: SimulatorSFT(model=spec)):
        first, second = make(), make()
        first.setup("fit")
        second.setup("test")
        first.encoders()[0].date = date(2024, 2, 3)
        checkpoint = {"state_dict": first.state_dict()}
        first.on_save_checkpoint(checkpoint)
        second.on_load_checkpoint(checkpoint)
        assert {made.date for made in second.encoders()} == {date(2024, 2, 3)}
