from __future__ import annotations

from collections import Counter
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.cache_store.address import Address, split_urls
from services.cache_store.shards import Rendezvous
from tests.cache_store.harness import block_hash

ROOTS = [block_hash(f"{i}") for i in range(4000)]
names = st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=6, unique=True)


def homes(servers: list[str]) -> dict[bytes, str]:
    rendezvous = Rendezvous(servers)
    return {root: servers[rendezvous.choose(root)] for root in ROOTS}


def test_prefixes_spread_evenly() -> None:
    counts = Counter(homes([f"store-{i}:6379/0" for i in range(4)]).values())
    assert len(counts) == 4
    assert max(counts.values()) / min(counts.values()) < 1.2


def test_a_server_more_takes_its_share_and_moves_nothing_else() -> None:
    before = homes(["a:1/0", "b:1/0", "c:1/0"])
    after = homes(["a:1/0", "b:1/0", "c:1/0", "d:1/0"])
    moved = [root for root in ROOTS if before[root] != after[root]]
    assert {after[root] for root in moved} == {"d:1/0"}
    assert 0.2 < len(moved) / len(ROOTS) < 0.3


@given(names, st.randoms(use_true_random=False), st.binary(min_size=16, max_size=16))
def test_the_order_in_which_servers_are_told_does_not_matter(
    servers: list[str], random: Random, first: bytes
) -> None:
    shuffled = random.sample(servers, len(servers))
    assert servers[Rendezvous(servers).choose(first)] == shuffled[Rendezvous(shuffled).choose(first)]


@given(names, st.binary(min_size=16, max_size=16))
def test_a_server_less_moves_only_its_own(servers: list[str], first: bytes) -> None:
    home = servers[Rendezvous(servers).choose(first)]
    for gone in servers:
        left = [name for name in servers if name != gone]
        if left and gone != home:
            assert left[Rendezvous(left).choose(first)] == home


def test_no_server_is_refused() -> None:
    with pytest.raises(ValueError, match="one server at least"):
        Rendezvous([])


@pytest.mark.parametrize(
    ("urls", "name"),
    [
        (["redis://h", "redis://u:p@h:6379", "redis://h:6379/0", "rediss://:x@h:6379?db=0"], "h:6379/0"),
        (["redis://h:1/2", "redis://h:1?db=2"], "h:1/2"),
        (["unix:///run/r.sock", "unix://:p@/run/r.sock?db=0"], "/run/r.sock/0"),
    ],
)
def test_a_server_has_one_name_however_it_is_reached(urls: list[str], name: str) -> None:
    assert {Address.from_url(url).name for url in urls} == {name}


def test_a_password_may_hold_a_comma() -> None:
    urls = split_urls("redis://:a,b@h:1,redis://:c@h:2")
    assert [Address.from_url(url).password for url in urls] == ["a,b", "c"]


def test_urls_come_in_a_list() -> None:
    assert split_urls("redis://a:1, redis://b:1 ,unix:///c.sock,") == [
        "redis://a:1", "redis://b:1", "unix:///c.sock",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "URL of one server"),
        (" , ", "URL of one server"),
        ("redis://a:1,redis://:secret@a:1/0", r"named twice: a:1/0$"),
        ("localhost,redis://a:1", "scheme"),
        ("redis://a:1,localhost", "[Pp]ort"),
        ("redis://a:port", "[Pp]ort"),
        ("unix:///c.sock?db=x", "db"),
        ("redis://a/-1?db=-1", "db must not be negative, got -1"),
        (
            "rediss://a?ssl_cert_reqs=maybe",
            "must be one of required, optional, none, got 'maybe'",
        ),
    ],
)
def test_urls_that_make_no_sense_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split_urls(text)
