"""Every moment of a step is charged once, by a clock of the test's own."""

import pytest

from zs_lightning.modules import phases, timed_phases
from zs_lightning.modules.timed_phases import TimedPhases


@pytest.fixture
def clock(monkeypatch):
    """The time in seconds, which the test sets."""
    now = [5.0]
    for room in (phases, timed_phases):
        monkeypatch.setattr(room.time, "monotonic", lambda: now[0])
    return now


def test_parts_add_up_to_the_whole(clock):
    timed = TimedPhases()
    begun = clock[0]
    for seconds, change in enumerate(
        [
            lambda: timed("generate", 0, 20, 0),
            lambda: timed("generate", 1, 20, 7),
            lambda: timed("search", 1, 20, 9),
            lambda: timed("generate", 18, 20, 9),
            lambda: timed("generate", 19, 20, 10),
            lambda: timed("", 0, 0, 0),
            lambda: timed("update", 0, 0),
            lambda: timed("reference", 0, 2),
            lambda: timed("update", 0, 6),
            lambda: timed("a phase of its own"),
            lambda: timed.end(),
            lambda: timed.push("validation"),
            lambda: timed("generate", 9, 9),
            lambda: timed.push("Board.on_validation_end"),
            lambda: timed.pop(),
            lambda: timed("", 0, 0),
            lambda: timed.pop(),
            lambda: timed.charge(),
        ],
        1,
    ):
        clock[0] += seconds
        change()
    assert timed.seconds_of == {
        # Each number is the seconds before the change of that place.
        "generate": 2 + 3 + 5 + 6,
        "search": 4,
        "update": 8 + 10,
        "reference": 9,
        "validation": 13 + 14 + 16 + 17,
        "Board.on_validation_end": 15,
        "other": 1 + 7 + 11 + 12 + 18,
    }
    assert sum(timed.seconds_of.values()) == clock[0] - begun
    assert timed.counts == {"rounds": 4, "visits": 1, "passes": 6, "late": 5 + 6}, "of the step alone, not of its validation"


def test_a_card_is_waited_for_before_the_clock_is_read(clock):
    timed = TimedPhases()

    def settle():
        clock[0] += 2.0

    timed.settle = settle
    timed("update")
    clock[0] += 1.0
    timed("update", 1, 2)
    timed("")
    assert timed.seconds_of == {"other": 2.0, "update": 3.0}
