import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from benchmarks.loadgen.http import Address, BadAnswer, BadUrl, ConnectionFailed, HttpClient

from .scripted_server import Answer, ScriptedServer, serving


@pytest.mark.parametrize(
    ("url", "address", "text"),
    [
        ("http://localhost:8000", Address("localhost", 8000, "", False), "http://localhost:8000"),
        ("http://a:1/v1/", Address("a", 1, "", False), "http://a:1"),
        ("https://a/llm/v1", Address("a", 443, "/llm", True), "https://a:443/llm"),
        ("http://[::1]:80", Address("::1", 80, "", False), "http://[::1]:80"),
    ],
)
def test_an_address_is_read_with_or_without_v1(url: str, address: Address, text: str) -> None:
    assert Address.parse(url) == address
    assert str(address) == text


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://a", "http://", "http://a:99999", "http://a?b=c"])
def test_a_bad_address_is_refused(url: str) -> None:
    with pytest.raises(BadUrl):
        Address.parse(url)


def test_a_password_in_an_address_is_refused_and_not_repeated() -> None:
    with pytest.raises(BadUrl) as caught:
        Address.parse("http://user:hunter2@a:1")
    assert "hunter2" not in str(caught.value)


async def test_one_connection_carries_many_requests_and_the_key() -> None:
    async with serving(ScriptedServer(lambda index, body: Answer())) as server:
        client = HttpClient(Address.parse(server.url), api_key="k1")
        for _ in range(5):
            assert (await client.get("/v1/models")).status == 200
        client.close()
    assert server.connections == 1
    assert all("Authorization: Bearer k1\r\n" in head for head in server.heads)


async def test_a_connection_that_the_server_closed_while_idle_is_not_used_again() -> None:
    async def once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")
        writer.close()

    async with listening(once) as client:
        for _ in range(3):
            assert (await client.get("/v1/models")).body == b"{}"
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("raw", "body"),
    [
        (b"HTTP/1.1 200 OK\r\nx: y\r\n\r\n{}", b"{}"),  # ends where the connection ends
        (b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\n{}", b"{}"),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}", b"{}"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\n{\r\n1\r\n}\r\n0\r\n\r\n", b"{}"),
    ],
)
async def test_every_framing_of_http_1_is_understood(raw: bytes, body: bytes) -> None:
    async with listening(_saying(raw)) as client:
        answer = await client.get("/v1/models")
    assert (answer.status, bytes(answer.body)) == (200, body)


@pytest.mark.parametrize(
    ("raw", "error"),
    [
        (b"SSH-2.0-OpenSSH\r\n", BadAnswer),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n{}", ConnectionFailed),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\n{\r\n", ConnectionFailed),
        (b"", ConnectionFailed),
    ],
)
async def test_a_broken_answer_raises_and_does_not_hang(raw: bytes, error: type[Exception]) -> None:
    async with listening(_saying(raw)) as client:
        with pytest.raises(error):
            async with asyncio.timeout(10):
                await client.get("/v1/models")


Connected = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def _saying(raw: bytes) -> Connected:
    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(raw)
        writer.close()

    return connected


@asynccontextmanager
async def listening(connected: Connected) -> AsyncIterator[HttpClient]:
    listener = await asyncio.start_server(connected, "127.0.0.1", 0)
    client = HttpClient(Address("127.0.0.1", listener.sockets[0].getsockname()[1], "", False))
    try:
        yield client
    finally:
        client.close()
        listener.close()
