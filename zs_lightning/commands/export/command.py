"""Writes what a `fit` trained as a folder that other programs load: a PEFT adapter, or a model if all weights were trained
or with --merge; with tokenizer, prompts.json and a model card."""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from zs_lightning.errors import RunError, UserError

if TYPE_CHECKING:
    from zs_lightning.commands.export.trained import Trained

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as --max-lora-rank."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"export: {message}; see python -m zs_lightning export --help")


def parse(args: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(prog="python -m zs_lightning export", description=__doc__)
    parser.add_argument("--ckpt", type=Path, required=True, help="run folder of a fit, or the checkpoint in it")
    parser.add_argument("--out", type=Path, required=True, help="folder to make; an existing one is never overwritten")
    parser.add_argument(
        "--merge", action="store_true", help="merge the adapter into its unquantised base, on the CPU in float32, and check"
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="of a model, not an adapter; the run's if not given")
    parser.add_argument(
        "--results", type=Path, action="append", default=[], help="run folder of a test, for the card; may be given many times"
    )
    parser.add_argument("--push", metavar="REPO", help="also upload the folder to this Hugging Face repository, private if new")
    return parser.parse_args(args)


def main(args: Sequence[str]) -> None:
    """Runs the command; `args` is what stands after its name."""
    options = parse(args)
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")
    from zs_lightning.commands.export.card import card, equal_to, read_results
    from zs_lightning.commands.export.trained import read_trained

    out: Path = options.out
    if out.exists():
        raise UserError(f"--out: {out} already exists; choose another folder")
    if above := [str(folder) for folder in out.parents if folder.exists() and not folder.is_dir()]:
        raise UserError(f"--out: {above[0]} is a file, so no folder can be made in it; choose another")
    trained = read_trained(options.ckpt)
    if options.merge and trained.lora is None:
        raise UserError(f"--merge: {trained.checkpoint.parent} trained all weights; export it without --merge")
    adapter = trained.lora is not None and not options.merge
    if adapter and options.dtype:
        raise UserError("export: --dtype is for all weights; an adapter is float32; give --merge too, or leave it out")
    results = [read_results(folder, trained) for folder in options.results]
    if options.push:
        check_login(options.push)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as workplace:
        folder = Path(workplace) / out.name
        # The miniature has no name that others find it by: it travels with its adapter.
        base = None if adapter and trained.spec.path == "miniature" else trained.spec.path
        # The whole path of a folder on this machine is for programs on this machine, and not for a hub.
        if base and Path(base).is_dir() and not options.push:
            base = str(Path(base).resolve())
        home = base or ("base" if options.push else str(out.resolve() / "base"))
        said, is_base = write(trained, folder, adapter, home, options.dtype)
        rank = trained.lora.r if adapter and trained.lora else None
        uses = use_lines(out.name, out.name, base or f"{out.name}/base", rank)
        (folder / "README.md").write_text(card(trained, out.name, adapter, uses, results, is_base), "utf-8")
        for file in folder.rglob("*"):
            file.chmod(0o755 if file.is_dir() else 0o644)
        folder.rename(out)
    print(f"Written: {out}")
    if said:
        print(f"Checked: {said}")
    if is_base:
        print(f"Note: {equal_to(trained)}")
    for program, lines in use_lines(out.name, str(out), base or f"{out}/base", rank).items():
        print(f"{program}:\n{textwrap.indent(lines, '  ')}")
    if options.push:
        push(options.push, out)


def write(trained: Trained, folder: Path, adapter: bool, base: str, dtype: str | None) -> tuple[str, bool]:
    """Makes the folder, but for its card. Returns what was checked, if anything, and whether the model is equal to its base.

    Args:
        adapter: write the adapter alone, not all weights.
        base: where the adapter will find its base.

    Raises:
        UserError: a checkpoint that does not fit, or a merge that loses the adapter.
    """
    import torch

    from zs_lightning.commands.export.trained import check_prompts, load_trained, save_adapter, save_merged
    from zs_lightning.models.loading import load_tokenizer
    from zs_lightning.models.specs import SHIPPED

    folder.mkdir()
    merge = trained.lora is not None and not adapter
    tokenizer, (model, is_base) = load_tokenizer(trained.spec.path), load_trained(trained, merge)
    said = ""
    if adapter:
        save_adapter(model, base, folder)
        if trained.spec.path == "miniature":
            shutil.copytree(SHIPPED, folder / "base", copy_function=shutil.copyfile)
    elif merge:
        said = save_merged(model, dtype or trained.spec.dtype, check_prompts(trained, tokenizer), folder)
    else:
        model.to(getattr(torch, dtype or trained.spec.dtype)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "prompts.json").write_text(json.dumps(asdict(trained.prompts), indent=2) + "\n", "utf-8")
    return said, is_base


def use_lines(name: str, folder: str, base: str, rank: int | None) -> dict[str, str]:
    """How the folder is used, by program: a few lines of Python, or the command that serves it.

    Args:
        base: folder or hub name of the model that the adapter belongs to.
        rank: of the adapter; None for a model.
    """
    if rank is None:
        load = ["from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
        load += [f"model = AutoModelForCausalLM.from_pretrained({json.dumps(folder)})"]
        vllm, source = f"vllm serve {folder} --served-model-name {name}", f"FROM ./{name}.gguf"
        convert = f"python llama.cpp/convert_hf_to_gguf.py {folder} --outfile {name}.gguf"
    else:
        load = ["from peft import PeftModel", "from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
        load += [f"base = AutoModelForCausalLM.from_pretrained({json.dumps(base)})"]
        load += [f"model = PeftModel.from_pretrained(base, {json.dumps(folder)})"]
        highest = next((allowed for allowed in VLLM_RANKS if allowed >= rank), rank)
        vllm = f"vllm serve {base} --enable-lora --max-lora-rank {highest} --lora-modules {name}={folder}"
        where = "--base" if base == f"{folder}/base" or Path(base).is_dir() else "--base-model-id"
        convert = (
            f"python llama.cpp/convert_hf_to_gguf.py {base} --outfile base.gguf && "
            f"python llama.cpp/convert_lora_to_gguf.py {folder} {where} {base} --outfile {name}.gguf"
        )
        source = f"FROM ./base.gguf\\nADAPTER ./{name}.gguf"
    load += [f"tokenizer = AutoTokenizer.from_pretrained({json.dumps(folder)})"]
    ollama = f"{convert} && printf '{source}\\n' > Modelfile && ollama create {name} -f Modelfile"
    return {"Python": "\n".join(load), "vLLM": vllm, "Ollama": ollama}


def check_login(repository: str) -> None:
    """Before the work is done. Raises UserError if nothing can be uploaded from here."""
    from httpx2 import HTTPError
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
        HfApi().whoami()
    except HFValidationError as error:
        raise UserError(f"--push {repository}: {error}") from error
    except LocalTokenNotFoundError as error:
        raise UserError(f"--push {repository}: you are not logged in; run hf auth login") from error
    except OfflineModeIsEnabled as error:
        raise UserError(f"--push {repository}: HF_HUB_OFFLINE forbids it; unset it or leave --push out") from error
    except HTTPError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--push {repository}: the hub does not let you in ({reason}); leave --push out") from error


def push(repository: str, folder: Path) -> None:
    """Raises RuntimeError if the upload fails; the folder stays."""
    from httpx2 import HTTPError
    from huggingface_hub import HfApi

    try:
        HfApi().create_repo(repository, private=True, exist_ok=True)
        HfApi().upload_folder(repo_id=repository, folder_path=folder)
    except (HTTPError, OSError) as error:
        raise RunError(
            f"--push: {folder} is complete, but its upload failed: {str(error).splitlines()[0]}; go on with "
            f"hf upload {repository} {folder}"
        ) from error
    print(f"Uploaded: {repository}")
