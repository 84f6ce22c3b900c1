"""An engine behind its token channel: requests in from routers, one report a step out to them.

The engine steps on its own thread. Everything here runs in the event loop; a step crosses over in one
`call_soon_threadsafe`, whatever the number of its streams. Grammars are compiled on threads beside both:
a request that has one joins the engine when that is done.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import Callable, Hashable
from typing import Protocol

from prometheus_client import CollectorRegistry

from services.wire.channel_server import ChannelServer, Stream, SubmitError
from services.wire.hashes import split_hashes, unpack_tokens
from services.wire.limits import ChannelLimits
from services.wire.messages import Finish, Hello, Stats, StepItem, Submit, TextAssets
from services.worker.grammar import Grammars, Matcher
from services.worker.metrics import LabelledRegistry, WorkerMetrics
from services.worker.request import EngineClosed, Request, RequestError, StepListener, StepReport

log = logging.getLogger(__name__)

#: Routers take a silent worker for dead after `ChannelLimits.silence_s`.
BEAT_S = 1.0
#: Beats in a row at which the engine must be unhealthy before the worker gives itself up.
BEATS_UNTIL_FAILED = 5
#: How often a drain looks whether the engine is idle.
DRAIN_POLL_S = 0.02


class EngineLike(Protocol):
    """What the server needs of an engine. All methods return at once and may be called from the event loop
    while the engine steps on its own thread."""

    def start(self, listener: StepListener) -> None:
        """Begin to step; `listener` is called on the engine's thread."""

    def submit(self, request: Request) -> None:
        """Queue a request: it will get exactly one Output with a `finish`. Raises RequestError for one that
        cannot be served, EngineClosed when none can any more."""

    def cancel(self, key: Hashable) -> None:
        """Free what the request holds within one step. Unknown keys are fine."""

    def drain(self) -> None:
        """Take no new requests."""

    @property
    def idle(self) -> bool:
        """Nothing runs, nothing waits."""

    def stats(self) -> Stats: ...

    def healthy(self) -> bool:
        """The engine's thread is alive and gets on."""

    def stop(self) -> None:
        """Stop stepping and end the thread; waits for the step under way."""


class WorkerServer:
    """Serves one engine to any number of routers."""

    def __init__(
        self,
        engine: EngineLike,
        hello: Hello,
        text: TextAssets,
        secret: bytes,
        registry: CollectorRegistry,
        limits: ChannelLimits | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.engine = engine
        self.channel = ChannelServer(hello, text, self, secret, limits)
        self.labelled = LabelledRegistry(registry, hello.model.name)
        self.metrics = WorkerMetrics(
            self.labelled,
            max_model_len=hello.model.max_model_len,
            block_size=hello.block_size,
            gpu_blocks=hello.gpu_blocks,
            held=self.channel.held.count,
            routers=lambda: len(self.channel.connections),
        )
        self.failed = asyncio.Event()  # the engine is gone; restart the process
        self._clock = clock
        card = hello.model
        self._grammars = Grammars(text.tokenizer, card.vocab_size, card.eos_token_ids)
        self._compiling: dict[Stream, asyncio.Task[None]] = {}
        self._draining = False
        self._sent_stats: Stats | None = None
        self._last_beat_s = clock()
        self._beats: asyncio.Task[None] | None = None

    # ---- life ------------------------------------------------------------------------------------

    async def start(self, sock: socket.socket) -> None:
        """Start the engine and listen on a bound socket."""
        loop = asyncio.get_running_loop()

        def listener(report: StepReport) -> None:
            loop.call_soon_threadsafe(self._publish, report, self._clock())

        self.engine.start(listener)
        await self.channel.serve(sock)
        self._beats = asyncio.create_task(self._beat())

    async def drain(self, timeout_s: float, reason: str = "shutting down") -> bool:
        """Refuse new requests and let the running ones finish. False when `timeout_s` was not enough."""
        self._draining = True
        self.engine.drain()
        self.channel.drain(reason)
        deadline_s = self._clock() + timeout_s
        while self._compiling or not self.engine.idle:
            if self._clock() >= deadline_s:
                return False
            await asyncio.sleep(DRAIN_POLL_S)
        return True

    async def stop(self) -> None:
        """Stop the engine, then hand out what it has done and close. Requests still running are lost."""
        if self._beats:
            self._beats.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._beats
        for task in self._compiling.values():
            task.cancel()
        # The thread's last reports crossed over before its end does, so they are published by now.
        await asyncio.to_thread(self.engine.stop)
        await self.channel.close()

    def trouble(self) -> str:
        """Why this worker is not healthy, empty if it is. Callable from any thread."""
        silent_s = self._clock() - self._last_beat_s
        if silent_s > BEATS_UNTIL_FAILED * BEAT_S:
            return f"the event loop has not run for {silent_s:.0f} s"
        return "" if self.engine.healthy() else "the engine does not step"

    async def _beat(self) -> None:
        """Once a second: the load for routers and metrics, and a look at the engine."""
        unhealthy = 0
        while True:
            self._last_beat_s = self._clock()
            unhealthy = 0 if self.engine.healthy() else unhealthy + 1
            if unhealthy == BEATS_UNTIL_FAILED:
                log.error("the engine does not step; giving up")
                self.failed.set()
            stats = self.engine.stats()
            self.metrics.load(stats)
            self._sent_stats = stats
            self.channel.publish((), {}, {}, stats)
            await asyncio.sleep(BEAT_S)

    # ---- one step --------------------------------------------------------------------------------

    def _publish(self, report: StepReport, now_s: float) -> None:
        stats = report.stats
        if stats is not None:
            self.metrics.load(stats)
            if stats == self._sent_stats:
                stats = None
            else:
                self._sent_stats = stats
        self.metrics.step(report.outputs, now_s)
        items = []
        for out in report.outputs:
            stream: Stream = out.key  # type: ignore[assignment]  # the key that `submit` chose
            items.append((stream, StepItem(stream.request, out.tokens, out.start, out.logprobs, out.finish)))
        self.channel.publish(items, report.stored, report.removed, stats)

    # ---- requests (RequestHandler) ---------------------------------------------------------------

    def submit(self, stream: Stream, message: Submit) -> None:
        now_s = self._clock()
        if message.sampling.grammar and not self._draining:
            self._compiling[stream] = asyncio.create_task(self._submit_compiled(stream, message, now_s))
        else:
            self._submit(stream, message, now_s, None)

    def cancel(self, stream: Stream) -> None:
        if task := self._compiling.pop(stream, None):
            task.cancel()
        self.engine.cancel(stream)

    async def _submit_compiled(self, stream: Stream, message: Submit, now_s: float) -> None:
        """Once its grammar is compiled. The router is told here what `submit` would have raised."""
        try:
            matcher = await asyncio.to_thread(self._matcher, message)
            self._submit(stream, message, now_s, matcher)
        except ValueError as error:
            self.metrics.refused("invalid_request")
            self._refuse(stream, Finish("error", message=str(error), error_kind="invalid_request"))
        except SubmitError as error:
            self._refuse(stream, Finish("error", message=str(error), error_kind=error.kind))
        except Exception as error:
            log.exception("could not take request %d", stream.request)
            self._refuse(stream, Finish("error", message=f"worker failed to take the request: {error}"))
        finally:
            self._compiling.pop(stream, None)

    def _matcher(self, message: Submit) -> Matcher:
        """Raises ValueError."""
        tokens = unpack_tokens(message.tokens)
        generated = tokens[len(tokens) - message.generated :]
        return self._grammars.matcher(message.sampling.grammar, generated)

    def _refuse(self, stream: Stream, finish: Finish) -> None:
        self.channel.publish([(stream, StepItem(stream.request, finish=finish))], {}, {}, None)

    def _submit(self, stream: Stream, message: Submit, now_s: float, matcher: Matcher | None) -> None:
        """Raises SubmitError."""
        try:
            if self._draining:
                raise SubmitError("draining", "the worker is shutting down")
            self.engine.submit(_request(stream, message, now_s, matcher))
        except RequestError as error:
            self.metrics.refused("invalid_request")
            raise SubmitError("invalid_request", str(error)) from error
        except EngineClosed as error:
            self.metrics.refused("draining")
            raise SubmitError("draining", str(error)) from error
        except SubmitError as error:
            self.metrics.refused(error.kind)
            raise
        self.metrics.submitted(stream, now_s)


def _request(stream: Stream, message: Submit, now_s: float, matcher: Matcher | None) -> Request:
    try:
        tokens = unpack_tokens(message.tokens)
        hashes = split_hashes(message.hashes)
    except ValueError as error:
        raise RequestError(str(error)) from error
    return Request(
        key=stream,
        tokens=tokens,
        root=message.root,
        hashes=hashes,
        sampling=message.sampling,
        retention=message.retention,
        priority=message.priority,
        tenant=message.tenant,
        arrival_s=now_s,
        generated=message.generated,
        matcher=matcher,
    )
