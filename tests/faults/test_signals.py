"""SIGTERM and SIGINT at any moment: the run ends soon, with its code and a sentence that is true, and goes on equal."""

import re
import signal
import time
from pathlib import Path

import pytest

from support.killed import PPO, TRIES, Run, alive, differing, fit, simulator, spread, wait
from zs_lightning.runs.stopping import ECHO

KINDS = {
    "grpo": fit("PolicyRL", {"class_path": "NoiseAnnealing"}, search=simulator()),
    "sft": fit("SimulatorSFT"),
    "ppo": fit("PolicyRL", **PPO),
}


@pytest.fixture(scope="module")
def whole(warm, tmp_path_factory):
    """What runs leave that nothing stops, and their seconds from the moment on at which they hear signals."""
    results, lives = {}, {}

    def of(name):
        if name not in results:
            run = Run(tmp_path_factory.mktemp("whole") / name, KINDS[name])
            command = hearing(run, warm)
            begun = time.monotonic()
            assert command.end()[0] == 0
            results[name], lives[name] = run.result(), time.monotonic() - begun
        return results[name], lives[name]

    return of


def hearing(run, warm):
    """A command that has begun to hear signals."""
    command = run.begin(warm)
    mask = 1 << (signal.SIGTERM - 1)
    while command.runs():
        try:
            status = Path(f"/proc/{command.child}/status").read_text()
        except (FileNotFoundError, ProcessLookupError):  # It has just ended.
            break
        if int(re.search(r"SigCgt:\s*(\S+)", status)[1], 16) & mask:
            break
        time.sleep(0.002)
    return command


def stop(run, warm, number, moment):
    """Exit code, seconds until it ended, its last sentence, and whether it is true."""
    command = hearing(run, warm)
    wait(command, moment)
    command.send(number)
    sent = time.monotonic()
    code, _, err = command.end()
    seconds, last = time.monotonic() - sent, (err.strip().splitlines() or [""])[-1]
    assert not alive(command.child)
    return code, seconds, last


def true(run, last, name):
    """Whether the sentence says where the run goes on."""
    if not run.checked():
        begun = not re.search("run/unsaved", last) or "the same command begins anew" in last
        return last.startswith(f"error: {name}") and "goes on with" not in last and begun
    there = "run/last.ckpt"
    finished = last == f"error: {name}; all steps were done: see {there}"
    return finished or last == f"error: {name}; fit goes on with --ckpt_path {there}"


NAMES = {signal.SIGTERM: "stopped by SIGTERM", signal.SIGINT: "interrupted"}


def stopped(kinds, numbers, count, whole, warm, folder):
    """Stops runs at so many moments, and goes on with them.

    Returns:
        What held, in words; seconds until the slowest ended; and what went wrong.
    """
    slowest, lost, wrong = 0.0, 0, []
    for i, part in enumerate(spread(1.0, count, NAMES[numbers[0]])):
        kind, number = kinds[i % len(kinds)], numbers[i % len(numbers)]
        expected, moment = whole(kind)[0], part * whole(kind)[1]
        for _ in range(TRIES):
            run = Run(folder / str(i), KINDS[kind])
            code, seconds, last = stop(run, warm, number, moment)
            if code:
                break
            moment *= 0.8  # What had ended before is begun once more.
        slowest = max(slowest, seconds)
        said = true(run, last, NAMES[number])
        differs = differing(run.end(warm), expected)
        lost = max(lost, run.lost)
        if code != 128 + number or not said or differs or run.left():
            wrong.append((i, kind, part, code, last, differs, run.left()))
    codes = " or ".join(str(128 + number) for number in numbers)
    held = f"{count - len(wrong)} of {count} with exit code {codes} and a true sentence, equal when they had gone on"
    return f"{held}; ended after {slowest:.1f} s at most, {lost} finished steps lost at most", slowest, wrong


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_ends_soon_and_goes_on(number, whole, warm, times, full, figure, tmp_path):
    kinds = list(KINDS)[: None if full else 2]
    held, slowest, wrong = stopped(kinds, [number], times(50, default=2), whole, warm, tmp_path)
    figure(3, f"{number.name} at random moments", held)
    assert not wrong
    assert slowest < (5 if full else 15), "a machine that does much else takes its time"


def test_a_real_model_ends_as_soon(real_model, whole, warm, times, figure, monkeypatch, tmp_path):
    """With `--real-model FOLDER`, one of half a billion weights for instance: its passes take seconds."""
    sizes = {"rollout": {"max_turns": 1, "max_new_tokens": 12, "max_observation_tokens": 64, "max_length": 1024}}
    model = {"path": real_model, "dtype": "float32"}
    options = {
        "model": model,
        "prompts": "miniature",
        "loss": {"kl_coef": 0.0},
        "updates_per_rollout": 1,
        "lora": {"r": 2},
        **sizes,
    }
    monkeypatch.setitem(KINDS, "real", fit("PolicyRL", {"class_path": "NoiseAnnealing"}, **options))
    held, slowest, wrong = stopped(["real"], [*NAMES], times(50), whole, warm, tmp_path)
    figure(3, f"SIGTERM or SIGINT at random moments: {Path(real_model).name}", held)
    assert not wrong
    assert slowest < 5


def test_a_second_ctrl_c_leaves_at_once(whole, warm, times, full, figure, tmp_path):
    """While the first one waits for a slow disk."""
    config = KINDS["sft"]
    config = config | {"trainer": {**config["trainer"], "callbacks": [*config["trainer"]["callbacks"], SLOW]}}
    expected, life = whole("sft")
    count, slowest, wrong = times(20, default=1), 0.0, []
    for i, part in enumerate(spread(1.0, count, "twice")):
        for tries in range(TRIES):
            run = Run(tmp_path / str(i), config)
            command = hearing(run, warm)
            while command.runs() and not run.done():
                time.sleep(0.005)
            wait(command, part * life * 0.4 * 0.8**tries)
            command.send(signal.SIGINT)
            wait(command, ECHO + 0.1)
            second = command.runs()
            command.send(signal.SIGINT)
            sent = time.monotonic()
            code, _, _ = command.end()
            if second:  # Who has nothing to save leaves at the first one.
                break
        slowest = max(slowest, time.monotonic() - sent)
        run.checked()
        differs = differing(run.end(warm), expected)
        if not second or code != 130 or differs or run.left() or alive(command.child):
            wrong.append((i, part, second, code, differs, run.left()))
    held = f"{count - len(wrong)} of {count} left with 130 within {slowest:.1f} s, with a checkpoint that can be read"
    figure(3, "Ctrl-C twice, the second while the first one saves", f"{held}, and went on equal")
    assert not wrong
    assert slowest < (5 if full else 15)


SLOW = {"class_path": "support.killhooks.SlowDisk", "init_args": {"seconds": 1.0}}
