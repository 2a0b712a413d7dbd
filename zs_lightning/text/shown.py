"""Text of others, as a terminal may show it."""

import re

_UNPRINTABLE = re.compile(
    # Control characters, those without width, of direction and of lines, halves of pairs.
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]"
)


def visible(text: str) -> str:
    """Untrusted text in which the characters that could reorder or end a page can be seen."""
    # Unicode has pictures of the first 32 alone.
    return _UNPRINTABLE.sub(lambda c: chr(0x2400 + ord(c[0])) if c[0] < " " else "\ufffd", text)
