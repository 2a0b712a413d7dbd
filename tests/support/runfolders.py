"""Run folders as `test` leaves them, with trajectories made by hand, some of them hostile."""

import json
from html.parser import HTMLParser
from types import SimpleNamespace

from zs_lightning.callbacks.run_files import RunFiles
from zs_lightning.commands.compare import command as compare
from zs_lightning.runs.outcomes import Outcome
from zs_lightning.types import ActionKind, Document, QAExample, Status, Trajectory, Turn

HOSTILE = '</style><script>alert(1)</script><img src=x onerror="alert(2)">\' " & {{ 7 * 7 }} {% raw %}'
CONTROLS = "\x00\x1b[31m\x07\u202e\u2028\ufeff"
LABEL = (HOSTILE + CONTROLS).replace("=", "-")


def trajectory(number: int, answer: str | None, searches: int = 1, text: str = "Doc of Foo.", **example) -> Trajectory:
    """Searches, each with one document, and then an answer, or none for lack of turns."""
    example = {"question": f"Question {number}?", "golden_answers": ("yes",), "subset": "known/one_hop", **example}
    turns = [
        Turn(
            text=f"<think> {text}</think><search> {text}</search>",
            kind=ActionKind.SEARCH,
            content=text,
            span=(0, 1),
            observation_span=(1, 2),
            documents=(Document(text=text, title=text),),
        )
        for _ in range(searches)
    ]
    if answer is not None:
        turns.append(Turn(text=f"<answer>{answer}</answer>", kind=ActionKind.ANSWER, content=answer, span=(2, 3)))
    return Trajectory(
        example=QAExample(id=str(number), source="toy", **example),
        sample=0,
        prompt_ids=[1],
        token_ids=[2, 3, 4],
        loss_mask=[True, False, True],
        old_logprobs=[-1.0, 0.0, -1.0],
        turns=turns,
        status=Status.TURN_LIMIT if answer is None else Status.ANSWERED,
    )


def write_run(folder, greedy, sampled=(), engine="bm25", seed=7):
    """A run folder as `test` leaves it."""
    files = RunFiles(str(folder))
    files.setup(SimpleNamespace(loggers=[], is_global_zero=True), None, "test")
    module = SimpleNamespace(seed=seed, noise_prob=0.0, search=SimpleNamespace(name=engine, counted=dict))
    module.trajectories = [*greedy, *sampled]
    module.outcomes = [Outcome.of(t, "greedy") for t in greedy] + [Outcome.of(t, "sampled") for t in sampled]
    files.on_test_end(SimpleNamespace(loggers=[], is_global_zero=True), module)
    return folder


def write_training(folder, trajectories, step):
    """What a `fit` keeps of a step; returns the file, to which later steps are added."""
    folder.mkdir(exist_ok=True)
    RunFiles(str(folder))._write_trajectories("train", trajectories, step)
    return folder / "trajectories" / "train.jsonl"


def policy(*answers, searches=1, **example):
    return [trajectory(i, answer, searches, **example) for i, answer in enumerate(answers)]


def eight_questions(folder, times=1):
    """Eight questions: base has 2 right, trained 6, and both answer as well when sampled; or as many times eight."""
    yes, no = "yes", "no"
    noes, yeses = [no] * 8 * times, [yes] * 8 * times
    base, trained = [yes, yes, no, no, no, no, no, None], [yes, no, yes, yes, yes, yes, yes, no]
    write_run(folder / "base", policy(*base * times), policy(*noes))
    write_run(folder / "trained", policy(*trained * times, searches=2), policy(*yeses, searches=0))
    write_run(folder / "none", policy(*noes, searches=0), policy(*noes, searches=0))
    return folder


def run_compare(folder, *more, names=("base", "trained")):
    """Compares runs that lie in the folder under these names, and more."""
    compare.main([*(f"{name}={folder / name}" for name in names), *map(str, more), "--out", str(folder / "out")])
    return json.loads((folder / "out" / "results.json").read_text())


def reverse_lines(path):
    path.write_text("".join(reversed(path.read_text().splitlines(True))))


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text += data
