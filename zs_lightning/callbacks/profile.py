"""Tells where the seconds of a fit's steps go: the option --profile."""

import json
from collections import defaultdict
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import lightning as L
import torch
from lightning.pytorch.profilers import Profiler

from zs_lightning.callbacks.run_files import RunFiles
from zs_lightning.errors import RunError
from zs_lightning.runs import folder as files
from zs_lightning.runs.checkpoints import write_whole
from zs_lightning.runs.profile import ROWS, Measured, Setup, advice, lines
from zs_lightning.text.protocol import query_key
from zs_lightning.text.shown import visible

STEP = "run_training_batch"
"""Lightning's name for what a module does in a step."""
HOOK = "[Callback]"
SAVING = ("RunFiles.on_train_batch_start", "RunFiles.on_validation_end")
"""Where checkpoints and the best model are saved."""


class Profile(L.Callback):
    """Times whole steps, each from the beginning of its work to that of the next one's, with the
    validations and saves in between; what is saved after the last one is no step's. The first one
    warms up and counts only if it is alone. `files` keeps the run folder; the module, which is
    trained, has TimedPhases.
    """

    def __init__(self, files: RunFiles, module: Any) -> None:
        self.files = files
        self.module = module
        self.phases = module.phases
        self.steps = 0
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.counts: defaultdict[str, float] = defaultdict(float)
        self.working, self.worked = False, False
        self.written = 0.0
        self.said: list[str] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if pl_module.device.type == "cuda":
            # Only here: without a profile nothing waits for a card between two phases.
            self.phases.settle = lambda: torch.cuda.synchronize(pl_module.device)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *others: Any) -> None:
        # Not where the step's work ends, which may be by an error.
        self.worked = True
        self.phases.counts |= self._work()

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.phases.push("validation")

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.phases.pop()

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._close()
        if self.steps and trainer.is_global_zero:
            found = self._measured()
            self.said = lines(found)
            content = json.dumps(asdict(found) | {"advice": advice(found)}, indent=2)
            write_whole(self.files.folder / files.PROFILE, content + "\n")

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        # What stopped the run is to be told, not a full disk or a card that is lost.
        with suppress(RunError, RuntimeError):
            self.on_train_end(trainer, pl_module)
        self.teardown(trainer, pl_module, "")

    def teardown(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        for line in self.said:
            print(visible(line))
        self.said = []

    # ------------------------------------------------------------------ what Lightning does

    def begins(self, action: str) -> None:
        if action == STEP:
            # Not at its hooks, where the step before is still saved.
            self._close()
            self.working, self.written = True, self._tokens_written()
        elif hook := self._hook(action):
            self.phases.push("saves" if hook in SAVING else hook)

    def ends(self, action: str) -> None:
        if action == STEP:
            self.phases("")
            self.working = False
        elif self._hook(action):
            self.phases.pop()

    def _hook(self, action: str) -> str:
        """A callback's name and hook; empty for others, for this one's, and for those in the middle
        of a step's work, which stay a part of it."""
        name = action.removeprefix(HOOK)
        return "" if self.working or name == action or name.startswith("Profile.") else name

    def _close(self) -> None:
        """Ends the step before, if it has done its work, and begins one."""
        self.phases.charge()
        if self.worked:
            if self.steps == 1:  # Now there is one that does not warm up.
                self.seconds.clear()
                self.counts.clear()
            self.steps += 1
            for sums, step in ((self.seconds, self.phases.seconds_of), (self.counts, self.phases.counts)):
                for name, value in step.items():
                    sums[name] += value
        self.worked = False
        self.phases.clear()

    # ------------------------------------------------------------------ what was done

    def _tokens_written(self) -> float:
        engine = getattr(self.module, "search", None)
        return float(engine.counted().get("tokens", 0.0)) if engine and engine.simulator else 0.0

    def _work(self) -> dict[str, float]:
        """What the step did, by this process's share."""
        module, ranks = self.module, self.module.trainer.world_size
        if not hasattr(module, "update"):  # A SimulatorSFT, which has no rollouts.
            return {"trained": float(module.trainer.callback_metrics.get("sft/tokens", 0.0)) / ranks}
        trajectories = module.trajectories
        asked = [(t.example.key, query_key(turn.content)) for t in trajectories for turn in t.searches if not turn.repeated]
        found = {
            "rollouts": len(trajectories),
            "sampled": sum(sum(t.loss_mask) for t in trajectories),
            "searches": len(asked),
            "repeated": len(asked) - len(set(asked)),
        }
        # Every rank has the trajectories of all.
        shares = {name: count / ranks for name, count in found.items()}
        counted = module.update.counted
        trained = {"trained": counted["trained"] * module.updates_per_rollout}
        return shares | {"written": self._tokens_written() - self.written} | counted | trained

    def _setup(self) -> Setup:
        module, card = self.module, None
        if module.device.type == "cuda":
            memory = torch.cuda.get_device_properties(module.device).total_memory
            card = torch.cuda.max_memory_allocated(module.device) / memory
        if not hasattr(module, "update"):
            return Setup(has_adapter=module.lora is not None, checkpointing=module.checkpointing, card=card)
        engine, fitting, slots = module.search, module.actor.fitting, module.rollout.slots
        simulator, http = engine.simulator, getattr(engine, "http", None)
        kind = "server" if http else "local"
        if simulator:
            kind = "policy" if simulator.shared else "simulator"
        kept = simulator.cache_path if simulator else http and http.cache
        return Setup(
            slots=slots * fitting.now // fitting.most,
            asked_slots=slots,
            engine=kind,
            search_slots=simulator.slots if simulator else http.concurrency if http else 0,
            result_tokens=simulator.max_new_tokens if simulator else 0,
            # Only what a model writes is drawn anew when it is asked again.
            shares_results=not hasattr(engine, "orders") or bool(kept and engine.orders.variants),
            has_adapter=module.lora is not None,
            checkpointing=module.checkpointing,
            updates=module.updates_per_rollout,
            card=card,
        )

    def _measured(self) -> Measured:
        steps = max(1, self.steps - 1)
        rows: defaultdict[str, float] = defaultdict(float)
        callbacks: defaultdict[str, float] = defaultdict(float)
        for name, seconds in self.seconds.items():
            rows[name if name in ROWS else "callbacks"] += seconds / steps
            if name not in ROWS:
                callbacks[name.partition(".")[0]] += seconds / steps
        counts = {name: count / steps for name, count in self.counts.items()}
        return Measured(steps, dict(rows), dict(callbacks), counts, self._setup(), self.steps == 1)


class Hooks(Profiler):
    """Tells the listener what Lightning tells its profiler: what it does, and which callback it
    asks."""

    def __init__(self, listener: Profile) -> None:
        super().__init__()
        self.listener = listener

    def start(self, action_name: str) -> None:
        self.listener.begins(action_name)

    def stop(self, action_name: str) -> None:
        self.listener.ends(action_name)
