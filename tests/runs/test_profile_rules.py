"""Which key a profile says to change, and how it is shown, from numbers."""

from dataclasses import replace

import pytest

from zs_lightning.runs.profile import WIDTH, Measured, Setup, advice, lines

SETUP = Setup(slots=64, asked_slots=64, engine="simulator", search_slots=64, result_tokens=600)
COUNTS = {
    "rollouts": 64.0, "sampled": 6400.0, "rounds": 400.0, "searches": 80.0, "visits": 4.0, "repeated": 8.0,
    "written": 8000.0, "late": 0.5, "passes": 2.0, "read": 9000.0, "padded": 10_000.0, "trained": 6000.0,
}  # fmt: skip
REST = {"generate": 1.0, "search": 1.0, "score": 1.0, "reference": 1.0, "values": 1.0, "update": 1.0}
REST |= {"validation": 1.0, "saves": 1.0, "callbacks": 1.0, "other": 1.0}


def measured(row, counts=None, **setup):
    """A step of 100 seconds, 91 of them in one row."""
    callbacks = {"Board": 0.75, "RunFiles": 0.25}
    return Measured(4, REST | {row: 91.0}, callbacks, COUNTS | (counts or {}), replace(SETUP, **setup))


CARD = {"card": 0.4}
CASES = [
    ("generate", {}, {}, "400 passes draw 100 tokens a rollout; lower model.rollout.max_new_tokens or max_turns, which"),
    ("generate", {}, {"slots": 32}, "memory holds only 32 of 64 slots; lower model.rollout.max_length, or set"),
    ("generate", {"rollouts": 65.0}, {}, "65 rollouts share 64 slots; raise model.rollout.slots"),
    ("generate", {}, {"engine": "policy"}, "56% of its tokens are the simulator's; lower model.search.count or"),
    ("generate", {"written": 6400.0}, {"engine": "policy"}, "400 passes draw"),
    ("search", {}, {}, "a result has 100 tokens of the simulator; lower model.search.count, or take a smaller or"),
    ("search", {"visits": 1.0}, {}, "80 searches at a time share 64 slots; raise model.search.slots"),
    ("search", {"repeated": 24.0}, {"shares_results": False}, "24 of 80 searches ask what another rollout asked; set"),
    ("search", {"repeated": 23.0}, {"shares_results": False}, "a result has 100 tokens"),
    ("search", {"repeated": 24.0}, {}, "a result has 100 tokens"),
    ("search", {}, {"result_tokens": 110}, "results have 100 tokens of at most 110; lower model.search.max_new_tokens"),
    ("search", {}, {"result_tokens": 112}, "a result has 100 tokens"),
    (
        "search", {}, {"engine": "server", "search_slots": 63, "result_tokens": 0},
        "64 rollouts ask for 63 searches at a time; raise model.search.http.concurrency",
    ),
    (
        "search", {}, {"engine": "server", "result_tokens": 0},
        "rollouts wait for 80 searches; set model.search.http.cache, or take a faster server",
    ),
    ("search", {}, {"engine": "local", "result_tokens": 0}, "rollouts wait for 80 searches; take another model.search"),
    ("score", {}, {}, "1 rollouts a second are judged; make model.reward faster"),
    ("reference", {}, {}, "99 tokens/s read; model.loss.kl_coef: 0 leaves it out"),
    ("values", {}, {}, "99 tokens/s read; a model.estimator other than ppo has no critic"),
    ("update", {}, {}, "6,000 tokens are trained at 66 a second; lower model.group_size, or train less with model.lora"),
    ("update", {"rollouts": 0.0}, {}, "6,000 tokens are trained at 66 a second; lower data.batch_size, or"),
    ("update", {}, {"checkpointing": True}, "each pass computes its forward twice; set model.checkpointing: false"),
    ("update", {}, {"checkpointing": True, **CARD}, "each pass computes its forward twice, with 40% of the card's memory"),
    ("update", {}, {"checkpointing": True, "card": 0.8}, "6,000 tokens"),
    ("update", {"passes": 8.0}, CARD | {"updates": 2}, "4 passes leave 60% of the card's memory; raise model.micro_batch"),
    ("update", {"passes": 3.0}, CARD, "6,000 tokens"),
    ("update", {"passes": 8.0}, {"card": 0.8}, "6,000 tokens"),
    ("update", {"passes": 8.0}, {}, "6,000 tokens"),
    ("update", {"read": 7500.0}, {}, "25% of the micro-batches is padding; lower model.micro_batch_tokens"),
    ("update", {}, {"updates": 2}, "a step is learnt from 2 times; lower model.updates_per_rollout"),
    ("validation", {}, {}, "raise trainer.val_check_interval, or lower data.validation_rows"),
    ("saves", {}, {}, "91 s go to disk; raise run.save_every"),
    ("callbacks", {}, {}, "Board takes 0.75 s; leave it out of trainer.callbacks"),
    ("other", {}, {}, "rows, metrics, curves and other ranks take it; see data.source and trainer.logger"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "counts", "setup", "said"), CASES)
def test_the_largest_part_names_its_number_and_its_key(row, counts, setup, said):
    (sentence,) = advice(measured(row, counts, **setup))
    assert sentence.startswith(f"{row} is 91% of a step: {said}")


def test_a_lower_rank_is_no_advice_where_all_weights_are_trained():
    assert advice(measured("update", has_adapter=False))[0].endswith("lower model.group_size")


def test_run_files_are_not_left_out_but_write_less():
    found = replace(measured("callbacks"), callbacks={"Board": 0.25, "RunFiles": 0.75})
    assert advice(found)[0].endswith("RunFiles takes 0.75 s; lower run.keep_trajectories")


def test_last_rollouts_are_named_from_a_quarter_of_a_step_on():
    assert len(advice(measured("generate", {"late": 24.9}))) == 1
    *_, late = advice(measured("generate", {"late": 25.0}))
    said = "the last tenth of the rollouts is waited for in 25% of a step"
    assert late == f"{said}: lower model.rollout.max_new_tokens or max_turns"


def test_at_most_three_sentences_from_the_largest_down():
    seconds = {"generate": 1.0, "update": 4.0, "search": 3.0, "saves": 2.0}
    found = replace(measured("update"), seconds=seconds)
    assert [said.split(" is ")[0] for said in advice(found)] == ["update", "search", "saves"]
    found = replace(found, counts=COUNTS | {"late": 2.5})
    assert [said.split(" is ")[0] for said in advice(found)] == ["update", "search", "the last tenth of the rollouts"]
    found = replace(found, counts=COUNTS, seconds={"generate": 0.9, "update": 8.1, "search": 1.0})
    assert [said.split(" is ")[0] for said in advice(found)] == ["update", "search"]


def test_the_table_on_80_columns():
    found = lines(replace(measured("search"), seconds={"search": 3.0, "generate": 4.0, "update": 0.5, "callbacks": 0.5}))
    assert max(map(len, found)) <= WIDTH
    assert found[0] == "where the seconds of a step went (mean of 4 after the first):"
    assert found[2:8] == [
        "generate      4.000 s   50%   1,600 tokens/s, 16 at a time",
        "search        3.000 s   38%   2,667 tokens/s, 20 searches at a time",
        "update        0.500 s    6%   12,000 tokens/s trained, 2 passes, 10% padding",
        "callbacks     0.500 s    6%   Board 0.750, RunFiles 0.250",
        "─" * WIDTH,
        "a step        8.000 s  100%",
    ]


def test_other_engines_and_the_first_step_alone():
    seconds = {"search": 30.0, "generate": 40.0}
    found = replace(measured("search", {"written": 0.0}, engine="server"), seconds=seconds, warming=True)
    assert lines(found)[0] == "where the seconds of a step went (the first one, which warms up):"
    assert lines(found)[3] == "search         30.0 s   43%   80 searches"
    found = replace(measured("search", engine="policy"), seconds=seconds)
    assert lines(found)[2] == "generate       40.0 s   57%   160 + 200 (simulator) tokens/s, 36 at a time"
