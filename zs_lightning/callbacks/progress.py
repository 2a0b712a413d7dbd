"""The progress bar: steps, time and up to four short metrics on 80 columns."""

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar
from rich.progress import ProgressColumn

BAR_WIDTH = 10


class StepProgress(RichProgressBar):
    """Counts training steps; the epochs of these runs mean nothing."""

    def _get_train_description(self, current_epoch: int) -> str:
        return "fit"

    @property
    def validation_description(self) -> str:
        return "val"

    @property
    def test_description(self) -> str:
        return "test"

    def configure_columns(self, trainer: L.Trainer) -> list[ProgressColumn]:
        """Those of Lightning without the steps per second, and a short bar."""
        text, bar, *others = super().configure_columns(trainer)
        bar.bar_width = BAR_WIDTH
        return [text, bar, *others[:2]]
