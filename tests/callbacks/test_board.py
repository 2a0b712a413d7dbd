"""The TensorBoard page of a run."""

import csv
import re
from types import SimpleNamespace

import pytest
import torch
import yaml
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata

from support.commandline import POLICY, SMALL_RL
from support.runfolders import policy
from zs_lightning.callbacks.board import LAYOUT, Board, Curves, absent, layout
from zs_lightning.cli import main
from zs_lightning.commands.compare import curves
from zs_lightning.modules.step_metrics import step_metrics

PATTERNS = [tag for charts in LAYOUT.values() for tags in charts.values() for tag in tags]


def run(**other):
    """What the board reads of a run: by default without anything that some runs do not have."""
    loss, search = SimpleNamespace(kl_coef=0.0), SimpleNamespace(name="bm25", hit_rate=lambda: None)
    actor = SimpleNamespace(encoder=SimpleNamespace(decode=lambda ids: f"{len(ids)} tokens"))
    module = dict(trajectories=policy("yes", "no"), actor=actor, loss=loss, search=search, device=torch.device("cpu"))
    module |= dict(critic=None, updates_per_rollout=1, rollout_step=0, noise_prob=0.25, group_size=8, estimator="grpo", seed=3)
    module |= dict(model=SimpleNamespace(path="miniature"), lora=None, health=SimpleNamespace(speaks=True))
    module |= dict(pool=None, validation_search=None, validated=[], with_real=[])
    return SimpleNamespace(**{**module, **other})


def run_board(board, loggers, zero=True, validates=1.0, module=None):
    trainer = SimpleNamespace(loggers=loggers, is_global_zero=zero, limit_val_batches=validates, callbacks=[board])
    trainer.state = SimpleNamespace(fn="fit")
    trainer.datamodule = SimpleNamespace(batch_size=4, steps=5)
    trainer.optimizers = [torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=0.5)]
    module = module or run()
    board.on_fit_start(trainer, module)
    for step in range(5):
        board.on_train_batch_end(trainer, module, None, None, step)
        module.rollout_step = step + 1
        board.on_validation_end(trainer, module)


def events(folder):
    return EventAccumulator(str(folder), size_guidance={"tensors": 0}).Reload()


def test_board_writes_layout_and_text_where_tensorboard_finds_them(tmp_path):
    logger = TensorBoardLogger(str(tmp_path), name="", version="")
    module = run(validated=policy("yes", "no", "no", "no", "yes"), with_real=policy("no", "yes"))
    run_board(Board(every=2), [CSVLogger(str(tmp_path / "csv")), logger], module=module)
    logger.experiment.flush()
    found = events(tmp_path)
    texts = {name: found.Tensors(f"trajectories/{name}/text_summary") for name in ("training", "validation", "validation_real")}
    assert set(found.Tags()["tensors"]) >= {"custom_scalars__config__"}
    assert [event.step for event in texts["training"]] == [0, 2, 4]
    assert [event.step for event in texts["validation"]] == [0, 1, 2, 3, 4]
    written = {name: shown[0].tensor_proto.string_val[0].decode() for name, shown in texts.items()}
    counts = {name: (text.count(", wrong"), text.count(", right")) for name, text in written.items()}
    assert counts == {"training": (1, 1), "validation": (2, 2), "validation_real": (1, 1)}


def test_board_is_quiet_on_other_ranks_and_without_tensorboard(tmp_path):
    run_board(Board(), [TensorBoardLogger(str(tmp_path), name="", version="")], zero=False)
    run_board(Board(), [])
    assert not list(tmp_path.glob("*tfevents*"))


# ---------------------------------------------------------------------------------------------- charts


def everything():
    """All that a run may log, but what belongs to a card."""
    rollouts = policy("yes", "no")
    for rollout in rollouts:
        rollout.noise_prob = 0.5
    for number, turn in enumerate(t for rollout in rollouts for t in rollout.searches):
        turn.label, turn.noise = (("noisy", 1.0), ("useful", 0.0))[number % 2]
    sums = {"value_loss": 1.0, "value_clipped": 0.0}
    logged = set(step_metrics(rollouts, rollouts, sums, 0.5, {"rollout": 1.0, "update": 1.0}))
    logged |= {"critic/value", "critic/return", "critic/explained_variance", "search/cache_hits", "memory/resident"}
    logged |= {"policy/skipped_steps", "policy/micro_batch_tokens", "health/alarms"}
    logged |= {"groups/pool", "groups/drawn", "groups/refilled"}
    logged |= {f"val/{name}" for name in ("em", "f1", "searches", "truncated")}
    return logged | {f"real/{name}" for name in ("em", "f1", "searches", "gap", "failed")} | {"seconds/validation"}


def drawn(charts, logged):
    """The logged tags of each chart; TensorBoard takes a tag as a pattern for the beginning."""
    return {
        name: {tag for tag in logged if any(re.match(pattern, tag) for pattern in patterns)}
        for tab in charts.values()
        for name, (_, patterns) in tab.items()
    }


def test_layout_names_tags_that_are_logged():
    logged = everything()
    for pattern in PATTERNS:
        assert pattern.startswith("memory/card") or any(re.fullmatch(pattern, tag) for tag in logged), pattern
    assert set(LAYOUT) == {"Reward", "Search", "Curriculum", "Health", "Speed", "Memory"}
    assert {tag for _, _, names in curves.CHARTS for tag in names} <= logged


def test_a_chart_has_its_own_tags():
    """Such as sampling_gap, which is not to draw sampling_gap_max too."""
    found = drawn(layout(("memory/card",)), everything())
    assert found.pop("drawn by kind") == {"noise/drawn_noisy", "noise/drawn_useful"}
    named = {name: set(tags) for tab in LAYOUT.values() for name, tags in tab.items()}
    assert found == {name: named[name] for name in found}
    assert named.keys() - found.keys() == {"drawn by kind", "most on the card so far, MiB"}


SIMULATES = {"search": SimpleNamespace(orders=object(), hit_rate=lambda: 0.5)}
WITH = {
    "val/": {},
    "real/": {"validation_search": object()},
    "seconds/validation": {"validation_search": object()},
    "critic/": {"critic": object()},
}
WITH |= {"noise/": SIMULATES, "search/more_after": SIMULATES, "search/withheld": SIMULATES, "search/cache_hits": SIMULATES}
WITH |= {"kl": {"loss": SimpleNamespace(kl_coef=0.1)}, "clip_ratio": {"updates_per_rollout": 2}}
WITH |= {"groups/": {"pool": object()}}
WITH |= {"health/": {"health": SimpleNamespace(speaks=False)}}
WITH |= {"memory/card": {"device": torch.device("cuda")}}


PLAIN = SimpleNamespace(limit_val_batches=0)
"""A run without a simulator, a validation, a critic and a card, whose charts would be empty."""


@pytest.mark.parametrize("tag", WITH)
def test_what_is_not_measured_has_no_empty_chart(tag):
    without = absent(PLAIN, run())
    missing = absent(SimpleNamespace(limit_val_batches=1.0), run(**WITH[tag]))
    assert tag in without
    assert tag not in missing
    assert ("memory/resident" in missing) == (tag == "memory/card")
    shown = [pattern for tab in layout(missing).values() for _, patterns in tab.values() for pattern in patterns]
    assert any(pattern.startswith(tag) for pattern in shown)
    gone = [pattern for tab in layout(without).values() for _, patterns in tab.values() for pattern in patterns]
    assert not any(pattern.startswith(tag) for pattern in gone)
    assert "real/" in absent(PLAIN, run(validation_search=object()))


def test_charts_of_a_plain_run():
    found = layout(absent(PLAIN, run()))
    assert list(found) == ["Reward", "Search", "Health", "Speed", "Memory"]
    assert all(drawn(found, everything()).values())


# ---------------------------------------------------------------------------------------------- loggers


def test_a_runs_curves_are_what_it_logs(tmp_path):
    logger = Curves(str(tmp_path))
    logger.log_metrics({"reward": 0.5, "epoch": 0}, 3)
    logger.save()
    assert EventAccumulator(str(tmp_path)).Reload().Tags()["scalars"] == ["reward"]
    assert [path.name.split(".")[0] for path in tmp_path.iterdir()] == ["events"]


def test_options_stand_in_the_runs_own_file_and_survive_a_second_life(tmp_path):
    for life in range(2):
        logger = Curves(str(tmp_path))
        logger.begun = True
        run_board(Board(), [logger], module=run(lora=SimpleNamespace(r=16)))
        logger.log_metrics({"reward": life}, life)
        logger.finalize("success")
    assert [path.name.split(".")[0] for path in tmp_path.iterdir()] == ["events"] * 2
    found = events(tmp_path)
    assert found.Tags()["scalars"] == ["reward"], "no value stands there that nobody measured"
    content = found.SummaryMetadata(metadata.SESSION_START_INFO_TAG).plugin_data.content
    values = metadata.parse_session_start_info_plugin_data(content).hparams
    written = {name: value.string_value or value.number_value for name, value in values.items()}
    assert written == {
        "model": "miniature", "trained": "LoRA 16", "estimator": "grpo", "lr": 0.5, "kl_coef": 0.0, "batch_size": 4.0,
        "updates_per_rollout": 1.0, "group_size": 8.0, "steps": 5.0, "search": "bm25", "noise_start": 0.25, "noise_end": 0.25,
        "seed": 3.0,
    }  # fmt: skip
    content = found.SummaryMetadata(metadata.EXPERIMENT_TAG).plugin_data.content
    described = metadata.parse_experiment_plugin_data(content)
    assert {info.name for info in described.hparam_infos} == set(written)
    assert [info.name.tag for info in described.metric_infos] == ["reward", "val/em"]


@pytest.mark.usefixtures("environment")
def test_every_logger_has_the_same_names_and_the_rollout_step_below(tmp_path):
    """Also where a step makes several updates, and of validations."""
    loggers = [
        {"class_path": "CSVLogger", "init_args": {"save_dir": "run", "name": "file"}},
        {"class_path": "zs_lightning.callbacks.board.Curves", "init_args": {"folder": "run"}},
    ]
    (tmp_path / "loggers.yaml").write_text(yaml.safe_dump({"trainer": {"logger": loggers}}))
    args = ["fit", POLICY, "--config=loggers.yaml", *SMALL_RL, "--model.search.init_args.model.adapter=null"]
    args += ["--model.rollout.max_new_tokens=16", "--model.updates_per_rollout=2", "--data.validation_rows=2"]
    args += ["--trainer.limit_val_batches=1.0", "--trainer.val_check_interval=1", "--data.steps=2", "--run.folder=run"]
    args += ["--model.validation_search=BM25Search"]
    main(args)
    with open("run/file/version_0/metrics.csv") as file:
        rows = list(csv.DictReader(file))
    found = events("run")
    file = {}
    for row in rows:
        for tag in set(row) - {"epoch", "step"}:
            if row[tag]:
                file.setdefault(tag, []).append((int(row["step"]), pytest.approx(float(row[tag]), rel=1e-6)))
    assert {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]} == file
    for tag in ("reward", "reward_std", "entropy", "memory/resident", "val/em", "real/em"):
        assert [step for step, _ in file[tag]] == [0, 1], tag
    assert file.keys() <= everything() | {"policy/sampling_gap_max", "noise/drawn_noisy"}
    options = yaml.safe_load((tmp_path / "run/file/version_0/hparams.yaml").read_text())
    assert (options["noise_end"], options["trained"], options["lr"]) == (0.5, "LoRA 2", 5e-4)


def test_board_refuses_a_rhythm_of_zero():
    with pytest.raises(ValueError, match="Board: every must be >= 1; got 0"):
        Board(every=0)


def test_two_lives_of_a_run_are_read_in_their_order(tmp_path):
    """TensorBoard reads its files by name, where the second stands before the process."""
    for value in (1.0, 2.0):
        curves = Curves(str(tmp_path))
        curves.log_metrics({"x": value}, 0)
        curves.finalize("success")
    first, second = sorted(path.name.split(".")[3] for path in tmp_path.iterdir())
    assert int(first) < int(second)
