import pytest

from services.router.api.errors import ApiError
from services.router.api.requests import ChatRequest, CompletionRequest, Message
from services.router.api.sampling import for_choice, sampling_params
from services.wire.messages import SamplingParams
from tests.router.workers import CARD


def chat(prompt_tokens=100, defaults=None, **fields):
    request = ChatRequest(model="m", messages=[Message("user", "hi")], **fields)
    return sampling_params(request, CARD, defaults or {}, prompt_tokens)


def completion(prompt_tokens=100, **fields):
    return sampling_params(CompletionRequest(model="m", prompt="x", **fields), CARD, {}, prompt_tokens)


def refusal(make, **fields):
    with pytest.raises(ApiError) as error:
        make(**fields)
    return error.value.detail


def test_every_field_arrives():
    given = chat(
        max_tokens=50,
        min_tokens=5,
        temperature=0.5,
        top_p=0.9,
        top_k=40,
        min_p=0.1,
        presence_penalty=0.2,
        frequency_penalty=0.3,
        repetition_penalty=1.1,
        seed=7,
        stop_token_ids=[3, 4],
        ignore_eos=True,
        logit_bias={"5": -100.0},
        logprobs=True,
        top_logprobs=2,
    )
    assert given == SamplingParams(
        50, 5, 0.5, 0.9, 40, 0.1, 0.2, 0.3, 1.1, 7, (3, 4), True, {5: -100.0}, 2
    )  # fmt: skip


def test_without_wishes_openais_defaults_hold():
    given = chat(seed=1)
    assert given == SamplingParams(max_tokens=CARD.max_model_len - 100, seed=1)


def test_the_models_own_defaults_come_before_openais_and_after_the_clients():
    defaults = {"temperature": 0.7, "top_p": 0.8, "top_k": 20.0, "repetition_penalty": 1.05}
    given = chat(defaults=defaults)
    assert (given.temperature, given.top_p, given.top_k, given.repetition_penalty) == (0.7, 0.8, 20, 1.05)
    given = chat(defaults=defaults, temperature=0.0, top_p=1.0, top_k=-1, repetition_penalty=1.0)
    assert (given.temperature, given.top_p, given.top_k, given.repetition_penalty) == (0.0, 1.0, 0, 1.0)


def test_max_completion_tokens_wins_over_max_tokens():
    assert chat(max_tokens=5, max_completion_tokens=9).max_tokens == 9


def test_completions_end_after_16_tokens_by_default_or_where_the_context_ends():
    assert completion().max_tokens == 16
    assert completion(prompt_tokens=CARD.max_model_len - 3).max_tokens == 3


def test_a_random_seed_is_drawn_once_so_that_a_retry_repeats_it():
    seeds = {chat().seed for _ in range(20)}
    assert len(seeds) == 20
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_each_choice_has_its_own_seed():
    first = chat(seed=2**63 - 1)
    assert [for_choice(first, i).seed for i in range(3)] == [2**63 - 1, 0, 1]
    assert chat(seed=-1).seed == 2**63 - 1


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"max_tokens": 8093}, "max_tokens", ["8093", "100 tokens", "8192"]),
        ({"max_completion_tokens": 8093}, "max_completion_tokens", ["8093"]),
        ({"min_tokens": 6, "max_tokens": 5}, "min_tokens", ["5", "6"]),
        ({"seed": 2**63}, "seed", ["64-bit"]),
        ({"seed": -(2**63) - 1}, "seed", ["64-bit"]),
        ({"stop_token_ids": [1000]}, "stop_token_ids", ["999", "1000"]),
        ({"logit_bias": {"1000": 1}}, "logit_bias", ["999", "1000"]),
        ({"logit_bias": {"x": 1}}, "logit_bias", ["'x'"]),
        ({"logit_bias": {"٣": 1}}, "logit_bias", ["token ids"]),
        ({"logit_bias": {str(i): 0 for i in range(1025)}}, "logit_bias", ["1024", "1025"]),
        ({"top_logprobs": 3}, "top_logprobs", ["logprobs"]),
    ],
)
def test_what_this_model_cannot_do_is_refused_with_its_limit(fields, param, words):
    detail = refusal(chat, **fields)
    assert detail.param == param
    assert all(word in detail.message for word in words)


def test_the_context_limit_has_its_code():
    assert refusal(chat, max_tokens=9000).code == "context_length_exceeded"


@pytest.mark.parametrize(
    ("fields", "expected"), [({}, -1), ({"logprobs": True}, 0), ({"logprobs": False}, -1)]
)
def test_chat_logprobs(fields, expected):
    assert chat(**fields).logprobs == expected


@pytest.mark.parametrize(("fields", "expected"), [({}, -1), ({"logprobs": 0}, 0), ({"logprobs": 3}, 3)])
def test_completion_logprobs(fields, expected):
    assert completion(**fields).logprobs == expected
