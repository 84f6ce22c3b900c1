"""From segments to request bodies: token ids for /v1/completions, words for /v1/chat/completions.

Token ids need no tokenizer and say exactly how long a prompt is. Words go through the server's chat template
and tokenizer, so that their length in tokens is near the number of words but the server's to say.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import shake_128
from typing import Any, Literal

import msgspec
import numpy as np

from .workload import Segment, Session

Api = Literal["completions", "chat"]

PATHS: dict[Api, str] = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}

#: Common short words: with the space before it each is one token in the byte-pair vocabularies we know.
_WORD_LIST = """
the of and to in is you that it he was for on are as with his they at be this have from or one had by word
but not what all were we when your can said there use an each which she do how their if will up other about
out many then them these so some her would make like him into time has look two more write go see number no
way could people my than first water been call who oil its now find long down day did get come made may part
over new sound take only little work know place year live me back give most very after thing our just name
good sentence man think say great where help through much before line right too mean old any same tell boy
follow came want show also around form three small set put end does another well large must big even such
because turn here why ask went men read need land different home us move try kind hand picture again change
off play spell air away animal house point page letter mother answer found study still learn should world
high every near add food between own below country plant last school father keep tree never start city earth
eye light thought head under story saw left few while along might close something seem next hard open
example begin life always those both paper
"""
WORDS = tuple(_WORD_LIST.split())


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Expands segments. A segment is SHAKE-128 of the seed and its name, so a longer one starts alike.

    The lowest sixteenth of the ids is left out: that is where special tokens live.
    """

    seed: int
    size: int

    def ids(self, segments: Iterable[Segment]) -> list[int]:
        lowest = self.size // 16
        ids: list[int] = []
        for segment in segments:
            noise = shake_128(f"{self.seed}/{segment.name}".encode()).digest(4 * segment.tokens)
            ids += (np.frombuffer(noise, dtype="<u4") % (self.size - lowest) + lowest).tolist()
        return ids

    def words(self, segments: Iterable[Segment]) -> str:
        return " ".join(WORDS[token % len(WORDS)] for token in self.ids(segments))


@dataclass(frozen=True, slots=True)
class Reply:
    """A turn's answer as the next turn needs it."""

    text: str
    tokens: int


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request ready to send. `prompt_tokens` is None where only the server can tell."""

    body: bytes
    max_tokens: int
    prompt_tokens: int | None


@dataclass(frozen=True, slots=True)
class RequestWriter:
    """How prompts are written for one endpoint. `extra` goes into every body and wins over what is there."""

    api: Api
    model: str
    vocabulary: Vocabulary
    ignore_eos: bool = True
    count_tokens: bool = False  # ask for logprobs: one entry a token, however the server cuts its chunks
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def path(self) -> str:
        return PATHS[self.api]

    def write(self, session: Session, replies: Sequence[Reply]) -> Prepared:
        """The turn that follows `replies`, with the whole history before it.

        Chat repeats the server's own answers. A completion's history stands in tokens of the same number,
        because a client without the tokenizer cannot know their ids: the answer's own blocks never hit.
        """
        turn = session.turns[len(replies)]
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": turn.output_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.ignore_eos:
            body["ignore_eos"] = True
        prompt_tokens = None
        if self.api == "chat":
            body["messages"] = self._messages(session, replies)
            if self.count_tokens:
                body["logprobs"] = True
        else:
            body["prompt"] = self._prompt_ids(session, replies)
            prompt_tokens = len(body["prompt"])
            if self.count_tokens:
                body["logprobs"] = 1
        return Prepared(msgspec.json.encode(body | self.extra), turn.output_tokens, prompt_tokens)

    def _messages(self, session: Session, replies: Sequence[Reply]) -> list[dict[str, str]]:
        messages = []
        if session.system:
            messages.append({"role": "system", "content": self.vocabulary.words(session.system)})
        for index, turn in enumerate(session.turns[: len(replies) + 1]):
            messages.append({"role": "user", "content": self.vocabulary.words(turn.user)})
            if index < len(replies):
                messages.append({"role": "assistant", "content": replies[index].text})
        return messages

    def _prompt_ids(self, session: Session, replies: Sequence[Reply]) -> list[int]:
        segments = list(session.system)
        for index, turn in enumerate(session.turns[: len(replies) + 1]):
            segments += turn.user
            if index < len(replies):
                segments.append(Segment(f"{session.name}/reply/{index}", replies[index].tokens))
        return self.vocabulary.ids(segments)
