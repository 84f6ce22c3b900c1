from __future__ import annotations

import asyncio

import pytest

from services.fleet import Address, StaticFleet


async def test_a_static_fleet_reports_its_list_once_and_stays() -> None:
    heard: list[frozenset[Address]] = []
    task = asyncio.create_task(StaticFleet("one:9101, [::1]:9102,").run(heard.append))
    await asyncio.sleep(0)
    assert heard == [frozenset({Address("one", 9101), Address("::1", 9102)})]
    assert not task.done()
    task.cancel()


@pytest.mark.parametrize("workers", ["one", "one:", ":9101", "one:0", "one:65536", "one:x"])
def test_an_address_that_is_none_is_refused_by_name(workers: str) -> None:
    with pytest.raises(ValueError, match=f"host:port, got {workers!r}"):
        StaticFleet(workers)


def test_an_empty_list_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one host:port"):
        StaticFleet(" , ")
