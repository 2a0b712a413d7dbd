"""What a tokenizer, its chat template and the model's own settings say of single ids."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def end_ids(tokenizer: Any, model: Any) -> frozenset[int]:
    """Tokens that end what a model writes: the tokenizer's, those of the model's generation_config, and the one with which
    the chat template ends an assistant's turn. Chat models often end with another than their tokenizer says."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = {tokenizer.eos_token_id, _turn_end(tokenizer), *(own if isinstance(own, list) else [own])}
    return frozenset(i for i in ends if i is not None)


def _turn_end(tokenizer: Any) -> int | None:
    """The control token behind an assistant's words in the chat template, if there is one."""
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        return None
    talk = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Goodbye"}]
    try:
        behind = tokenizer.apply_chat_template(talk, tokenize=False).rpartition("Goodbye")[2].lstrip()
    except (TemplateError, TypeError):  # What is wrong with it is said where a prompt is made.
        return None
    controls = {token.content.strip(): i for i, token in tokenizer.added_tokens_decoder.items() if token.content.strip()}
    return controls.get(max((content for content in controls if behind.startswith(content)), key=len, default=""))


def leave_out_padding(model: Any, tokenizer: Any) -> None:
    """Logits of ids that the tokenizer does not know, which pad a vocabulary to a round number, are no longer there: such an
    id is never drawn, and is no part of a log-probability."""
    head, known = model.get_output_embeddings(), max(tokenizer.get_vocab().values()) + 1
    if known < len(head.weight):

        def cut(_module: torch.nn.Module, _states: Any, logits: Tensor) -> Tensor:
            return logits[..., :known]

        head.register_forward_hook(cut)
