"""Requests that cannot be served are refused at once, by field, value and limit."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest

from kernels.kv_payload import Codec
from services.cache_store.frames import CODEC_IDS
from services.wire.messages import Retention
from services.worker.check import RequestLimits, check_request
from services.worker.config import EngineConfig
from services.worker.request import Request, RequestError
from tests.worker.requests import make_request, prompt
from tests.worker.stepping import Stepped

LIMITS = RequestLimits(vocab_size=320, block_size=16, kv_tokens=1024, max_model_len=512)


def changed(**fields: Any) -> Request:
    return Request(**{**vars(make_request("a", prompt(40))), **fields})


def sampled(**fields: Any) -> Request:
    request = make_request("a", prompt(40))
    return Request(**{**vars(request), "sampling": msgspec.structs.replace(request.sampling, **fields)})


def retained(*ranges: Retention) -> Request:
    return changed(retention=ranges)


def test_an_ordinary_request_passes() -> None:
    check_request(make_request("a", prompt(511), temperature=0.7, top_p=0.9, logit_bias={3: -5.0}), LIMITS)
    check_request(retained(Retention(0, 10, 90, 5.0), Retention(10, None, 0)), LIMITS)
    check_request(make_request("a", prompt(40), max_tokens=40, generated=39), LIMITS)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (changed(generated=-1), "generated must be at least 0 and at most 7, got -1"),
        (changed(generated=8), "generated must be at least 0 and at most 7, got 8"),
        (
            make_request("a", prompt(5), max_tokens=9, generated=5),
            "generated must be at least 0 and at most 4, got 5",
        ),
        (
            changed(generated=7, retention=(Retention(0, 34),)),
            "within the prompt's 33 tokens, got 0 to 34",
        ),
        (changed(tokens=[], hashes=[]), "tokens must hold at least 1 token, got 0"),
        (changed(tokens=[3, 320] * 20), "tokens must be token ids from 0 to 319, got 320"),
        (changed(tokens=[3, -1] * 20), "tokens must be token ids from 0 to 319, got -1"),
        (changed(tokens=["x"] * 40), "tokens must be integers"),
        (
            make_request("a", prompt(512)),
            "prompt of 512 tokens is too long, the limit is 512 tokens including",
        ),
        (make_request("a", prompt(1024)), "does not fit, KV memory holds 1024 tokens"),
        (changed(hashes=[b"x" * 16]), "hashes must name the 2 full blocks of 16 tokens, got 1"),
        (changed(hashes=[b"x" * 16, b"short"]), "16 bytes each, got one of 5"),
        (changed(root=b""), "16 bytes each, got one of 0"),
        (sampled(max_tokens=0), "max_tokens must be at least 1, got 0"),
        (sampled(min_tokens=9), "min_tokens must be at least 0 and at most 8, got 9"),
        (sampled(temperature=-0.1), "temperature must be at least 0, got -0.1"),
        (sampled(temperature=math.nan), "temperature must be at least 0, got nan"),
        (sampled(temperature=math.inf), "temperature must be at least 0, got inf"),
        (sampled(top_p=0.0), "top_p must be more than 0 and at most 1, got 0.0"),
        (sampled(top_p=1.1), "top_p must be more than 0 and at most 1, got 1.1"),
        (sampled(top_k=-1), "top_k must be at least 0"),
        (sampled(min_p=1.5), "min_p must be at least 0 and at most 1, got 1.5"),
        (sampled(presence_penalty=2.5), "presence_penalty must be at least -2 and at most 2, got 2.5"),
        (sampled(frequency_penalty=-3), "frequency_penalty must be at least -2 and at most 2, got -3"),
        (sampled(repetition_penalty=0), "repetition_penalty must be more than 0, got 0"),
        (sampled(seed=2**63), "seed must be at least"),
        (sampled(logprobs=21), "logprobs must be at least -1 and at most 20, got 21"),
        (sampled(stop_token_ids=(320,)), "stop_token_ids must be token ids from 0 to 319, got 320"),
        (sampled(stop_token_ids=tuple(range(65))), "stop_token_ids must name at most 64 tokens, got 65"),
        (
            sampled(logit_bias=dict.fromkeys(range(1025), 1.0)),
            "logit_bias must name at most 1024 tokens, got 1025",
        ),
        (sampled(logit_bias={-1: 1.0}), "logit_bias must be token ids from 0 to 319, got -1"),
        (sampled(logit_bias={1: math.inf}), "logit_bias of token 1 must be finite, got inf"),
        (retained(Retention(0, 41)), "within the prompt's 40 tokens, got 0 to 41"),
        (retained(Retention(5, 5)), "got 5 to 5"),
        (retained(Retention(0, 10), Retention(9, 20)), "sorted, disjoint .* got 9 to 20 after 10"),
        (retained(Retention(20, 30), Retention(0, 10)), "got 0 to 10 after 30"),
        (retained(Retention(0, 10, 101)), "priority must be from 0 to 100, got 101"),
        (retained(Retention(0, 10, 50, 0.0)), "ttl_s must be positive and finite, got 0.0"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(request_: Request, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        check_request(request_, LIMITS)


def test_a_refused_request_leaves_no_trace() -> None:
    stepped = Stepped(pages=8)
    with pytest.raises(RequestError, match="KV memory holds 128 tokens"):
        stepped.engine.submit(make_request("a", prompt(200)))
    assert stepped.engine.idle
    stepped.run([make_request("a", prompt(20))])
    assert stepped.finishes["a"].reason in ("stop", "length")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"block_size": 24}, "block_size must be a power of two"),
        ({"kv_bytes": 0}, "kv_bytes must be at least 1, got 0"),
        ({"pages": 0}, "pages must be at least 1, got 0"),
        ({"max_running": 0}, "max_running must be at least 1, got 0"),
        ({"max_model_len": 1}, "max_model_len must be at least 2, got 1"),
        ({"max_running": 64, "max_step_tokens": 63}, "max_step_tokens must be at least max_running"),
        ({"pipeline_depth": 3}, "pipeline_depth must be 1 or 2, got 3"),
        ({"store_codec": "zip"}, "store_codec must be one of none, int8, fp8, k8v4, got 'zip'"),
    ],
)
def test_a_senseless_configuration_is_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig(**fields)


def test_blocks_travel_compact_from_a_gpu_and_exact_from_a_cpu_unless_told_otherwise() -> None:
    assert EngineConfig.for_device("cpu").store_codec == "none"
    assert EngineConfig.for_device("cuda:1", store_codec=None).store_codec == "int8"
    assert EngineConfig.for_device("cuda", store_codec="k8v4").store_codec == "k8v4"


def test_every_codec_of_the_kernels_has_an_id_in_frames() -> None:
    assert {codec.value for codec in Codec} == set(CODEC_IDS)


def test_memory_and_setting_bound_the_length_of_a_request() -> None:
    assert Stepped().engine.max_model_len == 512
    assert Stepped(max_model_len=100).engine.max_model_len == 100
    assert Stepped(pages=4).engine.max_model_len == 64
    with pytest.raises(ValueError, match="max_model_len must be at most the model's 512, got 513"):
        Stepped(max_model_len=513)


def test_kv_bytes_become_pages() -> None:
    config = EngineConfig(kv_bytes=1000)
    assert config.page_count(300, available=10**9) == 3
    with pytest.raises(ValueError, match="kv_bytes must hold at least one page of 1001 B, got 1000"):
        config.page_count(1001, available=10**9)
    assert EngineConfig().page_count(300, available=1000) == 3
