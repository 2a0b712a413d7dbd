"""The two stages as LightningModules."""

from zs_lightning.modules.policy_rl import PolicyRL
from zs_lightning.modules.simulator_sft import SimulatorSFT

__all__ = ["PolicyRL", "SimulatorSFT"]
