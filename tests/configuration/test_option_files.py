"""Options that meet each other in files and on the command line, as the parser resolves them."""

from pathlib import Path

import pytest
import yaml

from support.commandline import POLICY
from zs_lightning.cli import main

pytestmark = pytest.mark.usefixtures("environment")


def resolved(capsys, *args):
    """The model's options."""
    with pytest.raises(SystemExit) as end:
        main(["fit", POLICY, *args, "--print_config"])
    assert end.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]


def test_one_field_of_a_group_leaves_the_others(capsys):
    """Of a group that could be null, from a second file; and another class drops what was the first one's."""
    Path("more.yaml").write_text("model: {init_args: {lora: {r: 32, alpha: 7, rslora: true}}}")
    found = resolved(capsys, "--config=more.yaml", "--model.init_args.lora.r=8", "--model.search=BM25Search")
    assert [found["lora"][name] for name in ("r", "alpha", "rslora", "dora")] == [8, 7, True, False]
    assert found["search"]["class_path"].endswith("BM25Search")
    assert "model" not in found["search"]["init_args"]


def test_the_name_of_a_file_stays_a_name(capsys):
    """And a number in any spelling a number."""
    Path("corpus.yaml").write_text("contents: of the file")
    found = resolved(capsys, "--model.search=BM25Search", "--model.search.corpus=corpus.yaml", "--model.optimizer.lr=1e-6")
    assert found["search"]["init_args"]["corpus"] == "corpus.yaml"
    assert found["optimizer"]["init_args"]["lr"] == 1e-6
