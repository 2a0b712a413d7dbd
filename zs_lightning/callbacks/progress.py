"""The progress bar: steps, time, up to four short metrics, and below what the step is doing, on 80
columns."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar
from rich.console import Group
from rich.progress import Progress, ProgressColumn
from rich.text import Text

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

    def _init_progress(self, trainer: L.Trainer) -> None:
        """Lightning's, with the phase of the step in a line below."""
        before = self.progress
        super()._init_progress(trainer)
        if (progress := self.progress) is None or progress is before:
            return
        found: Any = progress
        found.get_renderables = lambda: [self.with_phase(progress, trainer.lightning_module)]

    def with_phase(self, progress: Progress, module: Any) -> Group:
        """What a terminal shows; between steps nothing stands below the bar."""
        said = module.phases.line()
        below = [Text(f"    {said}", style="dim", no_wrap=True, overflow="ellipsis")] if said else []
        return Group(progress.make_tasks_table(progress.tasks), *below)

    def configure_columns(self, trainer: L.Trainer) -> list[ProgressColumn]:
        """Those of Lightning without the steps per second, and a short bar."""
        text, bar, *others = super().configure_columns(trainer)
        bar.bar_width = BAR_WIDTH
        return [text, bar, *others[:2]]
