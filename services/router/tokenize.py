"""POST /tokenize and /detokenize in vLLM's form: the tokens that a prompt becomes, the text of tokens."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from services.router.api.conversation import conversation
from services.router.api.decode import decode
from services.router.api.errors import invalid, unavailable
from services.router.api.requests import ChatRequest, Input, Message, TokenId, Tool
from services.router.api.sampling import check_prompt_ids
from services.router.prompt import PromptBuilder
from services.router.text.template import TemplateError
from services.router.workers import ServedModel, WorkerPool


class TokenizeRequest(Input):
    """Body of POST /tokenize: a `prompt` as for completions, or `messages` as for chat completions."""

    model: Annotated[str | None, Meta(description="Default: the only model that is served")] = None
    prompt: str | None = None
    add_special_tokens: Annotated[
        bool | None, Meta(description="Begin a prompt as the model wants it. Default: true")
    ] = None
    messages: Annotated[list[Message], Meta(min_length=1)] | None = None
    tools: list[Tool] | None = None
    add_generation_prompt: Annotated[
        bool | None, Meta(description="End messages where an answer begins. Default: true")
    ] = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: Annotated[bool | None, Meta(description="Also the vocabulary's names of tokens")] = (
        None
    )


class Tokens(msgspec.Struct):
    """Answer to POST /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(Input):
    """Body of POST /detokenize."""

    tokens: list[TokenId]
    model: str | None = None


class Detokenized(msgspec.Struct):
    """Answer to POST /detokenize: the text of the tokens, special ones by name."""

    prompt: str


_tokenize_decoder = msgspec.json.Decoder(TokenizeRequest)
_detokenize_decoder = msgspec.json.Decoder(DetokenizeRequest)


class Tokenizing:
    """The two endpoints, from a body to an answer. Raises ApiError."""

    def __init__(self, pool: WorkerPool, prompts: PromptBuilder) -> None:
        self._pool = pool
        self._prompts = prompts

    async def tokenize(self, body: bytes) -> Tokens:
        request = decode(body, _tokenize_decoder)
        if (request.prompt is None) == (request.messages is None):
            raise invalid("exactly one of prompt and messages is required", "prompt")
        model = self._find(request.model)
        tokens = await self._prompts.run(len(body), lambda: _tokens(request, model))
        tokenizer = model.text.tokenizer
        names = [tokenizer.name(token) for token in tokens] if request.return_token_strs else None
        return Tokens(len(tokens), model.card.max_model_len, tokens, names)

    async def detokenize(self, body: bytes) -> Detokenized:
        request = decode(body, _detokenize_decoder)
        model = self._find(request.model)
        check_prompt_ids(request.tokens, model.card, "tokens")
        tokenizer = model.text.tokenizer
        text = await self._prompts.run(len(body), lambda: tokenizer.decode(request.tokens, special=True))
        return Detokenized(text)

    def _find(self, name: str | None) -> ServedModel:
        if name is not None:
            return self._pool.wanted(name)
        if not self._pool.models:
            raise unavailable("no worker has become ready yet", "no_worker")
        if len(self._pool.models) > 1:
            raise invalid("model is required where several are served", "model", "missing_required_parameter")
        return next(iter(self._pool.models.values()))


def _tokens(request: TokenizeRequest, model: ServedModel) -> list[int]:
    text = model.text
    if request.prompt is not None:
        if request.add_special_tokens is False:
            return text.tokenizer.encode(request.prompt)
        return text.encode_prompt(request.prompt)
    chat = ChatRequest(model=model.name, messages=request.messages or [], tools=request.tools)
    seen = conversation(chat, text.template)
    try:
        return text.encode_chat(
            seen.messages,
            seen.tools,
            request.chat_template_kwargs,
            add_generation_prompt=request.add_generation_prompt is not False,
        ).tokens
    except TemplateError as error:
        raise invalid(f"messages: the model's chat template refused them: {error}", "messages") from None
