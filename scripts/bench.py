"""Benchmarks: this package and what people would use instead, on the same work in the same process.

    python scripts/bench.py [NAME …] [--json FILE]

Without a name every bench runs that needs no GPU, each in a process of its own. The exit status is 1 if a ratio falls
short of what it must reach, or if two sides did not produce the same result (then there is no time either). The peers are
installed by the extra `bench`. The last results are kept in bench_results.md next to this file.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import platform
import subprocess
import sys
import tempfile
import warnings
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benches.harness import Row, Unavailable, UnequalResultsError

ON_CPU = (
    "rollout-policy",
    "rollout-search",
    "mixed-lora",
    "step-vs-trl",
    "train-pass",
    "stop-tail",
    "sim-batch",
    "guards",
    "watching",
)
ON_GPU = ("gpu-step",)
RESULTS = Path(__file__).with_name("bench_results.md")
SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "KINETO_LOG_LEVEL": "99",
    "TRL_EXPERIMENTAL_SILENCE": "1",
}
"""Read by libraries when they are imported, so nothing heavy is imported at the top of this file."""
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "trl", "lightning")
OPENING = """# Results of scripts/bench.py

Ratio: time of the peer / our time on the same work in the same process, median of at least 3 interleaved rounds (guards and
watching: each step's least). CPU: process CPU seconds on one thread. Random weights (tiny: 5 million parameters, small: 33
million), greedy unless said otherwise, lengths fixed beforehand by one seeded generator. What is not in a table was not
measured.
"""


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def processor() -> str:
    """The CPU's name as Linux tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def cells(row: Row) -> list[str]:
    """A row as the table shows it."""
    unit = {"s": "s", "mb": "MB"}[row.unit]
    required = "" if row.required is None else f"≥ {row.required:.2f}{'' if row.reached else ' MISSED'}"
    return [row.case, row.peer, f"{row.ours:.3g} {unit}", f"{row.theirs:.3g} {unit}", f"{row.ratio:.2f}", required, row.equal]


def figures(row: Row) -> str:
    """The row's details: counts as they are, seconds with two decimals."""
    parts = [f"{key} {value:,}" if isinstance(value, int) else f"{key} {value:.2f}" for key, value in row.details.items()]
    return f"{row.case}, {row.peer}: " + ", ".join(parts)


HEADER = ["case", "against", "ours", "peer", "ratio", "required", "results"]


def show(console: Console, name: str, rows: list[Row]) -> None:
    table = Table(title=name, title_justify="left")
    for heading in HEADER:
        table.add_column(heading, justify="right" if heading in ("ours", "peer", "ratio") else "left")
    for row in rows:
        table.add_row(*cells(row), style=None if row.reached else "bold red")
    console.print(table)
    for row in rows:
        if row.details:
            console.print(figures(row))


def keep(name: str, rows: list[Row]) -> None:
    """Replaces the bench's section in the results file."""
    found = ", ".join(f"{package} {number}" for package, number in versions().items())
    lines = [f"## {name}", "", f"{date.today()}, {processor()}, {found}", ""]
    lines += ["| " + " | ".join(HEADER) + " |", "|" + " --- |" * len(HEADER)]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in rows]
    for row in rows:
        if row.details:
            lines += ["", figures(row)]
    old = RESULTS.read_text().split("\n## ")[1:] if RESULTS.is_file() else []
    sections = {text.split("\n", 1)[0]: "## " + text.strip() for text in old} | {name: "\n".join(lines)}
    order = [*ON_CPU, *ON_GPU]
    RESULTS.write_text("\n\n".join([OPENING.strip(), *(sections[n] for n in order if n in sections)]) + "\n")


def run_one(name: str, target: Path | None) -> int:
    """Runs a bench in this process; returns the exit status."""
    console = Console(width=None if sys.stdout.isatty() else 160)
    for variable, value in SETTINGS.items():
        os.environ.setdefault(variable, value)
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for chatty in ("bitsandbytes", "lightning.pytorch"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        rows = []
        for row in importlib.import_module(f"benches.{name.replace('-', '_')}").run():
            rows.append(row)
            console.print(f"{name}: {row.case}, {row.peer}: {row.ratio:.2f}", style="dim", highlight=False)
    except Unavailable as reason:
        console.print(f"{name}: {reason}")
        return 0
    except UnequalResultsError as error:
        console.print(f"[bold red]{name}: refused, {error}")
        return 1
    show(console, name, rows)
    keep(name, rows)
    if target:
        target.write_text(json.dumps({"bench": name, "versions": versions(), "rows": [row.as_json() for row in rows]}) + "\n")
    return int(not all(row.reached for row in rows))


def run_each(names: list[str], target: Path | None) -> int:
    """Runs every bench in a new process; one JSON line each."""
    status, lines = 0, []
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            part = Path(folder) / "report.json"
            status |= subprocess.run([sys.executable, __file__, name, "--json", str(part)], check=False).returncode
            lines += [part.read_text()] if part.is_file() else []
    if target:
        target.write_text("".join(lines))
    return int(status != 0)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join([*ON_CPU, *ON_GPU]))
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results here, one line for each bench")
    options: Any = parser.parse_args(arguments)
    unknown = sorted(set(options.names) - set(ON_CPU) - set(ON_GPU))
    if unknown:
        parser.error(f"no bench is called {', '.join(unknown)}; there are {', '.join([*ON_CPU, *ON_GPU])}")
    names = options.names or list(ON_CPU)
    return run_one(names[0], options.json) if len(names) == 1 else run_each(names, options.json)


if __name__ == "__main__":
    sys.exit(main())
