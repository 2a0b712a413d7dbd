"""What a CUDA card does: its tests, generation and training against the arithmetic floor, and short steps of the presets.

Called by gpu.sh. Every part is a process of its own with a time limit; results are written after each of them, as
gpu_results.json and gpu_results.md, so that a run that is stopped leaves what it measured. Nothing is downloaded: models
have random weights. --dry goes through the same code on a CPU, with tiny stand-ins, and keeps no figure.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from bench import versions
from benches import gpu_presets

ROOT = Path(__file__).parents[1]
LIMITS = {"card": 60, "tests": 150, "gpu-step": 120, "stand-in": 120, "preset": 120}
"""Most seconds of each process; none is begun with less than LEAST left of all."""
LEAST = 30
SHOWN = 6000
"""Characters at the end of what a failed process printed that are shown."""
NO_TIME = "no time left (presets named on the command line run alone)"
DRY = "DRY RUN on a CPU with tiny stand-ins: nothing in it was measured."


class Missing(Exception):
    """A part gave no result; the message says why."""


def process(command: list[str], limit: float) -> str:
    """Runs a command in the tree's root; returns what it printed.

    Raises:
        Missing: it failed or took longer than `limit` seconds.
    """
    paths = os.pathsep.join([str(ROOT), str(ROOT / "scripts"), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, timeout=limit, check=False, text=True, errors="replace", **streams
        )
    except subprocess.TimeoutExpired as error:
        print((error.stdout or b"").decode(errors="replace")[-SHOWN:], file=sys.stderr)
        raise Missing(f"stopped after its limit of {limit:.0f} s") from error
    if done.returncode:
        print(done.stdout[-SHOWN:], file=sys.stderr)
        last = [line for line in done.stdout.splitlines() if line.strip()][-1:]
        raise Missing(f"failed with {done.returncode}: {' '.join(last)[:300]}")
    return done.stdout


def child(work: str, limit: float, *arguments: object) -> Any:
    """The result of a function of CHILDREN in a process of its own, which gives the card back when it ends."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        process([sys.executable, str(Path(__file__)), "child", work, str(result), json.dumps(arguments)], limit)
        return json.loads(result.read_text())


# ---------------------------------------------------------------------- in a process of its own


def card_here() -> dict[str, Any]:
    import torch

    from zs_lightning.commands.estimate.command import card_here

    gigabytes, name = card_here()
    return {"name": name, "gigabytes": gigabytes, "count": torch.cuda.device_count(), "cuda": torch.version.cuda}


def floors(dry: bool) -> list[dict[str, Any]]:
    from benches import gpu_step

    return [row.as_json() for row in gpu_step.run(gpu_step.DRY if dry else gpu_step.CARD)]


CHILDREN: dict[str, Callable[..., Any]] = {
    "card": card_here,
    "gpu-step": floors,
    "stand-in": gpu_presets.make_stand_in,
}


# ---------------------------------------------------------------------- the parts


def run_tests(limit: float) -> dict[str, Any]:
    """Counts of tests/generation/test_generator_gpu.py, and the first line of each failure."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "report.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            f"--junit-xml={file}",
            "tests/generation/test_generator_gpu.py",
        ]
        try:
            process(command, limit)
        except Missing:
            if not file.is_file():
                raise
        suite = ElementTree.parse(file).getroot().find("testsuite")
    assert suite is not None
    counts = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    failed = [
        (case.get("name"), fault.get("message", "")) for case in suite for fault in case if fault.tag in ("failure", "error")
    ]
    return {**counts, "failed": [f"{name}: {message.splitlines()[0] if message else ''}"[:300] for name, message in failed]}


class Presets:
    """Short steps of presets with stand-ins that are made when they are first needed."""

    def __init__(self, folder: Path, card: dict[str, Any], dry: bool) -> None:
        self.folder, self.card, self.dry = folder, card, dry
        gpu_presets.make_rows(folder / "rows.jsonl")

    def measure(self, preset: Path, left: Callable[[], float]) -> dict[str, Any]:
        """Measured and estimated figures of a preset, or why there are none as `skipped`."""
        found: dict[str, Any] = {"preset": f"{preset.parent.name}/{preset.stem}"}
        try:
            enough(left)
            arguments = gpu_presets.options(preset, self.dry)
            found["estimated"] = gpu_presets.estimated(arguments, self.card["gigabytes"])
            if not found["estimated"]["fits"]:
                raise Missing(f"does not fit {self.card['gigabytes']} GB, says estimate")
            if (cards := len(found["estimated"]["peak_bytes"])) > self.card["count"]:
                raise Missing(f"needs {cards} cards")
            for name in gpu_presets.models(preset):
                place = gpu_presets.stand_in(name, self.folder)
                if not (place / "adapter").is_dir():
                    enough(left)
                    child("stand-in", min(LIMITS["stand-in"], left()), name, str(place), self.dry)
            enough(left)
            arguments += gpu_presets.stand_ins(preset, self.folder)
            return found | {"measured": self._fit(found["preset"].replace("/", "-"), arguments, left)}
        except Missing as reason:
            return found | {"skipped": str(reason)}

    def _fit(self, name: str, arguments: list[str], left: Callable[[], float]) -> dict[str, Any]:
        run, said, output = self.folder / f"run-{name}", "", ""
        command = [sys.executable, "-m", "zs_lightning", "fit", *arguments, f"--run.folder={run}", "--run.save_every=1000"]
        try:
            output = process([*command, "--trainer.callbacks+=benches.gpu_presets.Watch"], min(LIMITS["preset"], left()))
        except Missing as reason:
            said = str(reason)
        found = gpu_presets.measured(run)
        if found is None:
            raise Missing(said or "it wrote no steps")
        notices = [line.strip() for line in output.splitlines() if "without CUDA graphs" in line or "memory holds" in line]
        return found | ({"ended": said} if said else {}) | ({"notices": notices} if notices else {})


def choose(given: list[Path], dry: bool) -> list[Path]:
    """The presets to run: small models first, one model before two, large cards first; dry, the first of each stage."""

    def order(path: Path) -> tuple[int, int, int, str]:
        billions, gigabytes = re.findall(r"(?:(\d+)b|small)/.*?(\d+)gb", f"{path.parent.name}/{path.stem}")[0]
        return int(billions or 0), len(gpu_presets.models(path)), -int(gigabytes), str(path)

    found = given or sorted((ROOT / "configs").glob("*/*gb.yaml"), key=order)
    if not dry or given:
        return found
    return [next(path for path in found if path.stem.startswith(kind)) for kind in ("policy", "simulator")]


# ---------------------------------------------------------------------- what is left of it


def without_figures(found: Any) -> Any:
    """A result of a dry run: every number is replaced, so that none can be taken for a measurement."""
    if isinstance(found, dict):
        return {key: without_figures(value) for key, value in found.items()}
    if isinstance(found, list):
        return [without_figures(value) for value in found]
    return "dry" if isinstance(found, int | float) and not isinstance(found, bool) else found


def table(report: dict[str, Any]) -> str:
    """The results as Markdown."""
    card, packages = report["card"], ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    lines = [
        f"# {DRY if report['dry'] else card['name']}",
        "",
        f"{report['date']}, {report['seconds']} s, {packages}",
    ]
    tests, floor = report["tests"], report["gpu-step"]
    said = tests.get("skipped_part") or ", ".join(f"{tests[key]} {key}" for key in ("tests", "failures", "errors", "skipped"))
    lines += ["", f"tests/generation/test_generator_gpu.py: {said}", *(f"- {line}" for line in tests.get("failed", []))]
    lines += ["", "| work | seconds | floor of this card | floor / seconds |", "|---|---|---|---|"]
    if isinstance(floor, dict):
        lines += [f"| skipped: {floor['skipped_part']} | | | |"]
    else:
        lines += [f"| {row['case']} | {row['ours_s']} | {row['peer_s']} | {row['ratio']} |" for row in floor]
    lines += ["", f"Presets: {report['about']}", ""]
    lines += ["| preset | peak GB measured / estimated | s a step | of it |", "|---|---|---|---|"]
    lines += [f"| {row['preset']} | {' | '.join(cells(row))} |" for row in report["presets"]]
    return "\n".join(lines) + "\n"


def gigabytes(counts: Any) -> str:
    """Of one card or several; "dry" where a figure is not to be taken for one."""
    return " + ".join(str(count) if isinstance(count, str) else f"{count / 1e9:.1f}" for count in counts)


def cells(row: dict[str, Any]) -> list[str]:
    if "skipped" in row:
        return ["", "", f"skipped: {row['skipped']}"]
    measured = row["measured"]
    peaks = f"{gigabytes(measured['peak_bytes'])} / {gigabytes(row['estimated']['peak_bytes'])}"
    said = [f"{measured['steps']} steps", *filter(None, [measured.get("ended")]), *measured.get("notices", [])]
    return [peaks, str(measured["step_seconds"]), "; ".join(said)]


def fill(preset: Path, row: dict[str, Any], card: str) -> None:
    """Puts the measured figures into the preset's head, in the place of earlier ones of this card."""
    peaks, seconds, _ = cells(row)
    start = f"# Measured on {card}"
    line = f"{start} in short steps with random weights: {peaks} GB (measured / estimated), {seconds} s.\n"
    lines = [old for old in preset.read_text().splitlines(keepends=True) if not old.startswith(f"{start} ")]
    at = next(i for i, old in enumerate(lines) if old.startswith("# Estimated, not measured")) + 1
    preset.write_text("".join([*lines[:at], line, *lines[at:]]))


def enough(left: Callable[[], float]) -> None:
    """Raises Missing if too few seconds are left to begin something."""
    if left() < LEAST:
        raise Missing(NO_TIME)


def part(work: Callable[[], Any], left: Callable[[], float]) -> Any:
    """What a part gives, or why it gave nothing as `skipped_part`."""
    try:
        enough(left)
        return work()
    except Missing as reason:
        return {"skipped_part": str(reason)}


def run(options: argparse.Namespace) -> int:
    """Runs all parts; the exit status is 1 if a test failed or a part gave nothing."""
    end = options.began + options.minutes * 60
    dry, out = options.dry, options.out or Path("runs/gpu-dry" if options.dry else "runs/gpu")

    def left() -> float:
        return end - time.time()

    card = {"name": "no card", "gigabytes": 80, "count": 1, "cuda": None} if dry else child("card", LIMITS["card"])
    out.mkdir(parents=True, exist_ok=True)
    about = f"steps of one wave, turns and results of {gpu_presets.TURN} and {gpu_presets.WRITTEN} tokens, random weights"
    report = {"schema": 1, "dry": dry, "card": card, "date": str(date.today()), "versions": versions(), "about": about}
    pending = {"skipped_part": "not run yet"}
    report |= {"seconds": 0, "tests": pending, "gpu-step": pending, "presets": []}

    def keep(key: str, found: Any) -> None:
        report[key] = without_figures(found) if dry else found
        report["seconds"] = "dry" if dry else round(time.time() - options.began)
        (out / "gpu_results.json").write_text(json.dumps(report, indent=2) + "\n")
        (out / "gpu_results.md").write_text(table(report))
        print(f"{key}: done, {max(0, left()):.0f} s left", flush=True)

    keep("tests", part(lambda: run_tests(min(LIMITS["tests"], left())), left))
    keep("gpu-step", part(lambda: child("gpu-step", min(LIMITS["gpu-step"], left()), dry), left))
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=out) as folder:
        presets = Presets(Path(folder).resolve(), card, dry)
        for path in choose(options.presets, dry):
            rows.append(presets.measure(path, left))
            keep("presets", rows)
            if options.fill and "measured" in rows[-1]:
                fill(path, rows[-1], card["name"])
    print(f"\n{table(report)}\nWritten: {out / 'gpu_results.json'} and gpu_results.md")
    tests, floor = report["tests"], report["gpu-step"]
    broken = [row for row in rows if "skipped" in row and (dry or row["skipped"].startswith("failed"))]
    return int(bool("skipped_part" in tests or tests["failed"] or isinstance(floor, dict) or broken))


def main(arguments: list[str] | None = None) -> int:
    words = sys.argv[1:] if arguments is None else arguments
    if words[:1] == ["child"]:
        _, work, result, given = words
        Path(result).write_text(json.dumps(CHILDREN[work](*json.loads(given))))
        return 0
    parser = argparse.ArgumentParser(prog="bash scripts/gpu.sh", description=__doc__)
    parser.add_argument(
        "presets", nargs="*", type=Path, metavar="PRESET", help="files of configs/; all that fit if none is given"
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="of the results; runs/gpu if not given")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything, what gpu.sh installs included")
    parser.add_argument("--dry", action="store_true", help="the same code on a CPU, without figures")
    parser.add_argument("--fill", action="store_true", help="also write the figures into the heads of the presets")
    parser.add_argument("--began", type=float, default=time.time(), help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    if options.dry and options.fill:
        parser.error("--fill writes what was measured, and --dry measures nothing; leave one of them out")
    options.presets = [path.resolve() for path in options.presets]
    try:
        return run(options)
    except Missing as reason:
        parser.error(f"there is no CUDA card that torch can use ({reason}); --dry goes through the same code without one")


if __name__ == "__main__":
    sys.exit(main())
