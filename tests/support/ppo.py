"""A policy of PPO without a Trainer, and trajectories for it."""

import torch

from support.detached import DetachedPolicy, NoEngine, random_trajectories, slow_rows
from zs_lightning.models.specs import LoraSpec, ModelSpec
from zs_lightning.modules.critic import CriticSpec

GAMMA, LAM = 0.97, 0.9


def policy(lr=0.1, **options):
    """The miniature with plain SGD and no clipping of gradients; every adapter and the critic's head are moved."""
    options = {"max_grad_norm": 0.0, "lora": LoraSpec(r=4), "seed": 0, "critic": CriticSpec(gamma=GAMMA, lam=LAM), **options}
    module = DetachedPolicy(NoEngine(), model=ModelSpec(device="cpu"), prompts="miniature", estimator="ppo", **options)
    module.setup("fit")
    generator = torch.Generator().manual_seed(1)
    for name, parameter in module.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05, generator=generator)
    module.critic.model.weight.data.normal_(0, 0.02, generator=generator)
    groups = [{"params": group["params"]} for group, _ in module.parameter_groups()]
    return module.attach(torch.optim.SGD(groups, lr=lr))


def rollouts(seed, count=7):
    """Trajectories with rewards, sampled not far from the policy; one has no sampled token."""
    rows, model = random_trajectories(seed, count), policy().policy
    generator = torch.Generator().manual_seed(seed)
    rows[2].loss_mask = [False] * len(rows[2].loss_mask)
    for i, row in enumerate(rows):
        row.reward, row.advantage = i % 3 / 2, 0.0
        with torch.no_grad():
            now = iter(slow_rows(model, row, 1.0)[0].tolist())
        noise = (0.3 * torch.randn(len(row.loss_mask), generator=generator)).tolist()
        row.old_logprobs = [next(now) + e if sampled else 0.0 for sampled, e in zip(row.loss_mask, noise, strict=True)]
    return rows
