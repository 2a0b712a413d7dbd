"""The engines of a measurement, one after another, on the same records."""

from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from zs_lightning.commands.measure_simulator import engines
from zs_lightning.commands.measure_simulator.report import Example, Measured, Report
from zs_lightning.commands.measure_simulator.trial import Found, Results, Study, Trial, every_result, form
from zs_lightning.configuration.arguments import instantiate, search_options
from zs_lightning.data.files import FileSource
from zs_lightning.errors import RunError, UserError
from zs_lightning.miniature.checks import truth_of
from zs_lightning.runs.intervals import score_interval
from zs_lightning.search import SearchEngine, ServedSimulatorSearch
from zs_lightning.search.corpus import LocalSearch
from zs_lightning.search.dense import Encoder
from zs_lightning.search.guard import content
from zs_lightning.search.meter import recalled, unrelated_queries
from zs_lightning.streams import derive_seed
from zs_lightning.text.prompts import USEFUL
from zs_lightning.text.shown import visible
from zs_lightning.types import Document, SearchRecord, SearchRequest

EXAMPLES = 4
PASSAGES = 5
"""Passages that are looked at for a sentence."""


def measurement(
    options: Namespace, places: Mapping[str, Path], search: Sequence[str], real: Sequence[str], console: Console
) -> Iterator[tuple[Report, list[Example]]]:
    """Measures all simulators; yields what is known after each of them. What can be refused is
    refused before a model is loaded."""
    configs = {name: engines.read_place(place) for name, place in places.items()}
    simulators = {name: engines.configured(places[name], config) for name, config in configs.items()}
    if search:
        simulators["search"] = engines.checked(engine_of(search, "search"))
    real_engine = engine_of(real, "real") if real else None
    asked = [kind.strip() for kind in options.kinds.split(",") if kind.strip()]
    records, taught, about = records_of(options, places, configs, console)
    kinds: dict[str, list[str]] = {}
    for name, engine in simulators.items():
        is_tuned = name in configs and engines.is_tuned(configs[name])
        kinds[name] = engines.kinds_of(engine, asked, taught if is_tuned else [])
    measured: list[Measured] = []
    results: dict[str, dict[str, Results]] = {}
    with console.status("") as status:
        status.update("the real engine")
        study = studied(records, options.seed, real_engine, options.embedder)
        real_measured = of_real(study, real_engine)
        for name in list(simulators):
            # Taken out, since the next one may need its memory.
            engine = simulators.pop(name)

            def say(what: str, name: str = name) -> None:
                status.update(f"{name}: {what}")

            say("loads")
            engines.keep_paid(engine, options.out)
            trial = Trial(engine, study, say)
            try:
                engine.setup()
                results[name] = trial.run(kinds[name])
            finally:
                engine.close()
            place = str(places.get(name, "--search"))
            measured.append(Measured(name, engine.name, place, trial.measures))
            if trial.kept and isinstance(engine, ServedSimulatorSearch):
                said = f"{name}: {trial.kept} of {len(records)} results were there before, in {engine.http.cache}"
                console.print(Text(visible(f"{said}; remove it to ask anew, as of another model.")), soft_wrap=True)
            yield Report([*measured, real_measured], about), examples(records, results, study.real)


def records_of(
    options: Namespace, places: Mapping[str, Path], configs: Mapping[str, dict[str, Any]], console: Console
) -> tuple[list[SearchRecord], list[str], dict[str, Any]]:
    """The records to ask for, the kinds of noise that they teach, and what results.json says of
    them."""
    first = next(iter(configs.values()), None)
    if not options.records and first is None:
        raise UserError("measure-simulator: --search says nothing of queries to ask; give --records FILE")
    source = engines.source_of(options.records, first)
    records, taught = engines.read_records(source, options.split, options.rows)
    about = {"rows": len(records), "split": options.split, "seed": options.seed}
    if isinstance(source, FileSource) and source.is_whole():
        about["split"] = None
        trained = {name: one for name, one in configs.items() if places[name].is_dir() and engines.is_tuned(one)}
        console.print(Text(visible(engines.said_of_all(source, records, trained))), soft_wrap=True)
    return records, taught, about


def engine_of(options: Sequence[str], key: str) -> Any:
    return instantiate(SearchEngine, key, search_options(options, [], key))


def studied(records: Sequence[SearchRecord], seed: int, real: SearchEngine | None, embedder: str | None) -> Study:
    """What all simulators are asked and held against."""
    truth = truth_of([record.example.source for record in records])
    found = real_documents(records, seed, real)
    holds = truth.holds if truth else corpus_holds(real) if isinstance(real, LocalSearch) else None
    near = cosines(embedder) if embedder else None
    return Study(records, unrelated_queries(records, seed), seed, found, truth, holds, near)


def real_documents(records: Sequence[SearchRecord], seed: int, engine: SearchEngine | None) -> Found:
    """What the real engine finds for each record's query; without one, what useful records hold."""
    if engine is None:
        return {n: record.documents for n, record in enumerate(records) if record.label == USEFUL}
    requests = []
    for n, record in enumerate(records):
        drawn = derive_seed(seed, str(n))
        requests.append(SearchRequest(key=str(n), query=record.query, example=record.example, turn=0, seed=drawn))
    results = every_result(engine, requests)
    engine.close()
    found = {int(result.key): result.documents for result in results if result.failure is None}
    if not found:
        raise RunError(f"--real: every search failed, the first one with: {results[0].failure}")
    return found


def corpus_holds(engine: LocalSearch) -> Callable[[str], bool]:
    """Whether one of the passages that are found for a sentence has all of its words of content."""

    @cache
    def holds(sentence: str) -> bool:
        words = content(sentence)
        hits = engine.rank([sentence], PASSAGES)[0]
        return any(words <= content(hit.passage.contents) for hit in hits)

    return holds


def cosines(folder: str) -> Callable[[Sequence[str], Sequence[str]], list[float]]:
    """The cosines of pairs of texts, by an encoder."""
    encoder = Encoder(folder, key="--embedder")

    def near(ones: Sequence[str], others: Sequence[str]) -> list[float]:
        pairs = encoder.encode("passage", ones) * encoder.encode("passage", others)
        found: list[float] = pairs.sum(1).tolist()
        return found

    return near


def of_real(study: Study, engine: SearchEngine | None) -> Measured:
    measures = form(study.real, study)
    if study.real:
        recall = [recalled(study.records[number], found) for number, found in study.real.items()]
        measures = {"recall/useful": score_interval(recall), **measures}
    name = engine.name if engine else "records"
    return Measured(name, name, "--real" if engine else "", measures, is_real=True)


def examples(records: Sequence[SearchRecord], results: Mapping[str, Mapping[str, Results]], real: Found) -> list[Example]:
    """The first few queries with what each engine wrote."""
    found: list[Example] = []
    for number, record in enumerate(records[:EXAMPLES]):
        written: dict[str, dict[str, Sequence[Document]]] = {}
        for name, labels in results.items():
            written[name] = {label: by[number].documents for label, by in labels.items() if number in by}
        found.append((record, written | ({"real": {"": real[number]}} if number in real else {})))
    return found
