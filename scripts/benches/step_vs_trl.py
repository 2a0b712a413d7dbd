"""One whole GRPO step with a simulated search: ours against TRL's trainer with the same simulator as its tool.

Both sides: 8 questions x 4 rollouts, LoRA on all linear layers, AdamW, no reference model, temperature 1, every turn as
long as every other, as many tokens of prompts, turns, results and of the simulator. Random weights never search, so both
sides are told that each turn but the last is a search.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from benches import harness, step_ours
from benches.harness import Row, Unavailable, UnequalResultsError
from benches.step_plan import Step, Work
from benches.work import make_model, make_tokenizer

REQUIRED = 3.5
FULL = Work(questions=8, group=4, searches=3, turn=24, result=48)
WARM_UP = Work(questions=2, group=2, searches=1, turn=4, result=48)


def save(folder: Path) -> tuple[str, str]:
    """Policy and simulator as folders, with a tokenizer that has an end token no model can sample."""
    tokenizer = make_tokenizer(8190)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    paths = []
    for seed, name in enumerate(("policy", "simulator")):
        make_model("tiny", ours=True, seed=seed).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        paths.append(str(folder / name))
    return paths[0], paths[1]


def same_work(ours: Step, theirs: Step) -> str:
    """Raises UnequalResultsError unless both sides went through the same number of tokens with as many weights."""
    for name, number in theirs.counts.items():
        if ours.counts[name] != number:
            raise UnequalResultsError(f"{name}: ours {ours.counts[name]}, TRL {number}")
    return "counts of tokens and weights equal"


def run() -> Iterator[Row]:
    if importlib.util.find_spec("trl") is None:
        raise Unavailable("TRL is not installed; install the extra `bench`")
    from benches import step_trl

    with tempfile.TemporaryDirectory() as folder:
        paths = save(Path(folder))
        for work, rounds in ((WARM_UP, 1), (FULL, harness.REPEATS)):
            ours, theirs = [], []
            for _ in range(rounds):
                theirs.append(step_trl.run(paths, work))
                ours.append(step_ours.run(paths, work, theirs[-1].counts))
                equal = same_work(ours[-1], theirs[-1])
    details = {}
    for side, steps in (("ours", ours), ("TRL", theirs)):
        for part in ("generation", "simulator", "training"):
            details[f"{part} {side} s"] = middle(steps, part)
    for name, number in theirs[-1].counts.items():
        details[name] = number
    yield Row(
        case=f"{FULL.rows} rollouts of {FULL.searches + 1} turns",
        peer="TRL GRPOTrainer, simulator as tool",
        ours=middle(ours, "total"),
        theirs=middle(theirs, "total"),
        required=REQUIRED,
        equal=equal,
        details=details,
    )


def middle(steps: list[Step], part: str) -> float:
    return median(step.seconds[part] for step in steps)
