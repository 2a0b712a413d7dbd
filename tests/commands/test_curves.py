"""Curves of a training, as a comparison shows them."""

import random
import re
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.tensorboard import SummaryWriter

from support.runfolders import eight_questions, run_compare
from zs_lightning.callbacks.board import Curves
from zs_lightning.commands.compare import curves


@pytest.fixture
def runs(tmp_path):
    return eight_questions(tmp_path)


def write_curves(folder, steps, tag="reward"):
    """One life of a run, with its own logger: which sees to it that a later life's file is read
    later, also where both begin in one second."""
    logger = Curves(str(folder))
    for step, value in steps:
        logger.log_metrics({tag: value, "seconds/rollout": 1.0}, step)
    logger.experiment.close()


def test_curves_of_a_resumed_run_take_the_later_value(tmp_path):
    write_curves(tmp_path, [(0, 0.25), (1, 0.5), (2, 9.0)])
    write_curves(tmp_path, [(2, 0.75), (3, float("nan")), (4, 1.0)])
    assert curves.read_curves(tmp_path) == {"reward": [(0, 0.25), (1, 0.5), (2, 0.75), (4, 1.0)]}


def test_curves_of_an_earlier_version_are_shown_also_where_a_later_one_went_on(tmp_path):
    write_curves(tmp_path, [(0, 0.25), (1, 0.5)], "reward/mean")
    assert curves.read_curves(tmp_path) == {"reward": [(0, 0.25), (1, 0.5)]}
    write_curves(tmp_path, [(1, 0.75), (2, 1.0)])
    assert curves.read_curves(tmp_path) == {"reward": [(0, 0.25), (1, 0.75), (2, 1.0)]}


def test_chart_by_hand():
    (chart,) = curves.charts({"reward/em": [(0, 0.0), (5, 1.0), (10, 0.5)], "reward": [(0, 1.0)]})
    # x from 0 to 366, y from 156 (0) to 0 (1).
    assert [(chart.x(step), chart.y(value)) for step, value in chart.lines[0].points] == [
        (0.0, 156.0),
        (183.0, 0.0),
        (366.0, 78.0),
    ]
    assert (chart.steps, chart.limits) == ((0, 10), (0.0, 1.0))


def test_charts_of_all_zeros_and_of_negative_rewards_stay_inside():
    found = curves.charts({"noise/planned": [(0, 0.0), (1, 0.0)], "reward": [(0, -0.5), (1, -0.1), (2, 0.2)]})
    for chart in found:
        for step, value in [point for line in chart.lines for point in line.points]:
            assert 0 <= chart.x(step) <= 366
            assert 0 <= chart.y(value) <= 156


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=30), st.integers(1, 9))
def test_running_mean_is_that_of_a_slow_reference(values, window):
    for i, mean in enumerate(curves.running_mean(values, window)):
        reach = window // 2
        while i - reach < 0 or i + reach >= len(values):
            reach -= 1
        near = [value for j, value in enumerate(values) if abs(i - j) <= reach]
        assert mean == pytest.approx(sum(near) / len(near), abs=1e-9)


@given(st.floats(1e-6, 1e6))
def test_nice_maximum_holds_the_value_without_much_air(value):
    assert value * (1 - 1e-8) <= curves.nice_maximum(value) <= 2.01 * value


def test_svg_of_the_page_is_well_formed(runs):
    rng = random.Random(0)
    writer = SummaryWriter(str(runs / "fit"))
    for _, _, names in curves.CHARTS:
        for tag in names:
            for step in range(20):
                writer.add_scalar(tag, rng.random(), step)
    writer.close()
    run_compare(runs, f"--training={runs / 'fit'}")
    drawings = re.findall("<svg.*?</svg>", (runs / "out" / "report.html").read_text(), re.DOTALL)
    lines = [ElementTree.fromstring(drawing).findall("polyline") for drawing in drawings]
    assert [len(found) for found in lines] == [2, 2, 4, 2, 4]  # A raw and a smooth line for each series.
    assert all(len(line.get("points").split()) == 20 for found in lines for line in found)
    assert "realised is the share of the step" in (runs / "out" / "report.html").read_text()
