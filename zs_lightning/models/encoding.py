"""From text to ids, with a wall between our own templates and text from outside."""

import re
from collections.abc import Mapping, Sequence
from datetime import date
from functools import cache
from itertools import pairwise
from typing import Any

from zs_lightning.errors import UserError

# A blank before a field is spelt with the field: byte-level tokenizers make " word" one token.
_FIELD = re.compile(r"(\s?\{\w+\})")

# Texts to write before a continuation and to cut off again, where a tokenizer puts a blank before
# what begins a text. One of them does not grow together with it.
_BEFORE = ("\n", "~", "ø", "ж", "中")

_NOW = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")


class TextEncoder:
    """Encodes templates and untrusted text with one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._literals = cache(self._ids)
        self._chats = cache(self._rendered)
        self.date = date.today()
        """What chat templates take for today: for all of a run, the day of its beginning."""
        # Added tokens that are not "special" (<tool_call> of Qwen3) are recognised in any text,
        # whatever the options say: such a text is cut behind their first character.
        added = [t for t in tokenizer.added_tokens_decoder.values() if not t.special]
        spelt = "|".join(re.escape(t.content) for t in added if t.content.strip())
        self._added = re.compile(f"(?={spelt})") if spelt else None
        first = tokenizer.convert_ids_to_tokens(self._ids("a", start=True))[:1]
        self._before = _BEFORE if first and first[0].startswith(("▁", "Ġ")) else ()

    def _ids(self, text: str, start: bool, **options: bool) -> list[int]:
        """Ids of a piece, as the tokenizer begins a text or, if not at the `start`, goes on."""

        def plain(piece: str) -> list[int]:
            return list(self.tokenizer(piece, add_special_tokens=False, **options)["input_ids"])

        for before in () if start or not text else self._before:
            cut = plain(before)
            ids = plain(before + text)
            if self.tokenizer.unk_token_id not in cut and ids[: len(cut)] == cut:
                return ids[len(cut) :]
        return plain(text)

    def untrusted(self, text: str, start: bool = False) -> list[int]:
        """Ids of outside text, in which the spelling of a control token is ordinary pieces. It goes
        on with what stands before it, unless it is the `start` of a text."""
        # Half characters cannot be encoded at all.
        text = text.encode("utf-8", "replace").decode("utf-8")
        cuts = [match.start() + 1 for match in self._added.finditer(text)] if self._added else []
        pieces = [text[start:end] for start, end in pairwise([0, *cuts, len(text)])]
        ids: list[int] = []
        for k, piece in enumerate(pieces):
            ids += self._ids(piece, start and not k, split_special_tokens=True)
        return ids

    def literal(self, text: str, start: bool = False) -> list[int]:
        """Ids of our own text, where tags and control tokens mean what they say."""
        return self._literals(text, start)

    def written(self, text: str, tags: Sequence[str]) -> list[int]:
        """Ids of a text as a model would sample it, which goes on with what stands before it: tags
        that the tokenizer has as tokens of their own are these, all else is untrusted."""
        own = set(tags) & set(self.tokenizer.get_added_vocab())
        pieces = re.split(f"({'|'.join(map(re.escape, sorted(own)))})", text) if own else [text]
        ids: list[int] = []
        for piece in pieces:
            ids += self.literal(piece) if piece in own else self.untrusted(piece)
        return ids

    def template(self, template: str, fields: Mapping[str, str]) -> list[int]:
        """Ids of a template that opens a text; the fields' texts are untrusted."""
        ids: list[int] = []
        for piece in _FIELD.split(template):
            name = piece.strip()[1:-1]
            if _FIELD.fullmatch(piece) and name in fields:
                ids += self.untrusted(piece[: piece.index("{")] + fields[name], start=not ids)
            elif piece:
                ids += self.literal(piece, start=not ids)
        return ids

    def prompt(
        self,
        template: str,
        fields: Mapping[str, str],
        chat: bool,
        system: str | None = None,
        thinking: bool | None = None,
    ) -> list[int]:
        """Ids of a template that opens the context.

        Args:
            chat: write it as a user's message, if the tokenizer has a chat template; otherwise it
                is plain text after the tokenizer's own begin token.
            system: the system's message before it.
            thinking: what the chat template gets as enable_thinking; None gives it nothing.
        """
        if chat and self.tokenizer.chat_template:
            return self.template(self._chats(template, system, thinking, self.date), fields)
        opening = [i for i in self.tokenizer("")["input_ids"] if i == self.tokenizer.bos_token_id]
        return opening + self.template(template, fields)

    def _rendered(self, template: str, system: str | None, thinking: bool | None, day: date) -> str:
        """What the chat template makes of the messages; UserError if it loses or changes a text."""
        from jinja2 import TemplateError

        messages = [] if system is None else [{"role": "system", "content": system}]
        messages.append({"role": "user", "content": template})
        options: dict[str, Any] = {} if thinking is None else {"enable_thinking": thinking}
        # The date is written into the template: a run that goes on has that of its beginning.
        today = day.strftime
        dated = _NOW.sub(lambda found: repr(today(found[2])), self.tokenizer.get_chat_template())
        options |= {"chat_template": dated, "tokenize": False, "add_generation_prompt": True}
        who = f"prompts: the chat template of {self.tokenizer.name_or_path}"
        change = "set prompts.chat: false, or take another model"
        try:
            text = str(self.tokenizer.apply_chat_template(messages, **options))
        except (TemplateError, TypeError) as error:
            if system is not None:
                # This raises if it is not the system's message that is refused.
                self._rendered(template, None, thinking, day)
                change = "leave prompts.simulator_system out, or take another model"
            raise UserError(f"{who} refuses the messages: {error}; {change}") from error
        written = {"prompts.simulator_system": system or "", "the prompt": template}
        for name, content in written.items():
            if content.strip() not in text:
                raise UserError(f"{who} changes or loses the text of {name}; {change}")
        return text

    def opens_thought(self, template: str, chat: bool, system: str | None = None, thinking: bool | None = None) -> bool:
        """Whether the prompt ends inside of a thought, which its output then only closes, as the
        chat templates of some models do. What a question says does not count."""
        if chat and self.tokenizer.chat_template:
            chat_text = self._chats(template, system, thinking, self.date)
            ending = chat_text.rpartition(template.strip())[2]
            return ending.rfind("<think>") > ending.rfind("</think>")
        return template.rstrip().endswith("<think>")

    def decode(self, ids: list[int]) -> str:
        """The ids' text with every tag in it."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
