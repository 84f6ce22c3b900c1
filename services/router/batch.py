"""Several prompts in one request, answered as one: every prompt has a job and a relay of its own, and their
choices count on from prompt to prompt."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

from services.router.api.formats import DONE, Answer, Writer
from services.router.api.requests import ChatRequest, CompletionRequest
from services.router.api.responses import FinishReason, PromptTokensDetails, Usage
from services.router.relay import Relay, Send
from services.router.text.choice import TokenLogprob


def prompts_of(request: ChatRequest | CompletionRequest) -> list[str | list[int]] | None:
    """The prompts of a request that has several, even if it is a list of one; None otherwise."""
    if isinstance(request, ChatRequest) or isinstance(request.prompt, str):
        return None
    prompts = [prompt for prompt in request.prompt if not isinstance(prompt, int)]
    return prompts or None


class Part:
    """What the relay of one prompt writes with: the request's own writer, choices from `first` on. What
    belongs to the whole answer is kept for the end."""

    def __init__(self, writer: Writer, first: int) -> None:
        self.answers: Sequence[Answer] = ()
        self.tokens: Usage | None = None
        self._writer = writer
        self._first = first

    def begin(self, index: int) -> bytes:
        return self._writer.begin(self._first + index)

    def delta(self, index: int, text: str, logprobs: Sequence[TokenLogprob] | None) -> bytes:
        return self._writer.delta(self._first + index, text, logprobs)

    def finish(self, index: int, reason: FinishReason) -> bytes:
        return self._writer.finish(self._first + index, reason)

    def usage(self, usage: Usage) -> bytes:
        self.tokens = usage
        return b""

    def whole(self, answers: Sequence[Answer], usage: Usage) -> bytes:
        self.answers = answers
        self.tokens = usage
        return b""


class Batch:
    """Serves the jobs of one request to one client; used like a `Relay`."""

    def __init__(self, writer: Writer, parts: Sequence[Part], relays: Sequence[Relay]) -> None:
        """`relays` write with the `parts`."""
        self._writer = writer
        self._parts = parts
        self._relays = relays
        self._has_begun = False
        self._broken = asyncio.Event()

    async def stream(self, send: Send, with_usage: bool) -> None:
        """Server-sent events. An error after the first byte becomes an event that ends the stream."""

        async def send_part(message: MutableMapping[str, Any]) -> None:
            if self._broken.is_set():
                return
            if message["type"] == "http.response.start":
                if not self._has_begun:
                    self._has_begun = True
                    await send(message)
                return
            events: bytes = message["body"]
            ends = not message.get("more_body", False)
            if ends and not events.endswith(DONE):  # with an error
                self._broken.set()
                await send(message)
                return
            if events := events.removesuffix(DONE):
                await send({**message, "body": events, "more_body": True})

        await self._run(lambda relay: relay.stream(send_part, True))
        if not self._broken.is_set():
            usage = self._writer.usage(self._usage()) if with_usage else b""
            await send({"type": "http.response.body", "body": usage + DONE})

    async def whole(self, send: Send) -> None:
        """One JSON document."""
        head: MutableMapping[str, Any] = {}

        async def keep_head(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start" and not head:
                head.update(message)

        await self._run(lambda relay: relay.whole(keep_head))
        body = self._writer.whole([answer for part in self._parts for answer in part.answers], self._usage())
        headers = [item for item in head["headers"] if item[0] != b"content-length"]
        await send({**head, "headers": [*headers, (b"content-length", str(len(body)).encode())]})
        await send({"type": "http.response.body", "body": body})

    async def _run(self, serve: Callable[[Relay], Awaitable[None]]) -> None:
        """All relays at once, until they are done or one has failed. Raises what the first to fail raised."""
        tasks = [asyncio.ensure_future(serve(relay)) for relay in self._relays]
        broken = asyncio.ensure_future(self._broken.wait())
        try:
            waiting = set(tasks)
            while waiting and not self._broken.is_set():
                done, _ = await asyncio.wait([*waiting, broken], return_when=asyncio.FIRST_COMPLETED)
                for task in done & waiting:
                    await task
                waiting -= done
        finally:
            for task in (*tasks, broken):
                task.cancel()
            await asyncio.gather(*tasks, broken, return_exceptions=True)

    def _usage(self) -> Usage:
        counts = [part.tokens for part in self._parts if part.tokens is not None]
        prompt = sum(usage.prompt_tokens for usage in counts)
        completion = sum(usage.completion_tokens for usage in counts)
        cached = sum(usage.prompt_tokens_details.cached_tokens for usage in counts)
        return Usage(prompt, completion, prompt + completion, PromptTokensDetails(cached))
