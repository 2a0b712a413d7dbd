"""The policy at work: its weights, a generator for them, and the search engine it asks.

The actor is what training, validation, tests and a person's questions have in common. It is made
before weights are loaded, so that a chat template that refuses or a server that is down is reported
within a second, and gets the policy with `attach`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

from zs_lightning.generation import Generator, MixedAdapters, Sampling, StopTags, own_adapter
from zs_lightning.generation.memory import Fitting
from zs_lightning.models.encoding import TextEncoder
from zs_lightning.models.lora import TRAINED, add_adapter
from zs_lightning.models.vocabulary import end_ids
from zs_lightning.rollout.rollouter import Rollouter, RolloutSpec, Tell, Watch
from zs_lightning.search import SearchEngine
from zs_lightning.search.simulator import ADAPTER
from zs_lightning.text.prompts import Prompts
from zs_lightning.text.protocol import STOP_TAGS
from zs_lightning.types import QAExample, Trajectory


class Actor:
    """Rolls the policy out with the weights that it has at the moment.

    Args:
        tokenizer: the policy's.
        search: the engine; a simulator on the policy's base writes in the policy's generator.
        other: an engine that some rollouts ask in its place; no simulator in this process.

    Raises:
        UserError: the chat template refuses a prompt, or a search engine cannot be used.
    """

    def __init__(
        self,
        tokenizer: Any,
        search: SearchEngine,
        prompts: Prompts,
        spec: RolloutSpec,
        other: SearchEngine | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.search = search
        self.other = other
        self.prompts = prompts
        self.spec = spec
        self.encoder = TextEncoder(tokenizer)
        self.stop = StopTags(tokenizer, STOP_TAGS)
        # For all its generators: on a GPU each rollout has one of its own.
        instead = "lower model.rollout.max_length, or set model.model.quantization: nf4"
        extra = search.simulator.slots if search.simulator and search.simulator.shared else 0
        key = "model.rollout.slots" + (" and model.search.slots" if extra else "")
        self.fitting = Fitting(key, spec.slots + extra, instead)
        self.generator: Generator | None = None
        self.policy: Any = None
        self.tell: Tell = lambda *_: None
        """Is told how far a rollout is."""
        # Some templates refuse a system message or a thought: said here, not in the first rollout.
        self.encoder.prompt(spec.template(prompts), {}, prompts.chat, thinking=prompts.thinking)
        simulator = search.simulator
        self.shared = simulator if simulator and simulator.shared else None
        """The simulator, if it is on the policy's base."""
        if self.shared:
            self.shared.check_room(tokenizer)
        # A server that is down or a corpus that is missing is said now.
        search.setup()
        if other is not None:
            other.setup()

    def attach(self, policy: Any) -> None:
        """Takes the policy, a causal language model with or without adapters."""
        self.policy = policy
        # The tokenizer does not tell all of them: generation_config lies beside the weights.
        self.stop.end_ids = end_ids(self.tokenizer, policy)
        if self.shared:
            if self.shared.spec.adapter:
                add_adapter(policy, self.shared.spec.adapter, ADAPTER, "model.search.model")
            self.shared.attach(policy, self.tokenizer)

    def encoders(self) -> list[TextEncoder]:
        """What makes prompts: the policy's, and a simulator's."""
        if self.search.simulator:
            return [self.encoder, self.search.simulator.encoder]
        return [self.encoder]

    def roll_out(
        self,
        examples: Sequence[QAExample],
        group_size: int,
        seed: int,
        noise_prob: float = 0.0,
        sampling: Sampling | None = None,
        watch: Watch | None = None,
        search: SearchEngine | None = None,
        max_turns: int | None = None,
    ) -> list[Trajectory]:
        """`group_size` trajectories for each example, in this order; see Rollouter.run. Sampling
        and turns are as in training, and the engine is the actor's own, unless others are given;
        `watch` sees the trajectories grow."""
        spec = self.spec if max_turns is None else replace(self.spec, max_turns=max_turns)
        with self.generating() as generator:
            rollouter = Rollouter(
                generator,
                self.encoder,
                search or self.search,
                self.prompts,
                spec,
                self.stop,
                adapter=TRAINED if generator.adapters else "",
                noise_prob=noise_prob,
                watch=watch,
                tell=self.tell,
            )
            return rollouter.run(examples, group_size, seed, sampling)

    @contextmanager
    def generating(self) -> Iterator[Generator]:
        """The policy in eval mode, in which it stays, with a generator.

        On a GPU its K/V memory is given back afterwards, where the update needs it; on a CPU it is
        kept, since memory that is touched for the first time is slow there.
        """
        # Dropout and checkpointing would change what is sampled, and what it is said to be likely.
        self.policy.eval()
        if self.generator is None:
            self.generator = self._new_generator()
        generator = self.generator
        try:
            # Inside, layers with adapters choose each row's own; outside, peft's forward is back.
            with generator.adapters or nullcontext():
                yield generator
        except (Exception, KeyboardInterrupt):
            # Lightning calls teardown only at the end of a run that nothing stopped. The generator
            # goes too: a step that is skipped is followed by one that a simulator has to join anew.
            self.close()
            raise
        else:
            if generator.device.type == "cuda":
                self.close()

    def _new_generator(self) -> Generator:
        """One for the policy alone, or one for the policy and a simulator on the same base."""
        length = self.spec.max_length
        simulator = self.shared
        if simulator is None:
            return Generator(self.policy, self.fitting, length, own_adapter(self.policy, TRAINED))
        # Without an adapter of its own the simulator's rows are the bare base's.
        names = [TRAINED, ADAPTER] if simulator.spec.adapter else [TRAINED]
        adapters = MixedAdapters(self.policy, names)
        length = max(length, simulator.max_length)
        # Policy rows that wait for documents keep their slots; those are written in the reserved.
        generator = Generator(self.policy, self.fitting, length, adapters, reserved=simulator.slots)
        # From here on it submits its rows to this generator, which the rollouter steps.
        simulator.join(generator)
        return generator

    def close(self) -> None:
        """Gives the generator's memory back and ends what the search engines have running."""
        # A simulator in the policy's generator leaves with it.
        self.generator = None
        self.search.close()
        if self.other is not None:
            self.other.close()
