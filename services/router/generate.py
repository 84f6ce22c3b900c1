"""POST /v1/chat/completions and /v1/completions: from request bytes to a running answer."""

from __future__ import annotations

import asyncio
import itertools
import logging
import re
import time
from collections.abc import Mapping, MutableMapping, Sequence
from functools import partial
from typing import Any

import msgspec
from msgspec.structs import replace

from services.router.api.answering import answering
from services.router.api.checks import check_chat, check_completion
from services.router.api.decode import decode
from services.router.api.errors import ApiError, failed, invalid
from services.router.api.formats import Format, Kind
from services.router.api.requests import ChatRequest, CompletionRequest
from services.router.api.sampling import sampling_params
from services.router.batch import Batch, Part, prompts_of
from services.router.body import Receive, read_json_body
from services.router.config import RouterConfig
from services.router.dispatch import Dispatcher
from services.router.job import Job
from services.router.metrics import RouterMetrics
from services.router.prompt import PromptBuilder
from services.router.relay import ClientGone, Relay, Send
from services.router.tenants import Tenants
from services.router.text import ModelText
from services.router.workers import WorkerPool

log = logging.getLogger(__name__)

ENDPOINTS: dict[str, Kind] = {"/v1/chat/completions": "chat", "/v1/completions": "completion"}

_chat_decoder = msgspec.json.Decoder(ChatRequest)
_completion_decoder = msgspec.json.Decoder(CompletionRequest)

#: W3C trace context: version, trace id, parent id, flags.
_TRACEPARENT = re.compile(rb"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}.*")


class Generate:
    """The two endpoints, without a framework between them and the server."""

    def __init__(
        self,
        config: RouterConfig,
        tenants: Tenants,
        pool: WorkerPool,
        dispatcher: Dispatcher,
        metrics: RouterMetrics,
        prompts: PromptBuilder,
    ) -> None:
        self._config = config
        self._tenants = tenants
        self._pool = pool
        self._dispatcher = dispatcher
        self._metrics = metrics
        self._prompts = prompts
        self._numbers = itertools.count()

    async def serve(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Answer one request. Every error becomes an OpenAI error object; nothing is raised."""
        path = scope["path"]
        status = 0

        async def counting_send(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self._serve(ENDPOINTS[path], scope, receive, counting_send)
        except ClientGone:
            status = status or 499
        except ApiError as error:
            status = error.status
            await send_error(error, send)
        except Exception:
            log.exception("%s failed", path)
            if status:  # an answer has begun: only closing the connection tells the client
                raise
            status = 500
            await send_error(failed("internal error", "internal_error"), send)
        finally:
            self._metrics.requests.labels(path, str(status)).inc()

    async def _serve(self, kind: Kind, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["method"] != "POST":
            error = invalid(f"{scope['method']} is not allowed here, only POST", status=405)
            error.headers += (("allow", "POST"),)
            raise error
        headers: Mapping[bytes, bytes] = dict(scope["headers"])
        tenant = self._tenants.identify(headers.get(b"authorization"))
        body = await read_json_body(
            headers, receive, self._config.max_body_bytes, self._config.body_timeout_s
        )
        arrival_s = time.monotonic()
        salt = self._tenants.salt(tenant)
        request: ChatRequest | CompletionRequest
        if kind == "chat":
            request = decode(body, _chat_decoder)
            check_chat(request)
        else:
            request = decode(body, _completion_decoder)
            check_completion(request)
        model = self._pool.wanted(request.model)
        card, text = model.card, model.text  # the model may be updated while we tokenise
        several = prompts_of(request)
        requests = [request] if several is None else [replace(request, prompt=one) for one in several]
        prompts = [
            await self._prompts.build(one, len(body), text, card, model.block_size, salt) for one in requests
        ]
        make = partial(
            answering, request, text, prompts[0].end, self._config.tool_call_parser, self._config.thinks
        )
        answers = await self._prompts.run(len(body), make)
        trace = _TRACEPARENT.fullmatch(headers.get(b"traceparent", b""))
        choices = request.n or 1
        jobs = [
            Job(
                number=next(self._numbers),
                model=model,
                text_digest=card.text_digest,
                prompt=prompt,
                sampling=sampling_params(
                    request, card, text.generation_defaults, len(prompt.tokens), answers.grammar
                ),
                choices=choices,
                priority=request.priority or 0,
                tenant=tenant,
                trace_id=trace[1].decode() if trace else "",
                arrival_s=arrival_s,
            )
            for prompt in prompts
        ]
        echo = [_echo(one, text) for one in requests for _ in range(choices)]
        with_usage = bool(request.stream_options and request.stream_options.include_usage)
        format = Format(
            kind,
            request.model,
            card.fingerprint,
            choices * len(jobs),
            with_usage,
            text.tokenizer,
            answers,
            echo if any(echo) else (),
        )
        stops = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ())
        relay = self._relay(jobs, text.showing(answers.marks), stops, format)
        watcher = asyncio.create_task(self._watch(receive, jobs))
        try:
            for job in jobs:
                self._dispatcher.submit(job)
            if request.stream:
                await relay.stream(send, with_usage)
            else:
                await relay.whole(send)
        finally:
            watcher.cancel()
            for job in jobs:
                self._dispatcher.release(job)

    def _relay(
        self, jobs: Sequence[Job], text: ModelText, stops: tuple[str, ...], format: Format
    ) -> Relay | Batch:
        if len(jobs) == 1:
            return Relay(jobs[0], text, stops, format, self._dispatcher, self._metrics)
        parts = [Part(format, i * job.choices) for i, job in enumerate(jobs)]
        relays = [
            Relay(job, text, stops, part, self._dispatcher, self._metrics)
            for job, part in zip(jobs, parts, strict=True)
        ]
        return Batch(format, parts, relays)

    async def _watch(self, receive: Receive, jobs: Sequence[Job]) -> None:
        """Free everything the moment the client leaves."""
        while (await receive())["type"] != "http.disconnect":
            pass
        self._metrics.disconnects.labels(jobs[0].model.name).inc()
        for job in jobs:
            job.client_gone = True
            self._dispatcher.release(job)
            job.wake.set()


def _echo(request: ChatRequest | CompletionRequest, text: ModelText) -> str:
    """What is to come before the answers."""
    if isinstance(request, ChatRequest) or not request.echo:
        return ""
    if isinstance(request.prompt, str):
        return request.prompt
    return text.tokenizer.decode([token for token in request.prompt if isinstance(token, int)])


async def send_error(error: ApiError, send: Send) -> None:
    """An error object as a whole response."""
    body = error.body()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(name.encode(), value.encode()) for name, value in error.headers]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
