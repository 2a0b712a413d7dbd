"""Questions and simulator records, and the data module that both Lightning modules share."""

from zs_lightning.data.datamodule import QADataModule
from zs_lightning.data.files import FileSource
from zs_lightning.data.mixed import MixedSource

__all__ = ["FileSource", "MixedSource", "QADataModule"]
