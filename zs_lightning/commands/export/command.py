"""Writes what a `fit` trained as a folder that other programs load.

That is a PEFT adapter, or a model if all weights were trained or with --merge; with tokenizer,
prompts.json and a model card.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from zs_lightning.configuration.arguments import CommandParser, at_home
from zs_lightning.errors import UserError

if TYPE_CHECKING:
    from zs_lightning.commands.export.trained import Trained

NOTHING = "its weights are what training began with: nothing was learnt"


def parse(args: Sequence[str]) -> Namespace:
    parser = CommandParser("export", __doc__)
    add = parser.add_argument
    ckpt = "run folder of a fit, or the checkpoint in it"
    add("--ckpt", type=at_home, required=True, help=ckpt)
    add("--out", type=at_home, required=True, help="folder to make; none is ever overwritten")
    merge = "merge the adapter into its unquantised base, on the CPU in float32, and check"
    add("--merge", action="store_true", help=merge)
    dtype = "of a model, not an adapter; the run's if not given"
    add("--dtype", choices=["float32", "bfloat16"], help=dtype)
    results = "run folder of a test, for the card; may be given many times"
    add("--results", type=at_home, action="append", default=[], help=results)
    return parser.parse_args(args)


def main(args: Sequence[str]) -> None:
    """Runs the command; `args` is what stands after its name."""
    options = parse(args)
    out: Path = options.out
    if out.exists():
        raise UserError(f"--out: {out} already exists; choose another folder")
    for above in out.parents:
        if above.exists() and not above.is_dir():
            raise UserError(f"--out: {above} is a file, so no folder can be made in it")
    from zs_lightning.commands.export.card import card, read_results
    from zs_lightning.commands.export.trained import read_trained

    trained = read_trained(options.ckpt)
    adapter = trained.lora is not None and not options.merge
    if options.merge and trained.lora is None:
        what = "trained all weights; export it without --merge"
        raise UserError(f"--merge: {trained.checkpoint.parent} {what}")
    if adapter and options.dtype:
        change = "give --merge too, or leave it out"
        raise UserError(f"--dtype: it is for all weights, and an adapter is float32; {change}")
    # Before the work, which takes minutes for a large model.
    results = [read_results(folder, trained) for folder in options.results]
    base = trained.spec.path
    # A base in a folder is found from anywhere on this machine.
    if Path(base).is_dir():
        base = str(Path(base).resolve())
    # The miniature has no name that others find it by: it travels with its adapter.
    travels = adapter and base == "miniature"
    out.parent.mkdir(parents=True, exist_ok=True)
    # Under another name until it is complete, so that nothing half-written is left.
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as workplace:
        folder = Path(workplace) / out.name
        home = str(out.resolve() / "base") if travels else base
        checked, unchanged = write(trained, folder, adapter, home, options.dtype)
        # As seen from where the folder lies, wherever that is.
        belongs = f"{out.name}/base" if travels else base
        note = NOTHING if unchanged else ""
        page = card(trained, out.name, belongs if adapter else None, results, note)
        (folder / "README.md").write_text(page, "utf-8")
        # Temporary folders are their owner's alone; an export is for others.
        for file in folder.rglob("*"):
            file.chmod(0o755 if file.is_dir() else 0o644)
        folder.rename(out)
    print(f"Written: {out}; its README.md says how it is used")
    if checked:
        print(f"Checked: {checked}")
    if note:
        print(f"Note: {note}")


def write(
    trained: Trained,
    folder: Path,
    adapter: bool,
    base: str,
    dtype: str | None,
) -> tuple[str, bool]:
    """Makes the folder, but for its card: with the adapter alone, which finds its base at `base`,
    or with all weights. Returns what was checked, if anything, and whether training changed
    nothing. Raises UserError for a checkpoint that does not fit, or a merge that loses the
    adapter."""
    import torch

    from zs_lightning.commands.export import trained as saving
    from zs_lightning.models.loading import load_tokenizer
    from zs_lightning.models.specs import SHIPPED

    folder.mkdir()
    merge = trained.lora is not None and not adapter
    tokenizer = load_tokenizer(trained.spec.path)
    model, unchanged = saving.load_trained(trained, merge)
    dtype = dtype or trained.spec.dtype
    checked = ""
    if adapter:
        model.peft_config["default"].base_model_name_or_path = base
        # Embeddings are never trained here, and asking whether they were would look the base up on
        # the hub.
        model.save_pretrained(folder, save_embedding_layers=False)
        # peft's own card; ours takes its place.
        (folder / "README.md").unlink(missing_ok=True)
        if trained.spec.path == "miniature":
            shutil.copytree(SHIPPED, folder / "base", copy_function=shutil.copyfile)
    elif merge:
        prompts = saving.check_prompts(trained, tokenizer)
        checked = saving.save_merged(model, dtype, prompts, folder)
    else:
        model.to(getattr(torch, dtype)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    text = json.dumps(asdict(trained.prompts), indent=2) + "\n"
    (folder / "prompts.json").write_text(text, "utf-8")
    return checked, unchanged
