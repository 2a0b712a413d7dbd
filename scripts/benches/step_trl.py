"""TRL's side of step-vs-trl: GRPOTrainer with the simulator as its tool."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback

from benches.step_plan import QUERY, Clock, Step, Work

QUESTION = "ka lo mi " * 16
ANSWER = "ka lo mi tra " * 3
"""What a search returns: its words do not matter, but their number must be the same for all."""
CALL = {"type": "function", "function": {"name": "search", "arguments": {"query": QUERY}}}


class WholeStep(TrainerCallback):
    """CPU seconds of the one optimiser step, its rollouts included."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.start = clock, 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.start = time.process_time()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.clock.seconds["total"] = time.process_time() - self.start


class Simulator:
    """The tool: one query, one `generate`, as TRL calls it."""

    def __init__(self, path: str, tokens: int) -> None:
        self.model, self.tokenizer = AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
        self.tokens, self.calls = tokens, 0

    def answer(self, query: str) -> str:
        ids = self.tokenizer(query, return_tensors="pt")["input_ids"]
        length = {"min_new_tokens": self.tokens, "max_new_tokens": self.tokens}
        mask = torch.ones_like(ids)
        output = self.model.generate(ids, attention_mask=mask, do_sample=True, temperature=0.8, pad_token_id=0, **length)
        self.tokenizer.decode(output[0, ids.shape[1] :])
        self.calls += 1
        return ANSWER


def tokenizer_for_tools(path: str) -> Any:
    """With a chat template that TRL knows how to call tools with."""
    import trl

    tokenizer = AutoTokenizer.from_pretrained(path, eos_token="<|im_end|>", padding_side="left")
    tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text()
    return tokenizer


def always_search(tokenizer: Any, ids: list[int], *_: Any, **__: Any) -> dict[str, Any]:
    """In place of TRL's reading of a turn: max_tool_calling_iterations ends it."""
    return {"role": "assistant", "content": tokenizer.decode(ids), "tool_calls": [CALL]}


def make_trainer(paths: tuple[str, str], work: Work, folder: str, tool: Any, reward: Any, clock: Clock) -> Any:
    from datasets import Dataset
    from peft import LoraConfig
    from trl import GRPOConfig, GRPOTrainer

    config = GRPOConfig(
        output_dir=folder,
        per_device_train_batch_size=min(work.micro, work.rows),
        gradient_accumulation_steps=max(1, work.rows // work.micro),
        num_generations=work.group,
        max_completion_length=4096,
        max_tool_calling_iterations=work.searches,
        generation_kwargs={"min_new_tokens": work.turn},
        max_steps=1,
        beta=0.0,
        learning_rate=1e-5,
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        disable_tqdm=True,
    )
    tokenizer = tokenizer_for_tools(paths[0])
    model = AutoModelForCausalLM.from_pretrained(paths[0])
    for settings in (model.config, model.generation_config):
        settings.eos_token_id, settings.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": QUESTION}]}] * work.questions),
        processing_class=tokenizer,
        tools=[tool],
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
        callbacks=[WholeStep(clock)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.generation_config.max_new_tokens = work.turn
    return trainer


def run(paths: tuple[str, str], work: Work) -> Step:
    """One step; random rewards, so that every rollout has an advantage."""
    clock, simulator, lengths, prompts = Clock(), Simulator(paths[1], work.result), [], []
    timed = clock.wrap("simulator", simulator.answer)

    def search(query: str) -> str:
        """Searches.

        Args:
            query: what to search for.

        Returns:
            The documents.
        """
        return timed(query)

    def reward(completions: list[Any], completion_ids: list[list[int]], **_: Any) -> list[float]:
        lengths.extend(map(len, completion_ids))
        return [float(i % 3) for i in range(len(completions))]

    with tempfile.TemporaryDirectory() as folder, patch("trl.trainer.grpo_trainer.parse_response", always_search):
        trainer = make_trainer(paths, work, folder, search, reward, clock)
        turn = clock.wrap("generation", trainer._generate_single_turn)

        def single_turn(prompt_ids: list[list[int]], *args: Any, **options: Any) -> Any:
            prompts.append([len(ids) for ids in prompt_ids])
            return turn(prompt_ids, *args, **options)

        trainer._generate_single_turn = single_turn
        trainer.train()
    sampled = work.rows * (work.searches + 1) * work.turn
    found = {
        "prompt tokens": sum(prompts[0]),
        "sampled tokens": sampled,
        "result tokens": sum(lengths) - sampled,
        "simulator tokens": simulator.calls * work.result,
        "trained weights": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
    }
    return Step(seconds=clock.split(), counts=found)
