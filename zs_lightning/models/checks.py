"""Refuses at once what would fail late, or silently give wrong numbers."""

# What is wrong with a model is said of a field of its ModelSpec; `naming` puts the key before it.
# Weights take minutes to load, so whatever config.json and the heads of files tell is asked first.

import json
import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from zs_lightning.errors import UserError
from zs_lightning.models.sizes import bare_model, weight_bytes
from zs_lightning.models.specs import LoraSpec, ModelSpec, choose_device, naming
from zs_lightning.models.sums import check_sums

AUTOCAST: dict[str, torch.dtype | None] = {"32-true": None, "bf16-mixed": torch.bfloat16}
"""The precisions of a trainer, and what they cast to in a forward pass."""

MORE = """bias lora_bias modules_to_save target_parameters trainable_token_indices use_dora use_bdlora
alora_invocation_tokens arrow_config kasa_config monteclora_config velora_config"""
"""Options of peft with which an adapter is more than two matrices a layer."""

_log = logging.getLogger(__name__)


def check_model(spec: ModelSpec, key: str = "model.model") -> None:
    """Raises UserError, with the model's key, for what can be known without its weights."""
    with naming(key):
        choose_device(spec.device)
        check_kind(spec)
        if spec.adapter:
            check_adapter(spec, spec.adapter)


def check_models(specs: Mapping[str, ModelSpec]) -> None:
    """check_model for several models by their keys, which must also fit on their cards."""
    needed: dict[torch.device, dict[str, int]] = {}
    for key, spec in specs.items():
        check_model(spec, key)
        device = choose_device(spec.device)
        if device.type == "cuda":
            model = bare_model(spec.config, spec.dtype)
            needed.setdefault(device, {})[key] = weight_bytes(model, spec.quantization)
    for device, sizes in needed.items():
        total, (free, _) = sum(sizes.values()), torch.cuda.mem_get_info(device)
        if total > free:
            taken = f"the weights take {total / 1e9:.1f} GB, and {device} has {free / 1e9:.1f} GB free"
            change = "set quantization: nf4, a smaller model or another device"
            tool = "`python -m zs_lightning estimate` says what fits"
            raise UserError(f"{' and '.join(sizes)}: {taken}; {change}; {tool}")


def check_kind(spec: ModelSpec) -> None:
    """Raises UserError for a model that is no decoder of text with full attention."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as DECODERS

    config = spec.config
    who = f"path: {spec.path} is a {config.model_type}"
    if config.is_encoder_decoder or config.model_type not in DECODERS:
        raise UserError(f"{who}, which is no decoder of text; choose one that is")
    # The memory of generation holds keys and values of all tokens, and nothing else.
    others = sorted(set(getattr(config, "layer_types", None) or []) - {"full_attention"})
    if config.get_text_config() is not config or others:
        reason = f"layers of kind {', '.join(others)}" if others else "more than text"
        raise UserError(f"{who} with {reason}; choose a model of text with full attention")


def check_logits(model: Any, path: str) -> None:
    """Raises UserError for a model that changes its logits, by what it does.

    Gemma, Cohere, Granite and Falcon do, each by an option of another name. Log-probabilities are
    computed from the vocabulary head, chunk by chunk, and would be others than those of sampling.
    """
    ids = torch.arange(2, device=model.device)[None]
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits.float()
        states = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        logits = model.get_output_embeddings()(states).float()
    if expected.shape != logits.shape or not torch.allclose(logits, expected, rtol=1e-4, atol=1e-4):
        what = f"{model.config.model_type} that changes its logits after the vocabulary head"
        raise UserError(f"path: {path} is a {what}; choose a model that does not")


def longest(config: Any) -> int | None:
    """Tokens of the longest context that a model can read; None if it does not say."""
    rope = getattr(config, "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default")
    most = getattr(config, "max_position_embeddings", None)
    name = "original_max_position_embeddings"
    first = rope.get(name) or getattr(config, name, None)
    if kind in ("dynamic", "longrope"):
        # Beyond that, the frequencies of all rows depend on the longest context of the batch.
        most = first or most
    elif kind in ("linear", "yarn") and most:
        most = max(most, int((first or most) * rope.get("factor", 1)))
    # Beyond its window a model forgets what the memory of generation would still show it.
    window = getattr(config, "sliding_window", None)
    if getattr(config, "layer_types", None):  # Which name those layers that have it: none, here.
        window = None
    return min(filter(None, (most, window)), default=None)


def check_length(spec: ModelSpec, length: int, key: str) -> None:
    """Raises UserError, which names the key, if a model cannot read contexts of this length."""
    most = longest(spec.config)
    if most is not None and length > most:
        raise UserError(f"{key}: {spec.path} reads at most {most} tokens; got {length}; set {key}: {most} or less")


def adapter_options(folder: str) -> dict[str, Any]:
    """What peft wrote of an adapter beside its weights. Raises UserError if it is not there."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (Path(folder) / name).is_file():
            missing = f"there is no adapter in {folder} ({name} is missing)"
            made = "python -m zs_lightning fit --config configs/miniature/simulator.yaml"
            change = "a `fit` writes one into its run folder as `model`, for the miniature's simulator"
            raise UserError(f"adapter: {missing}; {change}: {made}")
    return dict(json.loads((Path(folder) / "adapter_config.json").read_text("utf-8")))


def _adapter_shapes(folder: str) -> dict[str, list[int]]:
    """Shapes of an adapter's weights, by their names in the base model."""
    from safetensors import safe_open

    shapes: dict[str, list[int]] = {}
    with safe_open(Path(folder) / "adapter_model.safetensors", "pt") as weights:
        for name in weights.keys():  # noqa: SIM118 - it is no dictionary
            shapes[name.removeprefix("base_model.model.")] = weights.get_slice(name).get_shape()
    return shapes


def check_adapter(spec: ModelSpec, folder: str) -> None:
    """Raises UserError if the adapter in the folder is damaged, or was made for a model of other
    layers."""
    adapter_options(folder)
    check_sums(folder, "adapter")
    layers = dict(bare_model(spec.config, "float32").named_modules())
    for name, shape in _adapter_shapes(folder).items():
        place, _, side = name.partition(".lora_")
        layer = layers.get(place)
        fits = layer is not None
        # A is [rank, in_features], B [out_features, rank]; other parts are looked at on loading.
        if isinstance(layer, torch.nn.Linear) and side == "A.weight":
            fits = shape[1] == layer.in_features
        elif isinstance(layer, torch.nn.Linear) and side == "B.weight":
            fits = shape[0] == layer.out_features
        if not fits:
            raise UserError(
                f"adapter: {folder} does not fit the model {spec.path}, which has no such layer as "
                f"that of base_model.model.{name} {shape}; set the model that it was trained on"
            )


def check_mixable(spec: ModelSpec, folder: str) -> None:
    """Raises UserError if the adapter in the folder cannot share a batch: see MixedAdapters."""
    options = adapter_options(folder)
    more = [name for name in MORE.split() if options.get(name) not in (None, False, [], "none")]
    model = bare_model(spec.config, "float32")
    ends = (model.get_output_embeddings(), model.get_input_embeddings())
    layers = {name.partition(".lora_")[0] for name in _adapter_shapes(folder)}
    more += [name for name, layer in model.named_modules() if layer in ends and name in layers]
    if more:
        what = f"is more than two matrices a layer of the decoder ({', '.join(more)})"
        change = "set model.search.model.path to a model of its own"
        raise UserError(f"adapter: {folder} {what}, which cannot share a base; {change}")


def check_precision(asked: object) -> str:
    """The precision that a trainer's option means, one of AUTOCAST, or else UserError."""
    # In others trained weights are too coarse for small steps, or gradients are scaled.
    name = {"None": "32-true", "32": "32-true", "bf16": "bf16-mixed"}.get(str(asked), str(asked))
    if name in AUTOCAST:
        return name
    why = ""
    if name in ("16", "16-mixed", "16-true"):
        why = (
            ", in which models made in bfloat16 may overflow and small gradients vanish; on a card "
            "without bfloat16 set 32-true with dtype: float32 of the models"
        )
    raise UserError(f"trainer.precision: expected {' or '.join(AUTOCAST)}; got {asked}{why}")


def check_gradients(spec: ModelSpec, precision: str) -> None:
    """Raises UserError if gradients pass through a format in which small ones vanish."""
    if spec.dtype == "float16" and (AUTOCAST[precision] is None or spec.quantization == "nf4"):
        raise UserError(
            "model.model.dtype: training goes wrong in float16, in which small gradients vanish; "
            "got float16; set model.model.dtype: bfloat16, or float32 on a card without it"
        )


def check_trained_weights(spec: ModelSpec, lora: LoraSpec | None) -> None:
    """Raises UserError for weights that do not hold small steps, or an adapter of other options."""
    if lora is not None:
        if spec.adapter:
            _check_same_options(spec.adapter, lora)
        return
    whole = "model: `lora: null` trains all weights"
    change = "or lora, such as lora: {r: 16}"
    if spec.quantization != "none":
        refused = f"which {spec.quantization} does not allow"
        raise UserError(f"{whole}, {refused}; set model.quantization: none, {change}")
    if spec.dtype != "float32":
        still = "trainer.precision: bf16-mixed still computes in bfloat16"
        coarse = f"most steps of RL are too small for {spec.dtype}"
        raise UserError(f"{whole}, and {coarse}; set model.dtype: float32 ({still}), {change}")


def _check_same_options(folder: str, lora: LoraSpec) -> None:
    with naming("model.model"):
        there = adapter_options(folder)
    wanted = {
        "r": ("r", lora.r),
        "alpha": ("lora_alpha", lora.alpha or 2 * lora.r),
        "rslora": ("use_rslora", lora.rslora),
        "dora": ("use_dora", lora.dora),
    }
    for name, (stored, value) in wanted.items():
        found = there.get(stored, False)
        if value != found:
            was = json.dumps(found)
            goes_on = f"training goes on with the adapter of model.model.adapter, {folder}"
            got = f"in which it is {was}; got {json.dumps(value)}"
            raise UserError(f"model.lora.{name}: {goes_on}, {got}; set model.lora.{name}: {was}")


def emulated(device: torch.device) -> set[str]:
    """Types that a device multiplies by instructions for others: up to 100 times as slow."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            own = torch.cuda.is_bf16_supported(including_emulation=False)
        return set() if own else {"bfloat16"}
    short = {"bfloat16": "bf16", "float16": "fp16"}
    if not torch.backends.mkldnn.is_available():
        return set(short)
    ops = torch.ops.mkldnn
    return {name for name in short if not getattr(ops, f"_is_mkldnn_{short[name]}_supported")()}


def slow_format(key: str, spec: ModelSpec, device: str, mixed: bool, slow: Collection[str]) -> str | None:
    """What makes a model's format slow on a device, cpu or cuda, that is slow with some types, see
    `emulated`, where the trainer casts to bfloat16 if `mixed`: a sentence that says what to set;
    None if nothing does."""
    multiplied = "bfloat16" if mixed else spec.dtype
    if multiplied in slow:
        changes = [f"{key}.dtype: float32"] * (spec.dtype in slow)
        changes += ["trainer.precision: 32-true"] * mixed
        what = "card" if device == "cuda" else "processor"
        return (
            f"{key}: this {what} cannot multiply {multiplied} itself, which makes it many times as "
            f"slow as float32; set {' and '.join(changes)}"
        )
    nf4 = spec.quantization == "nf4" and spec.dtype == "float32"
    if device == "cuda" and nf4 and "bfloat16" not in slow:
        return (
            f"{key}: nf4 with dtype float32 is multiplied in float32, on a card far slower than in "
            f"bfloat16; set {key}.dtype: bfloat16"
        )
    return None


def say_slow(specs: Mapping[str, ModelSpec], precision: str) -> None:
    """Warns of models, by their keys, whose formats are slow where they run in this precision."""
    for key, spec in specs.items():
        with naming(key):
            device = choose_device(spec.device)
        mixed = AUTOCAST[precision] is not None
        if slow := slow_format(key, spec, device.type, mixed, emulated(device)):
            _log.warning("%s", slow)
