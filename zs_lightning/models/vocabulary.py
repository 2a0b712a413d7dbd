"""What a tokenizer, its chat template and the model's own settings say of single ids."""

from typing import Any

import torch
from torch import Tensor


def end_ids(tokenizer: Any, model: Any) -> frozenset[int]:
    """Tokens that end what a model writes."""
    # Chat models often end with another than their tokenizer says: with one of their
    # generation_config, or the one with which the chat template ends an assistant's turn.
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = {tokenizer.eos_token_id, _turn_end(tokenizer)}
    ends |= set(own if isinstance(own, list) else [own])
    return frozenset(ends - {None})


def _turn_end(tokenizer: Any) -> int | None:
    """The control token behind an assistant's words in the chat template, if there is one."""
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        return None
    talk = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Goodbye"}]
    try:
        text = tokenizer.apply_chat_template(talk, tokenize=False)
    except (TemplateError, TypeError):  # What is wrong with it is said where a prompt is made.
        return None
    behind = text.rpartition("Goodbye")[2].lstrip()
    # The longest one: </s> may begin another's spelling.
    found, number = "", None
    for i, token in tokenizer.added_tokens_decoder.items():
        content = token.content.strip()
        if behind.startswith(content) and len(content) > len(found):
            found, number = content, i
    return number


def leave_out_padding(model: Any, tokenizer: Any) -> None:
    """Cuts off the logits of ids that the tokenizer does not know."""
    # They pad a vocabulary to a round number. Such an id must neither be drawn nor be a part of
    # any log-probability.
    head = model.get_output_embeddings()
    known = max(tokenizer.get_vocab().values()) + 1
    if known < len(head.weight):

        def cut(_module: torch.nn.Module, _states: Any, logits: Tensor) -> Tensor:
            return logits[..., :known]

        head.register_forward_hook(cut)
