"""The two stages, and a supervised start before the second, as LightningModules."""

from zs_lightning.modules.policy_rl import PolicyRL
from zs_lightning.modules.policy_sft import PolicySFT
from zs_lightning.modules.simulator_sft import SimulatorSFT

__all__ = ["PolicyRL", "PolicySFT", "SimulatorSFT"]
