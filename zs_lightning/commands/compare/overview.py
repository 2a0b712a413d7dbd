"""Any number of runs in one table, for the terminal, as Markdown and as a page. Shares are shown in per cent."""

from __future__ import annotations

import textwrap
from typing import Any

from rich.console import Console
from rich.text import Text

from zs_lightning.runs.outcomes import NORMALISATION
from zs_lightning.runs.pages import COLOURS, render
from zs_lightning.runs.tables import (
    INTERVAL,
    inline,
    make_table,
    markdown_cell,
    markdown_table,
    percent,
    points,
    spread,
    stacked,
    subset_legend,
    visible,
)

HEADERS = "Run, Questions, EM, Difference, F1, Cover EM, Searches, Truncated, Invalid, Forged".split(", ")
NARROW = ["Run", "Ques-\ntions", "EM", "Difference", "F1", "Sear-\nches", "Trun-\ncated", "For-\nged"]
MARK = "*"
"""At scores that are not over the first run's questions."""
NAME_WIDTH = 12
"""Of a run's column in a terminal."""
MOST_INTERVALS = 5
"""Runs whose intervals have room beside each other in a terminal; results.json and the pages have all."""

LEGEND = (
    "EM: exact match, %. Difference: in EM points from the first run, on the questions that both answered. F1: shared "
    "words, %. Cover EM: a golden answer occurs in the answer, %. Searches: per question. Truncated: ended by a limit, %. "
    "Invalid: ended by a failed search, %. Forged: the policy wrote search results itself, %. "
    f"In results.json, {NORMALISATION}"
)


def title(results: dict[str, Any]) -> str:
    return f"{len(results['runs'])} runs, {results['decoding']}, each against {visible(results['first'])}"


def described(run: dict[str, Any]) -> str:
    """Policy and setting, as far as they are known."""
    return ": ".join(part for part in (run["policy"], run["setting"]) if part)


def unpaired(results: dict[str, Any]) -> list[str]:
    """A sentence for each run whose questions are not all those of the first, and what the mark at its scores means."""
    said = []
    for run in results["runs"]:
        pairs = run["difference"]
        if _mark(run):
            said.append(
                f"{run['name']} and {results['first']}: the difference is over the {pairs['questions']} questions that both "
                f"answered; {pairs['only_here']} only of {run['name']} and {pairs['only_in_first']} only of {results['first']} "
                "are left out."
            )
    if said:
        said.append(f"{MARK} Over other questions than those of {results['first']}: do not compare it with the other scores.")
    return said


def _mark(run: dict[str, Any]) -> str:
    pairs = run["difference"]
    return MARK if pairs and (pairs["only_here"] or pairs["only_in_first"]) else ""


def questions(run: dict[str, Any]) -> str:
    return f"{run['questions']}{_mark(run)}"


def _change(run: dict[str, Any]) -> tuple[str, str]:
    """The difference in EM, and its interval."""
    if run["difference"] is None:
        return "first", ""
    mean, _, interval = points(run["difference"]["em"]).partition(" ")
    return mean, interval.strip("()")


def parts(results: dict[str, Any]) -> tuple[str, list[tuple[str, list[dict[str, Any] | None]]]]:
    """A heading, and for each data set (or each subset, if there is one data set) its name and EM of every run, with its
    mark; None for a run without it."""
    runs = results["runs"]
    several = any("mean_of_sources" in run for run in runs)
    key = "sources" if several else "subsets"
    names = dict.fromkeys(name for run in runs for name in run[key])
    rows = []
    for name in sorted(names, key=lambda name: ("/" in name, name)):
        rows.append((name, [_em(run[key].get(name), name in run["other_questions"][key]) for run in runs]))
    if several:
        means = [_em(run.get("mean_of_sources"), bool(run["other_questions"][key])) for run in runs]
        rows.append(("mean of data sets", means))
    return ("EM by data set" if several else "EM by subset"), rows


def _em(part: dict[str, Any] | None, other_questions: bool) -> dict[str, Any] | None:
    return None if part is None else {**part.get("em", part), "mark": MARK if other_questions else ""}


def _value(interval: dict[str, Any]) -> str:
    return percent(interval["mean"]) + interval["mark"]


def _legend(rows: list[tuple[str, list[dict[str, Any] | None]]]) -> str:
    return f"{LEGEND} {subset_legend(name for name, _ in rows)}".strip()


def show(results: dict[str, Any], console: Console | None = None) -> None:
    """Prints the comparison."""
    console = console or Console(highlight=False)
    table = make_table(title(results), NARROW)
    for run in results["runs"]:
        scores = [stacked(percent(run[name]["mean"]), spread(run[name])) for name in ("em", "f1")]
        shares = [f"{run['searches_per_question']:.2f}", percent(run["truncated"]), percent(run["forged"])]
        cells: list[Text | str] = [questions(run), scores[0], stacked(*_change(run)), scores[1], *shares]
        table.add_row(stacked(visible(run["name"]), visible(described(run))), *cells)
    console.print(table)
    heading, rows = parts(results)
    if rows:
        table = make_table(heading, ["", *(textwrap.fill(visible(run["name"]), NAME_WIDTH) for run in results["runs"])])
        for name, intervals in rows:
            room = len(intervals) <= MOST_INTERVALS
            cells = [stacked(_value(i), spread(i) if room else "") if i else Text("–") for i in intervals]
            table.add_row(Text(visible(name)), *cells)
        console.print(table)
    for sentence in unpaired(results):
        console.print(Text(visible(sentence)))
    console.print(Text(f"{_legend(rows)} Below a value: its {INTERVAL}.", "dim"))


def markdown(results: dict[str, Any]) -> str:
    """The comparison as a Markdown page."""
    rows = []
    for run in results["runs"]:
        em, f1, cover = (inline(percent(run[name]["mean"]), spread(run[name])) for name in ("em", "f1", "cover_em"))
        shares = [percent(run[name]) for name in ("truncated", "invalid", "forged")]
        searches = f"{run['searches_per_question']:.2f}"
        cells = [questions(run), em, inline(*_change(run)), f1, cover, searches, *shares]
        rows.append([inline(run["name"], described(run)), *cells])
    page = [f"# {markdown_cell(title(results))}\n", markdown_table(HEADERS, rows)]
    heading, sets = parts(results)
    if sets:
        cells_of = [[name, *(inline(_value(i), spread(i)) if i else "–" for i in values)] for name, values in sets]
        page += [f"## {heading}\n", markdown_table(["", *(markdown_cell(run["name"]) for run in results["runs"])], cells_of)]
    page += [f"{markdown_cell(sentence)}\n" for sentence in unpaired(results)]
    return "\n".join([*page, f"{_legend(sets)} In parentheses: {INTERVAL}.\n"])


def html(results: dict[str, Any]) -> str:
    """The comparison as one HTML page. A function of the results alone."""
    heading, rows = parts(results)
    values = {
        "results": results,
        "title": title(results),
        "described": described,
        "questions": questions,
        "change": _change,
        "unpaired": unpaired(results),
        "headers": HEADERS,
        "heading": heading,
        "parts": rows,
        "legend": _legend(rows),
        "interval": INTERVAL,
        "colours": [number % COLOURS for number in range(len(results["runs"]))],
    }
    return render("overview.html", values, "commands/compare")
