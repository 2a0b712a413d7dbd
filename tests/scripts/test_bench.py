"""The benchmark program at its smallest: what it refuses, what its exit status says, what it keeps."""

import json
import multiprocessing
import os
import threading
from contextlib import nullcontext

import numpy as np
import pytest
import torch

import bench
from benches import fits, harness, rollout_policy, sim_batch, stop_tail, train_pass, watching, work


@pytest.fixture
def results(tmp_path, monkeypatch):
    """One round of a few short searches, and a results file of its own."""
    monkeypatch.setattr(harness, "REPEATS", 1)
    monkeypatch.setattr(bench, "RESULTS", tmp_path / "results.md")
    monkeypatch.setattr(sim_batch, "SEARCHES", 5)
    monkeypatch.setattr(sim_batch, "REQUIRED", {2: 0.0})
    return bench.RESULTS


def run(tmp_path, *names):
    target = tmp_path / "report.json"
    status = bench.main([*names, "--json", str(target)])
    return status, json.loads(target.read_text()) if target.is_file() else None


def test_what_is_measured_is_printed_kept_and_written(results, tmp_path, capsys):
    results.write_text("# old\n\n## stop-tail\n\nof yesterday\n\n## sim-batch\n\nto be replaced\n")
    status, report = run(tmp_path, "sim-batch")
    assert status == 0
    assert report["bench"] == "sim-batch"
    assert report["versions"]["torch"] == torch.__version__
    [row] = report["rows"]
    assert row["ours_s"] > 0
    assert row["peer_s"] > 0
    assert abs(row["ratio"] - row["peer_s"] / row["ours_s"]) < 0.02 * row["ratio"]
    assert (row["case"], row["required"], row["equal"]) == ("5 searches", 0.0, "tokens identical")
    assert "2 at a time" in capsys.readouterr().out
    kept = results.read_text()
    assert kept.startswith(bench.OPENING)
    assert "of yesterday" in kept
    assert "to be replaced" not in kept
    assert kept.index("## stop-tail") < kept.index("## sim-batch") < kept.index("| 5 searches |")


def test_a_ratio_that_falls_short_is_the_exit_status(results, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sim_batch, "REQUIRED", {2: 1e6, 1: 0.0})
    status, report = run(tmp_path, "sim-batch")
    assert status == 1
    assert [row["required"] for row in report["rows"]] == [1e6, 0.0]
    assert capsys.readouterr().out.count("MISSED") == results.read_text().count("MISSED") == 1


@pytest.mark.parametrize("change", [lambda turn: turn[:-1], lambda turn: [turn[0] + 1, *turn[1:]]], ids=["shorter", "other"])
def test_times_of_other_work_are_refused(change, results, tmp_path, monkeypatch, capsys):
    def wrong(model, prompts, new, stops, slots):
        turns = work.generate(model, prompts, new, stops, slots)
        return [change(turn) for turn in turns] if slots == 2 else turns

    monkeypatch.setattr(sim_batch, "generate", wrong)
    assert run(tmp_path, "sim-batch") == (1, None)
    assert "refused" in capsys.readouterr().out
    assert not results.exists()


def test_few_near_ties_are_said_and_more_are_refused():
    ours = [list(range(100)), list(range(100))]
    theirs = [list(range(100)), [*range(98), 0, 0]]
    assert harness.same_tokens(ours, ours) == "tokens identical"
    assert harness.same_tokens(ours, theirs).startswith("99.00%")
    with pytest.raises(harness.UnequalResultsError, match=r"98\.50%"):
        harness.same_tokens(ours, [[7, *range(1, 100)], theirs[1]])


def test_sides_take_turns_and_the_median_counts(monkeypatch):
    order, clock = [], iter([0.0, 1.0, 10.0, 30.0, 0.0, 9.0, 0.0, 21.0, 0.0, 2.0, 0.0, 90.0])
    monkeypatch.setattr(harness.time, "process_time", lambda: next(clock))
    sides = {name: lambda name=name: order.append(name) for name in ("ours", "peer")}
    seconds, equal = harness.compare(sides, lambda one, other: "yes")
    assert order == ["ours", "peer"] * 3
    assert seconds == {"ours": 2.0, "peer": 21.0}
    assert equal == {"peer": "yes"}


def test_two_trainings_run_at_the_same_moment_and_exchange_their_cores(monkeypatch, tmp_path):
    """CPU seconds in the first row, those of the clock in the second: means of the rounds."""
    rounds = [[[1.0, 5.0], [2.0, 6.0]], [[4.0, 2.0], [5.0, 3.0]]]
    sides = {name: fits.Side([name], nullcontext()) for name in ("ours", "theirs")}
    both = multiprocessing.get_context("fork").Barrier(2, timeout=60)

    def trained(folder, side, names):
        both.wait()
        name, number = folder.name.split("-")
        (tmp_path / folder.name).write_text(str(os.sched_getaffinity(0)))
        fits.Clock.found = np.array(rounds[int(number)]) * (2 if name == "theirs" else 1)
        return {"weights": b"other" if side.options == ["wrong"] else b"same"}

    monkeypatch.setattr(fits, "ROUNDS", 2)
    monkeypatch.setattr(fits, "trained", trained)
    monkeypatch.setattr(
        fits.os, "sched_setaffinity", lambda _, cores: monkeypatch.setattr(fits.os, "sched_getaffinity", lambda _: cores)
    )
    monkeypatch.setattr(fits.os, "sched_getaffinity", lambda _: {3, 5, 8})
    rows = list(fits.compare(**sides, peer="p", required=0.9, names=("weights",), equal="e"))
    assert [(row.ours, row.theirs, row.required) for row in rows] == [(6.0, 12.0, 0.9), (8.0, 16.0, None)]
    assert rows[0].details == {"ratio of round 1": 2.0, "ratio of round 2": 2.0}
    had = {name: [(tmp_path / f"{name}-{number}").read_text() for number in (0, 1)] for name in sides}
    assert had == {"ours": ["{3}", "{5}"], "theirs": ["{5}", "{3}"]}
    with pytest.raises(harness.UnequalResultsError):
        list(fits.compare(sides["ours"], fits.Side(["wrong"], nullcontext()), "p", 0.9, ("weights",), "e"))


def test_a_training_that_dies_is_said(monkeypatch):
    monkeypatch.setattr(fits, "trained", lambda *_: os._exit(3))
    sides = {name: fits.Side([name], nullcontext()) for name in ("ours", "theirs")}
    with pytest.raises(RuntimeError, match="the training of ours ended with 3"):
        list(fits.compare(**sides, peer="p", required=0.9, names=("weights",), equal="e"))


def test_seconds_inside_of_what_watches_count_once_and_only_while_steps_run(monkeypatch):
    clock = iter(range(0, 1000, 10))
    inside = watching.Inside()
    inner = inside.timed(lambda: "deep")
    outer = inside.timed(inner)
    assert outer() == "deep"  # Before the second step.
    monkeypatch.setattr(fits.Clock, "runs", True)
    monkeypatch.setattr(watching.time, "thread_time", lambda: next(clock))
    assert outer() == "deep"
    assert inside.seconds == 10
    with pytest.raises(ZeroDivisionError):
        inside.timed(lambda: 1 / 0)()
    assert inside.seconds == 20
    other = threading.Thread(target=inner)
    other.start()
    other.join()
    assert inside.seconds == 20


def test_peers_of_rollouts_write_what_the_engine_writes(monkeypatch):
    monkeypatch.setattr(harness, "REPEATS", 1)
    monkeypatch.setattr(rollout_policy, "REQUIRED", {2: 0.0})
    rows = list(rollout_policy.run())
    assert [row.equal for row in rows] == ["tokens identical"] * 2
    assert [row.peer.split(", ")[1] for row in rows] == ["per turn", "kept K/V"]


def test_a_stop_ends_a_turn_where_it_was_planned():
    tokenizer = work.make_tokenizer()
    ids = [300, 400, 300, 400, 500, 300, 400]
    end = stop_tail.unique_end(tokenizer, ids)
    stop = work.StopTags(tokenizer, (end,))
    assert [stop.hit(ids[:n]) for n in range(1, 8)] == [False] * 6 + [True]


def test_gradients_are_compared(monkeypatch):
    monkeypatch.setattr(harness, "REPEATS", 1)
    for name, value in {"SHAPE": "tiny", "REQUIRED": {2: 0.0}, "MICRO": 1}.items():
        monkeypatch.setattr(train_pass, name, value)
    rows = list(train_pass.run())
    assert [row.unit for row in rows] == ["s", "mb"]
    assert all(row.equal.startswith("gradients within") and row.ours > 0 for row in rows)
    one = {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([2.0])}
    close, off = {**one, "a": torch.tensor([1.0, 1e-5])}, {**one, "a": torch.tensor([1.0, 1e-4])}
    assert train_pass.same_gradients(one, close) == "gradients within 5e-06"
    for wrong in (off, {"a": one["a"]}, {**one, "a": torch.tensor([1.0, torch.nan])}):
        with pytest.raises(harness.UnequalResultsError):
            train_pass.same_gradients(wrong, one)


def test_peak_memory_is_what_was_held_at_once():
    def work_on_it():
        for _ in range(3):
            torch.zeros(2**20) + 1  # Two of 4 MB at a time.

    assert 8 <= train_pass.peak_mb(work_on_it) < 9


def test_without_a_card_there_is_no_row(results, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run(tmp_path, "gpu-step") == (0, None)
    assert "nothing was measured" in capsys.readouterr().out
    assert not results.exists()


def test_unknown_names_are_answered_with_the_known_ones(capsys):
    with pytest.raises(SystemExit):
        bench.main(["rollouts"])
    assert "rollout-policy, rollout-search" in capsys.readouterr().err
