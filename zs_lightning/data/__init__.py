"""Questions and simulator records, and the data module that both Lightning modules share."""

from zs_lightning.data.datamodule import QADataModule

__all__ = ["QADataModule"]
