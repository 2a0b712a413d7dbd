"""How often each fault is tried, and the table of what held: `bash scripts/test.sh --full` writes it."""

from pathlib import Path

import pytest

RESULTS = Path(__file__).parents[2] / "scripts" / "fault_results.md"
HEAD = """# What held when things went wrong

Written by `bash scripts/test.sh --full`; the usual run tries a tenth of each or less.

| Row | What is done to a run | What held |
|---|---|---|
"""


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="try each fault as often as planned, not a tenth of that or less")
    parser.addoption("--real-model", metavar="FOLDER", help="a model for the tests that want a real one")


@pytest.fixture
def times(request):
    """How often to try what the plan wants tried so many times; by default a tenth of it, or as often as is given."""
    full = request.config.getoption("--full")
    return lambda planned, default=None: planned if full else default or max(1, planned // 10)


@pytest.fixture
def full(request):
    return request.config.getoption("--full")


@pytest.fixture
def real_model(request):
    """Folder of a model that nobody made for tests."""
    return request.config.getoption("--real-model") or pytest.skip("wants --real-model")


@pytest.fixture
def figure(record_property):
    """Notes what held, before it is asserted: `figure(6, "a checkpoint with a flipped bit", "5 of 5 found")`."""

    def note(row, fault, held):
        record_property("fault", (row, fault, held))

    return note


class Table:
    """The lines of all tests of a session, of other processes too."""

    def __init__(self):
        self.lines = {}

    def pytest_runtest_logreport(self, report):
        for name, value in report.user_properties:
            if name == "fault" and report.when == "call":
                row, fault, held = value
                self.lines[row, fault] = held + (" **(failed)**" if report.failed else "")

    def pytest_sessionfinish(self):
        if self.lines:
            write_results(RESULTS, self.lines)


def pytest_configure(config):
    # With several processes the first one hears of all tests.
    if config.getoption("--full") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Table())


def write_results(path, lines):
    """Puts lines into the table, in place of those of the same faults."""
    known = {}
    for line in path.read_text().splitlines() if path.is_file() else []:
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if len(cells) == 3 and cells[0].isdigit():
            known[int(cells[0]), cells[1]] = cells[2]
    known |= lines
    body = "".join(f"| {row} | {fault} | {held} |\n" for (row, fault), held in sorted(known.items()))
    path.write_text(HEAD + body)
