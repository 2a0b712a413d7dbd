"""What a step is doing, by a clock of the test's own."""

import pytest

from zs_lightning.modules import phases as room
from zs_lightning.modules.phases import Phases


@pytest.fixture
def clock(monkeypatch):
    """The time in seconds, which the test sets."""
    now = [0.0]
    monkeypatch.setattr(room.time, "monotonic", lambda: now[0])
    return now


def step(phases, clock, start, write=8.0, search=2.0, update=5.0, first=0):
    """A step of 100 tokens; the rollouts write, search, and write on."""
    clock[0] = start
    phases("generate", 0, 4, first)
    clock[0] += write / 2
    phases("search", 1, 4, first + 50)
    clock[0] += search
    phases("generate", 2, 4, first + 50)
    clock[0] += write / 2
    phases("generate", 4, 4, first + 100)
    phases("update", 0, 3)
    clock[0] += update
    phases.end()


def test_phases_that_come_in_turns_add_up(clock):
    phases = Phases()
    step(phases, clock, 10.0)
    assert {name: list(took) for name, took in phases.took.items()} == {"generate": [8.0], "search": [2.0], "update": [5.0]}
    assert phases.line() == ""


def test_a_line_says_done_of_all_tokens_a_second_and_seconds_left(clock):
    phases = Phases()
    phases("generate", 0, 4, 700)
    assert phases.line() == "generate 0/4, 0 s"
    clock[0] = 10.0
    phases("generate", 1, 4, 1700)
    assert phases.line() == "generate 1/4, 100 tokens/s, 30 s left", "a quarter took ten seconds"
    phases("search", 1, 4, 1700)
    clock[0] = 20.0
    assert phases.line() == "search 1/4, 50 tokens/s, 30 s left"
    phases("update")
    assert phases.line() == "update, 0 s"
    phases("update", 2, 3)
    clock[0] = 24.0
    assert phases.line() == "update 2/3, 2 s left"
    phases.done = 4  # A callback may count more passes than were planned.
    assert phases.line() == "update 3/3, 4 s"


def test_the_usual_time_tells_what_is_left_and_a_generator_counts_on(clock):
    phases = Phases()
    for start, write in ((0.0, 8.0), (100.0, 100.0), (300.0, 6.0)):
        step(phases, clock, start, write, first=int(start))
    clock[0] = 400.0
    phases("generate", 0, 4, 500)
    assert phases.usually() == 8.0
    clock[0] = 402.0
    phases("generate", 1, 4, 540)
    assert phases.line() == "generate 1/4, 20 tokens/s, 6 s left"
    clock[0] = 409.0
    assert phases.line() == "generate 1/4, 4 tokens/s, 9 s", "nothing is promised once it takes longer than usual"


def test_a_validation_tells_nothing_of_the_next_step(clock):
    phases = Phases()
    phases("generate", 0, 4)
    clock[0] = 50.0
    phases.end(usual=False)
    phases("generate", 0, 4)
    assert (phases.usually(), phases.seconds()) == (None, 0.0)


def test_only_the_last_steps_are_remembered(clock):
    phases = Phases()
    for number in range(room.REMEMBERED + 5):
        step(phases, clock, 100.0 * number, update=number)
    assert list(phases.took["update"]) == list(range(5, room.REMEMBERED + 5))
