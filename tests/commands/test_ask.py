"""Asking by hand: the trained and the untrained policy over its own engine, in the terminal and on the page."""

import io
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console

from support.tiny import PlayerPiano
from zs_lightning.cli import main
from zs_lightning.commands.ask.session import Session, default_search, policy_config
from zs_lightning.commands.ask.stream import Stream
from zs_lightning.configuration.arguments import instantiate, split
from zs_lightning.generation import Generator, Sampling
from zs_lightning.miniature.world import make_world
from zs_lightning.models.loading import load_model
from zs_lightning.models.specs import ModelSpec
from zs_lightning.modules.trainable import TrainableModule
from zs_lightning.rollout.rollouter import prompt_ids
from zs_lightning.runs.checkpoints import find_run
from zs_lightning.types import ActionKind, QAExample

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "miniature" / "policy.yaml"
QUESTION = "What is the country of the birthplace of Zino Tipin?"


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """What a `fit` would leave: its resolved config and a checkpoint of other weights than the base has."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "config.yaml").write_text("# command: fit\n" + yaml.safe_dump(yaml.safe_load(CONFIG.read_text())))
    weights = {f"policy.{name}": p.detach().clone() for name, p in load_model(ModelSpec(device="cpu")).named_parameters()}
    for name, tensor in weights.items():
        if "norm" in name:
            tensor += 0.5 * torch.linspace(-1, 1, len(tensor))
    torch.save({"state_dict": weights, "rollout_step": 3}, folder / "last.ckpt")
    return folder


@pytest.fixture(scope="module")
def base():
    return Session(policy_config(CONFIG), None, [])


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_it_computes_in_the_precision_of_the_run(precision):
    """As a test of the run would; in another it may write other tokens."""
    config = policy_config(CONFIG)
    session = Session({**config, "trainer": {**config["trainer"], "precision": precision}}, None, [])
    seen = []
    session.actor.policy.get_output_embeddings().register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    asked(session, QUESTION)
    assert set(seen) == {{"32-true": torch.float32, "bf16-mixed": torch.bfloat16}[precision]}


SONG = [
    "<think> I need the birthplace of Zino Tipin.</think><search> birthplace of Zino Tipin</search>",
    "<think> Zino Tipin birthplace Mabel. I need the country of Mabel.</think><search> country of Mabel</search>",
    "<think> Mabel country Sakovu.</think><answer> Sakovu</answer>",
]


@pytest.fixture(scope="module")
def player():
    """The base's session, with a model that sings: the base itself answers without a search."""
    session = Session(policy_config(CONFIG), None, [])
    encoder = session.actor.encoder
    example = QAExample(id="1", question=QUESTION, golden_answers=(), source="t")
    ids = prompt_ids(encoder, session.actor.prompts, session.limits, example)
    model = PlayerPiano(len(encoder.tokenizer), {tuple(ids): [encoder.literal(text) for text in SONG]})
    session.actor.generator = Generator(model, 1, session.limits.max_length)
    return session


@pytest.fixture
def searching(tmp_path):
    """A configuration that searches for the question itself."""
    config = policy_config(CONFIG)
    config["model"]["init_args"]["rollout"]["retrieve_first"] = True
    (tmp_path / "searching.yaml").write_text(yaml.safe_dump(config))
    return tmp_path / "searching.yaml"


def asked(session, question, width=80):
    """A trajectory and what the terminal showed of it."""
    screen = Console(file=io.StringIO(), width=width, color_system="truecolor", highlight=False)
    with Stream(screen, session.decode) as stream:
        trajectory = session.ask(question, stream)
        stream.end(trajectory)
    return trajectory, screen.file.getvalue()


def bare(shown):
    return re.sub(r"\x1b\[[0-9;]*m", "", shown)


def failure(capsys, *args):
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(["ask", *map(str, args)])
    return end.value.code, capsys.readouterr().err.rstrip("\n")


# ---------------------------------------------------------------------- the rollout


def test_it_answers_as_a_test_of_the_run_would(base, player):
    config = policy_config(CONFIG)["model"]
    config["init_args"]["search"] = {"class_path": "BM25Search"}
    module = instantiate(TrainableModule, "model", config)
    module.setup("test")
    questions = [question.example(0).question for question in make_world(0).questions()["test"][:4]]
    for session, question in [*((base, question) for question in questions), (player, QUESTION)]:
        if session is player:
            module.actor.generator = player.actor.generator
        example = QAExample(id="1", question=question, golden_answers=(), source="t")
        (wanted,) = module.roll_out([example], 1, 7, 0.0, Sampling(temperature=0.0))
        got, _ = asked(session, question)
        assert (got.prompt_ids, got.token_ids, got.turns) == (wanted.prompt_ids, wanted.token_ids, wanted.turns)
        assert (got.status, got.answer) == (wanted.status, wanted.answer)
    assert [turn.text for turn in got.turns] == SONG


def test_the_checkpoint_is_what_answers(run_folder, base):
    session = Session(policy_config(find_run(run_folder, "--ckpt")[0]), run_folder / "last.ckpt", [])
    loaded = session.actor.policy.state_dict()
    saved = torch.load(run_folder / "last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(loaded[name.removeprefix("policy.")], tensor) for name, tensor in saved.items())
    assert asked(session, QUESTION)[0].token_ids != asked(base, QUESTION)[0].token_ids


def test_the_default_engine_is_the_world_of_the_questions():
    def engine(source):
        return default_search({"data": {"source": source}})

    world = ["--search=BM25Search", "--search.world_seed=0"]
    assert default_search({}) == default_search({"data": {}}) == engine("MiniatureSource") == world
    seven = {"class_path": "zs_lightning.data.sources.MiniatureSource", "init_args": {"world_seed": 7}}
    assert engine(seven)[1] == "--search.world_seed=7"
    assert default_search({"data": 3}) == engine({"class_path": "MiniatureSource", "init_args": None}) == world
    assert engine({"class_path": "zs_lightning.data.OtherSource"}) == ["--search=zs_lightning.search.MediaWikiSearch"]


def test_the_options_of_the_engine_are_not_taken_for_the_question():
    words = ["--search", "BM25Search", "--html", "f", "--search.corpus=a b", "what?", "--search.count", "2"]
    assert split(words) == (["--html", "f", "what?"], ["--search", "BM25Search", "--search.corpus=a b", "--search.count", "2"])
    assert split(["--", "--search"]) == (["--", "--search"], [])
    assert split(["--search"]) == ([], ["--search"])


def test_any_engine_can_be_asked(searching, tmp_path, capsys):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("Zino Tipin birthplace Nowhere Town.")
    search = ["--search", "BM25Search", "--search.corpus", tmp_path / "notes", "--search.cache", tmp_path / "cache"]
    page = tmp_path / "page.html"
    main(list(map(str, ["ask", "--config", searching, QUESTION, *search, "--html", page])))
    said = capsys.readouterr().out
    assert (
        "searches   What is the country of the birthplace of Zino Tipin?\n        1  a Zino Tipin birthplace Nowhere Town."
        in "\n".join(line.rstrip() for line in said.splitlines())
    )
    assert "<li><b>a</b> Zino Tipin birthplace Nowhere Town.</li>" in page.read_text()


# ---------------------------------------------------------------------- the terminal


def test_the_terminal_shows_thoughts_searches_documents_and_the_answer(player):
    trajectory, shown = asked(player, QUESTION, width=60)
    assert trajectory.answer == "Sakovu"
    assert trajectory.turns[1].documents[0].text == "Mabel country Sakovu."
    words = " ".join(bare(shown).split())
    at = 0
    for turn in trajectory.turns:
        thought = re.search("<think> (.*?)</think>", turn.text)[1]
        label = "searches" if turn.kind is ActionKind.SEARCH else "answers"
        lines = [f"{i} {d.text}" for i, d in enumerate(turn.documents, 1)]
        for part in (f"thinks {thought}", f"{label} {turn.content}", *lines):
            at = words.index(part, at) + len(part)
    assert at == len(words)
    assert max(map(len, bare(shown).splitlines())) <= 60
    assert "\x1b[1;32m" in shown


def test_what_is_written_appears_word_by_word(player):
    """Before each new token the terminal holds all complete words of the ones before, and no half of a tag."""
    screen = Console(file=io.StringIO(), width=1000)
    seen = []

    with Stream(screen, player.decode) as stream:

        def watch(trajectory, sampled):
            stream(trajectory, sampled)
            with screen.capture() as shown:
                screen.print(stream.live.renderable)
            seen.append((player.decode(sampled), shown.get().split()))

        player.ask(QUESTION, watch)
    assert len(seen) > 20
    labels = {"think": "thinks", "search": "searches", "answer": "answers"}
    held = 0
    for written, shown in seen:
        tag, _, content = written.rpartition("<")[2].partition(">")
        if tag in labels and content.strip():
            *complete, last = f"{labels[tag]}{content}".split()
            assert shown[-len(complete) :] == complete or complete == [labels[tag]]
            held += last not in shown[-1:]
        assert not any("<" in word for word in shown)
    assert held > 20


# ---------------------------------------------------------------------- what can be wrong


def test_what_is_wrong_is_one_plain_sentence(run_folder, tmp_path, capsys):
    untrained = ("--config", CONFIG)
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.yaml").write_text((run_folder / "config.yaml").read_text())
    assert failure(capsys, *untrained, " ") == (2, "error: ask: the question is empty")
    assert failure(capsys, "--ckpt", "nowhere", "hi") == (
        2,
        "error: --ckpt: there is no file nowhere; expected the run folder of a `fit`, or the checkpoint in it",
    )
    assert f"there is no file {other / 'last.ckpt'}; expected" in failure(capsys, "--ckpt", other, "hi")[1]
    (other / "last.ckpt").write_text("no checkpoint")
    assert "is damaged or no checkpoint; expected the last.ckpt of a `fit`" in failure(capsys, "--ckpt", other, "hi")[1]
    shutil.copy(run_folder / "last.ckpt", tmp_path)
    assert "there is no config.yaml beside" in failure(capsys, "--ckpt", tmp_path, "hi")[1]
    torch.save({"state_dict": {"policy.x": torch.ones(1)}}, other / "last.ckpt")
    assert failure(capsys, "--ckpt", other / "last.ckpt", "hi")[1].startswith("error: checkpoint: its weights do not fit")
    torch.save({"weights": 1}, other / "last.ckpt")
    assert "last.ckpt cannot be read" in failure(capsys, "--ckpt", other, "hi")[1]
    said = failure(capsys, *untrained, "red harbor " * 400)[1]
    assert said == "error: the question is too long for a context of 640 tokens"
    assert failure(capsys, *untrained, "half \udcff")[1] == "error: the question is not UTF-8"
    assert failure(capsys, "hi")[1].startswith("error: ask: nobody to ask; give --ckpt RUN")
    assert "not allowed with" in failure(capsys, *untrained, "--ckpt", run_folder, "hi")[1]
    assert failure(capsys, *untrained, "hi", "--html", tmp_path)[1].startswith("error: --html: ")
    (tmp_path / "notes.txt").write_text("mine")
    said = failure(capsys, *untrained, "hi", "--html", tmp_path / "notes.txt")[1]
    assert "notes.txt is there and no page; expected a new file, or one that ends in .html" in said
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert "did you mean search.count?" in failure(capsys, *untrained, "hi", "--search.cuont", "2")[1]
    simulator = CONFIG.with_name("simulator.yaml")
    assert failure(capsys, "--config", simulator, "hi")[1].endswith("expected one of PolicyRL")
    for said in ("", "model: 3", "- 1", "a: ["):
        (tmp_path / "c.yaml").write_text(said)
        assert failure(capsys, "--config", tmp_path / "c.yaml", "hi")[0] == 2


def test_a_failed_search_ends_with_code_1(searching, capsys):
    search = ["--search=SimulatorSearch", "--search.prompts=miniature", "--search.max_length=60", "--search.max_new_tokens=45"]
    with pytest.raises(SystemExit) as end:
        main(["ask", f"--config={searching}", QUESTION, *search])
    assert end.value.code == 1
    assert re.search(r"^failed +the simulator's prompt has \d+ tokens", capsys.readouterr().out, re.MULTILINE)


def test_the_help_is_there_at_once():
    code = (
        "import sys\nfrom zs_lightning.cli import main\nfor name in ('ask', 'serve'):\n  try: main([name, '--help'])\n"
        "  except SystemExit as end: print(end.code)\n"
        "print([m for m in ('torch', 'lightning', 'jsonargparse', 'jinja2', 'rich') if m in sys.modules])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert "--ckpt RUN" in said
    assert "--port PORT" in said
    assert said.endswith("\n0\n[]\n")
