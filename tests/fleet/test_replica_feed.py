from __future__ import annotations

import pytest

from services.fleet.base import Address
from services.fleet.replica_feed import ReplicaFeed

WORKERS = ("app", "Worker")


def test_a_listener_hears_every_change_of_its_deployment_only() -> None:
    feed, heard = ReplicaFeed(), []
    feed.subscribe(WORKERS, heard.append)
    feed.publish(WORKERS, [{"host": "a", "port": 1}, {"host": "b", "port": 2}])
    feed.publish(("app", "Other"), [{"host": "c", "port": 3}])
    feed.publish(WORKERS, [])
    assert heard == [frozenset({Address("a", 1), Address("b", 2)}), frozenset()]


def test_who_comes_late_hears_what_is_known() -> None:
    feed, heard = ReplicaFeed(), []
    feed.publish(WORKERS, [{"host": "a", "port": 1}])
    feed.subscribe(WORKERS, heard.append)
    assert heard == [frozenset({Address("a", 1)})]


def test_nothing_is_heard_after_unsubscribing() -> None:
    feed, heard = ReplicaFeed(), []
    feed.subscribe(WORKERS, heard.append)
    feed.unsubscribe(WORKERS, heard.append)
    feed.publish(WORKERS, [])
    assert heard == []


def test_a_replica_without_an_address_is_left_out_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    feed, heard = ReplicaFeed(), []
    feed.subscribe(WORKERS, heard.append)
    feed.publish(WORKERS, [{"host": "a", "port": "1"}, {}, {"host": "b", "port": 2}])
    assert heard == [frozenset({Address("b", 2)})]
    assert caplog.text.count("no host and port") == 2
