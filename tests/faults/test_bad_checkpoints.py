"""Row 6: the last checkpoint is damaged, foreign or of another version: it is found before anything is loaded."""

import random
import shutil

import pytest
import torch

from support.commandline import SIMULATOR, SMALL_SFT, failure
from zs_lightning.cli import main
from zs_lightning.errors import UserError
from zs_lightning.runs.checkpoints import find_checkpoint, save

STEPS = 3
FIT = ["fit", SIMULATOR, *SMALL_SFT, f"--data.steps={STEPS}", "--trainer.limit_val_batches=0"]
FIT += ["--trainer.enable_progress_bar=false"]
LOAD = torch.load


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of three steps, each saved, and one of another adapter."""
    place = tmp_path_factory.mktemp("runs")
    for name, rank in (("whole", 2), ("other", 3)):
        main([*FIT, f"--model.lora.r={rank}", f"--run.folder={place / name}"])
    return place


def cut(file, rng, runs):
    file.write_bytes(file.read_bytes()[: rng.randrange(1, file.stat().st_size)])


def with_a_flipped_bit(file, rng, runs):
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def empty(file, rng, runs):
    file.write_bytes(b"\0" * rng.choice([0, 1, file.stat().st_size]))


def of_another_model(file, rng, runs):
    shutil.copy(runs / "other" / rng.choice(["last.ckpt", "previous.ckpt"]), file)


def of_another_version(file, rng, runs):
    """One that lies there without having been saved by this program."""
    found = LOAD(file, weights_only=True)
    torch.save(found | {"schema": rng.randrange(2, 9)}, file)


FAULTS = [cut, with_a_flipped_bit, empty, of_another_model, of_another_version]


@pytest.mark.parametrize("fault", FAULTS)
def test_it_is_found_before_it_is_loaded_and_the_one_before_it_is_used(fault, runs, tmp_path, caplog, monkeypatch, figure):
    rng, read, good = random.Random(fault.__name__), [], 0
    monkeypatch.setattr(torch, "load", lambda file, *_, **__: read.append(file))
    for number in range(5):
        folder = tmp_path / str(number)
        shutil.copytree(runs / "whole", folder)
        fault(folder / "last.ckpt", rng, runs)
        caplog.clear()
        found = find_checkpoint(folder, "run.folder")
        said = f"run.folder: {folder / 'last.ckpt'} is damaged"
        names_both = said in caplog.text and caplog.text.endswith(f"is used: {folder / 'previous.ckpt'}\n")
        good += found == folder / "previous.ckpt" and names_both and not read
    figure(6, f"a last checkpoint: {fault.__name__.replace('_', ' ')}", f"{good} of 5 found before loading, both named")
    assert good == 5


def test_the_run_goes_on_from_the_one_before_it_to_the_same_end(runs, tmp_path, capfd, times, figure):
    expected, equal = (runs / "whole" / "model" / "adapter_model.safetensors").read_bytes(), 0
    rng, trials = random.Random(6), times(10)
    for number in range(trials):
        folder = tmp_path / str(number)
        shutil.copytree(runs / "whole", folder)
        FAULTS[number % len(FAULTS)](folder / "last.ckpt", rng, runs)
        main([*FIT, "--model.lora.r=2", f"--run.folder={folder}"])
        said = f"goes on after {STEPS - 1} of {STEPS} steps, from {folder / 'previous.ckpt'}" in "".join(capfd.readouterr())
        equal += said and (folder / "model" / "adapter_model.safetensors").read_bytes() == expected
    figure(6, "runs that go on past such a checkpoint", f"{equal} of {trials} end equal to one that nothing happened to")
    assert equal == trials


def test_what_a_newer_program_saved_is_not_replaced(tmp_path, figure):
    """It is no damaged one: to go on before it would throw away what the newer program did."""
    refused = 0
    for schema in range(2, 7):
        folder = tmp_path / str(schema)
        folder.mkdir()
        for step in (1, 2):
            save(folder, {"step": step, "state_dict": {}})
        sums = folder / "checkpoints.json"
        sums.write_text(sums.read_text().replace('"schema": 1', f'"schema": {schema}', 1))
        with pytest.raises(UserError, match=rf"last\.ckpt was written by a newer version .*schema {schema}\); upgrade it$"):
            find_checkpoint(folder, "run.folder")
        refused += 1
    figure(6, "a last checkpoint: saved by a newer program", f"{refused} of 5 named and kept")


def test_without_a_good_one_nothing_is_trained(runs, tmp_path, capsys, times, figure):
    rng, trials, good = random.Random(66), times(10), 0
    for number in range(trials):
        folder = tmp_path / str(number)
        shutil.copytree(runs / "whole", folder)
        for name in ("last.ckpt", "previous.ckpt"):
            FAULTS[number % len(FAULTS)](folder / name, rng, runs)
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        code, said = failure(capsys, *FIT, "--model.lora.r=2", f"--run.folder={folder}")
        kept = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
        good += code == 2 and kept and "last.ckpt is damaged" in said and "previous.ckpt is damaged" in said
    figure(6, "both checkpoints of a run damaged", f"{good} of {trials} refused, both named, nothing changed")
    assert good == trials
