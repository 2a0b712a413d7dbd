"""The TensorBoard page of a run."""

import re
from types import SimpleNamespace

import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from markdown import markdown as render_markdown
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from support.runfolders import Page, policy, trajectory
from zs_lightning.callbacks.board import LAYOUT, Board, Curves, best_and_worst, layout, trajectory_list
from zs_lightning.commands.compare import curves
from zs_lightning.modules.step_metrics import step_metrics
from zs_lightning.types import Status

WORDS = {
    2: "<search> a|b </search>",
    3: "\n<information>`x` *y* _z_ [l](http://e) &amp;</information>\n",
    4: "<answer>yes</answer>",
}


def test_a_trajectory_is_shown_as_written_and_read_and_says_what_was_trained_on():
    shown = trajectory(0, "yes", question="Is <b>it</b> | so?")
    html = render_markdown(trajectory_list(shown, lambda ids: "".join(WORDS[i] for i in ids)), extensions=["tables"])
    parsed = Page(html)
    assert set(parsed.tags) <= {"p", "strong", "ul", "li"}
    assert "Is <b>it</b> | so?" in parsed.text
    first, read, last = ("".join(WORDS[i].strip().splitlines()) for i in (2, 3, 4))
    assert [Page(item).text.strip() for item in re.findall("<li>(.*?)</li>", html, re.DOTALL)] == [
        f"1 policy (trained on): {first}",
        f"1 engine (not trained on):  ⏎ {read}",
        f"2 policy (trained on): {last}",
    ]
    shown.status, shown.failure = Status.FAILED, "no | answer"
    assert "(trained on)" not in trajectory_list(shown, lambda ids: "")
    assert "no &#124; answer" in trajectory_list(shown, lambda ids: "")


def test_best_and_worst_are_two_different_rollouts():
    three = policy("a", "b", "c")
    three[1].reward, three[2].reward = 1.0, -1.0
    assert best_and_worst(three) == [three[1], three[2]]
    assert [t.example.id for t in best_and_worst(policy("a", "b"))] == ["0", "1"]
    assert len(best_and_worst(policy("a"))) == 1


def run_board(board, loggers, zero=True):
    trainer = SimpleNamespace(loggers=loggers, is_global_zero=zero, limit_val_batches=1.0)
    actor = SimpleNamespace(encoder=SimpleNamespace(decode=lambda ids: f"{len(ids)} tokens"))
    module = SimpleNamespace(trajectories=policy("yes", "no"), actor=actor)
    board.on_fit_start(trainer, module)
    for step in range(5):
        board.on_train_batch_end(trainer, module, None, None, step)


def test_board_writes_layout_and_text_where_tensorboard_finds_them(tmp_path):
    logger = TensorBoardLogger(str(tmp_path), name="", version="")
    run_board(Board(every=2), [CSVLogger(str(tmp_path / "csv")), logger])
    logger.experiment.flush()
    events = EventAccumulator(str(tmp_path), size_guidance={"tensors": 0}).Reload()
    assert set(events.Tags()["tensors"]) == {"custom_scalars__config__", "trajectories/text_summary"}
    texts = events.Tensors("trajectories/text_summary")
    assert [event.step for event in texts] == [0, 2, 4]
    assert texts[0].tensor_proto.string_val[0].count(b"1 tokens") == 6


def test_board_is_quiet_on_other_ranks_and_without_tensorboard(tmp_path):
    run_board(Board(), [TensorBoardLogger(str(tmp_path), name="", version="")], zero=False)
    run_board(Board(), [])
    assert not list(tmp_path.glob("*tfevents*"))


def test_layout_names_tags_that_are_logged():
    rollouts = policy("yes", "no")
    for rollout in rollouts:
        rollout.noise_prob = 0.5
    for turn in rollouts[0].searches:
        turn.label = "noisy"
        turn.noise = 1.0
    logged = set(step_metrics(rollouts, rollouts, {}, 0.5, {"rollout": 1.0, "update": 1.0})) | {"val/em", "val/f1"}
    shown = [tag for charts in LAYOUT.values() for tags in charts.values() for tag in tags]
    assert set(shown) <= logged
    assert len(shown) == len(set(shown))
    assert {tag for _, _, names in curves.CHARTS for tag in names} <= logged


@pytest.mark.parametrize("validates", [True, False])
def test_a_chart_has_its_own_tags_and_is_left_out_where_nothing_is_measured(validates):
    """TensorBoard takes a tag as a pattern for the beginning: sampling_gap is not to draw sampling_gap_max too."""
    logged = [
        *step_metrics(policy("yes", "no"), policy("yes", "no"), {}, 0.5, {"rollout": 1.0, "update": 1.0}),
        "val/em",
        "val/f1",
    ]
    found = layout(validates)
    assert found.keys() == LAYOUT.keys()
    assert ("validation" in found["Reward"]) == validates
    for tab, charts in found.items():
        for name, (_, patterns) in charts.items():
            drawn = [tag for tag in logged if any(re.match(pattern, tag) for pattern in patterns)]
            assert sorted(drawn) == sorted(tag for tag in LAYOUT[tab][name] if tag in logged)


def test_a_runs_curves_are_what_it_logs(tmp_path):
    logger = Curves(str(tmp_path))
    logger.log_metrics({"reward": 0.5, "epoch": 0}, 3)
    logger.save()
    assert EventAccumulator(str(tmp_path)).Reload().Tags()["scalars"] == ["reward"]
    assert [path.name.split(".")[0] for path in tmp_path.iterdir()] == ["events"]


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
