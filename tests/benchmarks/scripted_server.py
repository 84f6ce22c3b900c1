"""An OpenAI-compatible endpoint that answers as a test tells it to. Real sockets, no model."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

Ending = Literal["done", "no_done", "no_finish", "cut", "error_event"]


@dataclass(frozen=True)
class Answer:
    """How one request is answered. Tokens beyond the request's max_tokens are never sent."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    message: str = ""  # of a status other than 200
    first_token_s: float = 0.0
    token_s: float = 0.0
    tokens_per_chunk: int = 1
    cached_tokens: int | None = 0
    usage: bool = True
    usage_excess: int = 0  # a lie: this many more tokens than were sent
    finish_reason: str = "length"
    ending: Ending = "done"


Script = Callable[[int, dict[str, Any]], Answer]


@dataclass
class ScriptedServer:
    script: Script
    models: list[dict[str, Any]] = field(default_factory=lambda: [{"id": "fake"}])
    one_at_a_time: bool = False
    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    heads: list[str] = field(default_factory=list)
    first_token_sent_s: dict[int, float] = field(default_factory=dict)
    connections: int = 0
    live: int = 0
    most_live: int = 0
    hung_up: int = 0  # answers whose client went away

    def __post_init__(self) -> None:
        self._turn = asyncio.Lock()

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while head := (await reader.readuntil(b"\r\n\r\n")).decode():
                await self._answer(head, reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _answer(self, head: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.heads.append(head)
        if head.startswith("GET /v1/models "):
            await _send_json(writer, 200, {"object": "list", "data": self.models}, {})
            return
        headers = dict(line.lower().split(": ", 1) for line in head.split("\r\n")[1:] if line)
        body = json.loads(await reader.readexactly(int(headers["content-length"])))
        index = len(self.bodies)
        self.bodies.append(body)
        answer = self.script(index, body)
        if answer.status != 200:
            error = {"error": {"message": answer.message, "type": "test"}}
            await _send_json(writer, answer.status, error, answer.headers)
            return
        self.live += 1
        self.most_live = max(self.most_live, self.live)
        try:
            if self.one_at_a_time:
                async with self._turn:
                    await self._stream(index, body, answer, writer)
            else:
                await self._stream(index, body, answer, writer)
        except ConnectionError:
            self.hung_up += 1
            raise
        finally:
            self.live -= 1

    async def _stream(
        self, index: int, body: dict[str, Any], answer: Answer, writer: asyncio.StreamWriter
    ) -> None:
        chat = "messages" in body
        extra = "".join(f"{name}: {value}\r\n" for name, value in answer.headers.items())
        writer.write(
            f"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n{extra}"
            "transfer-encoding: chunked\r\n\r\n".encode()
        )
        if chat:  # the role comes before any token: it must not count as one
            role = {"role": "assistant", "content": ""}
            await _send_event(writer, {"choices": [{"index": 0, "delta": role}]})
        await asyncio.sleep(answer.first_token_s)
        tokens = body["max_tokens"]
        for start in range(0, tokens, answer.tokens_per_chunk):
            if start:
                await asyncio.sleep(answer.token_s)
            if start * 2 >= tokens and answer.ending in ("cut", "error_event"):
                if answer.ending == "error_event":
                    await _send_event(writer, {"error": {"message": "worker lost", "code": 500}})
                writer.transport.abort()
                return
            count = min(answer.tokens_per_chunk, tokens - start)
            self.first_token_sent_s.setdefault(index, time.perf_counter())
            await _send_event(writer, _tokens_chunk(chat, start, count, "logprobs" in body))
        if answer.ending != "no_finish":
            last: dict[str, Any] = {"index": 0, "finish_reason": answer.finish_reason}
            last["delta" if chat else "text"] = {} if chat else ""
            await _send_event(writer, {"choices": [last]})
        if answer.usage:
            prompt = len(body.get("prompt", ())) or sum(len(m["content"].split()) for m in body["messages"])
            usage: dict[str, Any] = {
                "prompt_tokens": prompt,
                "completion_tokens": tokens + answer.usage_excess,
            }
            if answer.cached_tokens is not None:
                usage["prompt_tokens_details"] = {"cached_tokens": answer.cached_tokens}
            await _send_event(writer, {"choices": [], "usage": usage})
        if answer.ending != "no_done":
            await _send_chunk(writer, b"data: [DONE]\n\n")
        writer.write(b"0\r\n\r\n")
        await writer.drain()


def _tokens_chunk(chat: bool, start: int, count: int, logprobs: bool) -> dict[str, Any]:
    texts = [f" t{start + offset}" for offset in range(count)]
    text = "".join(texts)
    choice: dict[str, Any] = {"index": 0, "finish_reason": None}
    choice |= {"delta": {"content": text}} if chat else {"text": text}
    if logprobs:
        choice["logprobs"] = {"content": [{"token": t} for t in texts]} if chat else {"tokens": texts}
    return {"choices": [choice]}


async def _send_event(writer: asyncio.StreamWriter, event: dict[str, Any]) -> None:
    await _send_chunk(writer, b"data: " + json.dumps(event).encode() + b"\n\n")


async def _send_chunk(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(b"%x\r\n%s\r\n" % (len(data), data))
    await writer.drain()


async def _send_json(writer: asyncio.StreamWriter, status: int, value: Any, headers: dict[str, str]) -> None:
    data = json.dumps(value).encode()
    extra = "".join(f"{name}: {text}\r\n" for name, text in headers.items())
    writer.write(
        f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\n{extra}"
        f"content-length: {len(data)}\r\n\r\n".encode()
        + data
    )
    await writer.drain()


async def until(condition: Callable[[], bool], deadline_s: float = 10.0) -> None:
    """Returns when `condition` holds. Raises TimeoutError after the deadline."""
    async with asyncio.timeout(deadline_s):
        while not condition():  # noqa: ASYNC110 - the condition is on the other side of a socket
            await asyncio.sleep(0.005)


@asynccontextmanager
async def serving(server: ScriptedServer) -> AsyncIterator[ScriptedServer]:
    """The server in this event loop, on a free port of loopback."""
    listener = await asyncio.start_server(server.connected, "127.0.0.1", 0)
    server.url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    try:
        yield server
    finally:
        listener.close()


@contextmanager
def serving_in_thread(server: ScriptedServer) -> Iterator[ScriptedServer]:
    """The server in a loop of its own, for the command that brings its own."""
    ready = threading.Event()
    loop = asyncio.new_event_loop()

    async def main() -> None:
        async with serving(server):
            ready.set()
            await stop.wait()
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()

    stop = asyncio.Event()
    thread = threading.Thread(target=loop.run_until_complete, args=(main(),))
    thread.start()
    try:
        assert ready.wait(10)
        yield server
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
        loop.close()
