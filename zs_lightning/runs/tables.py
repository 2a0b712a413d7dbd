"""The comparison in words and tables, for the terminal and as Markdown. Shares are shown in per cent."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from zs_lightning.runs.outcomes import NORMALISATION

HEADERS = ("Policy", "EM\ngreedy", "EM\nsampled", "F1", "Cover\nEM", "Searches", "Trun-\ncated", "Invalid")
LEGEND = (
    "EM: exact match, %. F1: shared words, %. Cover EM: a golden answer occurs in the answer, %. All greedy but EM sampled "
    "(temperature 1). Searches: per question. Truncated: ended by a limit, %. Invalid: ended by a failed search, %. "
    f"In results.json, {NORMALISATION}"
)
SUBSETS = (
    "Known entities: named in what the base model was made from. New: only the search corpus names them, neither that text, "
    "nor the simulator's training, nor any training question. One hop: one fact is asked for; two hop: a fact about what "
    "another fact names."
)
"""Of the miniature's questions."""
SECONDS = "Each is the wall-clock time of a stage's commands in seconds, added up where commands ran side by side."
INTERVAL = "95 % interval over questions"
FEW = 20
"""Questions, below which no change is claimed."""
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")


def visible(text: str) -> str:
    """Untrusted text with its control, direction and half characters made visible: they could reorder or end a page."""

    def picture(match: re.Match[str]) -> str:
        code = ord(match[0])
        return chr(0x2400 + code) if code < 32 else "\N{REPLACEMENT CHARACTER}"

    return _UNPRINTABLE.sub(picture, text)


def percent(value: float) -> str:
    """Three characters more or less: 9.5, 35.5, 100."""
    return f"{100 * value:.1f}".replace("100.0", "100")


def spread(interval: dict[str, float]) -> str:
    return f"{percent(interval['low'])}–{percent(interval['high'])}"


def points(interval: dict[str, float]) -> str:
    """A difference of shares with its interval, in percentage points."""
    mean, low, high = (f"{100 * interval[name]:+.1f}".replace("-", "−") for name in ("mean", "low", "high"))
    return f"{mean} ({low} to {high})"


def headline(results: dict[str, Any]) -> str:
    """What happened, in one sentence that the interval carries."""
    base, trained = (results["policies"][name]["em"]["mean"] for name in ("base", "trained"))
    numbers = f"from {percent(base)} % to {percent(trained)} %"
    if results["questions"] < FEW:
        return f"Too few questions ({results['questions']}) to claim a change in exact match: {numbers}."
    if results["difference"]["em"]["low"] > 0:
        return f"Exact match rose {numbers}."
    if results["difference"]["em"]["high"] < 0:
        return f"Exact match fell {numbers}."
    return f"No clear change in exact match: {numbers}."


def difference_line(results: dict[str, Any]) -> str:
    """The paired differences, in one sentence."""
    greedy, sampled = results["difference"]["em"], results["difference"]["em_sampled"]
    said = f"Trained − base in EM points, on the same {results['questions']} questions: greedy {points(greedy)}"
    return f"{said}{f', sampled {points(sampled)}' if sampled else ''}; 95 % intervals, paired."


def subset_names(results: dict[str, Any]) -> list[str]:
    """Parts of names before whole names: known, new, one_hop, two_hop, known/one_hop, …"""
    names = results["policies"]["base"]["subsets"]["greedy"]
    return sorted(names, key=lambda name: ("/" in name, name))


def subset_legend(names: Iterable[str]) -> str:
    """What the names of subsets mean; empty if they are not the miniature's."""
    return SUBSETS if {"known", "new", "one_hop", "two_hop"} <= set(names) else ""


def _cells(name: str, metrics: dict[str, Any]) -> list[tuple[str, str]]:
    """Value and interval of each column."""
    intervals = [metrics[column] for column in ("em", "em_sampled", "f1", "cover_em")]
    shares = [(percent(metrics[column]), "") for column in ("truncated", "invalid")]
    searches = (f"{metrics['searches_per_question']:.2f}", "")
    return [(name, ""), *((percent(i["mean"]), spread(i)) if i else ("–", "") for i in intervals), searches, *shares]


def engines(results: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Title and policies: the main engine, then the others."""
    yield results["engine"], results["policies"]
    yield from results["other_engines"].items()


def _title(label: str, policies: dict[str, Any]) -> str:
    return f"{visible(label)}, {next(iter(policies.values()))['questions']} questions"


def make_table(title: str, headers: list[str]) -> Table:
    table = Table(title=Text(title), title_justify="left", box=SIMPLE_HEAD)
    table.collapse_padding, table.pad_edge, table.show_edge = True, False, False  # Eight columns in 80 characters.
    for number, header in enumerate(headers):
        table.add_column(Text(header), justify="right" if number else "left", no_wrap=number > 0, overflow="fold")
    return table


def stacked(value: str, interval: str) -> Text:
    return Text.assemble(value, ("\n" + interval, "dim") if interval else "")


def show(results: dict[str, Any], console: Console | None = None) -> None:
    """Prints the comparison."""
    console = console or Console(highlight=False)
    for label, policies in engines(results):
        table = make_table(_title(label, policies), list(HEADERS))
        for name, metrics in policies.items():
            table.add_row(*(stacked(*cell) for cell in _cells(name, metrics)))
        console.print(table)
        if policies is results["policies"]:
            console.print(Text(difference_line(results), "bold"), end="\n\n")
    policies = results["policies"]
    if names := subset_names(results):
        table = make_table("EM by subset, greedy", ["Subset", "Questions", *policies])
        for name in names:
            parts = [metrics["subsets"]["greedy"][name] for metrics in policies.values()]
            cells = [stacked(percent(part["mean"]), spread(part)) for part in parts]
            table.add_row(Text(visible(name)), str(parts[0]["questions"]), *cells)
        console.print(table)
    legend = [f"{LEGEND} Below a value: its {INTERVAL}.", subset_legend(names)]
    console.print(Text(" ".join(filter(None, legend)), "dim"))


def markdown_cell(text: str) -> str:
    """Untrusted text that stays inside its cell and stays text."""
    text = " ".join(visible(text).split())
    return re.sub(r"[\\`*{}\[\]<>#|!&~$]", lambda match: f"&#{ord(match[0])};", text)


def markdown_table(headers: list[str], rows: list[list[str]]) -> str:
    lines = [headers, ["---", *["---:"] * (len(headers) - 1)], *([markdown_cell(cell) for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def inline(value: str, interval: str) -> str:
    return f"{value} ({interval})" if interval else value


def markdown(results: dict[str, Any]) -> str:
    """The comparison as a Markdown page."""
    parts = [f"# {headline(results)}\n", f"{difference_line(results)}\n"]
    for label, policies in engines(results):
        rows = [[inline(*cell) for cell in _cells(name, metrics)] for name, metrics in policies.items()]
        headers = [header.replace("-\n", "").replace("\n", " ") for header in HEADERS]
        parts += [f"## {markdown_cell(_title(label, policies))}\n", markdown_table(headers, rows)]
    policies = results["policies"]
    if names := subset_names(results):
        rows = []
        for name in names:
            intervals = [metrics["subsets"]["greedy"][name] for metrics in policies.values()]
            rows.append([name, str(intervals[0]["questions"]), *(inline(percent(i["mean"]), spread(i)) for i in intervals)])
        parts += ["## EM by subset, greedy\n", markdown_table(["Subset", "Questions", *policies], rows)]
        parts += [f"{said}\n" for said in [subset_legend(names)] if said]
    if recall := results["simulator"]:
        useful, noisy = (
            inline(f"{percent(i['mean'])} %", spread(i)) for i in (recall["useful_recall"], recall["noisy_recall"])
        )
        parts.append(f"Simulated results hold the asked fact in {useful} of useful and {noisy} of noisy searches.\n")
    if results["seconds"]:
        times = ", ".join(f"{markdown_cell(name)} {seconds:g} s" for name, seconds in results["seconds"].items())
        parts.append(f"Time: {times}. {SECONDS}\n")
    return "\n".join([*parts, f"{LEGEND} In parentheses: {INTERVAL}.\n"])
