"""What both modules share: an optimiser from the config, a warm-up, and checkpoints that hold
trainable tensors only."""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from typing import Any

import lightning as L
import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from zs_lightning.errors import NotFiniteError, UserError, check_least
from zs_lightning.generation.memory import Fitting
from zs_lightning.models.encoding import TextEncoder
from zs_lightning.models.specs import ModelSpec
from zs_lightning.models.value_head import of_critic
from zs_lightning.modules.accidents import Skipped
from zs_lightning.modules.phases import Phases
from zs_lightning.modules.update import OptimiserStep
from zs_lightning.runs.checkpoints import check_tensors
from zs_lightning.streams import derive_seed, global_seed

_log = logging.getLogger(__name__)


class TrainableModule(L.LightningModule):
    """A module whose weights are one language model, loaded in `setup` and partly frozen."""

    task: str
    """What the rows of its data are, see QADataModule."""
    best_metric: str = ""
    """The metric of a validation by which the best model of a run is kept; empty keeps none."""
    curves: str
    """What TensorBoard's tags of its training begin with."""
    headline: str
    """The metric of a training step that says most."""
    learns_from_rollouts = False
    """Whether the trajectories of a training step are the policy's own."""
    sequel: str
    """The command that comes after a fit, with {} for its run folder."""
    model: ModelSpec

    def __init__(
        self,
        optimizer: OptimizerCallable,
        warmup_steps: int,
        decay: bool,
        max_grad_norm: float,
        seed: int | None,
        checkpointing: bool,
        micro_batch_tokens: int,
    ) -> None:
        super().__init__()
        check_least(
            "model",
            warmup_steps=(warmup_steps, 0),
            max_grad_norm=(max_grad_norm, 0),
            micro_batch_tokens=(micro_batch_tokens, 1),
        )
        # A wrong learning rate is reported before the weights are loaded, which takes long.
        try:
            optimizer([torch.nn.Parameter(torch.zeros(1))])
        except ValueError as error:
            raise UserError(f"model.optimizer: {error}") from error
        # Several backward passes and sometimes several updates make one training step.
        self.automatic_optimization = False
        # Checkpoints hold what is trained and nothing else.
        self.strict_loading = False
        self.optimizer = optimizer
        self.warmup_steps = warmup_steps
        self.decay = decay
        self.max_grad_norm = max_grad_norm
        self.seed = global_seed(seed)
        self.checkpointing = checkpointing
        self.optimiser_step = OptimiserStep(max_grad_norm)
        self.phases = Phases()
        self.micro_batch_tokens = micro_batch_tokens
        instead = "shorten the longest rows, or set model.checkpointing: true or model.model.quantization: nf4"
        self.fitting = Fitting("model.micro_batch_tokens", micro_batch_tokens, instead)
        self.skipped = Skipped()

    def specs(self) -> dict[str, ModelSpec]:
        """The models that it loads, by their keys."""
        return {"model.model": self.model}

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """The weights that training changes, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def parameter_groups(self) -> list[tuple[dict[str, Any], int]]:
        """The optimiser's groups of weights, each with its warm-up in training steps."""
        return [({"params": list(self.trainable().values())}, self.warmup_steps)]

    def planned_steps(self) -> float:
        """The steps over which noise and learning rate are planned: of a run that goes on for more,
        those it began with. Infinity before the data is set up."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        return getattr(data, "planned", None) or self.trainer.num_training_batches

    def configure_optimizers(self) -> Any:
        groups = self.parameter_groups()
        optimizer = self.optimizer([group for group, _ in groups])
        factors = [self._factor(warmup_steps) for _, warmup_steps in groups]
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, factors)]

    def _factor(self, warmup_steps: int) -> Callable[[int], float]:
        def factor(step: int) -> float:
            # Asked for here and not before: Lightning would set up the data too early to restore
            # its position on resume.
            total = self.planned_steps()
            # The first step too has a rate above 0, or it would be a rollout without an update.
            warm = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
            if not self.decay:
                return warm
            # Down to 2 %, so that the last steps still learn.
            cosine = 0.5 * (1 + math.cos(math.pi * min(1, step / total)))
            return warm * max(0.02, cosine)

        return factor

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Forgets what the step before measured: Lightning would log it for this one as well."""
        self.trainer.fit_loop.epoch_loop._results.clear()

    def training_step(self, batch: Sequence[Any], batch_idx: int) -> None:
        """Learns from the batch. A step that meets a number which is not finite changes no weight
        from there on: its rows are written down, and it is counted. Raises RunError if such steps
        followed each other."""
        before = self.optimiser_step.taken
        try:
            self.learn(batch, batch_idx)
            self.skipped.in_a_row = 0
        except NotFiniteError as error:
            self.optimizers().zero_grad()  # type: ignore[union-attr]
            taken = self.optimiser_step.taken - before
            if self.global_rank == 0:
                part = f" from update {taken + 1} on" if taken else ""
                _log.warning("step %d is skipped%s: %s", batch_idx + 1, part, error)
            self.skipped.add(batch_idx + 1, str(error), self.forget_step(bool(taken)) or batch)
        self.fitting.grows()
        self.step_scheduler()
        counts = {"skipped_steps": self.skipped.total, "micro_batch_tokens": self.fitting.now}
        self.log_dict({f"{self.curves}/{name}": float(count) for name, count in counts.items()})

    def learn(self, batch: Any, batch_idx: int) -> None:
        """A training step, but for the learning rate. Raises NotFiniteError, on every rank alike,
        before an update changes a weight or the optimiser's state."""
        raise NotImplementedError

    def forget_step(self, updated: bool) -> Sequence[Any]:
        """What was made of the rows of a step that is skipped; nothing else shall learn from it,
        unless the weights were `updated` on it."""
        return []

    def optimise(self) -> list[float]:
        """One optimiser step on the gradients that are there; returns each group's norm."""
        return self.optimiser_step(self.optimizers())

    def on_fit_end(self) -> None:
        """Says so if the whole run changed nothing."""
        # A new adapter does nothing while its second half is 0. Of other weights, a part of a run
        # does not know.
        trained = self.trainable().items()
        second = [p for name, p in trained if "lora_B" in name and not of_critic(name)]
        is_new = bool(second) and not any(parameter.any() for parameter in second)
        unchanged = is_new or not (self.optimiser_step.had_gradients or self.trainer.ckpt_path)
        if unchanged and self.trainer.is_global_zero and not self.trainer.interrupted:
            equal = "equal to their base" if is_new else "what they were before"
            why = ", ".join(self.reasons())
            _log.warning("fit: nothing was learnt, the weights are %s: %s", equal, why)

    def reasons(self) -> list[str]:
        """Why nothing may have been learnt."""
        had = self.optimiser_step.had_gradients
        return ["there were gradients, so see the learning rate" if had else "all gradients were 0"]

    @contextmanager
    def seeded(self, step: int) -> Iterator[None]:
        """Dropout, which alone draws from torch's global generator, as a function of seed and step:
        a resumed run draws as one that never stopped."""
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            seed = derive_seed(self.seed, "dropout", step, self.global_rank)
            torch.manual_seed(seed)  # noqa: TID251 - in fork_rng
            yield

    def step_scheduler(self) -> None:
        """Once per training step: the schedule is over training steps, not over updates."""
        self.lr_schedulers().step()  # type: ignore[union-attr]

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Batches are lists of rows; the tensors made of them are moved where they are made."""
        return batch

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:  # type: ignore[override]
        """Trainable tensors only: the frozen, perhaps quantised, base is loaded from its own
        files."""
        return {name: parameter.detach() for name, parameter in self.trainable().items()}

    def encoders(self) -> list[TextEncoder]:
        """What makes the prompts, after `setup`."""
        return []

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["skipped"] = [self.skipped.total, self.skipped.in_a_row]
        fitting = self.fitting
        checkpoint["fitting"] = [fitting.most, fitting.now, fitting.fitted, fitting.patience]
        checkpoint["date"] = [encoder.date.isoformat() for encoder in self.encoders()]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_tensors(checkpoint["state_dict"], self.trainable())
        self.skipped.total, self.skipped.in_a_row = checkpoint.get("skipped", [0, 0])
        most, *now = checkpoint.get("fitting", [None])
        if most == self.fitting.most:  # Else the user wants another size from here on.
            self.fitting.now, self.fitting.fitted, self.fitting.patience = now
        for encoder in self.encoders():
            dates = [*checkpoint.get("date", []), encoder.date.isoformat()]
            encoder.date = date.fromisoformat(dates[0])
