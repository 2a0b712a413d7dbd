"""A configuration as `fit` reads it, up to the point where it would load or write something."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from zs_lightning.commands.estimate.job import Job, read
from zs_lightning.configuration.lightning_cli import ZeroSearchCLI
from zs_lightning.configuration.paths import check_schema


class Reader(ZeroSearchCLI):
    """Makes the modules of a configuration, but no trainer and no run folder."""

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        LightningCLI.parse_arguments(self, parser, args)
        check_schema(self.config["fit"]["schema"])

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        return None

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def read_config(args: Sequence[str]) -> Job:
    """The job of `fit` with these arguments.

    Raises:
        UserError: an option is wrong.
    """
    cli = Reader(["fit", *args])
    data = cli.datamodule
    return read(cli.model, data.batch_size, data.steps, cli.config["fit"]["trainer"]["precision"])
