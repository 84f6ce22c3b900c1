"""The router's end, against true and raw workers."""

import asyncio
import logging
import socket
import struct

import msgspec
import pytest

from services.wire.channel import WorkerUnavailable
from services.wire.channel_server import SubmitError
from services.wire.limits import ChannelLimits
from services.wire.messages import (
    PROTOCOL_VERSION,
    Auth,
    Cancel,
    Challenge,
    Events,
    Finish,
    Snapshot,
    SnapshotRequest,
    Stats,
    Step,
    StepItem,
    Submit,
    TextAssetsRequest,
)
from tests.fakes.until import until
from tests.wire.peers import HELLO, TEXT, connected, publish, raw_worker, served, submit

STATS = Stats(3, 2, 100, 10, 1.0, 1.0, 0.0)


async def hang():
    await asyncio.Event().wait()


async def test_a_sink_gets_every_item_of_its_request_and_the_finish_is_the_last():
    async with served() as server, connected(server.port) as channel:
        await until(lambda: channel.hello)
        got = []
        request = submit(channel, got.append)
        await until(lambda: server.handler.submitted)
        stream, message = server.handler.submitted[0]
        assert (message.request, message.tokens, message.root) == (request, b"\1\0\0\0", b"r" * 16)
        publish(server, (stream, [1]))
        publish(server, (stream, [2, 3]))
        publish(server, (stream, [], Finish("stop", stop_token=2)))
        await until(lambda: got and got[-1].finish)
        assert [item.tokens for item in got] == [(1,), (2, 3), ()]
        assert channel.live_requests == 0


async def test_the_listener_hears_connected_then_snapshot_then_events_and_stats():
    async with served() as server:
        publish(server, stored={"gpu": [b"a" * 16]})
        async with connected(server.port) as channel:
            await until(lambda: "snapshot" in channel.listener.what())
            publish(server, stored={"gpu": [b"b" * 16]}, stats=STATS)
            server.drain("upgrade")
            await until(lambda: "draining" in channel.listener.what())
            assert channel.listener.heard[0][0] == "connected"
            assert channel.listener.heard[0][1].worker_id == "w0"
            assert channel.listener.heard[1:] == [
                ("snapshot", Snapshot(1, {"gpu": b"a" * 16})),
                ("events", Events(2, {"gpu": b"b" * 16}, {})),
                ("stats", STATS),
                ("draining", "upgrade"),
            ]


async def test_a_lost_worker_ends_every_live_request_once_after_the_listener_knows():
    async with served() as server, connected(server.port) as channel:
        await until(lambda: channel.hello)
        order = channel.listener.heard
        for n in range(3):
            submit(channel, lambda item, n=n: order.append((n, item)))
        await until(lambda: len(server.handler.submitted) == 3)
        publish(server, (server.handler.submitted[0][0], [5], Finish("length")))
        await until(lambda: channel.live_requests == 2)
        for connection in list(server.connections):
            connection.abort()
        await until(lambda: "lost" in channel.listener.what())
        lost = channel.listener.what().index("lost")
        ends = [(who, item.finish) for who, item in order if isinstance(item, StepItem)]
        assert [who for who, _ in ends] == [0, 1, 2]
        assert ends[0][1] == Finish("length")
        for who, finish in ends[1:]:
            assert (finish.reason, finish.error_kind) == ("error", "worker_lost")
            assert "worker lost" in finish.message
            assert channel.listener.what().index(who) > lost


async def test_a_sink_may_submit_elsewhere_and_cancel_others_while_its_worker_is_lost():
    async with (
        served() as server,
        served() as other,
        connected(server.port) as channel,
        connected(other.port) as spare,
    ):
        await until(lambda: channel.hello and spare.hello)
        refused = []

        def retry(item):
            channel.cancel(2)
            try:
                submit(channel, retry)
            except WorkerUnavailable:
                refused.append(item)
            submit(spare, lambda item: None)

        submit(channel, retry)
        submit(channel, retry)
        await until(lambda: len(server.handler.submitted) == 2)
        for connection in list(server.connections):
            connection.abort()
        await until(lambda: other.handler.submitted)
        assert [item.request for item in refused] == [1]  # 2 was cancelled before it heard


async def test_a_restarted_worker_is_found_again_and_asked_for_a_snapshot():
    async with served() as server:
        port = server.port
        async with connected(port) as channel:
            await until(lambda: "snapshot" in channel.listener.what())
            await server.close()
            await until(lambda: channel.hello is None)
            with pytest.raises(WorkerUnavailable, match="is not connected"):
                submit(channel, lambda item: None)
            restarted = msgspec.structs.replace(HELLO, epoch=2)
            async with served(port=port, hello=restarted) as again:
                await until(lambda: channel.listener.what().count("snapshot") == 2)
                assert [hello.epoch for hello in channel.listener.of("connected")] == [1, 2]
                assert channel.listener.what()[:3] == ["connected", "snapshot", "lost"]
                submit(channel, lambda item: None)
                await until(lambda: again.handler.submitted)
                assert again.handler.submitted[0][1].request == 1


async def test_request_numbers_go_on_after_a_reconnect():
    async with served() as server, connected(server.port) as channel:
        await until(lambda: channel.hello)
        assert submit(channel, lambda item: None) == 1
        for connection in list(server.connections):
            connection.abort()
        await until(lambda: channel.listener.what().count("connected") == 2)
        assert submit(channel, lambda item: None) == 2


async def test_a_gap_in_the_events_asks_for_a_snapshot_and_holds_back_until_it_comes():
    asked = []

    async def play(worker):
        await worker.accept()
        asked.append(await worker.receive())
        worker.send(Events(9, {"gpu": b"9" * 16}, {}))  # part of the snapshot
        worker.send(Snapshot(10, {}))
        worker.send(Events(11, {"gpu": b"b" * 16}, {}))
        worker.send(Events(11, {"gpu": b"b" * 16}, {}))  # twice
        worker.send(Events(13, {"gpu": b"d" * 16}, {}))  # 12 is missing
        asked.append(await worker.receive())
        worker.send(Events(14, {"gpu": b"e" * 16}, {}))
        worker.send(Snapshot(14, {"gpu": b"e" * 16}))
        worker.send(Events(15, {"gpu": b"f" * 16}, {}))
        await hang()

    async with raw_worker(play) as port, connected(port) as channel:
        await until(lambda: len(channel.listener.of("events")) == 2)
        assert asked == [SnapshotRequest(), SnapshotRequest()]
        assert channel.listener.heard[1:] == [
            ("snapshot", Snapshot(10, {})),
            ("events", Events(11, {"gpu": b"b" * 16}, {})),
            ("snapshot", Snapshot(14, {"gpu": b"e" * 16})),
            ("events", Events(15, {"gpu": b"f" * 16}, {})),
        ]


async def test_a_cancelled_request_is_silent_and_the_worker_is_told_once():
    told = []

    async def play(worker):
        await worker.accept()
        while (message := await worker.receive()) is not None:
            told.append(message)
            if isinstance(message, Cancel):
                worker.send(Step([StepItem(message.request, (1,))]))
                worker.send(STATS)

    async with raw_worker(play) as port, connected(port) as channel:
        await until(lambda: channel.hello)
        got = []
        request = submit(channel, got.append)
        channel.cancel(request)
        channel.cancel(request)
        channel.cancel(12345)
        await until(lambda: channel.listener.of("stats"))
        assert got == []
        assert [message for message in told if isinstance(message, Cancel)] == [Cancel(request)]


async def test_a_sink_that_fails_costs_its_own_request_only(caplog):
    async with served() as server, connected(server.port) as channel:
        await until(lambda: channel.hello)
        got = []

        def broken(item):
            raise ZeroDivisionError("boom")

        submit(channel, broken)
        submit(channel, got.append)
        await until(lambda: len(server.handler.submitted) == 2)
        publish(server, *((stream, [1]) for stream, _ in server.handler.submitted))
        await until(lambda: got and server.handler.cancelled)
        assert [stream.request for stream in server.handler.cancelled] == [1]
        assert "ZeroDivisionError" in caplog.text


async def test_a_worker_without_the_secret_is_not_believed():
    proofs = []

    async def play(worker):
        auth = await worker.accept(secret=b"guess")
        proofs.append(auth.proof)
        await hang()

    async with raw_worker(play) as port, connected(port) as channel:
        await until(lambda: "does not know the channel secret" in channel.last_error)
        assert channel.listener.heard == []
        assert proofs


async def test_the_secret_is_not_proved_to_a_worker_of_another_version():
    heard = []

    async def play(worker):
        worker.send(Challenge(PROTOCOL_VERSION + 1, "w0", b"n" * 32))
        heard.append(await worker.receive())

    async with raw_worker(play) as port, connected(port) as channel:
        versions = f"version {PROTOCOL_VERSION + 1}, this end speaks version {PROTOCOL_VERSION}"
        await until(lambda: versions in channel.last_error)
        await until(lambda: heard)
        assert heard[0] is None


async def test_a_refusal_reaches_the_router_with_its_reason_and_is_logged_once(caplog):
    caplog.set_level(logging.WARNING)
    async with served(secret=b"other") as server, connected(server.port) as channel:
        await until(lambda: "refused by the worker" in channel.last_error)
        before = len(caplog.records)
        # The next attempts fail alike; each leaves a line at the worker, none at the router.
        await until(lambda: len(caplog.records) >= before + 2)
        lines = [record for record in caplog.records if record.name == "services.wire.channel"]
        assert len(lines) == 1


@pytest.mark.parametrize(
    "frames",
    [
        [b"SSH-2.0-OpenSSH_9.2\r\n"],
        [STATS],
        [HELLO],
        [Challenge(PROTOCOL_VERSION, "w0", b"n" * 32)] * 2,
        [struct.pack("<I", 100_000)],
        [Auth(PROTOCOL_VERSION, "", b"", b"")],
    ],
    ids=["other protocol", "stats first", "hello first", "two challenges", "too large", "wrong direction"],
)
async def test_nonsense_instead_of_a_handshake_ends_the_attempt(frames):
    ended = asyncio.Event()

    async def play(worker):
        for frame in frames:
            worker.send(frame)
        while await worker.receive() is not None:
            pass
        ended.set()

    async with raw_worker(play) as port, connected(port) as channel:
        await asyncio.wait_for(ended.wait(), 5)
        await until(lambda: "not a worker of this protocol" in channel.last_error)
        assert channel.listener.heard == []


async def test_nonsense_after_the_handshake_loses_the_worker():
    async def play(worker):
        await worker.accept()
        while not isinstance(await worker.receive(), Submit):
            pass
        worker.send(struct.pack("<I", 2) + b"\xc1\xc1")
        await hang()

    async with raw_worker(play) as port, connected(port) as channel:
        await until(lambda: channel.hello)
        got = []
        submit(channel, got.append)
        await until(lambda: got)
        assert got[0].finish.error_kind == "worker_lost"
        assert "not a worker of this protocol" in got[0].finish.message


async def test_a_worker_that_falls_silent_is_lost():
    async def play(worker):
        await worker.accept()
        await hang()

    async with raw_worker(play) as port, connected(port, limits=ChannelLimits(silence_s=0.2)) as channel:
        await until(lambda: channel.hello)
        got = []
        submit(channel, got.append)
        await until(lambda: got)
        assert "silent for 0.2 s" in got[0].finish.message


async def test_a_worker_that_speaks_rarely_but_in_time_is_kept():
    async def play(worker):
        await worker.accept()
        while True:
            worker.send(STATS)
            await asyncio.sleep(0.05)

    async with raw_worker(play) as port, connected(port, limits=ChannelLimits(silence_s=0.5)) as channel:
        await until(lambda: len(channel.listener.of("stats")) == 30)
        assert channel.listener.what().count("connected") == 1


async def test_a_worker_that_never_answers_is_given_up():
    async def play(worker):
        await hang()

    async with raw_worker(play) as port, connected(port, limits=ChannelLimits(handshake_s=0.05)) as channel:
        await until(lambda: channel.last_error == "no answer within 0.05 s")


async def test_a_worker_that_does_not_read_refuses_requests_at_the_limit():
    async def play(worker):
        await worker.accept()
        worker.writer.transport.pause_reading()
        await hang()

    async with (
        raw_worker(play) as port,
        connected(port, limits=ChannelLimits(max_buffered_bytes=1_000_000)) as channel,
    ):
        await until(lambda: channel.hello)
        taken = 0
        try:
            while taken < 1000:
                submit(channel, lambda item: None, tokens=b"\0" * 100_000)
                taken += 1
        except WorkerUnavailable as error:
            assert "does not read" in str(error)  # noqa: PT017
        assert channel.live_requests == taken < 1000


async def test_an_address_where_nobody_listens_is_tried_until_somebody_does():
    with socket.create_server(("127.0.0.1", 0)) as placeholder:
        port = placeholder.getsockname()[1]
    async with connected(port) as channel:
        await until(lambda: "Connect call failed" in channel.last_error or "refused" in channel.last_error)
        async with served(port=port):
            await until(lambda: channel.hello)


async def test_a_host_that_cannot_exist_is_an_error_like_any_other():
    async with connected(1, host="x" * 70) as channel:
        await until(lambda: channel.last_error != "not connected yet")


async def test_concurrent_callers_share_one_answer_with_the_text_assets():
    asked = []

    async def play(worker):
        await worker.accept()
        while (message := await worker.receive()) is not None:
            if isinstance(message, TextAssetsRequest):
                asked.append(message)
                await asyncio.sleep(0)
                worker.send(TEXT)

    async with raw_worker(play) as port, connected(port) as channel:
        await until(lambda: channel.hello)
        impatient = asyncio.create_task(channel.text_assets())
        await asyncio.sleep(0)
        impatient.cancel()
        assert await asyncio.gather(channel.text_assets(), channel.text_assets()) == [TEXT, TEXT]
        assert len(asked) == 1


async def test_text_assets_fail_when_the_worker_is_lost():
    async def play(worker):
        await worker.accept()
        while not isinstance(await worker.receive(), TextAssetsRequest):
            pass

    async with raw_worker(play) as port, connected(port) as channel:
        await until(lambda: channel.hello)
        with pytest.raises(WorkerUnavailable, match="lost while it sent its tokenizer"):
            await channel.text_assets()


async def test_stopping_the_channel_ends_its_requests_and_frees_the_worker():
    async with served() as server:
        got = []
        async with connected(server.port) as channel:
            await until(lambda: channel.hello)
            submit(channel, got.append)
            await until(lambda: server.handler.submitted)
        assert got[0].finish.error_kind == "worker_lost"
        await until(lambda: server.handler.cancelled)
        assert channel.hello is None


async def test_a_draining_worker_still_finishes_what_it_has_and_refuses_the_rest():
    async with served() as server, connected(server.port) as channel:
        await until(lambda: channel.hello)
        first, second = [], []
        submit(channel, first.append)
        await until(lambda: server.handler.submitted)
        server.drain("upgrade")
        server.handler.fail = SubmitError("draining", "the worker is shutting down")
        submit(channel, second.append)
        await until(lambda: second)
        publish(server, (server.handler.submitted[0][0], [1], Finish("stop")))
        await until(lambda: first)
        assert second[0].finish.error_kind == "draining"
        assert first[0].finish == Finish("stop")
        assert channel.listener.of("draining") == ["upgrade"]
