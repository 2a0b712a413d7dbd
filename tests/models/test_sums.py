"""Checksums beside the weights that a run wrote."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from zs_lightning.errors import UserError
from zs_lightning.models.loading import load_model
from zs_lightning.models.specs import ModelSpec
from zs_lightning.models.sums import check_sums
from zs_lightning.runs.checkpoints import replace_folder


def test_the_weights_of_a_run_are_read_only_as_they_were_written(tiny_folder, tmp_path):
    part, folder = tmp_path / "model.part", tmp_path / "model"
    shutil.copytree(tiny_folder, part)
    replace_folder(part, folder)
    weights, spec = folder / "model.safetensors", ModelSpec(path=str(folder), device="cpu")
    content = weights.read_bytes()
    assert json.loads((folder / "sha256.json").read_text()) == {weights.name: hashlib.sha256(content).hexdigest()}
    load_model(spec)
    weights.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    with pytest.raises(UserError, match=rf"^here.path: {weights} is damaged: it is not what sha256.json beside it says$"):
        load_model(spec, "here")
    (folder / "sha256.json").unlink()
    load_model(spec)


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[1]", b'{"gone": "0"}', b'{"../up": "0"}'])
def test_checksums_that_are_damaged_themselves_are_one_sentence(content, tmp_path):
    Path(tmp_path / "sha256.json").write_bytes(content)
    with pytest.raises(UserError, match=r"^adapter: .*sha256\.json does not go with the weights beside it"):
        check_sums(str(tmp_path), "adapter")
