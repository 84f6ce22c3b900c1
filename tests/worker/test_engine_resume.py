"""A request that another engine began goes on as if it had never moved."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.wire.messages import Retention
from services.worker.request import Request
from tests.worker.requests import BLOCK, make_request, prompt
from tests.worker.stepping import MemoryStore, Stepped

PROMPT = prompt(37, seed=3)
TOKENS = 60


def begun(answer: list[int], **fields: Any) -> Request:
    """The request, `answer` of it generated already."""
    return make_request("a", PROMPT + answer, **{"max_tokens": TOKENS, "generated": len(answer), **fields})


def run(request: Request, store: MemoryStore | None = None) -> Stepped:
    stepped = Stepped(store, max_step_tokens=40)
    stepped.run([request])
    stepped.check_empty()
    return stepped


penalties = st.sampled_from([0.0, -1.5, 0.7, 2.0])
samplings = st.fixed_dictionaries(
    {"temperature": st.sampled_from([0.0, 0.8, 1.5]), "seed": st.integers(-(2**63), 2**63 - 1)},
    optional={
        "top_p": st.sampled_from([0.5, 0.95]),
        "top_k": st.sampled_from([1, 5, 40]),
        "min_p": st.just(0.05),
        "presence_penalty": penalties,
        "frequency_penalty": penalties,
        "repetition_penalty": st.sampled_from([0.8, 1.3]),
        "min_tokens": st.integers(0, TOKENS),
        "logit_bias": st.dictionaries(st.integers(0, 319), st.floats(-5, 5), max_size=4),
        "stop_token_ids": st.just((11, 12)),
        "ignore_eos": st.booleans(),
        "logprobs": st.integers(0, 3),
    },
)


@given(samplings, st.data())
@settings(max_examples=40, deadline=None)
def test_it_gets_the_tokens_and_the_end_of_the_undisturbed_run(
    sampling: dict[str, Any], data: st.DataObject
) -> None:
    whole = run(begun([], **sampling))
    answer, finish = whole.tokens["a"], whole.finishes["a"]
    cut = data.draw(st.integers(0, max(0, len(answer) - (finish.reason == "length"))))
    rest = run(begun(answer[:cut], **sampling))
    assert rest.tokens["a"] == answer[cut:]
    assert rest.finishes["a"] == finish
    for resumed, undisturbed in zip(rest.logprobs["a"], whole.logprobs["a"][cut:], strict=True):
        assert resumed.chosen == pytest.approx(undisturbed.chosen, abs=1e-4)
        assert [token for token, _ in resumed.top] == [token for token, _ in undisturbed.top]


def test_without_the_count_the_same_tokens_are_another_request() -> None:
    sampling = {"temperature": 1.0, "seed": 5, "ignore_eos": True}
    answer = run(begun([], **sampling)).tokens["a"]
    as_prompt = run(make_request("a", PROMPT + answer[:20], max_tokens=TOKENS, **sampling))  # type: ignore[arg-type]
    assert as_prompt.tokens["a"][:40] != answer[20:]


def test_what_it_was_given_is_prefilled_and_told_at_its_start() -> None:
    answer = run(begun([], ignore_eos=True)).tokens["a"]
    stepped = run(begun(answer[:30], ignore_eos=True))
    assert stepped.starts["a"].prompt_tokens == len(PROMPT) + 30
    assert stepped.engine.counters.prefill_tokens == len(PROMPT) + 30
    assert len(stepped.tokens["a"]) == TOKENS - 30


def test_the_answers_blocks_that_the_first_engine_stored_are_loaded() -> None:
    """Blocks of the answer are named and written as the prompt's are."""
    store = MemoryStore()
    first = Stepped(store)
    answer = first.run([begun([], ignore_eos=True)])["a"]
    first.settle()
    rest = run(begun(answer[:45], ignore_eos=True), store)
    assert rest.tokens["a"] == answer[45:]
    assert rest.starts["a"].store_tokens == (len(PROMPT) + 45) // BLOCK * BLOCK


def test_retention_is_about_the_prompt_and_not_the_answer_so_far() -> None:
    store = MemoryStore()
    wish = (Retention(0, None, 90),)
    answer = run(begun([], ignore_eos=True)).tokens["a"]
    stepped = Stepped(store)
    stepped.run([begun(answer[:43], ignore_eos=True, retention=wish)])
    stepped.settle()
    priorities = [block.priority for block in sorted(store.blocks.values(), key=lambda block: block.depth)]
    assert priorities[:5] == [90, 90, 90, 35, 35]  # 37 tokens are in the first three blocks
