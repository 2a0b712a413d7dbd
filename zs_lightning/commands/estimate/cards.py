"""The cards that are known by name, and what their makers state."""

from __future__ import annotations

import re
from dataclasses import dataclass

from zs_lightning.errors import UserError


@dataclass(frozen=True)
class Rates:
    """Of a card, as its maker states them: bytes/s and dense bfloat16 FLOP/s."""

    name: str
    gigabytes: int
    bandwidth: float
    flops: float


CARDS = (
    Rates("RTX 3090", 24, 0.936e12, 71e12),
    Rates("RTX 4090", 24, 1.008e12, 165e12),
    Rates("RTX 5090", 32, 1.792e12, 209e12),
    Rates("RTX 6000 Ada", 48, 0.960e12, 364e12),
    Rates("L40S", 48, 0.864e12, 362e12),
    Rates("A100 40GB", 40, 1.555e12, 312e12),
    Rates("A100", 80, 2.039e12, 312e12),
    Rates("H100", 80, 3.35e12, 989e12),
    Rates("H200", 141, 4.8e12, 989e12),
)
USUAL = {24: "RTX 4090", 48: "RTX 6000 Ada", 80: "A100", 141: "H200"}
"""The card that a memory in GB is taken for."""


def rates_of(gigabytes: int, name: str = "") -> Rates:
    """Of the card with this name, or of the usual card with at least this memory; the largest if there is none."""
    named = [card for card in CARDS if name and card.name.removeprefix("RTX ").removesuffix(" 40GB") in name]
    usual = [card for card in CARDS if card.name in USUAL.values() and card.gigabytes >= gigabytes]
    if named:
        return min(named, key=lambda card: abs(card.gigabytes - gigabytes))
    return [*usual, CARDS[-1]][0]


def card_asked(text: str) -> tuple[int, str]:
    """Memory in GB, and the name if it was one, of a card that a user writes as 24, RTX4090 or "A100 40GB".

    Raises:
        UserError: neither memory nor the name of a known card.
    """
    for card in CARDS:
        if _plain(text) in (_plain(card.name), _plain(f"{card.name} {card.gigabytes}GB")):
            return card.gigabytes, card.name
    if text.isdecimal() and int(text):
        return int(text), ""
    known = ", ".join(card.name for card in CARDS)
    raise UserError(f"--card: expected GB of memory such as 24, or one of {known}; got {text}")


def _plain(name: str) -> str:
    return re.sub(r"nvidia|geforce|rtx|[\s_-]", "", name.lower())
