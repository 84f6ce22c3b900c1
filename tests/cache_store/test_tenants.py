"""Tenants with different salts: none finds what another has stored, nor learns that it is there."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from redis import Redis

from services.cache_store.client import BlockStore, Outcome
from services.cache_store.embedded import LocalRedis
from services.cache_store.functions import StoreFunctions
from services.router.tenants import Tenants
from services.wire.hashes import chain_hashes, pack_tokens, root_hash
from tests.cache_store.proxy import SlowProxy
from tests.cache_store.test_client import FORMAT, payload_of, read_all, to_write

BLOCK_SIZE = 16
SALTS = Tenants(b"the deployment's secret")


def blocks_of(tenant: str, seed: int) -> list[bytes]:
    """The names of a prompt's 20 blocks, as the router makes them for this tenant."""
    tokens = pack_tokens(range(1000 * seed, 1000 * seed + 20 * BLOCK_SIZE))
    return chain_hashes(root_hash(FORMAT.fingerprint, SALTS.salt(tenant)), tokens, BLOCK_SIZE)


@pytest.fixture
def proxy(redis_server: LocalRedis) -> Iterator[SlowProxy]:
    proxy = SlowProxy(int(redis_server.url.split(":")[2].split("/")[0]), bytes_per_s=1e12)
    yield proxy
    proxy.close()


@pytest.fixture
def store(proxy: SlowProxy) -> Iterator[BlockStore]:
    """Whose talk with the server passes the proxy."""
    store = BlockStore(proxy.url, FORMAT, capacity=64 << 20, timeout_s=20.0)
    yield store
    store.close()


# ---- names ----------------------------------------------------------------------------------------------

salts = st.binary(max_size=40)
fingerprints = st.binary(min_size=16, max_size=16)


@given(fingerprints, salts, fingerprints, salts)
def test_other_salts_or_other_models_are_other_roots(
    model: bytes, salt: bytes, other_model: bytes, other_salt: bytes
) -> None:
    assume((model, salt) != (other_model, other_salt))
    assert root_hash(model, salt) != root_hash(other_model, other_salt)


@given(fingerprints, fingerprints)
def test_a_model_is_not_a_salt_and_a_salt_no_model(one: bytes, other: bytes) -> None:
    """An adapter is a part of the fingerprint: its name as somebody's salt is something else."""
    assume(one != other)
    assert root_hash(one, other) != root_hash(other, one)
    assert root_hash(one, b"") != root_hash(one, bytes(1))


@given(st.text(max_size=20), st.text(max_size=20), st.integers(0, 50))
def test_two_tenants_have_no_block_in_common(one: str, other: str, seed: int) -> None:
    assume(one != other)
    assert not set(blocks_of(one, seed)) & set(blocks_of(other, seed))


# ---- in the store ---------------------------------------------------------------------------------------


def test_a_tenant_never_finds_what_another_has_stored_and_has_its_own_beside_it(store: BlockStore) -> None:
    for tenant in ("alice", "bob", ""):
        blocks = blocks_of(tenant, 1)
        assert read_all(store, blocks) == []
        assert set(store.write(to_write(blocks, tenant=tenant)).outcomes.values()) == {Outcome.STORED}
        assert read_all(store, blocks) == [bytes(payload_of(block)) for block in blocks]


def ask(store: BlockStore, blocks: list[bytes]) -> object:
    found = store.lookup(blocks, "bob")
    assert found is not None
    payloads = store.read(found, 0, len(found.hashes))
    store.release(found)
    return found.hashes, payloads


def write(store: BlockStore, blocks: list[bytes]) -> object:
    return list(store.write(to_write(blocks, tenant="bob")).outcomes.values())


def retain(store: BlockStore, blocks: list[bytes]) -> object:
    return store.retain(blocks, "bob", 90, 60.0)


def peek(store: BlockStore, blocks: list[bytes]) -> object:
    return store._functions.peek(blocks)


@pytest.mark.parametrize("do", [ask, write, retain, peek])
def test_a_foreign_block_and_one_that_nobody_has_cost_the_same_commands_and_bytes(
    store: BlockStore, proxy: SlowProxy, redis: Redis, do: Callable[[BlockStore, list[bytes]], object]
) -> None:
    store.write(to_write(blocks_of("alice", 1), tenant="alice"))
    store.write(to_write(blocks_of("bob", 9), tenant="bob"))  # all connections are there

    def counters() -> tuple[int, int, int]:
        commands = redis.info("stats")["total_commands_processed"]
        return proxy.asked_bytes, proxy.answered_bytes, commands

    def talk(blocks: list[bytes]) -> tuple[object, list[int]]:
        before = counters()
        answer = do(store, blocks)
        return answer, [now - then for now, then in zip(counters(), before, strict=True)]

    foreign, nobodys = talk(blocks_of("bob", 1)), talk(blocks_of("bob", 2))
    assert foreign == nobodys
    assert min(foreign[1]) > 0
    own = talk(blocks_of("alice", 1))
    assert own != foreign, "a hit is not the same, or this test sees nothing"


def test_what_a_tenant_holds_is_counted_as_its_own(store: BlockStore, redis: Redis) -> None:
    for tenant in ("alice", "bob"):
        store.write(to_write(blocks_of(tenant, 1), tenant=tenant))
    usage = StoreFunctions(redis).usage()
    assert len(usage.owners) == 2
    assert sum(usage.owners.values()) == usage.total
