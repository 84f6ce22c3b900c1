"""Who computes what: claims on every kind of server that is installed."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from redis import Redis

from services.cache_store.claims import LIFE_S, Claimed, Claims, Followed, Times
from services.cache_store.embedded import LocalRedis
from tests.cache_store.harness import chain

RUN = chain("a", 100)


def times(blocks: int, begins_s: float = 0.0) -> Times:
    """Every worker computes a block in 10 ms; to store and to load it takes next to nothing."""
    return Times(begins_s, begins_s + 1.25 * blocks / 100, begins_s + blocks / 100)


SOON = times(len(RUN))


@pytest.fixture
def redis(any_server: LocalRedis) -> Iterator[Redis]:
    with Redis.from_url(any_server.socket_url) as client:
        client.execute_command("FLUSHALL", "SYNC")
        client.function_flush()
        yield client


@pytest.fixture
def one(redis: Redis) -> Claims:
    return Claims(redis, b"worker 1")


@pytest.fixture
def other(redis: Redis) -> Claims:
    return Claims(redis, b"worker 2")


def followed(answer: Claimed | Followed) -> Followed:
    assert isinstance(answer, Followed), answer
    return answer


def key_of(answer: Claimed | Followed) -> bytes:
    assert isinstance(answer, Claimed), answer
    assert answer.key is not None
    return answer.key


def is_to_compute(answer: Claimed | Followed) -> bool:
    """Without a claim."""
    return answer == Claimed(None)


def test_of_two_that_miss_the_same_one_computes_and_the_other_follows(one: Claims, other: Claims) -> None:
    key = key_of(one.claim([], RUN, SOON, 1))
    seen = followed(other.claim([], RUN, SOON, 1))
    assert (seen.blocks, seen.key, seen.claimer) == (100, key, b"worker 1")
    assert 0.8 < seen.expected_s <= 1.0
    assert other.holds(seen)


def test_a_claim_says_whether_somebody_follows(one: Claims, other: Claims) -> None:
    key = key_of(one.claim([], RUN, SOON, 1))
    assert one.renew([key]) == [(True, False)]
    followed(other.claim([], RUN, SOON, 1))
    assert one.renew([key]) == [(True, True)]


def test_a_prompt_that_parts_from_the_claimed_one_follows_as_far_as_they_go_together(
    one: Claims, other: Claims
) -> None:
    key_of(one.claim([], RUN, SOON, 1))
    for together in (1, 37, 99):
        seen = followed(other.claim([], RUN[:together] + chain("b", 50), times(together + 50), 1))
        assert seen.blocks == together
        assert seen.expected_s <= together / 100
    longer = followed(other.claim([], RUN + chain("b", 50), times(150), 1))
    assert longer.blocks == 100


def test_who_comes_when_some_blocks_are_stored_finds_the_claim_by_the_blocks_before(
    one: Claims, other: Claims
) -> None:
    key_of(one.claim(RUN[:3], RUN[3:], SOON, 1))
    seen = followed(other.claim(RUN[:40], RUN[40:], SOON, 1))
    assert seen.blocks == 60
    assert key_of(other.claim(RUN[:2], RUN[2:], SOON, 1)) != seen.key, "that one nobody has claimed"


def test_a_claim_behind_others_is_found_first(redis: Redis, one: Claims, other: Claims) -> None:
    key_of(one.claim([], RUN[:50], times(50), 1))
    key_of(other.claim(RUN[:50], RUN[50:], times(50), 1))
    third = Claims(redis, b"worker 3")
    seen = followed(third.claim(RUN[:20], RUN[20:], times(80, begins_s=0.3), 1))
    assert (seen.claimer, seen.blocks) == (b"worker 1", 30)
    seen = followed(third.claim(RUN[:70], RUN[70:], times(30, begins_s=0.3), 1))
    assert (seen.claimer, seen.blocks) == (b"worker 2", 30)


def test_what_is_too_short_to_wait_for_is_computed_by_both(one: Claims, other: Claims) -> None:
    key_of(one.claim([], RUN, SOON, 1))
    assert is_to_compute(other.claim([], RUN[:5] + chain("b", 50), SOON, 6))


def test_nobody_waits_for_one_that_is_done_too_late_and_who_is_done_first_takes_over(
    redis: Redis, one: Claims, other: Claims
) -> None:
    queued = times(len(RUN), begins_s=30.0)
    old = key_of(one.claim([], RUN, queued, 1))
    assert key_of(other.claim([], RUN, SOON, 1)) == old
    assert one.renew([old]) == [(False, False)]
    one.release([old])
    assert other.renew([old]) == [(True, False)], "only an owner's release counts"
    assert followed(one.claim([], RUN, queued, 1)).claimer == b"worker 2", "now it waits for the other"


def test_who_would_store_it_later_still_takes_nothing_over(one: Claims, other: Claims) -> None:
    """Writing takes longer than computing: not worth waiting for, but the first to be there."""
    key = key_of(one.claim([], RUN, Times(0.0, 0.9, 2.0), 1))
    assert is_to_compute(other.claim([], RUN, Times(0.0, 0.9, 2.1), 1))
    assert one.renew([key]) == [(True, False)]


def test_one_that_is_late_is_expected_to_be_so_for_as_long_again(one: Claims, other: Claims) -> None:
    key_of(one.claim([], RUN, Times(0.0, 0.0, 0.0), 1))
    began_s = time.monotonic()
    while time.monotonic() - began_s < 0.03:
        seen = followed(other.claim([], RUN, SOON, 1))
    assert 0.02 < seen.expected_s < 0.5


def test_ones_own_claim_is_not_followed(one: Claims) -> None:
    key_of(one.claim([], RUN, SOON, 1))
    assert is_to_compute(one.claim([], RUN, SOON, 1))
    assert is_to_compute(one.claim(RUN[:4], RUN[4:], SOON, 1))


def test_a_released_claim_is_gone_at_once_and_one_of_a_dead_worker_after_its_life(
    redis: Redis, one: Claims, other: Claims
) -> None:
    key = key_of(one.claim([], RUN, SOON, 1))
    seen = followed(other.claim([], RUN, SOON, 1))
    assert 0 < redis.pttl(key) <= LIFE_S * 1000
    one.release([key])
    assert not other.holds(seen)
    assert redis.dbsize() == 0
    key = key_of(other.claim([], RUN, SOON, 1))
    assert redis.pexpire(key, 1)  # its worker does not renew it
    while redis.exists(key):
        pass
    assert key_of(one.claim([], RUN, SOON, 1)) == key


def test_renewing_prolongs_a_claim(redis: Redis, one: Claims) -> None:
    key = key_of(one.claim([], RUN, SOON, 1))
    redis.pexpire(key, 200)
    one.renew([key])
    assert redis.pttl(key) > 500


def test_one_that_was_taken_over_is_no_more_held(one: Claims, other: Claims, redis: Redis) -> None:
    queued = times(len(RUN), begins_s=10.0)
    key_of(one.claim([], RUN, queued, 1))
    seen = followed(other.claim([], RUN, queued, 1))
    key_of(Claims(redis, b"worker 3").claim([], RUN, SOON, 1))
    assert not other.holds(seen)


def test_claims_on_blocks_of_another_codec_are_not_seen(redis: Redis, one: Claims) -> None:
    key_of(one.claim([], RUN, SOON, 1))
    key_of(Claims(redis, b"worker 2", codec=1).claim([], RUN, SOON, 1))


def test_a_prompt_of_more_blocks_than_a_call_takes_is_claimed_and_found(one: Claims, other: Claims) -> None:
    run = chain("long", 3000)
    key_of(one.claim([], run, SOON, 1))
    assert followed(other.claim(run[:900], run[900:], SOON, 1)).blocks == 2100
    assert key_of(other.claim(run[:2000], run[2000:], SOON, 1)), "the other claim lies too far back"


def test_what_makes_no_sense_is_refused(redis: Redis, one: Claims) -> None:
    with pytest.raises(ValueError, match="no blocks"):
        one.claim([], [], SOON, 1)
    with pytest.raises(ValueError, match="8 bytes, got 3"):
        Claims(redis, b"abc")
