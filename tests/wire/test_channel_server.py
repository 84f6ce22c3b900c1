"""The worker's end, against true and raw routers."""

import asyncio
import logging
import struct

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.wire.channel_server import SubmitError, bind
from services.wire.framing import encode_frame
from services.wire.limits import ChannelLimits
from services.wire.messages import (
    PROTOCOL_VERSION,
    Cancel,
    Drain,
    Events,
    Finish,
    Hello,
    Refused,
    SamplingParams,
    Snapshot,
    SnapshotRequest,
    Stats,
    Step,
    StepItem,
    Submit,
    TextAssetsRequest,
)
from tests.fakes.until import until
from tests.wire.peers import SECRET, TEXT, RawPeer, connected, publish, served, submit


def framed(value):
    body = msgspec.msgpack.encode(value)
    return struct.pack("<I", len(body)) + body


STATS = Stats(1, 0, 0, 10, 1.0, 1.0, 0.0)


def a_submit(request, **fields):
    return Submit(request, b"\1\0\0\0", b"r" * 16, b"", SamplingParams(max_tokens=5), **fields)


async def test_two_routers_may_use_the_same_request_number():
    async with served() as server, connected(server.port) as one, connected(server.port) as two:
        await until(lambda: one.hello and two.hello)
        got = {one: [], two: []}
        assert submit(one, got[one].append) == submit(two, got[two].append) == 1
        await until(lambda: len(server.handler.submitted) == 2)
        (first, _), (second, _) = server.handler.submitted
        publish(server, (first, [11]), (second, [22]))
        publish(server, (second, [23], Finish("stop")))
        publish(server, (first, [12], Finish("length")))
        await until(lambda: len(got[one]) == 2 and len(got[two]) == 2)
        tokens = sorted([item.tokens for item in items] for items in got.values())
        assert tokens == [[(11,), (12,)], [(22,), (23,)]]


async def test_one_step_is_one_frame_for_all_streams_of_a_router():
    async with served() as server:
        peer = await RawPeer.router(server.port)
        assert isinstance(await peer.authenticate(), Hello)
        for request in (1, 2, 3):
            peer.send(a_submit(request))
        await until(lambda: len(server.handler.submitted) == 3)
        streams = [stream for stream, _ in server.handler.submitted]
        publish(server, *((stream, [stream.request]) for stream in streams), stats=STATS)
        assert await peer.receive() == Step([StepItem(n, (n,)) for n in (1, 2, 3)])
        assert await peer.receive() == STATS


async def test_a_router_without_the_secret_is_refused():
    async with served() as server:
        peer = await RawPeer.router(server.port)
        answer = await peer.authenticate(secret=b"wrong")
        assert isinstance(answer, Refused)
        assert "does not know the channel secret" in answer.reason
        assert await peer.receive() is None
        assert not server.connections


async def test_a_router_of_another_version_is_told_both():
    async with served() as server:
        peer = await RawPeer.router(server.port)
        answer = await peer.authenticate(protocol=7)
        assert f"version 7, this end speaks version {PROTOCOL_VERSION}" in answer.reason


async def test_a_router_that_does_not_authenticate_in_time_is_refused():
    async with served(limits=ChannelLimits(handshake_s=0.05)) as server:
        peer = await RawPeer.router(server.port)
        await peer.receive()
        assert await peer.receive() == Refused("no Auth within 0.05 s")
        assert await peer.receive() is None


async def test_requests_before_auth_are_refused():
    async with served() as server:
        peer = await RawPeer.router(server.port)
        await peer.receive()
        peer.send(a_submit(1))
        assert await peer.receive() == Refused("Submit before Auth")
        assert not server.handler.submitted


async def test_a_large_frame_before_auth_is_refused_by_its_length_alone():
    async with served() as server:
        peer = await RawPeer.router(server.port)
        await peer.receive()
        peer.send(struct.pack("<I", 70_000))
        assert "70000 bytes exceeds the limit" in (await peer.receive()).reason


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        struct.pack("<I", 3) + b"\xc1\xc1\xc1",
        framed([]) + b"\x00\x00\x00\x00",
        framed(["unknown"]),
        encode_frame(Drain("a router may not say this")),
        struct.pack("<I", 50_000) + b"\x91" * 50_000,  # nested arrays
        framed(["cancel", "one"]),
    ],
    ids=["http", "not msgpack", "empty", "unknown tag", "wrong direction", "nested", "wrong fields"],
)
async def test_garbage_closes_its_own_connection_with_a_reason_and_one_line_in_the_log(garbage, caplog):
    caplog.set_level(logging.WARNING)
    async with served() as server, connected(server.port) as bystander:
        await until(lambda: bystander.hello)
        peer = await RawPeer.router(server.port)
        await peer.authenticate()
        peer.send(a_submit(1))
        await until(lambda: server.handler.submitted)
        peer.send(garbage * 3)
        assert isinstance(await peer.receive(), Refused)
        assert await peer.receive() is None
        assert [stream.request for stream in server.handler.cancelled] == [1]
        assert len([record for record in caplog.records if "refused" in record.message]) == 1
        submit(bystander, lambda item: None)
        await until(lambda: len(server.handler.submitted) == 2)


async def test_any_bytes_leave_the_server_serving():
    async with served(limits=ChannelLimits(handshake_s=5)) as server:
        loop = asyncio.get_running_loop()

        @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), database=None)
        @given(authenticated=st.booleans(), data=st.binary(max_size=200), framed=st.booleans())
        def attack(authenticated, data, framed):
            async def send():
                peer = await RawPeer.router(server.port)
                if authenticated:
                    await peer.authenticate()
                peer.send(struct.pack("<I", len(data)) + data if framed else data)
                peer.writer.write_eof()
                while await peer.receive() is not None:
                    pass
                peer.close()

            asyncio.run_coroutine_threadsafe(send(), loop).result(10)

        await asyncio.to_thread(attack)
        await until(lambda: not server.connections)
        async with connected(server.port) as channel:
            await until(lambda: channel.hello)


async def test_a_request_number_used_twice_is_a_broken_router():
    async with served() as server:
        peer = await RawPeer.router(server.port)
        await peer.authenticate()
        peer.send(a_submit(5))
        peer.send(a_submit(5))
        assert await peer.receive() == Refused("request 5 submitted twice")
        assert len(server.handler.submitted) == len(server.handler.cancelled) == 1


async def test_a_cancelled_request_gets_nothing_more_and_unknown_cancels_are_ignored():
    async with served() as server:
        peer = await RawPeer.router(server.port)
        await peer.authenticate()
        peer.send(a_submit(1))
        peer.send(a_submit(2))
        peer.send(Cancel(1))
        peer.send(Cancel(1))
        peer.send(Cancel(99))
        await until(lambda: len(server.handler.submitted) == 2 and server.handler.cancelled)
        (one, _), (two, _) = server.handler.submitted
        publish(server, (one, [1]), (two, [2]))
        publish(server, (one, [], Finish("cancelled")))
        publish(server, (two, [3], Finish("stop")))
        assert await peer.receive() == Step([StepItem(2, (2,))])
        assert await peer.receive() == Step([StepItem(2, (3,), finish=Finish("stop"))])
        assert server.handler.cancelled == [one]


async def test_a_router_that_goes_away_leaves_no_request_behind():
    async with served() as server:
        peer = await RawPeer.router(server.port)
        await peer.authenticate()
        for request in range(10):
            peer.send(a_submit(request))
        await until(lambda: len(server.handler.submitted) == 10)
        finished = server.handler.submitted[0][0]
        publish(server, (finished, [1], Finish("stop")))
        peer.close()
        await until(lambda: not server.connections)
        assert {stream.request for stream in server.handler.cancelled} == set(range(1, 10))
        publish(server, *((stream, [1]) for stream, _ in server.handler.submitted))


@pytest.mark.parametrize("kind", ["invalid_request", "draining"])
async def test_a_request_that_is_not_taken_is_answered_with_the_kind_of_error(kind):
    async with served() as server, connected(server.port) as channel:
        await until(lambda: channel.hello)
        server.handler.fail = SubmitError(kind, "top_p must be at most 1, got 7")
        got = []
        submit(channel, got.append)
        await until(lambda: got)
        assert got[0].finish == Finish("error", message="top_p must be at most 1, got 7", error_kind=kind)
        assert channel.live_requests == 0


async def test_a_handler_that_fails_costs_one_request_not_the_connection(caplog):
    async with served() as server, connected(server.port) as channel:
        await until(lambda: channel.hello)
        server.handler.fail = ZeroDivisionError("boom")
        got = []
        submit(channel, got.append)
        await until(lambda: got)
        assert (got[0].finish.reason, got[0].finish.error_kind) == ("error", "internal")
        server.handler.fail = None
        submit(channel, got.append)
        await until(lambda: server.handler.submitted)
        assert "ZeroDivisionError" in caplog.text


async def test_a_router_that_does_not_read_is_dropped_at_the_limit_and_others_go_on():
    limits = ChannelLimits(max_buffered_bytes=300_000)
    async with served(limits=limits) as server, connected(server.port) as reading:
        await until(lambda: reading.hello)
        stuck = await RawPeer.router(server.port)
        await stuck.authenticate()
        stuck.writer.transport.pause_reading()
        stuck.send(a_submit(1))
        got = []
        submit(reading, got.append)
        await until(lambda: len(server.handler.submitted) == 2)
        streams = [stream for stream, _ in server.handler.submitted]
        steps = 0
        while len(server.connections) == 2:
            publish(server, *((stream, range(1000)) for stream in streams))
            steps += 1
            assert steps < 10_000  # kernel buffers are megabytes, not gigabytes
            if steps % 10 == 0:
                await until(lambda: len(got) >= steps - 100)  # noqa: B023
        await until(lambda: len(got) == steps)
        assert [stream.request for stream in server.handler.cancelled] == [1]


async def test_a_router_that_stays_behind_is_dropped_in_the_end():
    async with served(limits=ChannelLimits(silence_s=0.2)) as server:
        stuck = await RawPeer.router(server.port)
        await stuck.authenticate()
        stuck.writer.transport.pause_reading()
        stuck.send(a_submit(1))
        await until(lambda: server.handler.submitted)
        stream, _ = server.handler.submitted[0]
        publish(server, (stream, range(3_000_000)))
        assert server.connections
        await until(lambda: server.handler.cancelled == [stream])
        assert not server.connections


async def test_a_snapshot_is_everything_up_to_its_number():
    async with served() as server:
        publish(server, stored={"gpu": [b"a" * 16, b"b" * 16], "store": [b"c" * 16]})
        peer = await RawPeer.router(server.port)
        await peer.authenticate()
        peer.send(SnapshotRequest())
        snapshot = await peer.receive()
        assert snapshot.seq == 1
        assert len(snapshot.held["gpu"]) == 32
        assert snapshot.held["store"] == b"c" * 16
        publish(server, stored={"gpu": [b"d" * 16]}, removed={"gpu": [b"a" * 16]})
        assert await peer.receive() == Events(2, {"gpu": b"d" * 16}, {"gpu": b"a" * 16})
        peer.send(SnapshotRequest())
        assert await peer.receive() in (
            Snapshot(2, {"gpu": b"b" * 16 + b"d" * 16, "store": b"c" * 16}),
            Snapshot(2, {"gpu": b"d" * 16 + b"b" * 16, "store": b"c" * 16}),
        )


async def test_text_assets_are_sent_on_request():
    async with served() as server:
        peer = await RawPeer.router(server.port)
        await peer.authenticate()
        peer.send(TextAssetsRequest())
        assert await peer.receive() == TEXT


async def test_routers_present_and_to_come_hear_of_a_drain():
    async with served() as server:
        early = await RawPeer.router(server.port)
        await early.authenticate()
        server.drain("upgrade")
        assert await early.receive() == Drain("upgrade")
        late = await RawPeer.router(server.port)
        assert isinstance(await late.authenticate(), Hello)
        assert await late.receive() == Drain("upgrade")


async def test_closing_lets_routers_take_what_is_written_for_them():
    async with served() as server:
        peer = await RawPeer.router(server.port)
        await peer.authenticate()
        peer.send(a_submit(1))
        await until(lambda: server.handler.submitted)
        stream, _ = server.handler.submitted[0]
        closing = asyncio.create_task(server.close())
        publish(server, (stream, range(100_000), Finish("length")))
        await asyncio.wait([closing], timeout=0)
        step = await peer.receive()
        assert len(step.items[0].tokens) == 100_000
        assert await peer.receive() is None
        await closing


def test_a_port_that_is_open_to_the_network_needs_a_secret():
    with pytest.raises(ValueError, match=r"secret is required to listen on 0\.0\.0\.0"):
        bind("0.0.0.0", 0, b"")


async def test_of_two_that_bound_a_port_before_either_listened_the_second_is_told():
    async with served() as server:
        with (
            bind("127.0.0.1", 0, SECRET) as first,
            bind("127.0.0.1", first.getsockname()[1], SECRET) as second,
        ):
            first.listen()
            with pytest.raises(OSError, match=r"cannot listen on 127\.0\.0\.1:\d+: Address already in use"):
                await server.serve(second)


def test_a_taken_port_is_an_error_at_once():
    with bind("127.0.0.1", 0, SECRET) as sock:
        sock.listen()
        with pytest.raises(OSError, match="in use"):
            bind("127.0.0.1", sock.getsockname()[1], SECRET)
