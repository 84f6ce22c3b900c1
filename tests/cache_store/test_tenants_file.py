"""Quotas and floors from a file: what it may say, what is refused, and that the store has them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from services.cache_store.embedded import LocalRedis
from services.cache_store.functions import StoreFunctions, owner_digest
from services.cache_store.service import Upkeep
from services.cache_store.tenants_file import Limits, TenantsFile, read_tenants
from tests.cache_store.test_service import metrics_of

ALICE, BOB = owner_digest("alice"), owner_digest("bob")
MIB = 1 << 20


@pytest.fixture
def write(tmp_path: Path) -> Callable[[Any], Path]:
    def write(content: Any) -> Path:
        """Another file in its place, as editors and Kubernetes do it."""
        path, new = tmp_path / "tenants.json", tmp_path / "new"
        new.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        os.replace(new, path)
        return path

    return write


def test_sizes_are_bytes_or_text(write: Callable[[Any], Path]) -> None:
    path = write({"alice": {"quota": "1.5MiB", "floor": 4096}, "bob": {"floor": "1MiB"}, "c": {}})
    assert read_tenants(path, 100 * MIB) == {
        "alice": Limits(3 * MIB // 2, 4096),
        "bob": Limits(None, MIB),
        "c": Limits(),
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "truncated"),
        ("[]", "Expected `object`"),
        ({"a": 3}, "Expected `object`"),
        ({"a": {"quota": "1 GB"}}, "'a': quota must be a size above 0 such as 512MiB or 1.5GiB, got '1 GB'"),
        ({"a": {"quota": -1}}, "'a': quota must be 0 bytes or more, got -1"),
        ({"a": {"quota": 2**60}}, "quota must be 0"),
        ({"a": {"quota": 1.5}}, "Expected `int | str | null`"),
        ({"a": {"qouta": 1}}, "unknown field `qouta`"),
        ({"a": {"quota": 1, "floor": 2}}, "'a': floor 2 is above quota 1"),
        ({"a": {"floor": 60}, "b": {"floor": 50}}, "110 bytes together, at most 100 can be kept"),
        ({str(i): {} for i in range(10_001)}, "10001 tenants, at most 10000"),
    ],
)
def test_a_file_that_makes_no_sense_is_refused_with_the_reason(
    write: Callable[[Any], Path], content: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        read_tenants(write(content), 100)


def test_a_bad_change_leaves_the_old_limits_in_force_and_says_so_once(
    write: Callable[[Any], Path], caplog: pytest.LogCaptureFixture
) -> None:
    file = TenantsFile(write({"alice": {"quota": 10}}), 100)
    write("{")
    for _ in range(3):
        assert file.limits() == {ALICE: Limits(10, None)}
    assert not file.sound
    assert len([r for r in caplog.records if "is refused, the limits stay as they were" in r.message]) == 1
    write({"bob": {"floor": 5}})
    assert file.limits() == {BOB: Limits(None, 5)}
    assert file.sound
    assert file.names() == {BOB: "bob"}


def test_a_file_that_goes_away_and_comes_back_is_no_change_of_limits(write: Callable[[Any], Path]) -> None:
    path = write({"alice": {"quota": 10}})
    file = TenantsFile(path, 100)
    path.unlink()
    assert file.limits() == {ALICE: Limits(10, None)}
    assert not file.sound
    write({"alice": {"quota": 10}})
    assert file.limits() == {ALICE: Limits(10, None)}
    assert file.sound


def test_the_upkeep_applies_the_part_of_its_server_and_takes_back_what_the_file_no_longer_says(
    write: Callable[[Any], Path], redis_server: LocalRedis
) -> None:
    file = TenantsFile(write({"alice": {"quota": 8 * MIB, "floor": 2 * MIB}}), 100 * MIB)
    upkeep = Upkeep(redis_server.socket_url, 100 * MIB, tenants=file, servers=2)
    functions = StoreFunctions(upkeep._redis)
    try:
        functions.govern(BOB, quota=5)
        upkeep.round()
        usage = functions.usage()
        assert (usage.quotas, usage.floors) == ({ALICE: 4 * MIB}, {ALICE: MIB})
        assert metrics_of(upkeep)["reprise_store_owner_quota_bytes[alice]"] == 4 * MIB
        assert metrics_of(upkeep)["reprise_store_owner_floor_bytes[alice]"] == MIB
        upkeep._redis.flushall()
        upkeep.round()
        assert functions.usage().quotas == {ALICE: 4 * MIB}, "also after the store was emptied"
        write("not JSON")
        upkeep.round()
        assert functions.usage().quotas == {ALICE: 4 * MIB}
        assert metrics_of(upkeep)["reprise_store_tenants_file_sound"] == 0
        write({"bob": {"floor": 2 * MIB}})
        upkeep.round()
        usage = functions.usage()
        assert (usage.quotas, usage.floors) == ({}, {BOB: MIB})
        assert metrics_of(upkeep)["reprise_store_tenants_file_sound"] == 1
    finally:
        upkeep.close()


def test_without_a_file_the_limits_are_left_to_others(redis_server: LocalRedis) -> None:
    upkeep = Upkeep(redis_server.socket_url, MIB)
    functions = StoreFunctions(upkeep._redis)
    try:
        functions.govern(BOB, quota=5)
        upkeep.round()
        assert functions.usage().quotas == {BOB: 5}
    finally:
        upkeep.close()
