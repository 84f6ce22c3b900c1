"""The client itself, killed between any two of its commands, beside other workers and on a server that loses
its functions, its data or some of it, or its memory is full. Time is the test's. What must hold: nobody reads
wrong bytes, the books add up after every command, and then a new worker stores everything and finds it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis import Redis

from services.cache_store import payloads
from services.cache_store.allocation import stored_bytes
from services.cache_store.client import LEASE_MS, BlockStore, Outcome
from services.cache_store.deletion import Deletion
from services.cache_store.embedded import LocalRedis
from services.cache_store.frames import FrameFormat
from services.cache_store.payloads import unlink_payloads
from tests.cache_store.harness import CLOCK_KEY, Store, chain
from tests.cache_store.oracle import READY, WRITING
from tests.cache_store.processes import Worker
from tests.cache_store.test_client import payload_keys, payload_of, to_write
from tests.cache_store.test_crashes import check_books

#: A frame of two values, so that a writer may die between them.
SIZE = 24_000 - 64
FORMAT = FrameFormat(b"f" * 16, 2, 16, SIZE)
BLOCK_BYTES = stored_bytes(FORMAT.frame_bytes)
#: Two prompts with the first two blocks in common, and one apart. There is room for seven blocks.
SHARED = chain("shared", 2)
PROMPTS = [[*SHARED, *chain("one", 2)], [*SHARED, *chain("two", 2)], chain("apart", 4)]
CAPACITY = 7 * BLOCK_BYTES


@pytest.fixture(autouse=True)
def one_value_a_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(payloads, "_WINDOW_BYTES", 1)


def write(prompt: int) -> Callable[[BlockStore], object]:
    return lambda store: store.write(to_write(PROMPTS[prompt], SIZE)).outcomes


def read(prompt: int) -> Callable[[BlockStore], object]:
    """How many blocks were found, how many read."""

    def work(store: BlockStore) -> tuple[int, int]:
        found = store.lookup(PROMPTS[prompt], "t")
        if found is None:
            return 0, 0
        got = store.read(found, 0, len(found.hashes))
        for block, payload in zip(found.hashes, got, strict=False):
            assert payload.data == payload_of(block, SIZE), "wrong bytes"
        store.release(found)
        return len(found.hashes), len(got)

    return work


class Server:
    """The server under test: workers on it, and what goes wrong with it."""

    def __init__(self, url: str, redis: Redis) -> None:
        self.url = url
        self.redis = redis
        self.store = Store(redis, CAPACITY)
        self.workers: list[Worker] = []
        self.copy: dict[bytes, bytes] = {}  # what a replica has
        self.lost = False  # data: what is READY may have no payload
        self.leases_ended = False
        self.killed = False

    def start(self, work: Callable[[BlockStore], object]) -> Worker:
        self.workers.append(Worker(self.url, FORMAT, CAPACITY, work))
        return self.workers[-1]

    def stop(self) -> None:
        for worker in self.workers:
            worker.kill()
        self.roomy()

    def kill(self, worker: Worker) -> None:
        worker.kill()
        self.killed = True

    def wait(self, ms: int = 1) -> None:
        full = self.redis.config_get("maxmemory")["maxmemory"] == "1"
        self.roomy()  # the clock's own
        self.store.turn_clock(ms)
        if full:
            self.full()
        self.leases_ended |= ms >= LEASE_MS

    def functions(self) -> None:
        self.roomy()
        self.redis.function_flush()

    def full(self) -> None:
        self.roomy()
        self.store.calls.load()  # which is refused afterwards
        self.redis.config_set("maxmemory", 1)

    def roomy(self) -> None:
        self.redis.config_set("maxmemory", 1 << 30)

    def replicate(self) -> None:
        self.copy = {key: self.redis.dump(key) for key in self.redis.scan_iter() if key != CLOCK_KEY.encode()}

    def fail_over(self) -> None:
        """To the replica, which lacks what came after `replicate`. It takes a second."""
        self.flush()
        for key, value in self.copy.items():
            self.redis.restore(key, 0, value)

    def flush(self) -> None:
        self.roomy()
        self.redis.flushall()
        self.lost = True
        self.store.set_clock(self.store.now + 1000)

    def lose_a_payload(self, number: int) -> None:
        if keys := payload_keys(self.redis):
            self.redis.delete(keys[number % len(keys)])
            self.lost = True

    def check(self) -> None:
        check_books(self.store, CAPACITY)
        if not self.lost:
            there = payload_keys(self.redis)
            for name in self.ready():
                assert sum(name in key for key in there) == 2, "both values of every block that is READY"

    def ready(self) -> set[bytes]:
        return {
            hash_ + record.fence for hash_, record in self.store.records().items() if record.state == READY
        }

    def check_reads(self) -> None:
        """Whoever found a run read all of it."""
        for worker in self.workers:
            if worker.done and isinstance(worker.result, tuple):
                found, read = worker.result
                assert read == found or self.lost or self.leases_ended

    def all_is_well_afterwards(self) -> None:
        """The dead are reaped, a new worker writes and reads everything, no byte is left at the end."""
        self.killed |= any(not worker.done for worker in self.workers)
        self.stop()
        calls = self.store.calls
        self.store.turn_clock(700_000)
        for _ in range(2):
            calls.upkeep(100)
            Deletion(calls, lambda names: unlink_payloads(self.redis, names)).step()
        self.check()
        assert not any(record.state == WRITING for record in self.store.records().values())
        for number, prompt in enumerate(PROMPTS):
            for _ in range(2):  # what was found bad is gone the second time
                for work in (read(number), write(number)):
                    self.start(work).finish()
            assert set(self.workers[-1].result.values()) == {Outcome.HAD}
            reader = self.start(read(number))
            reader.finish()
            assert reader.result == (len(prompt), len(prompt))
        self.stop()
        unlink_payloads(self.redis, calls.evict(0)[0])
        unlink_payloads(self.redis, calls.some_dropped(1000))
        assert self.store.records() == {}
        assert calls.usage().total == 0
        assert self.killed or self.lost or payload_keys(self.redis) == []


@pytest.fixture
def server(redis_server: LocalRedis, redis: Redis) -> Iterator[Server]:
    server = Server(redis_server.socket_url, redis)
    yield server
    server.stop()


def commands_of(server: Server, work: Callable[[BlockStore], object]) -> int:
    worker = server.start(work)
    worker.finish()
    return worker.commands


def test_two_writers_die_at_any_command_under_a_reader_and_nothing_is_wrong_or_lost(server: Server) -> None:
    """Every pair of commands for the two to die before, the three taking turns."""
    most = commands_of(server, write(0))
    assert most > 10, "RESERVE, two values a block, COMMIT"
    for first, second in itertools.product(range(0, most + 1), range(0, most + 1, 3)):
        server.stop()
        server = Server(server.url, server.redis)
        one, other, reader = server.start(write(0)), server.start(write(1)), server.start(read(0))
        for command in range(most + 1):
            for worker, dies_at in ((one, first), (other, second), (reader, most + 1)):
                if command == dies_at:
                    server.kill(worker)
                server.store.turn_clock()
                worker.step()
            server.check()
        reader.finish()
        server.check_reads()
        server.store.turn_clock(10_000)
        last = server.start(write(1))
        last.finish()
        assert Outcome.FOLLOWED not in last.result.values(), "the dead hold nobody up"
        assert server.store.length(PROMPTS[1]) == 4
        server.check()


def test_a_reader_reads_all_that_it_found_whoever_needs_room_between_any_two_of_its_commands(
    server: Server,
) -> None:
    server.start(write(0)).finish()
    for command in range(commands_of(server, read(0)) + 1):
        server.stop()
        server = Server(server.url, server.redis)
        server.start(write(0)).finish()
        reader = server.start(read(0))
        for step in range(100):
            if step == command:
                other = server.start(write(2))
                other.finish()
                assert set(other.result.values()) <= {Outcome.STORED, Outcome.NO_ROOM, Outcome.ORPHANED}
            reader.step()
        assert reader.result in ((4, 4), (3, 3)), "the last block may go before the lookup"
        server.check()


def test_a_writer_that_was_overtaken_at_any_command_leaves_nothing_of_its_own(server: Server) -> None:
    most = commands_of(server, write(0))
    for command in range(1, most + 1):
        server.stop()
        server = Server(server.url, server.redis)
        slow = server.start(write(0))
        for _ in range(command):
            slow.step()
        server.wait(10_000)
        quick = server.start(write(0))
        for _ in range(most // 2):
            quick.step()
        slow.finish()
        server.check()
        quick.finish()
        server.check()
        assert server.store.length(PROMPTS[0]) == 4
        assert len(payload_keys(server.redis)) == 8


@pytest.mark.parametrize("what", ["functions", "flush", "fail_over", "full", "lose_a_payload"])
@pytest.mark.parametrize("work", [write, read])
def test_a_server_that_loses_something_between_any_two_commands_costs_misses_only(
    server: Server, what: str, work: Callable[[int], Callable[[BlockStore], object]]
) -> None:
    most = commands_of(server, write(0)) if work is write else commands_of(server, read(0)) + 8
    for command in range(most + 1):
        server.stop()
        server = Server(server.url, server.redis)
        for number in (0, 2):
            server.start(write(number)).finish()
            if number == 0:
                server.replicate()
        worker = server.start(work(1))
        for _ in range(command):
            worker.step()
        getattr(server, what)(*[command] if what == "lose_a_payload" else [])
        worker.finish()
        assert worker._store.counts().get("errors", 0) == 0
        server.check()
        server.check_reads()
    server.all_is_well_afterwards()


#: Start a worker, let the n-th go on by a command or to its end, kill it, let time pass, or spoil something.
steps = st.lists(
    st.one_of(
        st.tuples(st.just("start"), st.sampled_from([write, write, read]), st.integers(0, 2)),
        st.tuples(st.just("start"), st.sampled_from([write, write, read]), st.integers(0, 2)),
        *[st.tuples(st.just("go"), st.integers(0, 5), st.integers(1, 6))] * 4,
        st.tuples(st.just("kill"), st.integers(0, 5)),
        st.tuples(st.just("wait"), st.sampled_from([1, 600, 10_000])),
        st.tuples(
            st.sampled_from(["functions", "full", "roomy", "roomy", "replicate", "flush", "fail_over"])
        ),
        st.tuples(st.just("lose_a_payload"), st.integers(0, 20)),
    ),
    min_size=5,
    max_size=40,
)


@pytest.mark.slow
def test_whatever_dies_and_is_lost_in_whatever_order_no_wrong_byte_is_read_and_no_byte_leaks(
    any_server: LocalRedis,
) -> None:
    with Redis.from_url(any_server.socket_url) as redis:

        @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
        @given(steps)
        def any_order(plan: list[tuple]) -> None:  # type: ignore[type-arg]
            server = Server(any_server.socket_url, redis)
            try:
                for what, *arguments in plan:
                    server.wait()
                    running = [worker for worker in server.workers if not worker.done]
                    if what == "start":
                        server.start(arguments[0](arguments[1]))
                    elif what not in ("go", "kill"):
                        getattr(server, what)(*arguments)
                    elif running:
                        worker = running[arguments[0] % len(running)]
                        if what == "kill":
                            server.kill(worker)
                        else:
                            for _ in range(arguments[1]):
                                worker.step()
                    server.check()
                    server.check_reads()
                server.all_is_well_afterwards()
            finally:
                server.stop()

        any_order()
