"""From a request's sampling fields to what workers are told, checked against the model that will serve it."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping

import msgspec

from services.router.api.errors import invalid, too_long
from services.router.api.requests import (
    MAX_LOGIT_BIASES,
    ChatRequest,
    CompletionRequest,
    Sampling,
)
from services.wire.messages import ModelCard, SamplingParams

#: OpenAI's default for text completions. A chat goes on for as long as the context allows.
COMPLETION_MAX_TOKENS = 16

_INT64 = 2**63


def sampling_params(
    request: ChatRequest | CompletionRequest,
    card: ModelCard,
    defaults: Mapping[str, float],
    prompt_tokens: int,
    grammar: str = "",
) -> SamplingParams:
    """Parameters of the first of the `n` answers. Raises ApiError (400).

    Temperature, top_p, top_k and repetition_penalty that the client does not give come from the model's own
    generation config (`defaults`), for which the checkpoint was tuned, then from OpenAI's defaults.
    """
    max_tokens = _max_tokens(request, card, prompt_tokens)
    min_tokens = request.min_tokens or 0
    if min_tokens > max_tokens:
        raise invalid(f"min_tokens must be at most max_tokens, {max_tokens}, got {min_tokens}", "min_tokens")
    if grammar:
        _check_beside_grammar(request)
    seed = secrets.randbits(63) if request.seed is None else request.seed
    if not -_INT64 <= seed < _INT64:
        raise invalid(f"seed must be a signed 64-bit integer, got {seed}", "seed")
    stop_token_ids = tuple(request.stop_token_ids or ())
    _check_ids("stop_token_ids", stop_token_ids, card)
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        temperature=_either(request.temperature, defaults, "temperature", 1.0),
        top_p=_either(request.top_p, defaults, "top_p", 1.0),
        top_k=max(0, int(_either(request.top_k, defaults, "top_k", 0))),
        min_p=request.min_p or 0.0,
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        repetition_penalty=_either(request.repetition_penalty, defaults, "repetition_penalty", 1.0),
        seed=seed % _INT64,
        stop_token_ids=stop_token_ids,
        ignore_eos=bool(request.ignore_eos),
        logit_bias=_logit_bias(request, card),
        logprobs=_logprobs(request),
        grammar=grammar,
    )


def for_choice(sampling: SamplingParams, index: int) -> SamplingParams:
    """Parameters of answer `index`: its own seed, so that the `n` answers differ."""
    if index == 0:
        return sampling
    return msgspec.structs.replace(sampling, seed=(sampling.seed + index) % _INT64)


def check_prompt_ids(tokens: Iterable[int], card: ModelCard, param: str = "prompt") -> None:
    """Raises ApiError (400) if a token id of the client's is not in the vocabulary."""
    _check_ids(param, tokens, card)


def check_room(prompt_tokens: int, card: ModelCard, param: str) -> None:
    """Raises ApiError (400) unless the model's context has room for the prompt and one token more."""
    if prompt_tokens >= card.max_model_len:
        raise too_long(
            f"{param}: {prompt_tokens} tokens; with at least one for the answer they exceed the context of "
            f"{card.max_model_len} tokens of model {card.name}",
            param,
        )


def _max_tokens(request: ChatRequest | CompletionRequest, card: ModelCard, prompt_tokens: int) -> int:
    room = card.max_model_len - prompt_tokens
    field, wanted = "max_tokens", request.max_tokens
    if isinstance(request, ChatRequest) and request.max_completion_tokens is not None:
        field, wanted = "max_completion_tokens", request.max_completion_tokens
    if wanted is None:
        return room if isinstance(request, ChatRequest) else min(COMPLETION_MAX_TOKENS, room)
    if wanted > room:
        raise too_long(
            f"{field}: {wanted} and {prompt_tokens} tokens of prompt exceed the context of "
            f"{card.max_model_len} tokens of model {card.name}",
            field,
        )
    return wanted


def _check_beside_grammar(request: Sampling) -> None:
    """An answer of a prescribed form ends where the form does."""
    for name in ("min_tokens", "ignore_eos"):
        if getattr(request, name):
            raise invalid(f"{name} cannot be combined with a prescribed form of the answer", name)


def _either(given: float | None, defaults: Mapping[str, float], name: str, otherwise: float) -> float:
    return defaults.get(name, otherwise) if given is None else given


def _logit_bias(request: Sampling, card: ModelCard) -> dict[int, float]:
    given = request.logit_bias or {}
    if len(given) > MAX_LOGIT_BIASES:
        raise invalid(
            f"logit_bias must have at most {MAX_LOGIT_BIASES} entries, got {len(given)}", "logit_bias"
        )
    biases = {}
    for key, value in given.items():
        if not key.isascii() or not key.isdigit():
            raise invalid(f"logit_bias: keys must be token ids, got {key[:40]!r}", "logit_bias")
        biases[int(key[:20])] = value
    _check_ids("logit_bias", biases, card)
    return biases


def _logprobs(request: ChatRequest | CompletionRequest) -> int:
    if isinstance(request, CompletionRequest):
        return -1 if request.logprobs is None else request.logprobs
    if request.logprobs:
        return request.top_logprobs or 0
    if request.top_logprobs is not None:
        raise invalid("top_logprobs needs logprobs to be true", "top_logprobs")
    return -1


def _check_ids(field: str, ids: Iterable[int], card: ModelCard) -> None:
    for token in ids:
        if not 0 <= token < card.vocab_size:
            raise invalid(f"{field}: token ids must be from 0 to {card.vocab_size - 1}, got {token}", field)
