"""The operators' API as its users see it, over a socket."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from redis import Redis

from services.cache_store.functions import PINNED
from services.cache_store.operators import Operators, Server
from services.cache_store.operators_http import MAX_BODY_BYTES, OperatorsServer, operators_app
from tests.cache_store.harness import ALICE, Store, block_hash, chain

KEY = "operators-only"


@pytest.fixture
def store(redis: Redis) -> Store:
    return Store(redis, capacity=100_000)


@pytest.fixture
def up() -> list[bool]:
    return [True]


@pytest.fixture
def api(store: Store, up: list[bool]) -> Iterator[httpx.Client]:
    servers = {"here": Server(store.calls, 100_000, lambda: up[0])}
    app = operators_app(Operators(servers), ["another", KEY], lambda: {ALICE: "alice"})
    server = OperatorsServer(app, socket.create_server(("127.0.0.1", 0)))
    try:
        with httpx.Client(
            base_url=f"http://127.0.0.1:{server.port}", headers={"authorization": f"Bearer {KEY}"}
        ) as client:
            yield client
    finally:
        server.close()


def error_of(answer: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return error


def test_prefixes_are_listed_page_by_page(api: httpx.Client, store: Store) -> None:
    lasts = set()
    for i in range(25):
        blocks = chain(f"{i}", 2)
        store.store(blocks)
        lasts.add(blocks[-1].hex())
    page = api.get("/v1/cache/prefixes").json()
    assert (page["object"], len(page["data"]), page["has_more"]) == ("list", 20, True)
    assert (page["deleting"], page["unreachable"]) == ([], [])
    rest = api.get("/v1/cache/prefixes", params={"after": page["next"], "limit": 100}).json()
    assert (len(rest["data"]), rest["has_more"], rest["next"]) == (5, False, None)
    assert {prefix["last"] for prefix in page["data"] + rest["data"]} == lasts
    prefix = page["data"][0]
    assert prefix.pop("idle_s") >= 0
    assert prefix == {
        "object": "cache.prefix",
        "server": "here",
        "first": chain("24", 2)[0].hex(),
        "last": chain("24", 2)[1].hex(),
        "blocks": 2,
        "bytes": 200,
        "shared": None,
        "uses": 1,
        "priority": 35,
        "hint": "default",
        "owner": ALICE.hex(),
        "tenant": "alice",
        "pinned_for_s": 0,
        "leased_for_s": 0,
        "whole": True,
    }


def test_a_prefix_is_pinned_and_deleted(api: httpx.Client, store: Store) -> None:
    blocks = chain("a", 3)
    store.store(blocks)
    answer = api.post("/v1/cache/pin", json={"hashes": [blocks[-1].hex()], "ttl_s": 60})
    assert answer.status_code == 200
    assert answer.json() == {
        "object": "cache.pin",
        "server": "here",
        "blocks": 3,
        "bytes": 300,
        "pinned_bytes": 300,
        "pinned_bytes_limit": 25_000,
    }
    assert {record.priority for record in store.records().values()} == {PINNED}
    (prefix,) = api.get("/v1/cache/prefixes").json()["data"]
    assert (prefix["priority"], prefix["pinned_for_s"]) == ("pinned", 60)
    answer = api.delete(f"/v1/cache/prefixes/{blocks[1].hex()}")
    assert answer.status_code == 202
    assert answer.json() == {"object": "cache.deletion", "hash": blocks[1].hex(), "server": "here"}
    assert store.length(blocks) == 1
    assert api.get("/v1/cache/prefixes").json()["deleting"] == [blocks[1].hex()]


@pytest.mark.parametrize(
    "authorization",
    [None, "", "Bearer", "Bearer wrong", f"Basic {KEY}", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}"],
)
def test_without_a_key_nobody_learns_or_does_anything(
    api: httpx.Client, store: Store, authorization: str | None
) -> None:
    blocks = chain("a", 1)
    store.store(blocks)
    del api.headers["authorization"]
    headers = {} if authorization is None else {"authorization": authorization}
    answers = [
        api.get("/v1/cache/prefixes", headers=headers),
        api.post("/v1/cache/pin", json={"hashes": [blocks[0].hex()], "ttl_s": 60}, headers=headers),
        api.delete(f"/v1/cache/prefixes/{blocks[0].hex()}", headers=headers),
    ]
    for answer in answers:
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == "Bearer"
        assert error_of(answer)["type"] == "authentication_error"
    assert store.records()[blocks[0]].priority == 35
    assert store.length(blocks) == 1


def test_there_is_no_api_without_a_key(store: Store) -> None:
    with pytest.raises(ValueError, match="needs a key"):
        operators_app(Operators({}), [], dict)


HASH = block_hash("a").hex()


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        (b"", None, "not valid JSON"),
        (b"{", None, "not valid JSON"),
        (b"\xff\xfe", None, "JSON"),
        (b"[" * 10_000, None, ""),
        (b"[]", None, "expected `object`, got `array`"),
        (b'{"ttl_s": 1}', None, "missing required field `hashes`"),
        (b'{"hashes": ["%s"]}' % HASH.encode(), None, "missing required field `ttl_s`"),
        (b'{"hashes": [], "ttl_s": 1}', "hashes", "length >= 1"),
        (b'{"hashes": ["%s"], "ttl_s": 1}' % b'","'.join([HASH.encode()] * 65), "hashes", "length <= 64"),
        (b'{"hashes": "%s", "ttl_s": 1}' % HASH.encode(), "hashes", "expected `array`"),
        (b'{"hashes": [3], "ttl_s": 1}', "hashes[0]", "expected `str`"),
        (b'{"hashes": ["abc"], "ttl_s": 1}', "hashes[0]", "32 hexadecimal digits, got 'abc'"),
        (b'{"hashes": ["%s"], "ttl_s": -1}' % HASH.encode(), "ttl_s", ">= 0"),
        (b'{"hashes": ["%s"], "ttl_s": 1e9}' % HASH.encode(), "ttl_s", "<= 2592000"),
        (b'{"hashes": ["%s"], "ttl_s": NaN}' % HASH.encode(), None, "JSON"),
        (b'{"hashes": ["%s"], "ttl_s": 1, "priority": 101}' % HASH.encode(), "priority", "<= 100"),
        (b'{"hashes": ["%s"], "ttl_s": 1, "priority": 9.5}' % HASH.encode(), "priority", "expected `int"),
        (b'{"hashes": ["%s"], "ttl_s": 1, "prio": 1}' % HASH.encode(), None, "unknown field `prio`"),
    ],
)
def test_a_bad_body_is_a_400_that_names_the_field(
    api: httpx.Client, body: bytes, param: str | None, message: str
) -> None:
    answer = api.post("/v1/cache/pin", content=body)
    error = error_of(answer)
    assert (answer.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert message in error["message"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/v1/cache/prefixes?limit=0", "limit must be from 1 to 100, got '0'"),
        ("/v1/cache/prefixes?limit=101", "got '101'"),
        ("/v1/cache/prefixes?limit=ten", "got 'ten'"),
        ("/v1/cache/prefixes?limit=%D9%A3", "limit must be"),
        ("/v1/cache/prefixes?order=size", "'order' is no parameter; there are: after, limit"),
        ("/v1/cache/prefixes?after=", "after must be the `next` of a page before"),
        ("/v1/cache/prefixes?after=!!!", "after must be"),
        ("/v1/cache/prefixes?after=%C3%A9", "after must be"),
        ("/v1/cache/prefixes?after=" + "A" * 5000, "after must be"),
        ("/v1/cache/prefixes?after=eyJoZXJlIjpbLTEsIjAwIl19", "after must be"),  # {"here":[-1,"00"]}
        ("/v1/cache/prefixes?after=eyJ0aGVyZSI6bnVsbH0", "after must be"),  # {"there":null}
    ],
)
def test_a_bad_question_is_a_400(api: httpx.Client, path: str, message: str) -> None:
    answer = api.get(path)
    assert answer.status_code == 400
    assert message in error_of(answer)["message"]


@pytest.mark.parametrize("text", ["a", "zz" * 16, "0" * 33, "%00" * 32, "٣" * 32])
def test_a_bad_hash_is_a_400(api: httpx.Client, text: str) -> None:
    answer = api.delete(f"/v1/cache/prefixes/{text}")
    assert answer.status_code == 400
    assert error_of(answer)["param"] == "hash"


def test_what_is_not_there_is_a_404_and_another_method_a_405(api: httpx.Client) -> None:
    assert error_of(api.delete(f"/v1/cache/prefixes/{HASH}"))["message"] == f"not stored: {HASH}"
    for answer in (
        api.delete(f"/v1/cache/prefixes/{HASH}"),
        api.post("/v1/cache/pin", json={"hashes": [HASH], "ttl_s": 1}),
        api.get("/v1/cache"),
        api.get("/"),
    ):
        assert answer.status_code == 404
        error_of(answer)
    answer = api.post("/v1/cache/prefixes")
    assert answer.status_code == 405
    assert error_of(answer)["code"] == "method_not_allowed"


def test_too_large_a_body_is_a_413(api: httpx.Client) -> None:
    answer = api.post("/v1/cache/pin", content=b" " * (MAX_BODY_BYTES + 1))
    assert answer.status_code == 413
    error_of(answer)


def test_what_cannot_be_pinned_now_is_a_409(api: httpx.Client, store: Store) -> None:
    blocks = chain("a", 30)
    store.store(blocks, size=1000)
    answer = api.post("/v1/cache/pin", json={"hashes": [blocks[-1].hex()], "ttl_s": 60})
    assert answer.status_code == 409
    assert error_of(answer)["message"] == "30000 bytes would be pinned, 25000 may be"


def test_a_store_that_is_away_is_a_503_and_a_list_without_it(
    api: httpx.Client, store: Store, up: list[bool]
) -> None:
    up[0] = False
    answer = api.delete(f"/v1/cache/prefixes/{HASH}")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert error_of(answer)["type"] == "server_error"
    assert api.get("/v1/cache/prefixes").json()["unreachable"] == ["here"]


def test_a_bug_is_a_500_that_tells_nothing(
    api: httpx.Client, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Operators, "delete", lambda self, block: 1 / 0)
    answer = api.delete(f"/v1/cache/prefixes/{HASH}")
    assert answer.status_code == 500
    assert "division" not in error_of(answer)["message"]
