"""What can be said of a request at once: whether this engine can serve it at all."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from kernels.sampling_table import MAX_BIASES, MAX_STOPS
from services.wire.hashes import HASH_BYTES
from services.wire.messages import MAX_PRIORITY, Retention, SamplingParams
from services.worker.request import Request, RequestError

#: OpenAI's limit; each costs a sorted candidate a token.
MAX_LOGPROBS = 20

#: Leaves half of the forbidden tokens of a slot to the model's own ends of sequence.
MAX_STOP_TOKENS = MAX_STOPS // 2


@dataclass(frozen=True)
class RequestLimits:
    vocab_size: int
    block_size: int
    kv_tokens: int  # that fit into all pages
    max_model_len: int


def check_request(request: Request, limits: RequestLimits) -> None:
    """Raises RequestError naming the field, the value and the limit."""
    _check_prompt(request, limits)
    _check_hashes(request, limits.block_size)
    _check_sampling(request.sampling, limits.vocab_size)
    # A continued request has a prompt and is not at its end.
    most = min(len(request.tokens), request.sampling.max_tokens) - 1
    _check_range("generated", request.generated, 0, most)
    _check_retention(request.retention, request.prompt_length)


def _check_prompt(request: Request, limits: RequestLimits) -> None:
    length = len(request.tokens)
    if not length:
        raise RequestError("tokens must hold at least 1 token, got 0")
    if length >= limits.kv_tokens:
        raise RequestError(
            f"tokens: a prompt of {length} tokens does not fit, KV memory holds {limits.kv_tokens} tokens "
            f"and 1 is needed to answer"
        )
    if length >= limits.max_model_len:
        raise RequestError(
            f"tokens: a prompt of {length} tokens is too long, the limit is {limits.max_model_len} tokens "
            f"including at least 1 generated"
        )
    try:
        ids = np.asarray(request.tokens, dtype=np.int64)
    except (TypeError, ValueError, OverflowError) as error:
        raise RequestError(f"tokens must be integers: {error}") from error
    _check_ids("tokens", int(ids.min()), int(ids.max()), limits.vocab_size)


def _check_ids(field: str, lowest: int, highest: int, vocab_size: int) -> None:
    if lowest < 0 or highest >= vocab_size:
        wrong = lowest if lowest < 0 else highest
        raise RequestError(f"{field} must be token ids from 0 to {vocab_size - 1}, got {wrong}")


def _check_hashes(request: Request, block_size: int) -> None:
    expected = len(request.tokens) // block_size
    if len(request.hashes) != expected:
        raise RequestError(
            f"hashes must name the {expected} full blocks of {block_size} tokens, got {len(request.hashes)}"
        )
    for hash in (request.root, *request.hashes):
        if len(hash) != HASH_BYTES:
            raise RequestError(f"root and hashes must be {HASH_BYTES} bytes each, got one of {len(hash)}")


def _check_sampling(sampling: SamplingParams, vocab_size: int) -> None:
    _check_range("max_tokens", sampling.max_tokens, 1, math.inf)
    _check_range("min_tokens", sampling.min_tokens, 0, sampling.max_tokens)
    _check_range("temperature", sampling.temperature, 0, math.inf)
    _check_range("top_p", sampling.top_p, 0, 1, above=True)
    _check_range("top_k", sampling.top_k, 0, 2**31 - 1)
    _check_range("min_p", sampling.min_p, 0, 1)
    _check_range("presence_penalty", sampling.presence_penalty, -2, 2)
    _check_range("frequency_penalty", sampling.frequency_penalty, -2, 2)
    _check_range("repetition_penalty", sampling.repetition_penalty, 0, math.inf, above=True)
    if sampling.grammar and sampling.min_tokens:
        raise RequestError(
            f"min_tokens must be 0 beside a grammar, which has its own end, got {sampling.min_tokens}"
        )
    _check_range("seed", sampling.seed, -(2**63), 2**63 - 1)
    _check_range("logprobs", sampling.logprobs, -1, MAX_LOGPROBS)
    _check_count("stop_token_ids", len(sampling.stop_token_ids), MAX_STOP_TOKENS)
    for token in sampling.stop_token_ids:
        _check_ids("stop_token_ids", token, token, vocab_size)
    _check_count("logit_bias", len(sampling.logit_bias), MAX_BIASES)
    for token, value in sampling.logit_bias.items():
        _check_ids("logit_bias", token, token, vocab_size)
        if not math.isfinite(value):
            raise RequestError(f"logit_bias of token {token} must be finite, got {value}")


def _check_count(field: str, count: int, most: int) -> None:
    if count > most:
        raise RequestError(f"{field} must name at most {most} tokens, got {count}")


def _check_range(field: str, value: float, least: float, most: float, *, above: bool = False) -> None:
    # Written so that NaN fails; infinity fails through isfinite, which a huge int would overflow.
    inside = (least < value if above else least <= value) and value <= most
    if not inside or (isinstance(value, float) and math.isinf(value)):
        bounds = f"{'more than' if above else 'at least'} {least}"
        if math.isfinite(most):
            bounds += f" and at most {most}"
        raise RequestError(f"{field} must be {bounds}, got {value}")


def _check_retention(retention: tuple[Retention, ...], prompt_length: int) -> None:
    previous_end = 0
    for item in retention:
        end = prompt_length if item.end is None else item.end
        if not previous_end <= item.start < end <= prompt_length:
            raise RequestError(
                f"retention ranges must be sorted, disjoint and within the prompt's {prompt_length} tokens, "
                f"got {item.start} to {end} after {previous_end}"
            )
        if not 0 <= item.priority <= MAX_PRIORITY:
            raise RequestError(f"retention priority must be from 0 to {MAX_PRIORITY}, got {item.priority}")
        if item.ttl_s is not None and not 0 < item.ttl_s < math.inf:
            raise RequestError(f"retention ttl_s must be positive and finite, got {item.ttl_s}")
        previous_end = end
