"""The losses and advantages of this package against TRL's own code, on random tensors.

    python scripts/parity.py

Calls the methods of a real GRPOTrainer and RLOOTrainer on a tiny model. Prints one line for each and the greatest
difference of loss and gradient (or of advantages); the exit status is 1 if one is above 1e-6. TRL is installed by the extra
`bench`.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from zs_lightning.models.loading import load_model, load_tokenizer
from zs_lightning.models.specs import ModelSpec
from zs_lightning.rl.advantages import ESTIMATORS, compute_advantages
from zs_lightning.rl.losses import LossSpec, importance_weights, loss_denominator, micro_batch_loss
from zs_lightning.types import MicroBatch

SETTINGS = {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "CUDA_VISIBLE_DEVICES": ""}
"""Read when TRL is imported."""
MOST = 1e-6
CASES = 5
"""Random batches of each line; the worst counts."""
ROLLOUTS, GROUP, LENGTH, BUDGET = 8, 4, 12, 20


@dataclass(frozen=True)
class Line:
    """One loss of ours and the settings with which TRL computes the same.

    Args:
        trl: attributes of the trainer, or of its `args` if they begin with a dot.
        clip: bounds of the ratio in later updates on a batch; None in the only one.
    """

    name: str
    spec: LossSpec
    trl: dict[str, Any]
    clip: tuple[float, float] | None = (0.2, 0.2)
    kl_coef: float = 0.0


CORRECTED = {"use_vllm": True, "vllm_importance_sampling_mode": "token_truncate", "vllm_importance_sampling_clip_max": 1.5}
LINES = (
    Line("on-policy gradient, token mean", LossSpec(), {"loss_type": "dapo"}, clip=None),
    Line("clip, token mean", LossSpec(), {"loss_type": "dapo"}),
    Line("clip-higher, token mean (DAPO)", LossSpec(), {"loss_type": "dapo"}, (0.2, 0.28)),
    Line("clip, sequence mean (GRPO)", LossSpec(mean="sequence"), {"loss_type": "grpo"}),
    Line("clip, constant (Dr. GRPO)", LossSpec(mean="constant"), {"loss_type": "dr_grpo"}),
    Line("dual clip", LossSpec(dual_clip=1.4), {"loss_type": "dapo", ".delta": 1.4}),
    Line(
        "sequence ratio, sequence mean (GSPO)",
        LossSpec(mean="sequence", ratio="sequence"),
        {"loss_type": "grpo", "importance_sampling_level": "sequence"},
        (0.03, 0.04),
    ),
    Line("clip, token mean", LossSpec(), {"loss_type": "dapo"}, kl_coef=0.3),
    Line("clip, sequence mean", LossSpec(mean="sequence"), {"loss_type": "grpo"}, kl_coef=0.3),
    Line("clip, constant", LossSpec(mean="constant"), {"loss_type": "dr_grpo"}, kl_coef=0.3),
    Line("importance cap, token mean", LossSpec(importance_cap=1.5), {"loss_type": "dapo", **CORRECTED}, kl_coef=0.3),
    Line(
        "importance cap, sequence mean",
        LossSpec(mean="sequence", importance_cap=1.5),
        {"loss_type": "grpo", **CORRECTED},
        kl_coef=0.3,
    ),
)
PLAIN = {"importance_sampling_level": "token", "use_vllm": False, ".delta": None, ".use_bias_correction_kl": False}


@dataclass(kw_only=True)
class Batch:
    """Random rollouts, padded to [N, T] float64: a mask with holes where documents stand, and log-probabilities."""

    seed: int
    mask: Tensor = field(init=False)
    now: Tensor = field(init=False)
    first: Tensor = field(init=False)
    sampled: Tensor = field(init=False)
    reference: Tensor = field(init=False)
    advantages: Tensor = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        size = (ROLLOUTS, LENGTH)
        lengths = torch.randint(2, LENGTH + 1, (ROLLOUTS, 1), generator=generator)
        self.mask = (torch.arange(LENGTH) < lengths) & (torch.rand(size, generator=generator) < 0.7)
        self.mask[:, 0] = True

        def near(center: Tensor, distance: float) -> Tensor:
            return center + distance * torch.randn(size, generator=generator, dtype=torch.float64)

        self.first = near(torch.full(size, -1.5, dtype=torch.float64), 0.5)
        self.now, self.sampled, self.reference = near(self.first, 0.3), near(self.first, 0.3), near(self.first, 0.5)
        self.advantages = torch.randn(ROLLOUTS, generator=generator, dtype=torch.float64)


def make_trainer(kind: str, folder: str) -> Any:
    """A trainer of TRL on the miniature, one step of which takes a batch of ROLLOUTS."""
    import trl
    from datasets import Dataset

    config = getattr(trl, f"{kind}Config")(
        output_dir=folder,
        per_device_train_batch_size=ROLLOUTS,
        num_generations=GROUP,
        max_completion_length=BUDGET,
        beta=0.0,
        report_to=[],
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        disable_tqdm=True,
    )
    return getattr(trl, f"{kind}Trainer")(
        model=load_model(ModelSpec(device="cpu")),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=config,
        train_dataset=Dataset.from_list([{"prompt": "Who?"}] * 2),
        processing_class=load_tokenizer("miniature"),
    )


def settle(trainer: Any, settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        setattr(trainer.args if name[0] == "." else trainer, name.lstrip("."), value)


def trl_loss(trainer: Any, line: Line, batch: Batch) -> tuple[Tensor, Tensor]:
    """Loss and its gradient [N, T] as TRL computes them from the batch's log-probabilities."""
    settle(trainer, PLAIN | line.trl | {"beta": line.kl_coef, "current_gradient_accumulation_steps": 1})
    trainer.epsilon_low, trainer.epsilon_high = line.clip or (0.2, 0.2)
    now, mask = batch.now.clone().requires_grad_(), batch.mask.long()
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (now, torch.zeros_like(now), None)
    inputs = {
        "prompt_ids": torch.zeros(ROLLOUTS, 1, dtype=torch.long),
        "prompt_mask": torch.ones(ROLLOUTS, 1, dtype=torch.long),
        "completion_ids": torch.zeros_like(mask),
        "completion_mask": torch.ones_like(mask),
        "tool_mask": mask,
        "num_items_in_batch": mask.sum(),
        "advantages": batch.advantages,
        "ref_per_token_logps": batch.reference,
    }
    if line.spec.importance_cap:
        # The trainer makes it beforehand; advantage_differences compares how.
        inputs["importance_sampling_ratio"] = (batch.first - batch.sampled).exp().clamp(max=line.spec.importance_cap)
    if line.clip:
        inputs["old_per_token_logps"] = batch.first if line.spec.importance_cap else batch.sampled
    loss = trainer._compute_loss(trainer.model, inputs)
    return loss.detach(), torch.autograd.grad(loss, now)[0]


def our_loss(line: Line, batch: Batch) -> tuple[Tensor, Tensor]:
    """The same by this package, one trajectory after the other."""
    now, mask = batch.now.clone().requires_grad_(), batch.mask
    denominator = loss_denominator(line.spec.mean, int(mask.sum()), ROLLOUTS, BUDGET)
    total = torch.zeros((), dtype=torch.float64)
    for i in range(ROLLOUTS):
        kept = mask[i]
        none = torch.zeros(0, 0)
        part = MicroBatch(
            trajectories=[],
            input_ids=none.long(),
            loss_mask=none.bool(),
            old_logprobs=batch.sampled[i][kept],
            advantages=batch.advantages[i].expand(int(kept.sum())),
            rows=torch.zeros(int(kept.sum()), dtype=torch.long),
            first_logprobs=batch.first[i][kept],
            ref_logprobs=batch.reference[i][kept] if line.kl_coef else None,
        )
        bounds = {} if line.clip is None else {"clip_low": line.clip[0], "clip_high": line.clip[1]}
        spec = replace(line.spec, kl_coef=line.kl_coef, **bounds)
        total = total + micro_batch_loss(part, now[i][kept], spec, line.clip is not None, denominator)[0]
    return total.detach(), torch.autograd.grad(total, now)[0]


def trl_step(trainer: Any, batch: Batch, rewards: Tensor) -> dict[str, Any]:
    """What TRL makes of completions of the batch's lengths with these rewards [N]: advantages and importance weights."""
    lengths = batch.mask.sum(1).tolist()
    ids = [list(range(5, 5 + n)) for n in lengths]
    sampled = [row[:n].tolist() for row, n in zip(batch.sampled, lengths, strict=True)]
    made = [[[5]] * ROLLOUTS, ids, [""] * ROLLOUTS]
    if type(trainer).__name__ == "GRPOTrainer":
        made = [*made[:2], None, made[2], sampled, {}, None, None]
    trainer._generate = lambda prompts: made
    trainer._calculate_rewards = lambda *_: rewards[:, None]
    return trainer._generate_and_score_completions([{"prompt": "Who?"}] * ROLLOUTS)


def loss_differences(trainer: Any) -> Iterator[tuple[str, float]]:
    """Of each line, the greatest difference of loss and gradient."""
    computed = trainer._get_per_token_logps_and_entropies
    for line in LINES:
        worst = 0.0
        for seed in range(CASES):
            batch = Batch(seed=seed)
            theirs, ours = trl_loss(trainer, line, batch), our_loss(line, batch)
            if not ours[1].abs().max() > 1e-3:
                raise RuntimeError(f"{line.name}: no gradient to compare")
            worst = max(worst, *(float((a - b).abs().max()) for a, b in zip(theirs, ours, strict=True)))
        yield f"{line.name}{', KL 0.3' if line.kl_coef else ''}", worst
    trainer._get_per_token_logps_and_entropies = computed


def advantage_differences(grpo: Any, rloo: Any) -> Iterator[tuple[str, float]]:
    """Of each estimator, and of the importance weights, the greatest difference."""
    groups = torch.arange(ROLLOUTS) // GROUP
    settle(grpo, PLAIN | {"beta": 0.0})
    cases = (
        ("RLOO advantages", "rloo", rloo, {}, 1.0),
        ("GRPO advantages without std", "grpo_no_std", grpo, {"scale_rewards": "none"}, 1.0),
        # TRL adds 1e-4 to the deviation and the paper's code 1e-6: both are nothing beside a deviation of thousands.
        ("GRPO advantages, great rewards", "grpo", grpo, {"scale_rewards": "group"}, 1e4),
    )
    for name, estimator, trainer, settings, scale in cases:
        settle(trainer, settings)
        worst = 0.0
        for seed in range(CASES):
            rewards = scale * torch.rand(ROLLOUTS, generator=torch.Generator().manual_seed(seed)).double()
            theirs = trl_step(trainer, Batch(seed=seed), rewards)["advantages"]
            worst = max(worst, float((theirs - compute_advantages(ESTIMATORS[estimator], rewards, groups)).abs().max()))
        yield name, worst
    settle(grpo, CORRECTED)
    worst = 0.0
    for seed in range(CASES):
        made = trl_step(grpo, Batch(seed=seed), torch.rand(ROLLOUTS))
        ours = importance_weights(made["old_per_token_logps"], made["sampling_per_token_logps"], 1.5)
        mask = made["completion_mask"].bool()
        worst = max(worst, float((made["importance_sampling_ratio"] - ours)[mask].abs().max()))
    yield "importance weights", worst


def main() -> int:
    """Prints the table; returns the exit status."""
    for variable, value in SETTINGS.items():
        os.environ.setdefault(variable, value)
    table = Table("loss", "max difference", "", title="Against TRL", title_justify="left")
    reached = True
    with tempfile.TemporaryDirectory() as folder:
        grpo, rloo = (make_trainer(kind, folder) for kind in ("GRPO", "RLOO"))
        for name, difference in [*loss_differences(grpo), *advantage_differences(grpo, rloo)]:
            same = difference <= MOST
            reached &= same
            table.add_row(name, f"{difference:.1e}", "" if same else "DIFFERS")
    Console().print(table)
    return int(not reached)


if __name__ == "__main__":
    sys.exit(main())
