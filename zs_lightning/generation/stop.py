"""Finds stop texts in sampled tokens, whatever pieces a tokenizer spells them with."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any

from zs_lightning.errors import UserError


class StopTags:
    """Stops a row once one of `texts` is in what it sampled, or at an end token.

    The tail is decoded only after a token that can complete a text, so most tokens cost one set lookup.
    """

    def __init__(self, tokenizer: Any, texts: Sequence[str]) -> None:
        self.tokenizer, self.texts = tokenizer, tuple(texts)
        self.window = max((len(text.encode()) for text in self.texts), default=0) + 4
        self.opening = ""
        """Stop texts count only after this one, if there is one."""
        self.end_ids = frozenset(i for i in (tokenizer.eos_token_id,) if i is not None)
        ids = [[i] for i in range(len(tokenizer))] if texts else []
        pieces = tokenizer.batch_decode(ids, clean_up_tokenization_spaces=False)
        self.candidates = frozenset(i for i, piece in enumerate(pieces) if any(_completes(piece, text) for text in self.texts))
        for text in self.texts:
            if text not in tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)):
                raise UserError(f"the tokenizer cannot spell the stop text {text!r}; choose another model or template set")

    def after(self, opening: str) -> StopTags:
        """The same, for rows whose stop texts count only after `opening`."""
        later = copy(self)
        later.opening = opening
        return later

    def hit(self, sampled: Sequence[int]) -> bool:
        """Whether the last sampled token completes a stop text or ends the text."""
        if sampled[-1] in self.end_ids:
            return True
        if sampled[-1] not in self.candidates:
            return False
        read = sampled if self.opening else sampled[-self.window :]
        tail = self.tokenizer.decode(read, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if self.opening:
            tail = tail.partition(self.opening)[2]
        return any(text in tail for text in self.texts)


def _completes(piece: str, text: str) -> bool:
    """Whether a token that reads `piece` by itself can be the one after which `text` has been written."""
    if "\ufffd" in piece:  # Some bytes of a character, of which the piece does not say which.
        return text[-1] in piece or not text.isascii()
    return text[-1] in piece and (text in piece or any(piece.startswith(text[i:]) for i in range(1, len(text))))
