"""How families of models write calls and thoughts, and which family a model is of."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

from services.router.answer.hermes import HermesParser
from services.router.answer.llama import PYTHON_TAG, LlamaParser
from services.router.answer.mistral import ARGS, BEGIN, CALL_ID, MistralParser
from services.router.answer.parser import BEGIN_THOUGHT, END_THOUGHT
from services.router.answer.pieces import CallParser

CallStyle = Literal["hermes", "llama", "mistral"]
CALL_STYLES: tuple[CallStyle, ...] = get_args(CallStyle)

#: Marks that may be special tokens, which text does not show otherwise.
_MARKS: dict[CallStyle, tuple[str, ...]] = {
    "hermes": ("<tool_call>", "</tool_call>"),
    "llama": (PYTHON_TAG,),
    "mistral": (BEGIN, CALL_ID, ARGS),
}


@dataclass(frozen=True)
class Family:
    """`thinks`: it may write thoughts between <think> and </think>."""

    calls: CallStyle
    thinks: bool

    def call_parser(self, names: Collection[str]) -> CallParser:
        """For one answer to a request with functions of these names."""
        match self.calls:
            case "hermes":
                return HermesParser()
            case "llama":
                return LlamaParser(names)
            case "mistral":
                return MistralParser()

    def marks(self, calls: bool) -> tuple[str, ...]:
        """What must show in the text for it to be understood, `calls` in it or not."""
        thoughts = (BEGIN_THOUGHT, END_THOUGHT) if self.thinks else ()
        return thoughts + (_MARKS[self.calls] if calls else ())


@lru_cache(maxsize=64)  # of some kilobytes each, and asked for with every request
def family_of(template: str, calls: CallStyle | None = None, thinks: bool | None = None) -> Family:
    """That of a model with this chat template. What is given holds instead of what the template tells.

    Where it does not tell how calls are written, Hermes' way is as good as any: the prompt or a grammar has
    the model do it."""
    if calls is None:
        calls = "hermes"
        if "tools" in template and "<tool_call>" not in template:
            if "[TOOL_CALLS]" in template:
                calls = "mistral"
            elif PYTHON_TAG in template or "<|start_header_id|>" in template:
                calls = "llama"
    return Family(calls, END_THOUGHT in template if thinks is None else thinks)
