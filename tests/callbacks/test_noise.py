"""What sets the noise of a run: by a schedule, or by success."""

import json
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from support.commandline import POLICY, SMALL_RL, failure, tensors
from zs_lightning.callbacks import NoiseAnnealing, NoiseBySuccess
from zs_lightning.cli import main
from zs_lightning.errors import UserError
from zs_lightning.types import QAExample, Status, Trajectory

EXAMPLE = QAExample(id="q", question="Who?", golden_answers=("She",), source="test")
CALLBACK = "--trainer.callbacks"


def rolled_out(*rewards):
    """Trajectories with these rewards; None is one that failed."""
    made = []
    for sample, reward in enumerate(rewards):
        status = Status.FAILED if reward is None else Status.ANSWERED
        earned = 5.0 if reward is None else reward
        made.append(Trajectory(example=EXAMPLE, sample=sample, prompt_ids=[], status=status, reward=earned))
    return made


def noises(callback, steps):
    """The noise of each step, whose rollouts earned these rewards."""
    module, found = SimpleNamespace(noise_prob=0.9), []
    for rewards in steps:
        callback.on_train_batch_start(None, module, None, 0)
        found.append(module.noise_prob)
        module.trajectories = rolled_out(*rewards)
        callback.on_train_batch_end(None, module, None, None, 0)
    return [round(noise, 9) for noise in found]


def test_noise_follows_success_by_hand():
    callback = NoiseBySuccess(threshold=0.5, start=0.1, end=0.4, window=2, rise=0.2)
    steps = [
        [1.0],  # One step is not a window of two.
        [0.2, 0.0, None],  # With 1.0 a mean of 0.55: it rises. What failed counts for nothing.
        [0.9],  # The window has begun anew.
        [0.0],  # 0.45.
        [1.0],  # 0.5 of the last two: to the end, not above.
        [1.0],
        [1.0],  # It stays there.
        [0.0],
    ]
    assert noises(callback, steps) == [0.1, 0.1, 0.3, 0.3, 0.3, 0.4, 0.4, 0.4]


def test_noise_falls_if_asked_to():
    steps = [[1.0], [0.0], [0.0], [0.3], [0.0], [0.0]]
    rule = {"threshold": 0.5, "window": 1, "rise": 0.3, "lower": 0.3}
    assert noises(NoiseBySuccess(**rule, fall=0.1), steps) == [0.0, 0.3, 0.2, 0.1, 0.1, 0.0]
    assert noises(NoiseBySuccess(**rule), steps) == [0.0, 0.3, 0.3, 0.3, 0.3, 0.3]


def test_a_window_is_of_the_last_steps_alone():
    callback = NoiseBySuccess(threshold=0.5, window=2, rise=0.1)
    assert noises(callback, [[0.0], [0.0], [0.5], [0.5], [0.0]]) == [0.0, 0.0, 0.0, 0.0, 0.1]


def test_a_step_without_a_usable_rollout_does_not_count():
    callback = NoiseBySuccess(threshold=0.5, window=2, rise=0.1)
    assert noises(callback, [[0.5], [None, None], [0.5], [0.5]]) == [0.0, 0.0, 0.0, 0.1]


def test_a_schedule_of_a_callback_counts_the_steps_of_the_run_or_its_own():
    module = SimpleNamespace(planned_steps=lambda: 4)
    for options, expected in (
        ({"schedule": "linear"}, [0.125, 0.25, 0.375, 0.5]),
        ({"schedule": "linear", "total_steps": 2}, [0.25, 0.5, 0.5, 0.5]),
        ({"schedule": "steps", "stages": 2}, [0.0, 0.0, 0.5, 0.5]),
        ({"schedule": "cosine", "start": 1.0, "end": 0.0}, [0.853553, 0.5, 0.146447, 0.0]),
        ({"start": 0.25, "end": 0.25}, [0.25] * 4),
        ({}, [0.069036, 0.166667, 0.304738, 0.5]),  # (√2 - 1) / 6 and so on: equation 1.
    ):
        found = []
        for module.rollout_step in range(4):
            NoiseAnnealing(**options).on_train_batch_start(None, module, None, 0)
            found.append(module.noise_prob)
        assert found == pytest.approx(expected, abs=1e-6), options


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"start": 0.6}, "NoiseBySuccess.end: expected 0.6 or more; got 0.5"),
        ({"end": 1.2}, "NoiseBySuccess.end: expected a number from 0 to 1; got 1.2"),
        ({"window": 0}, "NoiseBySuccess.window: expected 1 or more; got 0"),
        ({"rise": 0.0}, "NoiseBySuccess.rise: expected a number above 0; got 0"),
        ({"rise": -0.1}, "NoiseBySuccess.rise: expected a number from 0 to 1; got -0.1"),
        ({"fall": float("nan")}, "NoiseBySuccess.fall: expected a number from 0 to 1; got nan"),
        ({"threshold": float("nan")}, "NoiseBySuccess.threshold: expected a finite number; got nan"),
        ({"fall": 0.1, "lower": 0.5}, "NoiseBySuccess.lower: expected less than threshold, 0.5; got 0.5"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, said):
    with pytest.raises(UserError) as error:
        NoiseBySuccess(**options)
    assert str(error.value) == said


# ---------------------------------------------------------------------- the command line


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize(
    ("args", "said"),
    [
        (
            [POLICY, f"{CALLBACK}+=NoiseBySuccess"],
            "trainer.callbacks: NoiseAnnealing and NoiseBySuccess would all set the noise; keep one",
        ),
        (
            [POLICY, f"{CALLBACK}+=NoiseAnnealing"],
            "trainer.callbacks: NoiseAnnealing and NoiseAnnealing would all set the noise; keep one",
        ),
        (
            [POLICY, f"{CALLBACK}=[NoiseBySuccess,NoiseBySuccess]"],
            "trainer.callbacks: one stands there twice: Found more than one stateful callback of type `NoiseBySuccess`.",
        ),
        ([POLICY, f"{CALLBACK}=NoiseBySuccess", f"{CALLBACK}.window=0"], "NoiseBySuccess.window: expected 1 or more; got 0"),
        (
            [POLICY, f"{CALLBACK}=NoiseAnnealing", f"{CALLBACK}.schedule=sine"],
            "trainer.callbacks.schedule: expected exponential, linear, cosine or steps; got sine",
        ),
        (
            [POLICY, f"{CALLBACK}=NoiseBySuccess", f"{CALLBACK}.window=many"],
            "trainer.callbacks.window: expected a whole number; got many",
        ),
    ],
)
def test_a_mistake_about_noise_is_said_before_anything_is_loaded(args, said, tmp_path, capsys):
    code, line = failure(capsys, "fit", *args, f"--run.folder={tmp_path / 'run'}")
    assert (code, line[: len(said) + 7]) == (2, f"error: {said}")
    assert not list(tmp_path.rglob("*.*"))


STEPS = 5
RISING = """
trainer:
  callbacks:
    - class_path: NoiseBySuccess
      init_args: {threshold: 0.2, window: 2, rise: 0.2, end: 0.5}
"""


def curve(folder, tag):
    return [event.value for event in EventAccumulator(str(folder)).Reload().Scalars(tag)]


@pytest.mark.usefixtures("environment")
def test_a_run_whose_noise_follows_success_stops_and_goes_on_bit_for_bit(tmp_path, capsys):
    """It stops after the steps 1 and 2: within a window, and after a rise."""
    (tmp_path / "rising.yaml").write_text(RISING)
    args = ["fit", POLICY, f"--config={tmp_path / 'rising.yaml'}", *SMALL_RL, "--model.search.model.adapter=null"]
    args += [f"--data.steps={STEPS}", "--trainer.log_every_n_steps=1"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    main([*args, f"--run.folder={whole}"])
    args += [f"--run.folder={parts}"]
    again: list[str] = []
    for _ in range(2):
        main([*args, *again, '--trainer.max_time={"milliseconds": 1}'])
        again = [f"--ckpt_path={parts}"]
    said = failure(capsys, *args, *again, f"{CALLBACK}.rise=0.1")[1]
    assert "trainer.callbacks.rise was 0.2, got 0.1; set" in said
    main([*args, *again])
    rewards, window, noise = curve(whole, "reward"), [], 0.0
    for planned, reward in zip(curve(whole, "noise/planned"), rewards, strict=True):
        assert planned == pytest.approx(noise)
        window = [*window, reward][-2:]
        if len(window) == 2 and sum(window) >= 0.4 and noise < 0.5:
            window, noise = [], min(0.5, noise + 0.2)
    assert noise > 0.3, f"rewards that try nothing: {rewards}"
    for tag in ("noise/planned", "noise/realised", "reward"):
        assert curve(parts, tag) == curve(whole, tag)
    lines = [(folder / "trajectories" / "train.jsonl").read_text() for folder in (whole, parts)]
    assert lines[0] == lines[1]
    assert json.loads(lines[0].splitlines()[-1])["noise_prob"] > 0.3
    first, second = (torch.load(folder / "last.ckpt", weights_only=True) for folder in (whole, parts))
    states = [next(v for k, v in state["callbacks"].items() if "NoiseBySuccess" in k) for state in (first, second)]
    assert states[0] == states[1]
    learned = [tensors(state["state_dict"]) for state in (first, second)]
    assert learned[0].keys() == learned[1].keys()
    assert all(torch.equal(tensor, learned[1][name]) for name, tensor in learned[0].items())
