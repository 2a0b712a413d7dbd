"""build-simulator-data with a model behind OpenAI's API: what it searches, and what is paid for once only."""

import json
from collections import Counter
from pathlib import Path

import pytest

from support.commandline import ROOT, failure
from support.faultserver import Reply
from support.modelserver import ModelServer, chat
from zs_lightning.cli import main
from zs_lightning.commands.build_simulator_data.served import ServedJudge, closed
from zs_lightning.commands.served import Writer
from zs_lightning.data.sources import MiniatureSource
from zs_lightning.search import remote
from zs_lightning.search.judges import JUDGE, VERDICT_TOKENS, Case
from zs_lightning.text.prompts import fill, get_prompts
from zs_lightning.types import Document, QAExample

pytestmark = pytest.mark.usefixtures("environment")

CONFIG = f"--config={ROOT / 'configs' / 'miniature' / 'build_simulator_data.yaml'}"
SMALL = ["build-simulator-data", CONFIG, "--batch_size=6", "--group_size=1", "--kinds=[]", "--rollout.max_turns=2"]


def served(server, folder, *options, api="chat"):
    address = [f"--served.hosts={server.url('')}", f"--served.api={api}", "--served.model=tiny"]
    return [*SMALL, *address, f"--folder={folder}", *options]


def numbers(folder):
    return json.loads(Path(folder, "build.json").read_text())


def searching(asked):
    """A model that searches for the question, then answers; asked to judge, it says useful."""
    said = asked.body["messages"]
    if "Verdict:" in said[-1]["content"]:
        return chat("Useful") | {"usage": {"completion_tokens": 2, "prompt_tokens": 90}}
    question = said[0]["content"].split("<question>")[-1].split("?")[0].replace("the ", "", 1).split(" ", 2)[-1]
    text = f"<search> {question} " if len(said) == 1 else "<answer> Nobody "
    return chat(text) | {"usage": {"completion_tokens": 7, "prompt_tokens": 40}}


def test_a_served_model_searches_and_judges_and_is_paid_once(serve, capsys):
    server = serve(searching)
    options = ["--judge=both", "--pairs=4", "--served.http.cache=paid.sqlite"]
    main(served(server, "first", *options))
    first = numbers("first")
    counts = first["counts"]
    assert counts["searches"] == counts["questions"] == counts["answered"]
    assert counts["tokens"] == 14 * counts["questions"]
    assert counts["judge_tokens"] == 2 * counts["questions"]
    assert first["records"]["useful"] == 2
    # Setup asks for one word.
    read, written = 170 * counts["questions"] + 40, 16 * counts["questions"] + 7
    assert (counts["served_read_tokens"], counts["served_written_tokens"]) == (read, written)
    assert f"the server read {read} and wrote {written} tokens; 0 answers were known already" in capsys.readouterr().out
    card = Path("first/card.md").read_text()
    assert f"; the server read {read} and wrote {written} tokens, 0 of its answers" in card
    assert "| judge | both; the model is tiny |" in card
    # Our prompt, the model's own words with the end that the server cut off, and what was found.
    talk = max((asked.body["messages"] for asked in server.asked), key=len)
    assert [message["role"] for message in talk] == ["user", "assistant", "user"]
    assert talk[1]["content"].endswith(" </search>")
    assert talk[2]["content"].startswith("<information> Doc 1: ")
    before = len(server.asked)
    main(served(server, "second", *options))
    # Setup asks once whether there is a server; all else was paid for already.
    assert len(server.asked) == before + 1
    assert Path("second/records.jsonl").read_bytes() == Path("first/records.jsonl").read_bytes()
    again = numbers("second")["counts"]
    assert (again["served_read_tokens"], again["served_written_tokens"]) == (40, 7)
    assert again["served_cached"] == 3 * counts["questions"]
    assert again["tokens"] == counts["tokens"]


def test_the_tiny_model_behind_a_server_works_like_one_here(serve, miniature):
    main(served(serve(ModelServer(*miniature)), "data", "--pairs=10", api="completions"))
    counts = Counter(numbers("data")["counts"])
    assert counts["searches"] > 10
    assert counts["failed"] == 0
    assert counts["answered"] > 5


def test_a_server_that_goes_away_loses_nothing(serve, capsys, monkeypatch):
    monkeypatch.setattr(remote, "BACKOFF", 0.01)
    server = serve(lambda asked: Reply(status=500) if len(server.asked) > 14 else searching(asked))
    code, said = failure(capsys, *served(server, "data", "--pairs=100"))
    assert code == 1
    assert "pairs are kept, and the same command goes on" in said
    kept = Path("data/work.jsonl").read_bytes()
    assert len(kept.splitlines()) == 2
    # The same command, with the server back.
    server.answer = searching
    main(served(server, "data", "--pairs=4"))
    assert Path("data/work.jsonl").read_bytes().startswith(kept)


def test_a_batch_that_a_kill_cut_off_is_not_paid_for_again(serve, capsys, monkeypatch):
    """Without a cache of one's own, what was written is kept in the folder."""
    monkeypatch.setattr(remote, "BACKOFF", 0.01)
    server = serve(lambda asked: Reply(status=500) if len(server.asked) > 5 else searching(asked))
    options = ["--pairs=4", "--batch_size=24", "--served.http.concurrency=1"]
    code, said = failure(capsys, *served(server, "data", *options))
    assert code == 1
    assert said.endswith("repair the server; 0 pairs are kept, and the same command goes on")
    assert len(Path("data/work.jsonl").read_bytes().splitlines()) == 1
    paid = [json.dumps(asked.body) for asked in server.asked[1:5]]
    server.answer, server.asked = searching, []
    main(served(server, "data", *options))
    assert not set(paid) & {json.dumps(asked.body) for asked in server.asked[1:]}


def test_a_build_goes_on_with_the_model_at_another_address(serve, capsys, monkeypatch):
    monkeypatch.setenv("OTHER_KEY", "0123456789")
    main(served(serve(searching), "data", "--pairs=4"))
    kept = Path("data/work.jsonl").read_bytes()
    other = ["--served.http.timeout=60", "--served.http.cache=other.sqlite", "--served.api_key_env=OTHER_KEY"]
    main(served(serve(searching), "data", "--pairs=12", *other))
    assert Path("data/work.jsonl").read_bytes().startswith(kept)
    code, said = failure(capsys, *served(serve(searching), "data", "--served.options={min_p: 0}"))
    assert code == 2
    assert "data holds a build with another `served`" in said


@pytest.mark.parametrize("limit", ["the server's", "rollout.max_length"])
def test_a_rollout_that_becomes_too_long_ends_and_keeps_what_it_found(serve, limit):
    def answer(asked):
        too_long = limit == "the server's" and len(asked.body["messages"]) > 1
        return Reply({"error": "the prompt is too long"}, status=400) if too_long else searching(asked)

    server = serve(answer)
    # Four characters count as a token: there is room for what opens a rollout, and some ten tokens.
    longest = max(len(fill(get_prompts("miniature").policy, question=q.question)) for q in MiniatureSource().questions("train"))
    room = [] if limit == "the server's" else [f"--rollout.max_length={longest // 4 + 10}"]
    main(served(server, "data", "--pairs=4", *room))
    counts = Counter(numbers("data")["counts"])
    assert counts["failed"] == 0
    assert counts["too_long"] == counts["searches"] == counts["questions"]
    assert f"{counts['too_long']} more ended at their greatest length" in Path("data/card.md").read_text()
    if room:
        assert all(len(asked.body["messages"]) == 1 for asked in server.asked)
        assert all(10 <= asked.body["max_tokens"] < 40 for asked in server.asked[1:])


def test_a_server_that_takes_no_rollout_says_what_to_change(serve, capsys):
    server = serve(lambda asked: searching(asked) if asked.body["max_tokens"] == 1 else Reply("long", status=400))
    code, said = failure(capsys, *served(server, "data"))
    assert code == 1
    longer = "give the server a longer context, or build in another folder with a lower rollout.max_new_tokens"
    assert f'the server answers 400: ""long""; if its prompt is too long, {longer}; 0 pairs' in said


def test_a_turn_that_is_cut_searches_for_nothing(serve, capsys):
    """Half a query is not what the model asked."""

    def cut(asked):
        answer = searching(asked)
        answer["choices"][0]["finish_reason"] = "length"
        return answer

    Path("questions.csv").write_text("question,answer\nWho is the author of Rim?,Ada\nWho is the author of Sea?,Bo\n")
    source = ["--source=FileSource", "--source.path=questions.csv"]
    code, said = failure(capsys, *served(serve(cut), "data", *source))
    assert code == 1
    assert "the model made no search in 2 rollouts" in said


def test_a_judge_that_cannot_be_asked_is_counted_apart(serve, capsys):
    def judging(asked):
        said = asked.body["messages"][-1]["content"]
        if "Verdict:" not in said:
            return searching(asked)
        return chat("Well") if len(said) % 2 else Reply("no", status=400)

    main(served(serve(judging), "data", "--pairs=4", "--judge=model"))
    counts = numbers("data")["counts"]
    assert counts["unclear"] + counts["judge_failed"] == counts["searches"]
    assert min(counts["unclear"], counts["judge_failed"]) > 0
    out, card = capsys.readouterr().out, Path("data/card.md").read_text()
    assert f"{counts['judge_failed']} calls of the judge failed: the rule's verdicts count there" in out
    assert f"| {counts['unclear']}; {counts['judge_failed']} more calls of the judge failed |" in card


def test_a_served_judge_reads_as_much_as_there_is_room_for(serve):
    server = serve(searching)
    example = QAExample(id="1", question="Who wrote Rim?", golden_answers=("Ada",), source="s")
    writer = Writer(hosts=server.url(""), api="chat")
    judge = ServedJudge(writer, 300)
    assert judge.verdicts([Case(example, "Rim", (Document(text=f"By Ada. {'word ' * 900}"),))]) == [True]
    writer.close()
    prompt = server.asked[-1].body["messages"][0]["content"]
    assert 4 * (300 - VERDICT_TOKENS) - 5 <= len(prompt) <= 4 * (300 - VERDICT_TOKENS)
    assert "By Ada. word" in prompt
    assert prompt.endswith("word\nThe results" + JUDGE.partition("The results")[2])


@pytest.mark.parametrize(
    ("written", "whole"),
    [
        ("<search> a", "<search> a</search>"),
        ("<search> a</search>", "<search> a</search>"),
        ("<think> <search> b </search> </think><answer> c", "<think> <search> b </search> </think><answer> c</answer>"),
        ("nothing", "nothing"),
    ],
)
def test_the_end_that_a_server_cuts_off_is_put_back(written, whole):
    assert closed(written) == whole
