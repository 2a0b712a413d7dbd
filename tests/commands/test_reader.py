"""The reader of trajectories on the page: what it gets, that no text can leave it, and a real browser with it."""

import base64
import hashlib
import json
import re
import zlib
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.browser import NAME, Browser
from support.runfolders import (
    CONTROLS,
    HOSTILE,
    Page,
    eight_questions,
    policy,
    run_compare,
    trajectory,
    write_run,
    write_training,
)
from zs_lightning.commands.compare import command, reader
from zs_lightning.commands.compare.spelling import Spelling
from zs_lightning.errors import UserError
from zs_lightning.models.specs import SHIPPED
from zs_lightning.runs.folder import read_run
from zs_lightning.types import Document


def content(page):
    """What the page's script reads."""
    (text,) = re.findall('<script type="text/plain" id="trajectories">([A-Za-z0-9+/=]+)</script>', page)
    return json.loads(zlib.decompress(base64.b64decode(text)))


def read(runs, training=None, most=100):
    found = reader.read_trajectories([read_run(run.name, "", run) for run in runs], training, most)
    return found, json.loads(zlib.decompress(base64.b64decode(found.data)))


# ---------------------------------------------------------------------- which


def test_of_each_kind_as_many_are_kept_by_their_draws():
    # Ranks within a and b, by draw: a 3, b 1, a 1, a 2, b 2.
    kinds, draws = list("abaab"), [9, 2, 1, 5, 7]
    assert reader.thinned(kinds, draws, 2) == {1, 2}
    assert reader.thinned(kinds, draws, 3) == {1, 2, 3}
    assert reader.thinned(kinds, draws, 9) == {0, 1, 2, 3, 4}


@given(st.lists(st.sampled_from("abc"), max_size=30), st.integers(0, 40))
def test_kinds_differ_by_one_at_most_where_lines_are_left(kinds, most):
    kept = reader.thinned(kinds, list(range(len(kinds))), most)
    assert len(kept) == min(most, len(kinds))
    shown, all_ = Counter(kinds[place] for place in kept), Counter(kinds)
    left_out = [kind for kind in all_ if shown[kind] < all_[kind]]
    assert all(shown[kind] >= max(shown.values(), default=0) - 1 for kind in left_out)


@pytest.mark.parametrize(
    ("counts", "most", "expected"),
    [([5, 100, 100], 65, [5, 30, 30]), ([3, 4], 100, [3, 4]), ([], 9, []), ([9, 9, 9], 10, [3, 3, 4])],
)
def test_runs_share_the_room(counts, most, expected):
    assert reader.shared(counts, most) == expected


def test_tests_show_the_same_questions_and_a_training_each_step(tmp_path):
    runs = eight_questions(tmp_path)
    for step in range(1, 21):
        write_training(tmp_path / "fit", [trajectory(i, "yes") for i in range(4)], step)
    found, data = read([runs / "base", runs / "trained"], runs / "fit", 48)
    assert found.counts == [("training", 24, 80), ("base", 12, 16), ("trained", 12, 16)]
    assert found.thinned
    rows = data["rows"]
    assert set(Counter(row["step"] for row in rows if row["run"] == 0).values()) <= {1, 2}
    assert {row["step"] for row in rows if row["run"] == 0} == set(range(1, 21))
    base, trained = ([(row["id"], row["decoding"]) for row in rows if row["run"] == run] for run in (1, 2))
    assert base == trained
    assert Counter(decoding for _, decoding in base) == {"greedy": 6, "sampled": 6}


def test_what_is_no_trajectory_is_counted_and_a_line_on_its_way_is_not(tmp_path):
    path = write_training(tmp_path, [trajectory(0, "yes"), trajectory(1, "no")], 3)
    line = json.loads(path.read_text().splitlines()[0])
    bad = [{"step": 1}, 7, line | {"turns": [{"kind": "answer"}]}, line | {"old_logprobs": ["x"]}, line | {"reward_parts": 3}]
    # The decoder reads what JSON has not.
    bad += [line | {"old_logprobs": [float("inf")]}, line | {"id": None, "question": None, "turns": None}]
    with path.open("a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in bad) + '{"schema": 1, "step": 4, "id"')
    found, data = read([], tmp_path)
    assert found.counts == [("training", 2, 9)]
    assert found.damaged == 7
    assert [(row["step"], row["id"], row["grade"]) for row in data["rows"]] == [(3, "toy/0", 2), (3, "toy/1", 0)]


def test_a_number_that_json_has_not_is_none(tmp_path):
    rows = [trajectory(0, "yes")]
    rows[0].reward, rows[0].advantage = float("nan"), float("inf")
    write_training(tmp_path, rows, 1)
    _, data = read([], tmp_path)
    assert [data["rows"][0][name] for name in ("reward", "advantage")] == [None, None]


def test_older_lines_are_read(tmp_path):
    path = write_training(tmp_path, [trajectory(0, "yes", 2)], 1)
    line = json.loads(path.read_text())
    for name in ("noise_prob", "failure", "reward_parts", "advantage"):
        del line[name]
    for number, turn in enumerate(line["turns"]):
        for name in ("label", "noise", "withheld", "repeated"):
            del turn[name]
        turn["noisy"] = [True, False, None][number]
    path.write_text(json.dumps(line) + "\n")
    _, data = read([], tmp_path)
    (row,) = data["rows"]
    assert [turn.get("label") for turn in row["turns"]] == ["noisy", "useful", None]
    assert (row["noise"], row["parts"], row["advantage"]) == (None, {}, None)


@pytest.mark.parametrize(
    ("earned", "f1", "expected"), [(0.0, 1.0, 0), (-0.1, 0.0, 0), (0.4, 0.4, 1), (0.9, 1.0, 2), (1.0, 0.0, 2), (None, 1.0, 0)]
)
def test_grades(earned, f1, expected):
    assert reader.grade(earned, {"f1": f1, "em_folded": 0.0}) == expected


# ---------------------------------------------------------------------- tokens


def written(text):
    """A trajectory of one turn in tokens of the miniature."""
    tokenizer = Spelling(SHIPPED / "tokenizer.json").tokenizer
    row = trajectory(0, None, 0)
    answer = trajectory(0, text).turns[-1]
    row.turns, row.token_ids = [answer], tokenizer.encode(text, add_special_tokens=False).ids
    answer.text, answer.span = text, (0, len(row.token_ids))
    row.prompt_ids = tokenizer.encode("Where is it?", add_special_tokens=False).ids
    row.old_logprobs, row.loss_mask = [-0.126] * len(row.token_ids), [True] * len(row.token_ids)
    return row


def test_tokens_have_their_texts_where_the_tokenizer_is_the_runs(tmp_path):
    row = written("<think> I may know this.</think>")
    write_training(tmp_path, [row, trajectory(1, "yes")], 1)
    (tmp_path / "config.yaml").write_text("model: {init_args: {model: {path: miniature}}}")
    _, data = read([], tmp_path)
    first, second = data["rows"]
    (turn,) = first["turns"]
    texts = [data["tokens"][number] for number in turn["tokens"]]
    assert "".join(texts) == "<think> I may know this.</think>"
    assert len(texts) > 5
    assert turn["logprobs"] == [13] * len(texts)
    assert data["prompts"][first["prompt"]].strip() == "Where is it?"
    # Its ids do not say what the run wrote: they are of another tokenizer.
    assert data["prompts"][second["prompt"]] == ""
    assert [turn.get("tokens") for turn in second["turns"]] == [None, None]


@pytest.mark.parametrize("path", ["/nowhere", "no/such-model", "not a name", 7, None])
def test_without_a_tokenizer_there_are_no_texts_of_tokens(path, tmp_path):
    write_training(tmp_path, [written("<think> I may know this.</think>")], 1)
    (tmp_path / "config.yaml").write_text(json.dumps({"model": {"init_args": {"model": {"path": path}}}}))
    _, data = read([], tmp_path)
    assert data["tokens"] == []
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    assert read([], tmp_path)[1] == data


# ---------------------------------------------------------------------- the page

TEXT = HOSTILE + "<!--<script>" + CONTROLS


def hostile_rows():
    rows = [trajectory(i, TEXT, text=TEXT, question=f"{i} {TEXT}", golden_answers=("yes", TEXT), subset=TEXT) for i in range(3)]
    for row in rows:
        row.failure, row.reward_parts = TEXT, {TEXT: 1.0, "__proto__": 2.0}
        row.turns[0].label, row.turns[0].documents = TEXT, (Document(text=TEXT, title=TEXT),) * 2
    return rows


@pytest.fixture
def hostile(tmp_path):
    for name in ("base", "trained"):
        write_run(tmp_path / name, hostile_rows())
    write_training(tmp_path / "fit", hostile_rows(), 1)
    path = tmp_path / "fit" / "alarms.jsonl"
    path.write_text(json.dumps({"step": 1, "name": TEXT, "is": "on", "reason": TEXT, "hint": TEXT}) + '\n{"step": 2')
    command.main(["--training", str(tmp_path / "fit"), "--out", str(tmp_path / "alone")])
    return tmp_path


def test_nothing_but_the_script_of_the_house_can_run(hostile):
    run_compare(hostile, f"--training={hostile / 'fit'}")
    for place in ("out", "alone"):
        page = (hostile / place / "report.html").read_bytes().decode("utf-8")
        scripts = re.findall("<script>(.*?)</script>", page, re.DOTALL)
        assert len(scripts) == 1
        allowed = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
        policy = (
            f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{allowed}'; base-uri 'none'; form-action 'none'"
        )
        parsed = Page(page)
        assert ("content", policy) in parsed.attributes
        assert parsed.tags.count("script") == 2
        assert parsed.tags.index("meta") < parsed.tags.index("script")
        assert not [name for name, _ in parsed.attributes if name.startswith("on") or name in ("src", "href", "srcset")]
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202e\u2028\ufeff]", page)
        shown = json.dumps(content(page), ensure_ascii=False)
        assert HOSTILE in json.loads(shown)["rows"][0]["question"]
        assert not re.search("[\u202e\u2028\ufeff]|\\\\u00", shown)


def test_script_makes_no_markup():
    script = (reader.Path(reader.__file__).parent / "reader.js").read_text()
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|eval|Function\(|fetch|import|</script|<!--", script
    )


def test_page_of_a_training_alone(tmp_path, capsys):
    fit, out = tmp_path / "fit", tmp_path / "out"
    write_training(fit, [trajectory(0, "yes")], 1)
    command.main(["--training", str(fit), "--out", str(out)])
    assert capsys.readouterr().out == f"Written: {out / 'report.html'}\n"
    assert sorted(path.name for path in out.iterdir()) == ["report.html"]
    page = (out / "report.html").read_text()
    assert "answered: training 1." in Page(page).text
    assert "Alarms" not in page


def test_alarms_of_a_training_stand_on_its_page(tmp_path):
    write_training(tmp_path / "fit", [trajectory(0, "yes")], 1)
    on = {"name": "no_search", "is": "on", "reason": "it stopped", "hint": "do <this>"}
    over = {"name": "no_search", "is": "over"}
    lines = [{"step": 7} | on, {"step": 9} | over, {"step": 12} | on, {"step": 13} | over | {"name": "x"}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "fit" / "alarms.jsonl").write_text(text + '[7]\n\n{"step": 14, "name": "no_se')
    found = [(alarm.step, alarm.over, alarm.name) for alarm in reader.read_alarms(tmp_path / "fit")]
    assert found == [(7, 9, "no_search"), (12, None, "no_search")]
    command.main(["--training", str(tmp_path / "fit"), "--out", str(tmp_path / "out")])
    said = " ".join(Page((tmp_path / "out" / "report.html").read_text()).text.split())
    assert "7 to 9no searchit stoppeddo <this> 12, still onno searchit stoppeddo <this>" in said


@pytest.mark.parametrize("args", [[], ["--training=fit"], ["--out=out"]])
def test_nothing_to_show_is_refused(args):
    with pytest.raises(UserError, match="compare needs two runs or more; or none"):
        command.main(args)


def test_without_trajectories_there_is_no_script(tmp_path):
    runs = eight_questions(tmp_path)
    for name in ("base", "trained"):
        (runs / name / "trajectories" / "test.jsonl").unlink()
    run_compare(runs)
    page = (runs / "out" / "report.html").read_text()
    assert "<script" not in page
    assert "script-src" not in page


# ---------------------------------------------------------------------- a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if NAME is None:
        pytest.skip("no Chromium on this machine")
    found = Browser(tmp_path_factory.mktemp("browser"))
    yield found
    found.close()


def test_hostile_texts_stay_texts_in_a_browser(hostile, browser):
    run_compare(hostile, f"--training={hostile / 'fit'}")
    for place in ("out", "alone"):
        page = hostile / place / "report.html"
        browser.said, browser.asked = [], []
        browser.open(page)
        browser.run("document.getElementById('tokens').click()")
        browser.run("document.getElementById('tokens').click()")
        assert browser.run("document.getElementById('shown').innerText").count(HOSTILE) > 5
        # Every script, image and handler that there is: two of the house.
        assert browser.run("document.querySelectorAll('script').length") == 2
        assert browser.run("document.querySelectorAll('img, iframe, object, embed, link, base').length") == 0
        names = "[...document.querySelectorAll('*')].flatMap((e) => [...e.attributes].map((a) => a.name))"
        assert not [name for name in browser.run(names) if name.startswith(("on", "src"))]
        assert not re.search("[\u202e\u2028\ufeff\x00\x1b]", browser.run("document.body.textContent"))
        assert browser.said == []
        assert [url for url in browser.asked if not url.startswith(("file://", "about:"))] == []


def test_policy_of_the_page_stops_scripts_and_the_network(hostile, browser):
    """Even if a text became markup or a script ran: this puts them there by force."""
    browser.open(hostile / "alone" / "report.html")
    browser.asked = []
    browser.run("""(() => {
      const script = document.createElement("script");
      script.textContent = "window.ran = 1";
      const image = new Image();
      image.src = "http://127.0.0.1:9/a.png";
      document.body.append(script, image);
      document.body.insertAdjacentHTML("beforeend", '<b onclick="window.ran = 2" id="bad"></b>');
      document.getElementById("bad").click();
    })()""")
    assert browser.run("window.ran === undefined")
    assert browser.run("fetch('http://127.0.0.1:9/').then(() => 'sent', (error) => error.name)") == "TypeError"
    assert sum("Content Security Policy" in str(said) for said in browser.said) >= 3
    browser.said = []


def count(browser):
    return browser.run("document.getElementById('count').textContent")


def put(browser, name, value):
    """Sets a filter as a user does; the others are reset."""
    browser.run(f"""(() => {{
      const form = document.getElementById("filters");
      form.reset();
      form.elements["{name}"].value = "{value}";
      form.dispatchEvent(new Event("input"));
    }})()""")
    return count(browser)


@pytest.fixture
def opened(tmp_path, browser):
    """Twenty trajectories: each of 8 questions by base and trained, and four of a training."""
    write_run(tmp_path / "base", policy(*["no"] * 8, searches=0))
    write_run(tmp_path / "trained", policy(None, *["yes"] * 7, searches=2))
    for step in (3, 9):
        found = [trajectory(i, ["yes", "no"][i], 1, subset="") for i in range(2)]
        found[0].reward, found[0].reward_parts, found[0].turns[0].label = 1.0, {"answer": 1.0}, "off_topic"
        found[1].turns[0].text, found[1].turns[0].label = f"<think> step {step}</think>", "useful"
        write_training(tmp_path / "fit", found, step)
    run_compare(tmp_path, f"--training={tmp_path / 'fit'}")
    browser.open(tmp_path / "out" / "report.html")
    return tmp_path / "out" / "report.html"


def test_filters(opened, browser):
    assert count(browser) == "20 of 20 trajectories"
    found = {
        ("run", "2"): 8,
        ("score", "0"): 11,
        ("score", "2"): 9,
        ("score", "1"): 0,
        ("status", "turn_limit"): 1,
        ("searches", "1"): 4,
        ("part", "toy"): 20,
        ("part", "toy · known/one_hop"): 16,
        ("noise", "some"): 2,
        ("noise", "none"): 2,
        ("noise", "kind off_topic"): 2,
        ("from", "4"): 2,
        ("to", "4"): 2,
        ("text", "STEP 9"): 1,
        ("text", "question 7?"): 2,
        ("text", "nowhere"): 0,
    }
    for (name, value), expected in found.items():
        assert (name, value, put(browser, name, value).split(" of ")[0]) == (name, value, str(expected))
    assert browser.run("document.getElementById('shown').textContent") == "No trajectory is like this."


def test_keys_links_and_two_side_by_side(opened, browser):
    def press(key):
        browser.run(f"document.getElementById('list').dispatchEvent(new KeyboardEvent('keydown', {{key: '{key}'}}))")
        return browser.run("[...document.querySelectorAll('#shown h4')].map((head) => head.textContent)")

    assert press("ArrowDown") == ["○training, step 3, #0"]
    assert press("ArrowUp") == ["●training, step 3, #0"]
    assert press("End") == ["●trained, greedy"]
    assert browser.run("document.querySelector('[aria-selected=true]').id") == "line-19"
    assert press("Home") == ["●training, step 3, #0"]
    mates = "[...document.querySelectorAll('.tools option')].map((option) => option.textContent)"
    assert browser.run(mates) == ["–", "● training, step 9, #0", "○ base, greedy", "○ trained, greedy"]
    browser.run("""(() => {
      const select = document.querySelector(".tools select");
      select.value = "0";
      select.dispatchEvent(new Event("change"));
    })()""")
    both = ["●training, step 3, #0", "●training, step 9, #0"]
    heads = "[...document.querySelectorAll('#shown h4')].map((head) => head.textContent)"
    assert browser.run(heads) == both
    link = browser.run("document.querySelector('.tools a').getAttribute('href')")
    assert link == browser.run("location.hash")
    browser.open(opened)
    assert browser.run(heads) == both[:1]
    browser.open(opened, fragment=link)
    assert browser.run(heads) == both
    # A fragment that names nothing, or is none.
    for fragment in ("#t=%E0%A4%A", "#t=a/b", "#x"):
        browser.open(opened, fragment=fragment)
        assert browser.run(heads) == both[:1]
    assert browser.said == []


def test_likelihoods_are_shown_on_demand(opened, browser):
    assert browser.run("document.querySelector('.strip')") is None
    browser.run("document.getElementById('tokens').click()")
    said = browser.run("document.querySelector('.strip').textContent")
    assert said == "▪mean −1.00; least likely token 1, log-prob −1.00, probability 37 %"


def test_without_scripts_the_page_is_what_it_was(opened, browser):
    browser.send("Emulation.setScriptExecutionDisabled", value=True)
    browser.send("Page.navigate", url=f"file://{opened}")
    browser.wait("document.readyState === 'complete' && location.protocol === 'file:'")
    assert browser.run("document.documentElement.dataset.ready") is None
    assert browser.run("document.getElementById('reader').getBoundingClientRect().height") == 0
    assert "Side by side" in browser.run("document.body.innerText")
    assert "Trajectories" not in browser.run("document.body.innerText")
    browser.send("Emulation.setScriptExecutionDisabled", value=False)
