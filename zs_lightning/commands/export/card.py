"""The model card of an export: what it is, what made it, how good it is, how to use it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from zs_lightning.commands.export.trained import Trained
from zs_lightning.errors import UserError
from zs_lightning.models.specs import resolve_path
from zs_lightning.runs.folder import Run, identity, read_config, read_test_results
from zs_lightning.runs.settings import settings
from zs_lightning.runs.tables import inline, markdown_table, scored
from zs_lightning.text.protocol import STOP_TAGS

WHAT = {
    "PolicyRL": "A policy that answers questions in several turns with a search engine, trained by reinforcement learning",
    "SimulatorSFT": "A simulator that plays a search engine, writing useful or noisy documents for a query, fine-tuned",
}
LEGEND = (
    "\n\nIn parentheses: 95 % intervals. EM is exact match; cover EM, which the method's published code calls EM, "
    "counts an answer that\ncontains a golden one. Both normalise as SQuAD does; F1 also drops "
    "typographic punctuation and counts scripts\nwithout blanks by character."
)
CARRIED = (
    " It lies in `base`: wherever this folder is carried, the lines below work. Only what looks the base up\nby itself, such "
    "as AutoPeftModelForCausalLM, then needs `base_model_name_or_path` in adapter_config.json set to where `base` is."
)
HEADERS = ["Data", "Questions", "EM, %", "Cover EM, %", "F1, %"]


def base_licence(path: str) -> tuple[str, str]:
    """The licence that the base model's folder names, as an identifier (or empty) and as a sentence."""
    if path == "miniature":
        return "apache-2.0", "It ships with zs_lightning under Apache-2.0."
    folder = Path(resolve_path(path))
    readme = folder / "README.md"
    parts = readme.read_text("utf-8", errors="replace").split("---\n", 2) if readme.is_file() else []
    said = re.search(r"^license: *(\S+) *$", parts[1], re.MULTILINE) if len(parts) == 3 and not parts[0].strip() else None
    if said:
        return said[1], f"The base model's licence is {said[1]}."
    if found := sorted(file.name for file in folder.glob("LICEN[CS]E*")):
        return "", f"The base model's licence is in its folder ({found[0]})."
    return "", "The base model's folder names no licence; look at where it comes from."


def read_results(folder: Path, trained: Trained) -> dict[str, Any]:
    """The results.json of a test of this very checkpoint, with what it searched with as `setting`.

    Raises:
        UserError: there are none, or they are not of a test, or of another checkpoint.
    """
    results, config = read_test_results(folder), read_config(folder)
    if "ckpt_path" not in config or not results.keys() & {"decodings", "simulator"}:
        raise UserError(f"--results: {folder} is not the run folder of a `test`, which holds results.json and config.yaml")
    tested = config["ckpt_path"]
    found = re.search(r"^# checkpoint: (\w+)$", (folder / "config.yaml").read_text("utf-8"), re.MULTILINE)
    if tested and not found:
        raise UserError(f"--results: {folder} does not say which weights it tested; run the test again with this version")
    if not tested or not found or found[1] != identity(trained.checkpoint):
        weights = f"other weights, {tested}," if tested else "the untrained model"
        raise UserError(
            f"--results: {folder} tested {weights} and not {trained.checkpoint}; a card shows only what its own model did"
        )
    run = Run(folder.name, "", folder, str(results.get("engine", "")), int(results["seed"]), [], config)
    return {**results, "setting": settings([run])[0]}


def _scores(label: str, part: dict[str, Any], questions: str) -> list[str]:
    columns = [part[name] for name in ("em", "cover_em", "f1")]
    return [label, questions, *(inline(scored(i)) for i in columns)]


def results_text(results: dict[str, Any]) -> str:
    """One test, as Markdown."""
    if "simulator" in results:
        names = {"useful_recall": "useful", "noisy_recall": "noisy"}
        parts = [(kind, results["simulator"][name]) for name, kind in names.items() if name in results["simulator"]]
        rows = [[kind, inline(scored(i))] for kind, i in parts]
        shares = markdown_table(["Ordered documents", "%"], rows)
        return f"Share of results that hold the asked fact, with its 95 % interval:\n\n{shares}"
    text = ""
    for decoding, metrics in results["decodings"].items():
        rows = [_scores("all", metrics, str(metrics["questions"]))]
        if "mean_of_sources" in metrics:
            rows.append(_scores("mean of data sets", metrics["mean_of_sources"], ""))
            rows += [_scores(name, part, str(part["questions"])) for name, part in metrics["sources"].items()]
        searches = f"{metrics['searches_per_question']:.2f} searches per question"
        text += f"{results['setting']}; {decoding}; {searches}; seed {results['seed']}:\n\n"
        text += markdown_table(HEADERS, rows) + "\n"
    return text


def configuration(trained: Trained) -> str:
    """The parts of the config that made the weights, as YAML. Of an engine only the class: its options may hold a key."""
    arguments = dict(trained.config["model"]["init_args"])
    if isinstance(arguments.get("search"), dict):
        arguments["search"] = str(arguments["search"].get("class_path", "")).rsplit(".", 1)[-1]
    shown = {"seed_everything": trained.config.get("seed_everything"), trained.kind: arguments, "data": trained.config["data"]}
    return yaml.safe_dump(shown, sort_keys=False, allow_unicode=True)


def equal_to(trained: Trained) -> str:
    """Of weights that are what they were before."""
    return f"its weights are equal to {'the adapter it began with' if trained.spec.adapter else 'its base'}: nothing was learnt"


def card(trained: Trained, name: str, adapter: bool, uses: dict[str, str], results: list[dict[str, Any]], is_base: bool) -> str:
    """The page, with the metadata that a model hub reads at its head.

    Args:
        is_base: nothing was learnt.
        uses: lines to use it with, by program, for the folder that holds the exported one.
    """
    base = trained.spec.path
    identifier, licence = base_licence(base)
    on_hub = base != "miniature" and not Path(base).is_dir()
    head = {
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["zerosearch", "question-answering", "search"],
        **({"base_model": base} if on_hub else {}),
        **({"license": identifier} if identifier else {}),
    }
    form = "a PEFT adapter" if adapter else "all weights" + (", the adapter merged in" if trained.lora else "")
    metrics = "\n".join(results_text(part) for part in results).strip() or "Not measured yet."
    if any("decodings" in part for part in results):
        metrics += LEGEND
    nothing = f"\n\n**Note: {equal_to(trained)}.**" if is_base else ""
    template = trained.prompts.policy if trained.kind == "PolicyRL" else trained.prompts.simulator_useful
    ending = ", ".join(trained.prompts.simulator_stop) or "the end token"
    if trained.kind == "PolicyRL":
        ending = f"{', '.join(STOP_TAGS)}. After a search, append its documents as `observation` and `document` say, and go on"
    return f"""---
{yaml.safe_dump(head, sort_keys=False).strip()}
---

# {name}

{WHAT.get(trained.kind, trained.kind)} with zs_lightning after ZeroSearch (arXiv 2505.04588). The folder holds {form}.
Base model: {base}. {licence}{CARRIED if adapter and base == "miniature" else ""}{nothing}

## Results

{metrics}

## Use

The prompt, as prompts.json has it:

```
{template.strip()}
```

Stop at {ending}.

To be run in the folder that holds this one.

{"".join(f"{program}:{chr(10)}{chr(10)}```{chr(10)}{lines}{chr(10)}```{chr(10)}{chr(10)}" for program, lines in uses.items())}\
## Training

```yaml
{configuration(trained).strip()}
```

Versions: {", ".join(f"{key} {value}" for key, value in trained.versions.items() if key not in ("command", "checkpoint"))}.
"""
