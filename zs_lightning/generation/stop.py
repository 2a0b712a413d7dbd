"""Finds stop texts in sampled tokens, whatever pieces a tokenizer spells them with."""

# A tag such as </search> may be one token, several, or share a token with what is around it. So
# stops are searched in text, not in ids. To decode a tail after each token of each row would cost
# more than the sampling: only a token that can be the last of a stop text leads to a look.

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any

from zs_lightning.errors import UserError


class StopTags:
    """Stops a row once one of `texts` is in what it sampled, or at an end token.

    Raises UserError if the tokenizer cannot write one of the texts.
    """

    def __init__(self, tokenizer: Any, texts: Sequence[str]) -> None:
        self.tokenizer = tokenizer
        self.texts = tuple(texts)
        # No token is shorter than a byte, and the first ones may begin before the text.
        self.window = max((len(text.encode()) for text in self.texts), default=0) + 4
        self.opening = ""
        """Stop texts count only after this one, if there is one."""
        self.end_ids = frozenset({tokenizer.eos_token_id} - {None})
        ids = [[i] for i in range(len(tokenizer))] if texts else []
        pieces = tokenizer.batch_decode(ids, clean_up_tokenization_spaces=False)
        self.candidates: set[int] = set()
        for text in self.texts:
            self.candidates |= {i for i, piece in enumerate(pieces) if _completes(piece, text)}
            if text not in tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)):
                raise UserError(f"the tokenizer cannot spell {text!r}; choose another model or template set")

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
        # The opening may lie anywhere before.
        read = sampled if self.opening else sampled[-self.window :]
        tail = self.tokenizer.decode(read, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if self.opening:
            tail = tail.partition(self.opening)[2]
        return any(text in tail for text in self.texts)


def _completes(piece: str, text: str) -> bool:
    """Whether a token that reads `piece` by itself can be the one that completes `text`."""
    if "\ufffd" in piece:
        # Some bytes of a character, which alone do not say of which one.
        return text[-1] in piece or not text.isascii()
    if text[-1] not in piece:
        return False
    return text in piece or any(piece.startswith(text[i:]) for i in range(1, len(text)))
