"""From a job's steps to the client's bytes: one coroutine a request, woken once for all that is queued.

Nothing is delayed to fill a batch: the first token goes out at once, and several tokens share an event only
when they were waiting together.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

from services.router.api.formats import DONE, Answer, Writer
from services.router.api.responses import PromptTokensDetails, Usage
from services.router.dispatch import Dispatcher
from services.router.job import Job
from services.router.metrics import RouterMetrics
from services.router.text import ModelText
from services.router.text.choice import Choice
from services.wire.messages import StepItem

Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

_EVENT_STREAM = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would hold tokens back
)


class ClientGone(Exception):
    """The client closed the connection: there is nobody to answer."""


class Relay:
    """Serves one job to one client. Raises ApiError for whatever ends it before the first byte."""

    def __init__(
        self,
        job: Job,
        text: ModelText,
        stops: tuple[str, ...],
        format: Writer,
        dispatcher: Dispatcher,
        metrics: RouterMetrics,
    ) -> None:
        self._job = job
        self._format = format
        self._dispatcher = dispatcher
        self._metrics = metrics
        self._with_logprobs = job.sampling.logprobs >= 0
        self._choices = [Choice(text.detokenizer(job.prompt.tokens), stops) for _ in range(job.choices)]
        self._unfinished = job.choices

    async def stream(self, send: Send, with_usage: bool) -> None:
        """Server-sent events. An error after the first byte becomes an event that ends the stream."""
        job, model = self._job, self._job.model.name
        delivery = self._metrics.inter_token.labels(model).observe
        begun, last_s = False, 0.0
        while self._unfinished:
            events = self._events(await self._next())
            if not begun:
                begun = True
                await send(self._head(_EVENT_STREAM))
                events = b"".join(map(self._format.begin, range(job.choices))) + events
            if not self._unfinished:
                self._account()
                if with_usage:
                    events += self._format.usage(self._usage())
                events += DONE
            elif job.failure and not job.items:
                self._metrics.broken_streams.labels(model, job.failure.detail.code or "").inc()
                await send({"type": "http.response.body", "body": events + job.failure.event()})
                return
            if events:
                now_s = time.monotonic()
                if last_s:
                    delivery(now_s - last_s)
                last_s = now_s
                await send({"type": "http.response.body", "body": events, "more_body": self._unfinished > 0})

    async def whole(self, send: Send) -> None:
        """One JSON document."""
        texts: list[list[str]] = [[] for _ in self._choices]
        while self._unfinished:
            for index, text in self._texts(await self._next()):
                texts[index].append(text)
            if self._unfinished and self._job.failure:
                raise self._job.failure
        self._account()
        answers = [
            Answer(
                "".join(parts), choice.take_logprobs() if self._with_logprobs else None, choice.finish_reason
            )
            for parts, choice in zip(texts, self._choices, strict=True)
            if choice.finish_reason is not None
        ]
        body = self._format.whole(answers, self._usage())
        length = str(len(body)).encode()
        await send(self._head(((b"content-type", b"application/json"), (b"content-length", length))))
        await send({"type": "http.response.body", "body": body})

    # ---- steps -----------------------------------------------------------------------------------

    async def _next(self) -> list[tuple[int, StepItem]]:
        """All that is queued, once something is. Raises ApiError when the job failed and nothing is left."""
        job = self._job
        await job.wake.wait()
        job.wake.clear()
        if job.client_gone:
            raise ClientGone
        items, job.items = job.items, []
        if job.failure and not items and not job.began:
            raise job.failure
        return items

    def _texts(self, items: Iterable[tuple[int, StepItem]]) -> Iterable[tuple[int, str]]:
        """New text by choice, several steps of one merged while they follow each other."""
        pending: dict[int, str] = {}
        for index, item in items:
            choice = self._choices[index]
            if choice.finish_reason is not None:
                continue  # on its way when a stop string ended the choice
            pending[index] = pending.get(index, "") + choice.feed(item)
            if choice.finish_reason is not None:
                self._unfinished -= 1
                if item.finish is None:
                    self._dispatcher.stop_choice(self._job, index)
        return pending.items()

    def _events(self, items: Iterable[tuple[int, StepItem]]) -> bytes:
        events = []
        for index, text in self._texts(items):
            choice = self._choices[index]
            logprobs = choice.take_logprobs() if self._with_logprobs else None
            if text or logprobs:
                events.append(self._format.delta(index, text, logprobs))
            if choice.finish_reason is not None:
                events.append(self._format.finish(index, choice.finish_reason))
        return b"".join(events)

    # ---- what goes with the answer -----------------------------------------------------------------

    def _head(self, headers: Iterable[tuple[bytes, bytes]]) -> dict[str, Any]:
        return {
            "type": "http.response.start",
            "status": 200,
            "headers": [*headers, (b"x-reprise-route", self._explanation().encode("latin-1", "replace"))],
        }

    def _explanation(self) -> str:
        """Which worker began, what routing expected of it and what the prefix hits really were."""
        job = self._job
        assert job.began is not None
        start, prediction, reason = job.began.start, job.began.route.prediction, job.began.route.reason
        uncached = start.prompt_tokens - start.gpu_tokens - start.host_tokens - start.store_tokens
        return (
            f"worker={job.began.worker_name}; predicted_ttft_ms={prediction.ttft_s * 1000:.1f}; "
            f"predicted_hit={prediction.local_tokens + prediction.store_tokens}; "
            f"hit_gpu={start.gpu_tokens}; hit_host={start.host_tokens}; hit_store={start.store_tokens}; "
            f"uncached={uncached}; reason={reason}"
        )

    def _usage(self) -> Usage:
        began = self._job.began
        prompt = len(self._job.prompt.tokens)
        completion = sum(choice.completion_tokens for choice in self._choices)
        cached = began.start.gpu_tokens + began.start.host_tokens + began.start.store_tokens if began else 0
        return Usage(prompt, completion, prompt + completion, PromptTokensDetails(cached))

    def _account(self) -> None:
        model = self._job.model.name
        completion = sum(choice.completion_tokens for choice in self._choices)
        self._metrics.completion_tokens.labels(model).inc(completion)
        self._metrics.e2e.labels(model).observe(time.monotonic() - self._job.arrival_s)
