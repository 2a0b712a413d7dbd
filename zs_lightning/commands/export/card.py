"""The model card of an export: what it is, what made it, how good it is, how to use it."""

import os
import re
from pathlib import Path
from typing import Any

import yaml

from zs_lightning.commands.export.trained import POLICIES, Trained
from zs_lightning.errors import UserError
from zs_lightning.runs.checkpoints import identity
from zs_lightning.runs.folder import Run, read_config, read_head, read_test_results
from zs_lightning.runs.pages import markdown
from zs_lightning.runs.settings import settings
from zs_lightning.runs.tables import inline, markdown_cell, markdown_table, scored
from zs_lightning.text.protocol import STOP_TAGS

HEADERS = ["Data", "Questions", "EM, %", "Cover EM, %", "F1, %"]


def read_results(folder: Path, trained: Trained) -> dict[str, Any]:
    """The results.json of a test of this very checkpoint, and what it searched with as `setting`.
    Raises UserError if there are none, or they are not of a test, or of another checkpoint."""
    results = read_test_results(folder)
    config = read_config(folder)
    if "ckpt_path" not in config or not results.keys() & {"decodings", "simulator"}:
        what = "which holds results.json and config.yaml"
        raise UserError(f"--results: {folder} is not the run folder of a `test`, {what}")
    tested = config["ckpt_path"]
    # By the weights and not by their path: run folders are moved and go on.
    found = read_head(folder).get("checkpoint")
    if tested and not found:
        change = "run the test again with this version"
        raise UserError(f"--results: {folder} does not say which weights it tested; {change}")
    if not tested or found != identity(trained.checkpoint):
        weights = f"other weights, {tested}," if tested else "the untrained model"
        why = "a card shows only what its own model did"
        raise UserError(f"--results: {folder} tested {weights} and not {trained.checkpoint}; {why}")
    engine = str(results.get("engine", ""))
    try:
        run = Run(folder.name, "", folder, engine, int(results["seed"]), [], config)
        shown = {**results, "setting": settings([run])[0]}
        results_text(shown)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        said = f"are damaged ({type(error).__name__} {error}); run the test again"
        raise UserError(f"--results: those in {folder} {said}") from error
    return shown


def _scores(label: str, part: dict[str, Any], questions: str) -> list[str]:
    cells = [inline(scored(part[name])) for name in ("em", "cover_em", "f1")]
    return [label, questions, *cells]


def results_text(results: dict[str, Any]) -> str:
    """One test, as Markdown."""
    if "simulator" in results:
        rows = []
        for kind in ("useful", "noisy"):
            if recall := results["simulator"].get(f"{kind}_recall"):
                rows.append([kind, inline(scored(recall))])
        shares = markdown_table(["Ordered documents", "%"], rows)
        return f"Share of results that hold the asked fact, with its 95 % interval:\n\n{shares}"
    text = ""
    for decoding, metrics in results["decodings"].items():
        rows = [_scores("all", metrics, str(metrics["questions"]))]
        if "mean_of_sources" in metrics:
            rows.append(_scores("mean of data sets", metrics["mean_of_sources"], ""))
            for name, part in metrics["sources"].items():
                rows.append(_scores(name, part, str(part["questions"])))
        searches = f"{metrics['searches_per_question']:.2f} searches per question"
        head = f"{results['setting']}; {decoding}; {searches}; seed {results['seed']}"
        text += f"{markdown_cell(head)}:\n\n"
        text += markdown_table(HEADERS, rows) + "\n"
    return text


def configuration(trained: Trained) -> str:
    """The parts of the config that made the weights, as YAML."""
    options = dict(trained.config["model"]["init_args"])
    for name in ("search", "demonstrations"):
        if isinstance(options.get(name), dict):
            # Of an engine, and of what has one, only the class: its options may hold a key.
            options[name] = str(options[name].get("class_path", "")).rsplit(".", 1)[-1]
    shown = {
        "seed_everything": trained.config.get("seed_everything"),
        trained.kind: options,
        "data": trained.config["data"],
    }
    return yaml.safe_dump(_without_folders(shown), sort_keys=False, allow_unicode=True)


def _without_folders(value: Any) -> Any:
    """The options with the last part alone of what names a place on this machine."""
    if isinstance(value, dict):
        return {key: _without_folders(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return list(map(_without_folders, value))
    if isinstance(value, str) and (value[:1] in ("~", "/", ".") or os.path.exists(value)):
        return Path(value).name
    return value


def card(trained: Trained, name: str, belongs: str | None, results: list[Any], note: str) -> str:
    """The page, with the metadata that a model hub reads at its head. An adapter `belongs` to the
    model of this folder or hub name, a whole model to None; the `note` is what a reader must know
    first."""
    base = trained.spec.path
    named = base
    if base != "miniature":
        named = markdown_cell(str(_without_folders(base)))
    settings_shown = configuration(trained)
    prompt, stops = trained.prompts.simulator_useful.strip(), trained.prompts.simulator_stop
    if trained.kind in POLICIES:
        prompt, stops = trained.prompts.policy.strip(), STOP_TAGS
    # A longer fence than any in what it holds.
    ticks = "`" * max(3, 1 + max(map(len, re.findall("`+", settings_shown + prompt)), default=0))
    versions = trained.versions.items()
    # Markdown and not HTML: what comes from data is made harmless in the tables.
    values = dict(
        trained=trained,
        policies=POLICIES,
        kind=markdown_cell(trained.kind),
        prompt=prompt,
        name=name,
        note=note,
        belongs=belongs,
        base=base,
        # A hub shows what a model was made from, but only by a name that it knows.
        known=base != "miniature" and not Path(base).is_dir(),
        results=[results_text(part) for part in results],
        explained=any("decodings" in part for part in results),
        stops=map(markdown_cell, stops),
        configuration=settings_shown,
        ticks=ticks,
        named=named,
        versions=[markdown_cell(f"{k} {v}") for k, v in versions if k not in ("command", "checkpoint")],
    )
    return markdown(Path(__file__).with_name("card.md"), values)
