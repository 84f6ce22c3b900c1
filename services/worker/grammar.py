"""Structured output in the engine: which tokens the grammar of a request allows next.

A matcher follows one request's answer token by token. Whoever takes in the request compiles it (`Grammars`,
away from the engine's thread); the engine asks it for a mask before each token and tells it the token after.

Masks are packed, a bit a token: what `kernels.sampling.TokenMask` takes. One takes 10 to 150 us, for JSON
8 on average (49,152 tokens).

Source: llguidance, https://github.com/guidance-ai/llguidance (Earley parser over a lexer of derivatives).
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence as Ordered
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from llguidance import LLMatcher

#: Compiled grammars kept: a client asks for the same one over and over. Each takes some 10 kB and its lexer.
_KEPT = 64

#: Of one grammar's lexer, which takes up to 2 kB a state: a hostile one cannot take more than 100 MB.
_MAX_LEXER_STATES = 50_000


class GrammarError(ValueError):
    """The grammar cannot be followed; the message says why."""


class Matcher(Protocol):
    """One answer's place in its grammar."""

    @property
    def complete(self) -> bool:
        """The answer is whole and nothing may follow but its end."""

    @property
    def fault(self) -> str:
        """Why it cannot be followed any further; empty while it can."""

    def allow(self, words: np.ndarray) -> None:
        """Write the mask of the next token into words [ceil(V / 32)] int32."""

    def accept(self, token: int) -> None:
        """The answer goes on with `token`, an end of sequence included."""


def masks(matchers: Ordered[Matcher], vocab: int) -> np.ndarray:
    """What each matcher allows: [N, ceil(vocab / 32)] int32."""
    words = np.zeros((len(matchers), -(-vocab // 32)), dtype=np.int32)
    for row, matcher in zip(words, matchers, strict=True):
        matcher.allow(row)
    return words


class Grammars:
    """Compiles the grammars of one model's requests. Safe to use from several threads.

    Made even where the library or the tokenizer is not up to it: then every request that needs it is told.
    """

    def __init__(self, tokenizer: bytes, vocab_size: int, eos_token_ids: Ordered[int]) -> None:
        """`tokenizer` is a Hugging Face tokenizers document. Takes 0.2 s for 49,152 tokens and holds the
        interpreter meanwhile, so do it before the engine steps."""
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()
        self._lock = threading.Lock()
        self._unable = ""
        if not eos_token_ids:
            self._unable = "structured output needs a model with an end-of-sequence token"
            return
        try:
            # Here and not above: machines that serve without structured output need no such package.
            from llguidance import LLMatcher, LLParserLimits, LLTokenizer
        except ImportError:
            self._unable = "structured output needs the package llguidance, which this worker lacks"
            return
        self._matcher = LLMatcher
        self._limits = LLParserLimits(max_lexer_states=_MAX_LEXER_STATES)
        try:
            self._tokenizer = LLTokenizer(tokenizer.decode(), n_vocab=vocab_size, eos_token=[*eos_token_ids])
        except Exception as error:  # the library raises whatever its tokenizers raise
            self._unable = f"structured output does not work with this model's tokenizer: {error}"

    def matcher(self, grammar: str, generated: Ordered[int] = ()) -> Matcher:
        """One for a new answer, or one that has begun with the tokens `generated`. Raises GrammarError.

        Takes microseconds for a grammar that was asked for lately, as a rule below a millisecond for another
        one, and up to a second for a very large one.
        """
        if self._unable:
            raise GrammarError(self._unable)
        with self._lock:
            compiled = self._compiled.get(grammar)
            if compiled is not None:
                self._compiled.move_to_end(grammar)
        if compiled is None:
            compiled = self._matcher(self._tokenizer, grammar, log_level=0, limits=self._limits)
            if compiled.is_error():
                raise GrammarError(f"grammar: {_first_line(compiled.get_error())}")
            with self._lock:
                self._compiled[grammar] = compiled
                while len(self._compiled) > _KEPT:
                    self._compiled.popitem(last=False)
        matcher = _Following(compiled.deep_copy())
        for token in generated:
            matcher.accept(token)
        if matcher.fault:
            raise GrammarError(f"grammar: the answer so far does not follow it: {matcher.fault}")
        return matcher


class _Following:
    """A `Matcher` of the library's."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher: Any = matcher

    @property
    def complete(self) -> bool:
        stopped: bool = self._matcher.is_stopped()
        return stopped and not self._matcher.is_error()

    @property
    def fault(self) -> str:
        return _first_line(self._matcher.get_error()) if self._matcher.is_error() else ""

    def allow(self, words: np.ndarray) -> None:
        self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)

    def accept(self, token: int) -> None:
        self._matcher.consume_token(token)


def _first_line(text: str) -> str:
    """Without the dump of the parser's state that follows."""
    return text.strip().partition("\n")[0][:300]
