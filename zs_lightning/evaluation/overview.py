"""Any number of runs in one table, for the terminal, as Markdown and as a page. Shares are shown in per cent."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text

from zs_lightning.evaluation.pages import COLOURS, render
from zs_lightning.evaluation.tables import (
    INTERVAL,
    inline,
    make_table,
    markdown_cell,
    markdown_table,
    percent,
    points,
    spread,
    stacked,
    visible,
)

HEADERS = "Run, Questions, EM, Difference, F1, Cover EM, Searches, Truncated, Invalid, Forged".split(", ")
NARROW = ["Run", "Ques-\ntions", "EM", "Difference", "F1", "Sear-\nches", "Trun-\ncated", "For-\nged"]
MOST_INTERVALS = 5
"""Runs whose intervals have room beside each other in a terminal; results.json and the pages have all."""

LEGEND = (
    "EM: exact match, %. Difference: in EM points from the first run, on the questions that both answered. F1: shared "
    "words, %. Cover EM: a golden answer occurs in the answer, %. Searches: per question. Truncated: ended by a limit, %. "
    "Invalid: ended by a failed search, %. Forged: the policy wrote search results itself, %."
)


def title(results: dict[str, Any]) -> str:
    return f"{len(results['runs'])} runs, {results['decoding']}, each against {visible(results['first'])}"


def described(run: dict[str, Any]) -> str:
    """Policy and setting, as far as they are known."""
    return ": ".join(part for part in (run["policy"], run["setting"]) if part)


def unpaired(results: dict[str, Any]) -> list[str]:
    """A sentence for each run whose questions are not all those of the first."""
    said = []
    for run in results["runs"][1:]:
        pairs = run["difference"]
        if pairs["only_here"] or pairs["only_in_first"]:
            said.append(
                f"{run['name']} and {results['first']}: the difference is over the {pairs['questions']} questions that both "
                f"answered; {pairs['only_here']} only of {run['name']} and {pairs['only_in_first']} only of {results['first']} "
                "are left out."
            )
    return said


def _change(run: dict[str, Any]) -> tuple[str, str]:
    """The difference in EM, and its interval."""
    if run["difference"] is None:
        return "first", ""
    mean, _, interval = points(run["difference"]["em"]).partition(" ")
    return mean, interval.strip("()")


def parts(results: dict[str, Any]) -> tuple[str, list[tuple[str, list[dict[str, Any] | None]]]]:
    """A heading, and for each data set (or each subset, if there is one data set) its name and EM of every run, None for a
    run without it."""
    runs = results["runs"]
    several = any("mean_of_sources" in run for run in runs)
    key = "sources" if several else "subsets"
    names = dict.fromkeys(name for run in runs for name in run[key])
    rows = [(name, [_em(run[key].get(name)) for run in runs]) for name in sorted(names, key=lambda name: ("/" in name, name))]
    if several:
        rows.append(("mean of data sets", [_em(run.get("mean_of_sources")) for run in runs]))
    return ("EM by data set" if several else "EM by subset"), rows


def _em(part: dict[str, Any] | None) -> dict[str, Any] | None:
    return None if part is None else part.get("em", part)


def show(results: dict[str, Any], console: Console | None = None) -> None:
    """Prints the comparison."""
    console = console or Console(highlight=False)
    table = make_table(title(results), NARROW)
    for run in results["runs"]:
        scores = [stacked(percent(run[name]["mean"]), spread(run[name])) for name in ("em", "f1")]
        shares = [f"{run['searches_per_question']:.2f}", percent(run["truncated"]), percent(run["forged"])]
        cells: list[Text | str] = [str(run["questions"]), scores[0], stacked(*_change(run)), scores[1], *shares]
        table.add_row(stacked(visible(run["name"]), visible(described(run))), *cells)
    console.print(table)
    heading, rows = parts(results)
    if rows:
        table = make_table(heading, ["", *(visible(run["name"]) for run in results["runs"])])
        for name, intervals in rows:
            room = len(intervals) <= MOST_INTERVALS
            cells = [stacked(percent(i["mean"]), spread(i) if room else "") if i else Text("–") for i in intervals]
            table.add_row(Text(visible(name)), *cells)
        console.print(table)
    for sentence in unpaired(results):
        console.print(Text(visible(sentence)))
    console.print(Text(f"{LEGEND} Below a value: its {INTERVAL}.", "dim"))


def markdown(results: dict[str, Any]) -> str:
    """The comparison as a Markdown page."""
    rows = []
    for run in results["runs"]:
        em, f1, cover = (inline(percent(run[name]["mean"]), spread(run[name])) for name in ("em", "f1", "cover_em"))
        shares = [percent(run[name]) for name in ("truncated", "invalid", "forged")]
        searches = f"{run['searches_per_question']:.2f}"
        cells = [str(run["questions"]), em, inline(*_change(run)), f1, cover, searches, *shares]
        rows.append([inline(run["name"], described(run)), *cells])
    page = [f"# {markdown_cell(title(results))}\n", markdown_table(HEADERS, rows)]
    heading, sets = parts(results)
    if sets:
        cells_of = [[name, *(inline(percent(i["mean"]), spread(i)) if i else "–" for i in values)] for name, values in sets]
        page += [f"## {heading}\n", markdown_table(["", *(markdown_cell(run["name"]) for run in results["runs"])], cells_of)]
    page += [f"{markdown_cell(sentence)}\n" for sentence in unpaired(results)]
    return "\n".join([*page, f"{LEGEND} In parentheses: {INTERVAL}.\n"])


def html(results: dict[str, Any]) -> str:
    """The comparison as one HTML page. A function of the results alone."""
    heading, rows = parts(results)
    values = {
        "results": results,
        "title": title(results),
        "described": described,
        "unpaired": unpaired(results),
        "headers": HEADERS,
        "heading": heading,
        "parts": rows,
        "legend": LEGEND,
        "interval": INTERVAL,
        "colours": [number % COLOURS for number in range(len(results["runs"]))],
    }
    return render("overview.html", values)
