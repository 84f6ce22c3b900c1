"""Payloads over the wire: servers that answer in odd pieces, wrongly, slowly or not at all."""

from __future__ import annotations

import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from redis.exceptions import InvalidResponse

from services.cache_store.address import Address
from services.cache_store.connection import ServerRefused
from services.cache_store.embedded import LocalRedis
from services.cache_store.functions import LAYOUT, NAME_BYTES
from services.cache_store.lanes import Lane, Lanes
from services.cache_store.payloads import Payloads
from services.cache_store.pool import ConnectionPool
from tests.cache_store.scripted_server import Script, ScriptedServer, read_gets, until_closed

FRAME_BYTES = 1000
TIMEOUT_S = 2.0
NAMES = [bytes([i]) * NAME_BYTES for i in range(6)]
FRAMES = [bytes([65 + i]) * FRAME_BYTES for i in range(6)]


class Client:
    """Payloads of frames of `FRAME_BYTES` from a server at `url`."""

    def __init__(self, url: str, timeout_s: float = TIMEOUT_S, frame_bytes: int = FRAME_BYTES) -> None:
        self.pool = ConnectionPool(Address.from_url(url), timeout_s)
        self.lanes = Lanes()
        self.payloads = Payloads(self.pool, self.lanes, frame_bytes, timeout_s=timeout_s)
        self.taken: list[bytes | None] = []

    def get(self, names: list[bytes] = NAMES, most: int | None = None) -> list[bytes | None]:
        """The frames taken; after an error, `taken` has those that came before it."""
        self.taken = []
        memory = memoryview(bytearray(len(names) * self.payloads.slot_bytes))

        def take(index: int, frame: memoryview | None) -> bool:
            assert index == len(self.taken)
            self.taken.append(None if frame is None else bytes(frame))
            return len(self.taken) != most

        self.payloads.get(names, memory, Lane.PREFETCH, take)
        return self.taken

    def put(self) -> list[bool]:
        return self.payloads.put(
            [(name, frame[:64], frame[64:]) for name, frame in zip(NAMES, FRAMES, strict=True)]
        )


@pytest.fixture
def serve() -> Iterator[Callable[..., tuple[Client, ScriptedServer]]]:
    """Makes a client of a server that runs a script; afterwards neither has a connection or a turn left."""
    made: list[tuple[Client, ScriptedServer]] = []

    def make(script: Script, **changes: float) -> tuple[Client, ScriptedServer]:
        server = ScriptedServer(script)
        made.append((Client(server.url, **changes), server))
        return made[-1]

    yield make
    for client, server in made:
        assert client.pool.open()[0] == 0
        assert client.lanes.under_way() == {}
        client.pool.close()
        assert client.pool.open() == (0, 0)
        server.close()
        wait_until(lambda server=server: server.connected == 0)


def wait_until(condition: Callable[[], object], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.002)


def bulk(*values: bytes | None) -> bytes:
    return b"".join(b"$-1\r\n" if v is None else b"$%d\r\n%s\r\n" % (len(v), v) for v in values)


def answering(reply: bytes) -> Script:
    """Answers the GETs of `NAMES` with `reply`, then reads on."""

    def script(sock: socket.socket, _: int) -> None:
        read_gets(sock, 1)
        sock.sendall(reply)
        until_closed(sock)

    return script


# ---- replies that are in order --------------------------------------------------------------------------


@settings(max_examples=40)
@given(st.lists(st.integers(1, 2500), max_size=20), st.lists(st.booleans(), min_size=6, max_size=6))
def test_however_a_reply_is_cut_into_packets_the_same_frames_come_out(
    cuts: list[int], there: list[bool]
) -> None:
    expected = [frame if is_there else None for frame, is_there in zip(FRAMES, there, strict=True)]

    def script(sock: socket.socket, _: int) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        read_gets(sock, len(NAMES))
        reply, at = bulk(*expected), 0
        for cut in cuts:
            sock.sendall(reply[at : at + cut])
            at += cut
        sock.sendall(reply[at:])
        until_closed(sock)

    server = ScriptedServer(script)
    client = Client(server.url)
    assert client.get() == expected
    client.pool.close()
    server.close()


def test_a_value_of_another_length_is_no_frame_and_those_after_it_are(
    serve: Callable[..., tuple[Client, ScriptedServer]],
) -> None:
    short, long, empty = b"s" * 10, b"l" * 5000, b""
    client, _ = serve(answering(bulk(FRAMES[0], short, FRAMES[2], long, empty, FRAMES[5])))
    assert client.get() == [FRAMES[0], short, FRAMES[2], b"", b"", FRAMES[5]]
    assert client.pool.open() == (0, 1)


def test_a_frame_of_several_values_ends_where_one_of_them_is_missing_or_too_long(
    serve: Callable[..., tuple[Client, ScriptedServer]],
) -> None:
    first, second = b"1" * 16368, b"2" * 16
    pairs = [
        (first, second),
        (first, None),
        (None, second),
        (None, None),
        (first[1:], second),
        (first, b"2" * 17),
    ]

    def script(sock: socket.socket, _: int) -> None:
        for pair in pairs:
            assert len(read_gets(sock, 2)) == 2
            sock.sendall(bulk(*pair))

    client, _ = serve(script, frame_bytes=16384)
    assert [client.get(NAMES[:1])[0] for _ in pairs] == [
        first + second,
        first,
        None,
        None,
        first[1:] + second,
        first,
    ]


@pytest.mark.parametrize("writes", [20_000, 400_000, 2_000_000])
def test_frames_of_other_lengths_are_read_too(any_server: LocalRedis, writes: int) -> None:
    lengths = [20_000, 400_000, 2_000_000]
    pool = ConnectionPool(Address.from_url(any_server.socket_url), TIMEOUT_S)
    payloads = {
        length: Payloads(pool, Lanes(), length, timeout_s=TIMEOUT_S, others=lengths) for length in lengths
    }
    frames = {os.urandom(NAME_BYTES): os.urandom(length) for length in [*lengths, *reversed(lengths)]}
    for name, frame in frames.items():
        assert payloads[len(frame)].put([(name, frame[:64], frame[64:])]) == [True]
    reader, got = payloads[writes], []
    names = list(frames)
    assert reader.batch == 4
    for start in range(0, len(names), 3):
        memory = memoryview(bytearray(3 * reader.slot_bytes))
        reader.get(
            names[start : start + 3], memory, Lane.GET, lambda _, frame: not got.append(bytes(frame or b""))
        )
    assert got == list(frames.values())
    pool.close()


def test_who_has_enough_leaves_a_connection_that_can_be_used_again(
    serve: Callable[..., tuple[Client, ScriptedServer]],
) -> None:
    def script(sock: socket.socket, _: int) -> None:
        for _ in range(2):
            read_gets(sock, len(NAMES))
            sock.sendall(bulk(*FRAMES))

    client, server = serve(script)
    assert client.get(most=2) == FRAMES[:2]
    assert client.get() == FRAMES
    assert server.accepted == 1


def test_no_more_is_asked_for_than_the_window(serve: Callable[..., tuple[Client, ScriptedServer]]) -> None:
    large = 1 << 20
    asked: list[int] = []

    def script(sock: socket.socket, _: int) -> None:
        sock.settimeout(0.2)
        for _ in range(2 * 4):
            with_two = 0
            while True:
                try:
                    with_two += len(read_gets(sock, 1))
                except TimeoutError:
                    break
            asked.append(with_two)
            sock.sendall(bulk(bytes(large - 16)))
        until_closed(sock)

    client, _ = serve(script, frame_bytes=2 * (large - 16))
    assert len(client.get(NAMES[:4])) == 4
    assert asked == [2, 1, 1, 1, 1, 1, 1, 0]


# ---- replies that are not -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "garbage",
    [
        b"HTTP/1.1 400 Bad Request\r\n\r\n", b"$12x\r\n", b"$-2\r\n", b"$\r\n", b"$1_0\r\n", b"+OK\r\n",
        b"*2\r\n$1\r\na\r\n$1\r\nb\r\n", b"$3\r\nabcd\r\n", b"\r\n", b"\x00" * 9000,
        b"$1000\r\n" + b"A" * 1002, b"$99999999999999999999\r\n", b"$70000000\r\n",
    ],
)  # fmt: skip
def test_garbage_is_an_error_and_the_connection_is_not_used_again(
    serve: Callable[..., tuple[Client, ScriptedServer]], garbage: bytes
) -> None:
    client, _ = serve(answering(bulk(FRAMES[0]) + garbage), timeout_s=0.5)
    with pytest.raises((InvalidResponse, TimeoutError)):
        client.get()
    assert client.taken[:1] == FRAMES[:1]
    assert client.pool.open() == (0, 0)


@pytest.mark.parametrize(
    "error", ["LOADING Redis is loading", "NOAUTH Authentication required.", "MASTERDOWN Link", "MOVED 1 h:1",
              "OOM command not allowed", "ERR"],
)  # fmt: skip
def test_an_error_reply_is_raised_with_its_code(
    serve: Callable[..., tuple[Client, ScriptedServer]], error: str
) -> None:
    client, _ = serve(answering(f"-{error}\r\n".encode()))
    with pytest.raises(ServerRefused, match=error) as caught:
        client.get()
    assert caught.value.code == error.split()[0]
    assert client.pool.open() == (0, 0)


@pytest.mark.parametrize("cut", [0, 1, 6, 7, 500, 1007, 1009, 1010, 3000])
def test_a_reply_that_ends_in_the_middle_gives_the_frames_before_it(
    serve: Callable[..., tuple[Client, ScriptedServer]], cut: int
) -> None:
    def script(sock: socket.socket, _: int) -> None:
        read_gets(sock, len(NAMES))
        sock.sendall(bulk(*FRAMES)[:cut])

    client, server = serve(script)
    with pytest.raises(ConnectionError):
        client.get()
    assert client.taken == FRAMES[: cut // len(bulk(FRAMES[0]))]
    assert server.accepted == 1, "nothing is asked again on a connection that was new"


# ---- slow servers ---------------------------------------------------------------------------------------


def test_a_server_that_never_answers_costs_one_timeout(
    serve: Callable[..., tuple[Client, ScriptedServer]],
) -> None:
    client, server = serve(lambda sock, _: until_closed(sock), timeout_s=0.05)
    with pytest.raises(TimeoutError):
        client.get()
    wait_until(lambda: server.connected == 0)
    assert server.accepted == 1


def test_a_server_that_trickles_is_given_up_although_bytes_keep_coming(
    serve: Callable[..., tuple[Client, ScriptedServer]],
) -> None:
    sent: list[int] = []

    def script(sock: socket.socket, _: int) -> None:
        read_gets(sock, 1)
        for byte in bulk(*FRAMES):
            time.sleep(0.01)  # the trickle
            sock.sendall(bytes([byte]))
            sent.append(byte)

    client, server = serve(script, timeout_s=0.1)
    with pytest.raises(TimeoutError, match="too slow"):
        client.get()
    wait_until(lambda: server.connected == 0)
    assert len(sent) < 200


def test_a_server_that_does_not_read_costs_a_write_one_timeout() -> None:
    gone = threading.Event()
    server = ScriptedServer(lambda *_: gone.wait(20) and None)
    client = Client(server.url, timeout_s=0.1, frame_bytes=8 << 20)
    with pytest.raises(TimeoutError):
        client.payloads.put([(NAMES[0], bytes(64), bytes((8 << 20) - 64))])
    assert client.pool.open() == (0, 0)
    assert client.lanes.under_way() == {}
    gone.set()
    server.close()


# ---- connections that die -------------------------------------------------------------------------------


def test_a_connection_that_died_while_idle_is_replaced_once(
    serve: Callable[..., tuple[Client, ScriptedServer]],
) -> None:
    closed = threading.Event()

    def script(sock: socket.socket, number: int) -> None:
        read_gets(sock, len(NAMES))
        sock.sendall(bulk(*FRAMES))
        if number == 0:
            sock.shutdown(socket.SHUT_RDWR)
            closed.set()
        else:
            until_closed(sock)

    client, server = serve(script)
    assert client.get() == FRAMES
    assert closed.wait(20)
    assert client.get() == FRAMES
    assert server.accepted == 2
    assert client.pool.open() == (0, 1)


def test_a_connection_that_dies_twice_is_an_error(
    serve: Callable[..., tuple[Client, ScriptedServer]],
) -> None:
    def script(sock: socket.socket, number: int) -> None:
        read_gets(sock, len(NAMES))
        if number == 0:
            sock.sendall(bulk(*FRAMES))

    client, server = serve(script)
    assert client.get() == FRAMES
    with pytest.raises(ConnectionError):
        client.get()
    assert server.accepted == 2


def test_frames_taken_before_a_connection_died_are_not_taken_again(
    serve: Callable[..., tuple[Client, ScriptedServer]],
) -> None:
    asked: list[int] = []

    def script(sock: socket.socket, number: int) -> None:
        if number == 0:
            read_gets(sock, len(NAMES))
            sock.sendall(bulk(*FRAMES))
            read_gets(sock, len(NAMES))
            sock.sendall(bulk(*FRAMES)[:2500])
        else:
            asked.append(len(read_gets(sock, 4)))
            sock.sendall(bulk(*FRAMES[2:]))
            until_closed(sock)

    client, _ = serve(script)
    assert client.get() == FRAMES
    assert client.get() == FRAMES
    assert asked == [4]


def test_closing_under_the_feet_of_a_call_ends_it_at_once(
    serve: Callable[..., tuple[Client, ScriptedServer]],
) -> None:
    client, server = serve(lambda sock, _: until_closed(sock), timeout_s=20)
    errors: list[BaseException] = []

    def call() -> None:
        try:
            client.get()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    wait_until(lambda: client.pool.open() == (1, 0) and server.connected == 1)
    client.pool.close()
    thread.join(10)
    assert not thread.is_alive()
    assert [isinstance(error, ConnectionError) for error in errors] == [True]
    with pytest.raises(ConnectionError, match="closed"):
        client.get()
    assert server.accepted == 1


# ---- writing --------------------------------------------------------------------------------------------


def test_values_are_sent_as_commands_with_an_end_and_each_answer_counts(
    serve: Callable[..., tuple[Client, ScriptedServer]],
) -> None:
    received: list[bytes] = []

    def script(sock: socket.socket, _: int) -> None:
        data = b""
        while data.count(b"86400000\r\n") < len(NAMES):
            data += sock.recv(1 << 16)
        received.append(data)
        sock.sendall(b"+OK\r\n-OOM command not allowed when used memory > 'maxmemory'.\r\n" + b"+OK\r\n" * 4)
        until_closed(sock)

    client, _ = serve(script)
    assert client.put() == [True, False, True, True, True, True]
    key = b"reprise%d:{p0}:" % LAYOUT
    expected = b"".join(
        b"*5\r\n$3\r\nSET\r\n$%d\r\n%s%s\r\n$%d\r\n%s\r\n$2\r\nPX\r\n$8\r\n86400000\r\n"
        % (len(key) + NAME_BYTES, key, name, FRAME_BYTES, frame)
        for name, frame in zip(NAMES, FRAMES, strict=True)
    )
    assert received == [expected]
    assert client.pool.open() == (0, 1)


@pytest.mark.parametrize("error", ["READONLY You can't write", "NOPERM no permissions", "MOVED 1 h:1"])
def test_a_write_that_is_refused_for_another_reason_than_memory_is_an_error(
    serve: Callable[..., tuple[Client, ScriptedServer]], error: str
) -> None:
    def script(sock: socket.socket, _: int) -> None:
        sock.recv(1 << 16)
        sock.sendall(b"+OK\r\n" + f"-{error}\r\n".encode() * 5)
        until_closed(sock)

    client, _ = serve(script)
    with pytest.raises(ServerRefused, match=error.split()[0]):
        client.put()
    assert client.pool.open() == (0, 0)


def test_a_server_that_goes_away_in_the_middle_of_a_write_is_an_error(
    serve: Callable[..., tuple[Client, ScriptedServer]],
) -> None:
    client, _ = serve(lambda sock, _: sock.recv(100) and None)
    with pytest.raises(ConnectionError):
        client.put()
    assert client.pool.open() == (0, 0)


# ---- the greeting ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "greeting"),
    [
        ("redis://127.0.0.1:{port}/3", [[b"SELECT", b"3"]]),
        ("redis://:s%20p@127.0.0.1:{port}", [[b"AUTH", b"s p"]]),
        ("redis://me:secret@127.0.0.1:{port}/1", [[b"AUTH", b"me", b"secret"], [b"SELECT", b"1"]]),
    ],
)
def test_a_connection_greets_with_password_and_database(url: str, greeting: list[list[bytes]]) -> None:
    seen: list[list[bytes]] = []

    def script(sock: socket.socket, _: int) -> None:
        for _ in greeting:
            seen.append(sock.recv(1 << 16).split(b"\r\n")[2::2])
            sock.sendall(b"+OK\r\n")
        read_gets(sock, len(NAMES))
        sock.sendall(bulk(*FRAMES))

    server = ScriptedServer(script)
    client = Client(url.format(port=server.port))
    assert client.get() == FRAMES
    assert seen == greeting
    client.pool.close()
    server.close()


def test_a_wrong_password_is_an_error_and_leaves_no_connection() -> None:
    def script(sock: socket.socket, _: int) -> None:
        sock.recv(1 << 16)
        sock.sendall(b"-WRONGPASS invalid username-password pair\r\n")
        until_closed(sock)

    server = ScriptedServer(script)
    client = Client(server.url.replace("//", "//:no@"))
    with pytest.raises(ServerRefused, match="WRONGPASS"):
        client.get()
    assert client.pool.open() == (0, 0)
    wait_until(lambda: server.connected == 0)
    server.close()


def test_over_tls_frames_come_whole_and_only_from_who_has_the_right_certificate(
    certificate: tuple[Path, Path],
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)

    def script(sock: socket.socket, _: int) -> None:
        data = b""
        while data.count(b"86400000\r\n") < len(NAMES):
            data += sock.recv(1 << 16)
        assert all(frame in data for frame in FRAMES)
        sock.sendall(b"+OK\r\n" * len(NAMES))
        for frame in FRAMES:
            read_gets(sock, 1)
            sock.sendall(bulk(frame)[:500])
            sock.sendall(bulk(frame)[500:])
        until_closed(sock)

    server = ScriptedServer(script, tls=context)
    trusting = Client(f"{server.url}?ssl_ca_certs={certificate[0]}")
    assert trusting.put() == [True] * len(NAMES)
    for name, frame in zip(NAMES, FRAMES, strict=True):
        assert trusting.get([name]) == [frame]
    assert trusting.pool.open() == (0, 1)
    doubting = Client(server.url)
    with pytest.raises(ssl.SSLCertVerificationError):
        doubting.get()
    assert doubting.pool.open() == (0, 0)
    trusting.pool.close()
    wait_until(lambda: server.connected == 0)
    server.close()


def test_closing_under_the_feet_of_a_call_over_tls_ends_it_at_once(certificate: tuple[Path, Path]) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    server = ScriptedServer(lambda sock, _: until_closed(sock), tls=context)
    client = Client(f"{server.url}?ssl_ca_certs={certificate[0]}", timeout_s=20)
    errors: list[BaseException] = []

    def call() -> None:
        try:
            client.get()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    wait_until(lambda: client.pool.open() == (1, 0) and server.connected == 1)
    client.pool.close()
    thread.join(10)
    assert not thread.is_alive()
    assert [isinstance(error, OSError) for error in errors] == [True]
    server.close()


def test_many_frames_go_there_and_come_back_on_a_real_server(any_server: LocalRedis) -> None:
    client = Client(any_server.socket_url, frame_bytes=300_000)
    names = [os.urandom(NAME_BYTES) for _ in range(client.payloads.batch)]
    frames = [os.urandom(300_000) for _ in names]
    for start in range(0, len(names), 7):
        part = list(zip(names[start : start + 7], frames[start : start + 7], strict=True))
        assert all(client.payloads.put([(name, frame[:64], frame[64:]) for name, frame in part]))
    assert client.get(names) == frames
    assert client.pool.open() == (0, 1)
    client.pool.close()
