"""Run folders of one step each, to export. A plugin of conftest.py."""

from pathlib import Path

import pytest

from zs_lightning.cli import main

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs" / "miniature"
POLICY = [
    f"--config={CONFIGS / 'policy.yaml'}",
    "--model.search=BM25Search",
    "--data.steps=1",
    "--data.batch_size=2",
    "--model.group_size=2",
    "--model.estimator=reinforce",
    "--model.reward.format_weight=0.5",
    "--model.warmup_steps=0",
    "--trainer.callbacks=null",
]


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """A simulator's adapter, a policy's adapter on a 4-bit base, all weights of a policy. Do not change them."""
    folder = tmp_path_factory.mktemp("runs")
    sft = ["--data.steps=1", "--data.batch_size=4", "--data.validation_rows=4", "--model.warmup_steps=0", "--model.lora.r=4"]
    sft += ["--run.save_every=1", "--trainer.limit_val_batches=0", "--trainer.val_check_interval=1"]
    main(["fit", f"--config={CONFIGS / 'simulator.yaml'}", f"--run.folder={folder / 'simulator'}", *sft])
    quantized = ["--model.model.quantization=nf4", "--model.lora.r=4", "--model.optimizer.init_args.lr=0.01"]
    main(["fit", *POLICY, f"--run.folder={folder / 'nf4'}", *quantized])
    main(["fit", *POLICY, f"--run.folder={folder / 'full'}"])
    return folder


def export(*args):
    main(["export", *map(str, args)])
