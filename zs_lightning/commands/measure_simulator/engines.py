"""Simulated engines as configurations, run folders and options name them, and the records to
measure them on."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from zs_lightning.commands.served import PAID
from zs_lightning.configuration.arguments import instantiate
from zs_lightning.configuration.paths import read_module
from zs_lightning.data.columns import spelling
from zs_lightning.data.files import FileSource
from zs_lightning.data.sources import QASource
from zs_lightning.errors import UserError
from zs_lightning.models.checks import check_length, check_models, longest
from zs_lightning.modules import SimulatorSFT
from zs_lightning.modules.trainable import TrainableModule
from zs_lightning.runs.folder import BEST, CONFIG, MODEL, newest, part_of
from zs_lightning.search import SearchEngine, ServedSimulatorSearch, SimulatorSearch
from zs_lightning.search.simulator import POLICY
from zs_lightning.text.prompts import EMPTY, USEFUL, Prompts, get_prompts
from zs_lightning.types import SearchRecord

Simulator = SimulatorSearch | ServedSimulatorSearch
SPARE = 8
EVERY = "all"
"""Stands for all kinds of noise that a simulator's prompts know."""


def read_place(place: Path) -> dict[str, Any]:
    """What a configuration file, or that of a run folder, says. Raises UserError if it is none."""
    expected = "expected `model:` with class_path and init_args, of SimulatorSFT or PolicyRL"
    file = run_of(place) / CONFIG if place.is_dir() else place
    return read_module(file, f"{place} describes no simulator; {expected}")


def run_of(place: Path) -> Path:
    """The run folder of a run's model; any other place is itself."""
    return place.parent if place.name in (MODEL, BEST) and (place.parent / CONFIG).is_file() else place


def is_tuned(config: Mapping[str, Any]) -> bool:
    """Whether a configuration fine-tunes a simulator."""
    return str(config["model"].get("class_path")).rpartition(".")[2] == SimulatorSFT.__name__


def configured(place: Path, config: Mapping[str, Any]) -> Simulator:
    """The simulator of a configuration: a policy's search engine, or what SimulatorSFT trained; of
    a file of SimulatorSFT its untrained base."""
    model = config["model"]
    options = dict(model.get("init_args") or {})
    if is_tuned(config):
        return _of_training(place, model, options)
    search = options.get("search")
    if search is None:
        raise UserError(f"{place} names no search engine; expected model.init_args.search")
    engine = instantiate(SearchEngine, "search", search)
    if engine.simulator is not None and engine.simulator.shared:
        # Alone it needs the weights that it would share.
        spec = {**(options.get("model") or {}), "adapter": engine.simulator.spec.adapter}
        inner = {**search["init_args"], "model": spec}
        engine = instantiate(SearchEngine, "search", {**search, "init_args": inner})
    return checked(engine)


def _of_training(place: Path, model: Mapping[str, Any], options: dict[str, Any]) -> Simulator:
    if place.is_dir():
        folder = place / MODEL if run_of(place) == place else place
        if not folder.is_dir():
            said = "expected the run folder of a `fit` that ended"
            if newest(place):
                said = f"`export --ckpt {place} --out {folder}` makes it of the checkpoint of a `fit` that was stopped"
            raise UserError(f"{place} holds no trained simulator ({MODEL} is missing); {said}")
        options["model"] = {**(options.get("model") or {}), "adapter": str(folder)}
    engine: SimulatorSearch = instantiate(TrainableModule, "model", {**model, "init_args": options}).simulator
    engine.max_length = min(engine.max_length, longest(engine.spec.config) or engine.max_length)
    return checked(engine)


def checked(engine: SearchEngine) -> Simulator:
    """The engine, if it is a simulated one that can be asked by itself."""
    if not isinstance(engine, Simulator):
        expected = "expected SimulatorSearch or ServedSimulatorSearch"
        raise UserError(f"measure-simulator: {engine.name} simulates no search engine; {expected}")
    if isinstance(engine, SimulatorSearch):
        if engine.spec.path == POLICY:
            raise UserError(f"search.model.path: {POLICY} has no weights of its own; name the configuration of the policy")
        check_models({"search.model": engine.spec})
        check_length(engine.spec, engine.max_length, "search.max_length")
    return engine


def kinds_of(engine: Simulator, asked: Sequence[str], taught: Sequence[str]) -> list[str]:
    """The kinds of noise to measure: those asked for, or those that it was taught and knows, or
    those that the engine draws."""
    prompts = engine.prompts if isinstance(engine.prompts, Prompts) else get_prompts(engine.prompts)
    known = [*prompts.noises, EMPTY]
    if list(asked) == [EVERY]:
        return known
    for kind in asked:
        if kind not in known:
            expected = f"expected {EVERY} or {', '.join(known)}"
            raise UserError(f"--kinds: the prompts of {engine.name} know no kind {kind}; {expected}")
    drawn = [kind for kind, weight in engine.orders.weights.items() if weight]
    return list(asked) or [kind for kind in known if kind in taught] or drawn


def keep_paid(engine: Simulator, out: Path | None) -> None:
    """Keeps what a server wrote in the folder of the report, unless it is kept already: what is
    paid for is not asked for again when a measurement is repeated."""
    if out is not None and isinstance(engine, ServedSimulatorSearch) and engine.http.cache is None:
        engine.http = replace(engine.http, cache=str(out / PAID))


def source_of(file: Path | None, config: Mapping[str, Any] | None) -> QASource:
    """The records of the file, or else the source of the configuration."""
    chosen = part_of(dict(config or {}), "data").get("source") or "MiniatureSource"
    return FileSource(str(file)) if file else instantiate(QASource, "source", chosen)


def read_records(source: QASource, split: str, rows: int) -> tuple[list[SearchRecord], list[str]]:
    """Up to so many records of different queries whose evidence is known; the kinds of noise of all
    that were looked at. Raises UserError if there is none."""
    try:
        # More than are asked for: some have no evidence, or the same query.
        found = source.search_records(split, SPARE * rows)
    except UserError as error:
        raise UserError(f"{error}; --records FILE names others") from error
    kept: dict[tuple[str, str], SearchRecord] = {}
    for record in found:
        if record.evidence:
            kept.setdefault((record.example.key, record.query), record)
    if not kept:
        none = f"of {len(found)} records none has evidence"
        raise UserError(f"measure-simulator: {none}; expected useful ones whose documents hold a golden answer")
    return list(kept.values())[:rows], sorted({record.label for record in found} - {USEFUL})


def said_of_all(source: FileSource, records: Sequence[SearchRecord], trained: Mapping[str, Mapping[str, Any]]) -> str:
    """What there is to say of records that no split holds back from training: how many of their
    questions each run trained on, as far as its configuration tells."""
    said = f"Queries are of all rows of {source.path}, whatever was trained on"
    asked = {spelling(record.example.question) for record in records}
    for name, config in trained.items():
        own = source_of(None, config)
        if isinstance(own, FileSource):
            try:
                known = {spelling(row.example.question) for row in own.search_records("train", sys.maxsize)}
            except UserError:  # Its file may be gone.
                continue
            said += f"; {len(asked & known)} of {len(asked)} questions are in the training split of {name}"
    return f"{said}."
