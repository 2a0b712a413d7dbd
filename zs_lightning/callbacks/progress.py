"""The progress bar: steps and time, below it metrics and what the step is doing, on 80 columns."""

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
        """Lightning's, with the metrics and the phase of the step in lines below."""
        before = self.progress
        super()._init_progress(trainer)
        progress: Any = self.progress
        if progress is None or progress is before:
            return
        # In a line of their own: four metrics do not fit beside the bar.
        *progress.columns, metrics = progress.columns
        progress.get_renderables = lambda: [self.with_lines(progress, metrics, trainer.lightning_module)]

    def with_lines(self, progress: Progress, metrics: Any, module: Any) -> Group:
        """What a terminal shows; between steps no phase stands below the bar."""
        said = (" ".join(metrics._generate_metrics_texts()), module.phases.line())
        below = [Text(f"    {s}", style="dim", no_wrap=True, overflow="ellipsis") for s in said if s]
        return Group(progress.make_tasks_table(progress.tasks), *below)

    def configure_columns(self, trainer: L.Trainer) -> list[ProgressColumn]:
        """Those of Lightning without the steps per second, and a short bar."""
        text, bar, *others = super().configure_columns(trainer)
        bar.bar_width = BAR_WIDTH
        return [text, bar, *others[:2]]
