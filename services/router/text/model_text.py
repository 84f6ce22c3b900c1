"""One model's text side: everything a router makes out of a worker's `TextAssets`."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

from services.router.text.detokenize import Detokenizer, MarkingDetokenizer, make_detokenizer
from services.router.text.template import ChatTemplate, TemplateError
from services.router.text.tokenizer import Tokenizer
from services.wire.messages import TextAssets

#: A prompt's last characters that are kept to see whether they begin the answer.
END_CHARS = 64


@dataclass(frozen=True)
class ChatPrompt:
    """`starts[i]` is the index of the first token of the i-th message asked for; `end` are the last
    characters of the text."""

    tokens: list[int]
    starts: list[int]
    end: str


class ModelText:
    """Tokenizer, chat template and generation defaults of one model. Safe to use from several threads."""

    def __init__(self, assets: TextAssets, vocab_size: int) -> None:
        """Takes up to a second for a large vocabulary. Raises ValueError if an asset cannot be used."""
        self.tokenizer = Tokenizer(assets.tokenizer, vocab_size)
        special = {"bos_token": assets.bos_token or "", "eos_token": assets.eos_token or ""}
        self.template = ChatTemplate(assets.chat_template, special) if assets.chat_template else None
        self.generation_defaults = assets.generation_defaults
        self._shown: dict[int, str] = {}
        self._first_token = (
            self.tokenizer.token_id(assets.bos_token) if assets.add_bos and assets.bos_token else None
        )

    def encode_prompt(self, text: str) -> list[int]:
        """Tokens of a raw prompt, begun with the model's beginning-of-sequence token where it wants one."""
        tokens = self.tokenizer.encode(text)
        if self._first_token is not None and tokens[:1] != [self._first_token]:
            tokens.insert(0, self._first_token)
        return tokens

    def encode_chat(
        self,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[dict[str, Any]] | None,
        extra: dict[str, Any] | None,
        starts_of: Sequence[int] = (),
        add_generation_prompt: bool = True,
    ) -> ChatPrompt:
        """Tokens of a conversation, as a rule ready for the assistant's answer, and where messages
        `starts_of` (ascending; the number of messages means the end) begin. Raises TemplateError."""
        if self.template is None:
            raise TemplateError("the model has no chat template")
        text = self.template.render(messages, tools, extra, add_generation_prompt)
        if not starts_of:
            return ChatPrompt(self.tokenizer.encode(text), [], text[-END_CHARS:])
        tokens, token_starts = self.tokenizer.encode_with_starts(text)
        chars = self.template.message_starts(starts_of, text, messages, tools, extra)
        return ChatPrompt(tokens, [bisect_left(token_starts, char) for char in chars], text[-END_CHARS:])

    def special(self, marks: Iterable[str]) -> dict[str, int]:
        """Ids of those of the marks that are special tokens, which text does not show."""
        ids = {mark: self.tokenizer.token_id(mark) for mark in marks}
        return {mark: id for mark, id in ids.items() if id is not None and id in self.tokenizer.special_ids}

    def showing(self, marks: Mapping[str, int]) -> ModelText:
        """The same, with these special tokens (text to id) shown in the text of answers."""
        if not marks:
            return self
        other = copy(self)
        other._shown = {id: mark for mark, id in marks.items()}
        return other

    def detokenizer(self, prompt: Sequence[int]) -> Detokenizer:
        """A detokenizer for one sequence that follows `prompt`."""
        detokenizer = make_detokenizer(self.tokenizer, prompt)
        return MarkingDetokenizer(detokenizer, self._shown) if self._shown else detokenizer
