"""Structured output in the worker: whatever the model would like to say, its answer follows the grammar."""

from __future__ import annotations

import functools
import json
import re
import sys

import numpy as np
import pytest
from llguidance import LLMatcher

from services.wire.messages import SamplingParams
from services.worker.grammar import GrammarError, Grammars, Matcher, masks
from services.worker.load import LoadedModel
from services.worker.models.random import TINY, random_model
from services.worker.request import RequestError
from tests.fakes.text import EOS, FAKE_VOCAB, byte_text_assets
from tests.worker.requests import make_request, prompt
from tests.worker.stepping import Stepped
from tests.worker.test_engine import alone, mixed

VOCAB = TINY["vocab_size"]  # 320: the tokenizer's and some that it lacks

DIGITS = LLMatcher.grammar_from_regex(r"[0-9]{3,12}")
SCHEMA = LLMatcher.grammar_from_json_schema(
    {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "maximum": 99}},
        "required": ["name", "age"],
        "additionalProperties": False,
    },
    overrides={"whitespace_flexible": False},
)


@functools.cache
def model() -> LoadedModel:
    """The tiny model with the byte tokenizer's end of sequence."""
    return random_model({**TINY, "eos_token_id": EOS}, max_model_len=512)


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(byte_text_assets().tokenizer, VOCAB, [EOS])


def allowed(matcher: Matcher) -> list[int]:
    words = masks([matcher], VOCAB)
    return np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist()


# ---- the matcher


def test_a_matcher_allows_what_may_follow_and_an_end_where_the_answer_is_whole(grammars: Grammars) -> None:
    matcher = grammars.matcher(LLMatcher.grammar_from_regex("ab?c|abcd"))
    assert bytes(allowed(matcher)) == b"a"
    matcher.accept(ord("a"))
    assert bytes(allowed(matcher)) == b"bc"
    matcher.accept(ord("b"))
    matcher.accept(ord("c"))
    assert allowed(matcher) == [ord("d"), EOS]
    assert not matcher.complete
    matcher.accept(ord("d"))
    assert matcher.complete
    assert not matcher.fault


def test_an_answer_that_has_begun_is_followed_from_there(grammars: Grammars) -> None:
    again = grammars.matcher(SCHEMA, b'{"name":"Jo"')
    assert bytes(allowed(again)) == b","
    assert bytes(allowed(grammars.matcher(SCHEMA))) == b"{", "the compiled one has not moved"
    with pytest.raises(GrammarError, match="does not follow"):
        grammars.matcher(SCHEMA, b'{"nome"')


@pytest.mark.parametrize(
    "grammar", ["start: nothing", '{"grammars": []}', "{", '{"json_schema": {"type": 1}}']
)
def test_a_bad_grammar_is_refused_in_a_line(grammars: Grammars, grammar: str) -> None:
    with pytest.raises(GrammarError, match=r"^grammar: [^\n]+$"):
        grammars.matcher(grammar)


def test_without_the_library_the_request_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    lacking = Grammars(byte_text_assets().tokenizer, FAKE_VOCAB, [EOS])
    with pytest.raises(GrammarError, match="package llguidance"):
        lacking.matcher(DIGITS)


def test_a_tokenizer_that_does_not_do_is_told_to_the_request() -> None:
    with pytest.raises(GrammarError, match="tokenizer"):
        Grammars(b"{}", FAKE_VOCAB, [EOS]).matcher(DIGITS)
    with pytest.raises(GrammarError, match="end-of-sequence"):
        Grammars(byte_text_assets().tokenizer, FAKE_VOCAB, []).matcher(DIGITS)


# ---- the engine


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("chunk", [16, 512])
def test_constrained_rows_follow_their_grammar_and_others_are_as_ever(
    grammars: Grammars, depth: int, chunk: int
) -> None:
    stepped = Stepped(model=model(), pipeline_depth=depth, max_step_tokens=chunk)
    constrained = [
        make_request(
            ("g", i),
            prompt(10 + 20 * i, seed=100 + i),
            max_tokens=100,
            temperature=1.0,
            seed=i,
            matcher=grammars.matcher(SCHEMA if i % 2 else DIGITS),
            grammar="the matcher's",
            logprobs=2 if i == 3 else -1,
        )
        for i in range(6)
    ]
    tokens = stepped.run(
        [r for pair in zip(mixed(1.0), constrained, strict=False) for r in pair] + mixed(1.0)[6:]
    )
    assert {key: tokens[key] for key in alone(1.0)} == alone(1.0)
    stepped.check_empty()
    for request in constrained:
        text = bytes(tokens[request.key]).decode()
        if request.key[1] % 2:  # type: ignore[index]
            document = json.loads(text)
            assert set(document) == {"name", "age"}
            assert document["age"] <= 99
        else:
            assert re.fullmatch("[0-9]{3,12}", text)
        assert stepped.finishes[request.key].reason == "stop"
    assert len(stepped.logprobs["g", 3]) == len(tokens["g", 3])


def test_a_pipelined_row_with_a_grammar_gets_a_token_every_step(grammars: Grammars) -> None:
    stepped = Stepped(model=model(), pipeline_depth=2)
    grammar = LLMatcher.grammar_from_regex("[a-z]{40}")
    stepped.run(
        [make_request("a", prompt(5), max_tokens=60, matcher=grammars.matcher(grammar), grammar=grammar)]
    )
    assert len(stepped.tokens["a"]) == 40
    assert stepped.finishes["a"].stop_token is None, "it was whole before an end of sequence"
    assert stepped.engine.counters.steps in (40, 41), "at most one beyond the end"


@pytest.mark.parametrize("depth", [1, 2])
def test_preemption_and_the_batch_do_not_change_a_constrained_text(grammars: Grammars, depth: int) -> None:
    def requests() -> list:
        return [
            make_request(
                i,
                prompt(20 + i, seed=i),
                max_tokens=90,
                temperature=1.0,
                seed=i,
                matcher=grammars.matcher(LLMatcher.grammar_from_regex("([a-z]{1,9} )+")),
                grammar="the matcher's",
            )
            for i in range(8)
        ]

    roomy, tight = (
        Stepped(model=model(), pipeline_depth=depth),
        Stepped(model=model(), pipeline_depth=depth, pages=20),
    )
    assert tight.run(requests()) == roomy.run(requests())
    assert tight.engine.counters.preemptions >= 5
    tight.check_empty()
    assert all(re.fullmatch("([a-z]{1,9} )*[a-z]{0,9}", bytes(t).decode()) for t in tight.tokens.values())
    assert {finish.reason for finish in tight.finishes.values()} == {"length"}, "max_tokens cut them"


@pytest.mark.parametrize("cut", [1, 5, 11])
def test_another_worker_goes_on_with_the_same_text(grammars: Grammars, cut: int) -> None:
    ask = {"max_tokens": 60, "temperature": 1.0, "seed": 5, "grammar": SCHEMA}
    whole = Stepped(model=model()).run(
        [make_request("a", prompt(20), matcher=grammars.matcher(SCHEMA), **ask)]
    )["a"]
    begun = whole[:cut]
    matcher = grammars.matcher(SCHEMA, begun)
    rest = Stepped(model=model()).run(
        [make_request("a", prompt(20) + begun, generated=cut, matcher=matcher, **ask)]
    )["a"]
    assert begun + rest == whole


class Failing:
    """A grammar that cannot go on after `tokens` tokens."""

    complete = False

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    @property
    def fault(self) -> str:
        return "too complex" if self.tokens < 0 else ""

    def allow(self, words: np.ndarray) -> None:
        if self.tokens == 99:
            raise RuntimeError("a bug")
        words.fill(-1)

    def accept(self, token: int) -> None:
        self.tokens -= 1


@pytest.mark.parametrize("depth", [1, 2])
def test_a_grammar_that_fails_ends_its_own_request(depth: int) -> None:
    stepped = Stepped(model=model(), pipeline_depth=depth)
    tokens = stepped.run([make_request("bad", prompt(9), matcher=Failing(3), grammar="x"), *mixed()])
    assert {key: tokens[key] for key in alone()} == alone()
    assert stepped.finishes["bad"].reason == "error"
    assert "too complex" in stepped.finishes["bad"].message
    stepped.check_empty()


@pytest.mark.parametrize("depth", [1, 2])
def test_a_step_whose_masks_fail_ends_its_requests_and_no_other(depth: int) -> None:
    stepped = Stepped(model=model(), pipeline_depth=depth)
    stepped.run([make_request("bad", prompt(9), matcher=Failing(99), grammar="x")])
    assert stepped.finishes["bad"].reason == "error"
    stepped.tokens.clear()
    assert stepped.run(mixed()) == alone()
    stepped.check_empty()


def test_cancelled_answers_free_what_they_hold(grammars: Grammars) -> None:
    stepped = Stepped(model=model(), pipeline_depth=2)
    endless = LLMatcher.grammar_from_regex("(ab){300}")
    stepped.engine.submit(
        make_request("a", prompt(9), max_tokens=400, matcher=grammars.matcher(endless), grammar=endless)
    )
    stepped.turn(6)
    stepped.engine.cancel("a")
    stepped.run()
    assert stepped.finishes["a"].reason == "cancelled"
    assert set(stepped.tokens["a"]) == {ord("a"), ord("b")}
    stepped.check_empty()


def test_min_tokens_and_a_grammar_contradict_each_other() -> None:
    with pytest.raises(RequestError, match="min_tokens"):
        Stepped(model=model()).engine.submit(make_request("a", prompt(9), min_tokens=3, grammar="x"))
    assert SamplingParams(1).grammar == ""
