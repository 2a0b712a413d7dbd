"""The two stages, and a supervised start before the second, as LightningModules; a reward that
asks a server."""

from zs_lightning.modules.judged_answer import JudgedAnswer
from zs_lightning.modules.policy_rl import PolicyRL
from zs_lightning.modules.policy_sft import PolicySFT
from zs_lightning.modules.simulator_sft import SimulatorSFT

__all__ = ["JudgedAnswer", "PolicyRL", "PolicySFT", "SimulatorSFT"]
