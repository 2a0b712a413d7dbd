"""Schedule, pictures and what a run leaves behind."""

from zs_lightning.callbacks.alarms import Alarms
from zs_lightning.callbacks.board import Board
from zs_lightning.callbacks.noise_annealing import NoiseAnnealing, NoiseBySuccess
from zs_lightning.callbacks.run_files import RunFiles

__all__ = ["Alarms", "Board", "NoiseAnnealing", "NoiseBySuccess", "RunFiles"]
