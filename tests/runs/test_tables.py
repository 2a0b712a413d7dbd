"""Untrusted text in tables: what cannot be seen, and what a site would make of it."""

import unicodedata

import pytest

from zs_lightning.runs.tables import markdown_cell
from zs_lightning.text.shown import visible


def test_no_character_is_invisible_or_turns_others():
    signs = "".join(map(chr, range(0x110000)))
    shown = {sign for sign, sight in zip(signs, visible(signs), strict=True) if sign != sight}
    controls = {c for c in signs if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")} - {"\t", "\n"}
    blanks = set("\u034f\u115f\u1160\u17b4\u17b5\u180b\u2800\u3164\uffa0\U000e0100")
    assert len(controls) > 2200
    assert controls | blanks <= shown
    # Letters, signs, emoji and blanks are what they are.
    others = {unicodedata.category(c) for c in shown - controls - blanks}
    assert others <= {"Mn", "Cn"}
    plain = "Ünïcödé 日本語 العربية हिन्दी 👩🏽 \t\n é"
    assert visible(plain) == plain


@pytest.mark.parametrize(
    ("text", "cell"),
    [
        ("see https://evil.example/x", "see https&#58;//evil.example/x"),
        ("WWW.evil.example", "WWW&#46;evil.example"),
        ("by @someone", "by @&#8288;someone"),
        ("me@evil.example", "me@&#8288;evil.example"),
        ("<b>|![a](b)&lt;", "&#60;b&#62;&#124;&#33;&#91;a&#93;(b)&#38;lt;"),
        ("12:30 a/b w.w", "12:30 a/b w.w"),
    ],
)
def test_a_cell_of_markdown_links_nothing_and_calls_nobody(text, cell):
    assert markdown_cell(text) == cell
