"""Clients that do not speak HTTP as libraries do: broken bytes, resets, nothing sent, nothing read."""

import asyncio
import json
import re
import socket
import struct

import pytest

import services.router.server as server_module
from services.router.config import RouterConfig
from tests.fakes import FakeEngine
from tests.fakes.until import until
from tests.router.serving import chat, serving


def post(body: bytes, *headers: str) -> bytes:
    head = ["POST /v1/chat/completions HTTP/1.1", "host: x", "content-type: application/json", *headers]
    return "\r\n".join([*head, f"content-length: {len(body)}", "", ""]).encode() + body


async def talk(port, *parts, timeout_s=10.0):
    """Send the parts, then everything that comes back until the server closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        for part in parts:
            writer.write(part)
            await writer.drain()
        async with asyncio.timeout(timeout_s):
            return await reader.read()
    finally:
        writer.close()


STREAM = json.dumps(chat(stream=True)).encode()
LOUD = json.dumps(chat(stream=True, logprobs=True, top_logprobs=20)).encode()  # kilobytes a token
SHORT = json.dumps(chat(max_tokens=3)).encode()


@pytest.mark.parametrize(
    "data",
    [b"nonsense\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00", b"GET / HTTP/9.9\r\n\r\n", b"\x00" * 100,
     b"POST /v1/chat/completions HTTP/1.1\r\ncontent-length: -5\r\n\r\n",
     b"POST /v1/chat/completions HTTP/1.1\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\n"],
)  # fmt: skip
async def test_what_is_not_http_is_refused_and_closed(data):
    async with serving() as served:
        assert (await talk(served.port, data)).startswith(b"HTTP/1.1 400")
        assert (await served.http.get("/health")).status_code == 200


async def test_a_request_may_come_byte_by_byte():
    async with serving() as served:
        whole = post(SHORT, "connection: close")
        answer = await talk(served.port, *(whole[i : i + 1] for i in range(len(whole))))
        assert answer.startswith(b"HTTP/1.1 200")


async def test_pipelined_requests_are_answered_in_order():
    async with serving() as served:
        answers = await talk(served.port, post(SHORT) + post(b"{") + post(SHORT, "connection: close"))
        statuses = [part[:3] for part in answers.split(b"HTTP/1.1 ")[1:]]
        assert statuses == [b"200", b"400", b"200"]


async def test_a_head_that_never_ends_is_cut_off(monkeypatch):
    monkeypatch.setattr(server_module, "HEAD_TIMEOUT_S", 0.2)
    async with serving() as served:
        assert (await talk(served.port, b"POST /v1/chat")).startswith(b"HTTP/1.1 408")
        kept = await talk(served.port, post(SHORT), b"POST /v1")
        assert [part[:3] for part in kept.split(b"HTTP/1.1 ")[1:]] == [b"200", b"408"]


async def test_a_connection_without_a_request_is_closed(monkeypatch):
    monkeypatch.setattr(server_module, "KEEP_ALIVE_S", 0.2)
    async with serving() as served:
        assert await talk(served.port) == b""
        assert (await talk(served.port, post(SHORT))).startswith(b"HTTP/1.1 200")


async def test_a_head_without_bounds_is_cut_off():
    async with serving() as served:
        reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
        writer.write(b"GET /health HTTP/1.1\r\nx: ")
        sent = 0
        while not reader.at_eof() and sent < 10_000_000:
            writer.write(b"y" * 10_000)
            sent += 10_000
            await asyncio.sleep(0)
            if reader._buffer:
                break
        assert sent < 1_000_000
        assert (await reader.read(12)) == b"HTTP/1.1 431"
        writer.close()


async def test_a_body_that_never_comes_is_cut_off():
    async with serving(config=RouterConfig(body_timeout_s=0.2)) as served:
        head = post(b"x" * 100)[:-50]
        answer = await talk(served.port, head)
        assert answer.startswith(b"HTTP/1.1 408")
        assert b"did not arrive within 0.2 s" in answer


async def test_a_client_that_goes_away_inside_its_body_is_forgotten():
    async with serving() as served:
        _, writer = await asyncio.open_connection("127.0.0.1", served.port)
        writer.write(post(b"x" * 100)[:-50])
        await writer.drain()
        writer.close()
        await until(lambda: served.sample("requests_total", endpoint="/v1/chat/completions", code="499") == 1)


@pytest.mark.parametrize("wait_for_tokens", [False, True])
async def test_a_connection_that_is_reset_frees_everything(wait_for_tokens):
    engine = FakeEngine(step_s=0.005)
    async with serving(engine) as served:
        for _ in range(20):
            sock = socket.create_connection(("127.0.0.1", served.port))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_sendall(sock, post(STREAM))
            if wait_for_tokens:
                await loop.sock_recv(sock, 4096)
            sock.close()  # with linger 0 this is a reset
        await until(lambda: len(engine.cancelled) == len(engine.submitted))
        await served.paid_back()


async def idle_reader(port, body=STREAM):
    """A connection with a stream asked for and a small window, of which nothing is read."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(sock, ("127.0.0.1", port))
    await loop.sock_sendall(sock, post(body))
    return sock


async def test_a_client_that_reads_nothing_is_bounded_and_others_are_not_held_up():
    engine = FakeEngine(step_s=0.001)  # slow enough not to be done before the router has seen it all
    async with serving(engine, config=RouterConfig(max_pending_tokens=500)) as served:
        sock = await idle_reader(served.port, LOUD)
        await until(lambda: len(served.engines[0].submitted) == 1)
        answer = await served.http.post("/v1/chat/completions", json=chat(max_tokens=50))
        assert answer.status_code == 200
        await until(lambda: served.engines[0].cancelled and not served.held())
        sock.close()


async def test_a_client_that_reads_nothing_for_long_is_cut_off(monkeypatch):
    monkeypatch.setattr(server_module, "WRITE_TIMEOUT_S", 0.3)
    async with serving(FakeEngine()) as served:
        sock = await idle_reader(served.port, LOUD)
        await until(lambda: len(served.engines[0].submitted) == 1)
        assert len(served.server.server_state.connections) == 1
        await until(lambda: not served.server.server_state.connections)
        sock.close()


async def test_a_slow_reader_gets_every_token():
    engine = FakeEngine("x" * 3000, step_s=0.0)
    async with serving(engine) as served:
        sock = await idle_reader(served.port)
        loop = asyncio.get_running_loop()
        data = b""
        while b"[DONE]" not in data:
            data += await loop.sock_recv(sock, 2000)
        sock.close()
        events = re.sub(rb"\r\n[0-9a-f]+\r\n", b"", data)  # where the chunks of the transfer meet
        texts = re.findall(rb'"delta":\{"content":"(x+)"\}', events)
        assert len(b"".join(texts)) == 3000
