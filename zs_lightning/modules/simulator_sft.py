"""Stage 1: teaches a language model to write useful or noisy documents for a query (paper section
3.3)."""

import math
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable

from zs_lightning.errors import NotFiniteError, UserError
from zs_lightning.generation import Sampling
from zs_lightning.models.checks import check_trained_weights, longest
from zs_lightning.models.encoding import TextEncoder
from zs_lightning.models.loading import load_model, load_tokenizer, recompute_activations
from zs_lightning.models.logprobs import token_logprobs
from zs_lightning.models.lora import add_lora
from zs_lightning.models.specs import LoraSpec, ModelSpec
from zs_lightning.modules.accidents import within_memory
from zs_lightning.modules.ranks import add_up, gather, own_share, sum_gradients
from zs_lightning.modules.trainable import TrainableModule
from zs_lightning.rollout import micro_batches
from zs_lightning.runs.intervals import score_interval
from zs_lightning.search.meter import recalled
from zs_lightning.search.simulator import SimulatorSearch
from zs_lightning.streams import derive_seed
from zs_lightning.text.prompts import NOISY, USEFUL, fill
from zs_lightning.types import SearchRecord, SearchRequest

LENGTH_LIMIT = 4096


class SimulatorSFT(TrainableModule):
    """LoRA fine-tuning on (query, useful or noisy, documents) records; the prompt is not part of
    the loss.

    Args:
        model: the base model.
        lora: the adapter to train.
        prompts: template set; the same as the policy's simulator will use.
        optimizer: e.g. AdamW with its learning rate.
        warmup_steps: linear warm-up of the learning rate.
        decay: cosine decay after the warm-up.
        max_grad_norm: gradients are clipped to this norm; 0 does not clip.
        micro_batch_tokens: most padded tokens of one forward and backward pass; does not change the
            gradient.
        checkpointing: keep only the layers' inputs and compute the rest again in the backward pass:
            far less memory, more time.
        count: documents per search. Of a record with more the first are taught; one with fewer is
            ordered with its own number.
        max_new_tokens: most tokens of a result in validation.
        sampling: of results in validation.
        seed: None takes seed_everything.
    """

    task = "records"
    curves = "sft"
    headline = "sft/loss"
    sequel = "measure-simulator trained={}"
    best_metric = "simulator/gap"

    def __init__(
        self,
        model: ModelSpec = ModelSpec(),
        lora: LoraSpec = LoraSpec(),
        prompts: str = "zerosearch",
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=1e-4, weight_decay=0.0),
        warmup_steps: int = 20,
        decay: bool = True,
        max_grad_norm: float = 1.0,
        micro_batch_tokens: int = 16384,
        checkpointing: bool = False,
        count: int = 5,
        max_new_tokens: int = 600,
        sampling: Sampling = Sampling(temperature=0.8),
        seed: int | None = None,
    ) -> None:
        super().__init__(optimizer, warmup_steps, decay, max_grad_norm, seed, checkpointing, micro_batch_tokens)
        self.model = model
        self.lora = lora
        self.simulator = SimulatorSearch(
            model=model,
            prompts=prompts,
            count=count,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            max_length=LENGTH_LIMIT,
        )
        self.recall: dict[str, list[float]] = {}

    def setup(self, stage: str) -> None:
        if hasattr(self, "language_model"):
            return
        self.tokenizer = load_tokenizer(self.model.path)
        check_trained_weights(self.model, self.lora)
        # A chat template that refuses is reported before weights are loaded.
        self.simulator.check_room(self.tokenizer)
        model = load_model(self.model, merge=False, tokenizer=self.tokenizer)
        self.language_model = add_lora(model, self.lora, derive_seed(self.seed, "lora"))
        if self.checkpointing:
            recompute_activations(self.language_model)
        context = longest(self.language_model.config) or LENGTH_LIMIT
        self.simulator.max_length = min(LENGTH_LIMIT, context)
        self.simulator.attach(self.language_model, self.tokenizer)

    def encoders(self) -> list[TextEncoder]:
        return [self.simulator.encoder]

    def _request(self, record: SearchRecord, key: str, noise_prob: float) -> SearchRequest:
        return SearchRequest(
            key=key,
            query=record.query,
            example=record.example,
            turn=0,
            seed=derive_seed(self.seed, "record", key),
            noise_prob=noise_prob,
            shown=record.shown,
        )

    def _encode(self, record: SearchRecord) -> tuple[list[int], int]:
        """Ids of a record's prompt and of all that the simulator has to write after it; how many
        are the prompt's."""
        prompts = self.simulator.prompts
        encoder = self.simulator.encoder
        # The prompt orders as many documents as the target has: a model that learnt otherwise would
        # not keep to the number.
        documents = record.documents[: self.simulator.count]
        if record.label not in (USEFUL, *prompts.noises):
            known = ", ".join((USEFUL, *prompts.noises))
            to = "correct the record, or add the kind to a file of prompts"
            raise UserError(f"data: a record has the label {record.label!r}; expected {known}; {to}")
        request = self._request(record, "", 0.0)
        blind = self.simulator.orders.plan(request).withheld
        prompt = self.simulator.prompt_ids(request, record.label, len(documents), blind)
        written = ""
        for number, document in enumerate(documents, 1):
            text = f"{document.title}: {document.text}" if document.title else document.text
            written += fill(prompts.document, number=number, text=text)
        # It has to learn where to stop, by the template's own end or by the tokenizer's.
        ending = [self.tokenizer.eos_token_id]
        if prompts.simulator_stop:
            ending = encoder.literal(prompts.simulator_stop[0])
        ids = (prompt + encoder.untrusted(written) + ending)[: self.simulator.max_length]
        return ids, min(len(prompt), len(ids))

    def learn(self, batch: list[SearchRecord], batch_idx: int) -> None:
        rows = [self._encode(record) for record in batch]
        # Of the whole batch: the mean does not depend on micro-batches or ranks.
        tokens = sum(len(ids) - prompt for ids, prompt in rows)
        if not tokens:
            limit = self.simulator.max_length
            raise UserError(f"data: every prompt of step {batch_idx} fills the context of {limit} tokens; shorten the records")
        own = own_share(rows)
        self.language_model.train()

        def attempt(fitting: int) -> float:
            self.optimizers().zero_grad()  # type: ignore[union-attr]
            parts = micro_batches(own, fitting, length=lambda row: len(row[0]))
            self.phases("update", 0, len(parts))
            with self.seeded(batch_idx):
                return sum(self._backward(part, tokens) for part in parts)

        lengths = [len(ids) for ids, _ in rows]
        loss = add_up({"loss": within_memory(self.fitting, lengths, attempt)})["loss"]
        if not math.isfinite(loss):
            raise NotFiniteError("the loss was not finite; lower the learning rate, or use precision 32-true")
        sum_gradients(self.trainable().values())
        (norm,) = self.optimise()
        self.log_dict({"sft/loss": loss, "sft/grad_norm": norm, "sft/tokens": float(tokens)})
        self.log("loss", loss, prog_bar=True, logger=False)

    def _backward(self, rows: list[tuple[list[int], int]], tokens: int) -> float:
        """The rows' part of the loss, the mean over all trained tokens of the batch."""
        width = max(len(ids) for ids, _ in rows)
        input_ids = torch.zeros(len(rows), width, dtype=torch.long)
        loss_mask = torch.zeros(len(rows), width, dtype=torch.bool)
        for i, (ids, prompt) in enumerate(rows):
            input_ids[i, : len(ids)] = torch.tensor(ids)
            loss_mask[i, prompt : len(ids)] = True
        tensors = (input_ids.to(self.device), loss_mask.to(self.device))
        logprobs, _ = token_logprobs(self.language_model, *tensors)
        loss = -logprobs.sum() / tokens
        self.manual_backward(loss)
        return float(loss.detach())

    def on_validation_epoch_start(self) -> None:
        self.recall = {}

    def validation_step(self, batch: list[SearchRecord], batch_idx: int) -> None:
        """Writes useful documents and each kind of noise that the records have for the query of
        each record, and looks for the evidence in them."""
        labels = sorted({record.label for record in batch} - {USEFUL}) or [NOISY]
        asked = [i for i, record in enumerate(batch) if record.evidence]
        if not asked:
            return
        own = own_share(asked)
        self.language_model.eval()
        for label in (USEFUL, *labels):
            self.recall.setdefault(label, [])
            noise_prob = float(label != USEFUL)
            keys = {f"{batch_idx}/{i}/{label}": batch[i] for i in own}
            with self.simulator.orders.only(label):
                self.simulator.submit([self._request(row, key, noise_prob) for key, row in keys.items()])
        written = [result for share in gather(self.simulator.poll()) for result in share]
        self.simulator.close()
        for result in sorted(written, key=lambda result: int(result.key.split("/")[1])):
            _, number, label = result.key.split("/")
            # By what was ordered: a result that failed says nothing of it.
            self.recall[label].append(recalled(batch[int(number)], result.documents))

    def on_validation_epoch_end(self) -> None:
        means = {label: score_interval(found).mean for label, found in self.recall.items()}
        if not means:
            return
        for label, mean in means.items():
            self.log(f"simulator/{label}_recall", mean)
        useful = means.pop(USEFUL)
        noise = sum(means.values()) / len(means)
        # What the curriculum works by: noise must differ from what is useful.
        self.log(self.best_metric, useful - noise)
        if self.trainer.state.fn == "fit":  # Short names, for the progress bar alone.
            self.log_dict({"useful": useful, "noise": noise}, prog_bar=True, logger=False)

    test_step = validation_step
    on_test_epoch_start = on_validation_epoch_start
    on_test_epoch_end = on_validation_epoch_end

    def results(self) -> dict[str, Any]:
        """Shares of results that hold the asked fact, by what was ordered."""
        return {f"{label}_recall": score_interval(found).told(len(found)) for label, found in self.recall.items()}

    def save_model(self, folder: Path) -> None:
        """The adapter as a plain PEFT folder, with the tokenizer."""
        self.language_model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
