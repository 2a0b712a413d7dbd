"""Dictionaries in the format of dictd."""

import gzip

DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"


def base64(value):
    return (base64(value // 64) if value > 63 else "") + DIGITS[value % 64]


def write_dictionary(folder, name, entries):
    """Writes NAME.index and NAME.dict.dz; an entry is a text with all the words that it is found by."""
    text, lines = b"", []
    for spellings, entry in entries:
        for spelling in spellings:
            lines.append(f"{spelling}\t{base64(len(text))}\t{base64(len(entry.encode()))}\n")
        text += entry.encode()
    (folder / f"{name}.index").write_text("".join(lines))
    (folder / f"{name}.dict.dz").write_bytes(gzip.compress(text))
