"""The table of what held."""

from support.faultplan import HEAD, write_results


def test_new_figures_replace_those_of_the_same_fault(tmp_path):
    path = tmp_path / "results.md"
    write_results(path, {(12, "b"): "3 of 3", (2, "a"): "1 of 1"})
    write_results(path, {(12, "b"): "4 of 4", (1, "c"): "5 of 5"})
    assert path.read_text() == HEAD + "| 1 | c | 5 of 5 |\n| 2 | a | 1 of 1 |\n| 12 | b | 4 of 4 |\n"
