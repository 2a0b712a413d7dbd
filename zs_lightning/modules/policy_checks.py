"""What is refused of a policy's options before a model is loaded, so that estimate sees it as
well."""

from zs_lightning.errors import UserError
from zs_lightning.models.specs import LoraSpec
from zs_lightning.rl.advantages import COMPARE
from zs_lightning.rl.pool import RefillSpec

PPO = "ppo"
"""The estimator whose advantages a critic makes."""


def check_clean(share: float, group_size: int) -> None:
    """Raises UserError if a share of a group's rollouts is in whole ones none of them, or all."""
    count = round(share * group_size)
    if 0 < share < 1 and count in (0, group_size):
        possible = f", or from {1 / group_size:g} to {1 - 1 / group_size:g}" if group_size > 1 else ""
        said = f"{share:g} of a group of {group_size} is {count} rollouts"
        raise UserError(f"model.rollout.clean_share: {said}; expected 0 or 1{possible}, or set another group_size")


def check_groups(
    estimator: str,
    group_size: int,
    lora: LoraSpec | None,
    clean_share: float,
    refill: RefillSpec | None,
) -> None:
    """Raises UserError if the estimator cannot do with groups of this size, these weights, or
    groups that are replaced."""
    check_clean(clean_share, group_size)
    # An estimator of one's own may do with a single rollout, which nobody knows here.
    if group_size < 2 and estimator in COMPARE:
        raise UserError(f"model: estimator {estimator} compares the rollouts of a group; set group_size to 2 or more")
    if estimator == PPO and lora is None:
        raise UserError(
            "model: estimator ppo has its critic on the policy's base model, which `lora: null` "
            "would train; set lora, such as lora: {r: 16}"
        )
    if refill:
        refill.check(estimator, group_size)
