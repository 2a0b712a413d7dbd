"""Models that would fail late, or silently give wrong numbers, are refused at once."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from zs_lightning.errors import UserError
from zs_lightning.models.sizes import bare_model

if TYPE_CHECKING:
    from zs_lightning.models.loading import LoraSpec, ModelSpec

AUTOCAST: dict[str, torch.dtype | None] = {"32-true": None, "bf16-mixed": torch.bfloat16}
"""The precisions of a trainer, and what they cast to in a forward pass."""

RESCALED = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")
"""What configurations call a change of the logits after the vocabulary head: Gemma's, Cohere's, Granite's, Falcon's."""


def read(load: Callable[..., Any], place: str, path: str, what: str, **options: Any) -> Any:
    """What a function of transformers makes of the folder or hub name, or a ValueError, which names the path."""
    try:
        return load(place, **options)
    except (OSError, ValueError) as error:
        said = " ".join(str(error).split())
        if "gated repo" in said:
            said = f"{path} is gated; accept its terms on its page of the hub and log in with `hf auth login`, or take another"
            raise UserError(f"model path: {said}") from error
        reason = said.split(". ")[0][:300].rstrip(".")
        raise UserError(f"model path: no {what} could be loaded from {path}: {reason}") from error


def check_kind(config: Any, path: str) -> None:
    """Raises UserError, before weights are loaded, for models whose memory is not keys and values alone, or whose logits are
    not those of the vocabulary head."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as DECODERS

    if config.is_encoder_decoder or config.model_type not in DECODERS:
        raise UserError(f"model path: {path} is a {config.model_type}, which is no decoder of text; choose one that is")
    others = sorted(set(getattr(config, "layer_types", None) or []) - {"full_attention"})
    if config.get_text_config() is not config or others:
        reason = f"layers of kind {', '.join(others)}" if others else "more than text"
        raise UserError(
            f"model path: {path} is a {config.model_type} with {reason}; choose a model of text with full attention"
        )
    for name in RESCALED:
        if getattr(config, name, None) not in (None, 1):
            raise UserError(
                f"model path: {path} is a {config.model_type} that changes its logits after the vocabulary head ({name}); "
                "choose a model that does not"
            )


def check_logits(model: Any, path: str) -> None:
    """As check_kind, by what the model does."""
    ids = torch.arange(2, device=model.device)[None]
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits.float()
        states = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        logits = model.get_output_embeddings()(states).float()
    if expected.shape != logits.shape or not torch.allclose(logits, expected, rtol=1e-4, atol=1e-4):
        raise UserError(
            f"model path: {path} is a {model.config.model_type} that changes its logits after the vocabulary head; choose a "
            "model that does not"
        )


def check_there(folder: str, key: str) -> None:
    """Raises UserError, which names the key, if the folder has no adapter."""
    if not (Path(folder) / "adapter_config.json").is_file():
        raise UserError(
            f"{key}: there is no adapter in {folder} (adapter_config.json is missing); a `fit` writes one into its "
            "run folder as `model`, for the miniature's simulator: "
            "python -m zs_lightning fit --config configs/miniature/simulator.yaml"
        )


def check_adapter(config: Any, path: str, folder: str, key: str) -> None:
    """Raises UserError, which names the key, if the adapter in the folder was made for a model of other layers."""
    from safetensors import safe_open

    check_there(folder, key)
    file = Path(folder) / "adapter_model.safetensors"
    if not file.is_file():  # One of an old peft, which is looked at when it is put on.
        return
    layers = dict(bare_model(config, "float32").named_modules())
    with safe_open(file, "pt") as weights:
        for name in weights.keys():  # noqa: SIM118 - it is no dictionary
            place, _, side = name.removeprefix("base_model.model.").partition(".lora_")
            layer, shape = layers.get(place), weights.get_slice(name).get_shape()
            # A is [rank, in] and B [out, rank].
            known = isinstance(layer, torch.nn.Linear) and side.endswith("weight") and side[:2] in ("A.", "B.")
            if layer is None or (known and shape[side[0] == "A"] != layer.weight.shape[side[0] == "A"]):
                raise UserError(
                    f"{key}: {folder} does not fit the model {path}, which has no such layer as that of {name} {shape}; set "
                    "the model that it was trained on"
                )


def check_mixable(config: Any, folder: str, key: str) -> None:
    """Raises UserError, which names the key, if the adapter in the folder cannot share a batch with another: see
    MixedAdapters."""
    from safetensors import safe_open

    there = json.loads((Path(folder) / "adapter_config.json").read_text("utf-8"))
    more = [name for name in ("use_dora", "lora_bias", "modules_to_save") if there.get(name)]
    more += ["bias"] if there.get("bias", "none") != "none" else []
    model, file = bare_model(config, "float32"), Path(folder) / "adapter_model.safetensors"
    ends = [
        name for name, layer in model.named_modules() if layer in (model.get_output_embeddings(), model.get_input_embeddings())
    ]
    if file.is_file():
        with safe_open(file, "pt") as weights:
            layers = {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in weights.keys()}  # noqa: SIM118
        more += sorted(layers & set(ends))
    if more:
        raise UserError(
            f"{key}: {folder} is more than two matrices a layer of the decoder ({', '.join(more)}), so it cannot share a base "
            "with another adapter; set model.search.model.path to a model of its own"
        )


def longest(config: Any) -> int | None:
    """Tokens of the longest context that a model can read, each as if it were alone; None if its configuration does not say."""
    rope = getattr(config, "rope_parameters", None) or {}
    most, kind = getattr(config, "max_position_embeddings", None), rope.get("rope_type", "default")
    first = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    if kind in ("dynamic", "longrope"):
        # Beyond that its frequencies depend on the longest context of a batch.
        return first or most
    if kind in ("linear", "yarn") and most:
        return max(most, int((first or most) * rope.get("factor", 1)))
    return most


def check_length(config: Any, path: str, length: int, key: str) -> None:
    """Raises UserError, which names the key, if a model cannot read contexts of this length."""
    most = longest(config)
    if most is not None and length > most:
        raise UserError(f"{key}: {path} reads at most {most} tokens; got {length}; set {key}: {most} or less")


def check_memory(needed: int, free: int, card: str, keys: Sequence[str]) -> None:
    """Raises UserError if the weights of the models at these keys, in bytes, do not fit on their card."""
    if needed > free:
        raise UserError(
            f"{' and '.join(keys)}: the weights take {needed / 1e9:.1f} GB, and {card} has {free / 1e9:.1f} GB free; set "
            "quantization: nf4, a smaller model or another device; `python -m zs_lightning estimate` says what fits"
        )


def check_precision(asked: object) -> str:
    """The precision that a trainer's option means, one of AUTOCAST.

    Raises:
        UserError: weights that are trained would be too coarse in it for small steps, or gradients would be scaled.
    """
    name = {"None": "32-true", "32": "32-true", "bf16": "bf16-mixed"}.get(str(asked), str(asked))
    if name in AUTOCAST:
        return name
    why = ""
    if name in ("16", "16-mixed", "16-true"):
        why = (
            ", in which models made in bfloat16 may overflow and small gradients vanish; on a card without bfloat16 set "
            "32-true with dtype: float32 of the models"
        )
    raise UserError(f"trainer.precision: expected {' or '.join(AUTOCAST)}; got {asked}{why}")


def emulated(device: torch.device) -> set[str]:
    """Types that a device multiplies by instructions for others, on processors up to a hundred times as slow as float32."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return set() if torch.cuda.is_bf16_supported(including_emulation=False) else {"bfloat16"}
    short = {"bfloat16": "bf16", "float16": "fp16"}
    if not torch.backends.mkldnn.is_available():
        return set(short)
    return {name for name, part in short.items() if not getattr(torch.ops.mkldnn, f"_is_mkldnn_{part}_supported")()}


def slow_format(key: str, spec: ModelSpec, device: str, mixed: bool, slow: Collection[str]) -> str | None:
    """What makes the format of the model at a key slow, in a sentence that says what to set; None if nothing is known to.

    Args:
        device: cpu or cuda.
        mixed: whether the trainer casts to bfloat16.
        slow: types that are slow there, see `emulated`.
    """
    multiplied = "bfloat16" if mixed else spec.dtype
    if multiplied in slow:
        changes = [f"{key}.dtype: float32"] * (spec.dtype in slow) + ["trainer.precision: 32-true"] * mixed
        what = "card" if device == "cuda" else "processor"
        return (
            f"{key}: this {what} cannot multiply {multiplied} itself, which makes it many times as slow as float32; set "
            + " and ".join(changes)
        )
    if device == "cuda" and spec.quantization == "nf4" and spec.dtype == "float32" and "bfloat16" not in slow:
        return (
            f"{key}: nf4 with dtype float32 is multiplied in float32, on a card far slower than in bfloat16; set {key}.dtype: "
            "bfloat16"
        )
    return None


def check_gradients(spec: ModelSpec, precision: str) -> None:
    """Raises UserError if gradients pass through the trained model in a format in which small ones vanish."""
    if spec.dtype == "float16" and (AUTOCAST[precision] is None or spec.quantization == "nf4"):
        raise UserError(
            "model.model.dtype: training goes wrong in float16, in which small gradients vanish; got float16; set "
            "model.model.dtype: bfloat16, or float32 on a card without it"
        )


def check_trained_weights(spec: ModelSpec, lora: LoraSpec | None) -> None:
    """Raises UserError if all weights are to be trained in a format that does not hold the small steps of RL, or an adapter
    of a folder with other options than its own."""
    if lora is not None and spec.adapter:
        check_there(spec.adapter, "model.model.adapter")
        there = json.loads((Path(spec.adapter) / "adapter_config.json").read_text("utf-8"))
        for option, key in {"r": "r", "alpha": "lora_alpha", "rslora": "use_rslora", "dora": "use_dora"}.items():
            wanted = lora.alpha or 2 * lora.r if option == "alpha" else getattr(lora, option)
            if wanted != (found := there.get(key, False)):
                raise UserError(
                    f"model.lora.{option}: training goes on with the adapter of model.model.adapter, {spec.adapter}, in which "
                    f"it is {json.dumps(found)}; got {json.dumps(wanted)}; set model.lora.{option}: {json.dumps(found)}"
                )
    if lora is not None or (spec.quantization == "none" and spec.dtype == "float32"):
        return
    if spec.quantization != "none":
        raise UserError(
            f"model: `lora: null` trains all weights, which {spec.quantization} does not allow; set lora, such as "
            "lora: {r: 16}, or model.quantization: none"
        )
    raise UserError(
        f"model: `lora: null` trains all weights, and most steps of RL are too small for {spec.dtype}; set model.dtype: "
        "float32 (trainer.precision: bf16-mixed still computes in bfloat16), or lora, such as lora: {r: 16}"
    )
