"""Makes the tiny base model that ships in zs_lightning/miniature/base: tokenizer, weights in bf16, figures.

    python scripts/build_miniature_base.py            # about 10 minutes on one core

Seeded: the same machine and versions make the same file. `base.json` beside the weights states what this run measured.
"""

import argparse
import json
import os
import time
from dataclasses import asdict
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

from miniature_base.pretraining import Recipe, Texts, build_model, build_tokenizer, learn_years, pretrain, probes
from zs_lightning.miniature.world import make_world

BASE = Path(__file__).parents[1] / "zs_lightning" / "miniature" / "base"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=BASE)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    start, recipe = time.monotonic(), Recipe(steps=arguments.steps)
    world = make_world(0)
    tokenizer = build_tokenizer(world)
    model = build_model(len(tokenizer), arguments.seed)
    texts = Texts(world, tokenizer, recipe, arguments.seed)
    pretrain(model, texts, recipe)
    # After the rounding: what was learnt before is the same with and without the years.
    model = model.to(torch.bfloat16).float()
    learn_years(model, texts, recipe)
    model = model.to(torch.bfloat16)
    figures = probes(model.float(), texts, 500)
    model.to(torch.bfloat16).save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    record = {
        "seconds": round(time.monotonic() - start),
        "threads": arguments.threads,
        "parameters": sum(p.numel() for p in model.parameters()),
        "seed": arguments.seed,
        "torch": torch.__version__,
        "recipe": asdict(recipe),
        "probes": figures,
    }
    (arguments.out / "base.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
