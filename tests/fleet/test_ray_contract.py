"""What we rely on in Ray Serve 2.60, on a real Ray: alpha APIs may change with any release."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
from ray import serve

from services.fleet.base import Address
from services.fleet.ray_serve import RayServeFleet
from tests.fakes.until import until
from tests.fleet.replicas import light_app, scaled

pytestmark = [pytest.mark.slow]

DEADLINE_S = 60


@pytest.fixture(scope="module")
def app(ray_address: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Two light workers; yields their directory."""
    assert ray_address.startswith("127.0.0.1:")
    directory = tmp_path_factory.mktemp("app")
    serve.start(proxy_location="Disabled")
    serve.run(light_app(directory), name="light", route_prefix=None)
    yield directory
    serve.shutdown()


class Watch:
    """Runs a fleet and remembers what it reported."""

    def __init__(self) -> None:
        self.sets: list[frozenset[Address]] = []

    @property
    def now(self) -> frozenset[Address]:
        return self.sets[-1] if self.sets else frozenset()

    async def until(self, condition: Callable[[frozenset[Address]], bool]) -> frozenset[Address]:
        await until(lambda: condition(self.now), DEADLINE_S)
        return self.now


@pytest.fixture
async def watch(app: Path) -> AsyncIterator[Watch]:
    watch = Watch()
    task = asyncio.create_task(RayServeFleet("light", "Worker").run(watch.sets.append))
    await watch.until(lambda addresses: len(addresses) == 2)
    yield watch
    task.cancel()


async def process_at(address: Address) -> int:
    reader, writer = await asyncio.open_connection(address.host, address.port)
    pid = int(await reader.read())
    writer.close()
    return pid


async def test_the_fleet_is_the_addresses_that_the_replicas_published(watch: Watch) -> None:
    pids = {await process_at(address) for address in watch.now}
    assert len(pids) == 2


@pytest.mark.filterwarnings("ignore:The `metrics_interval_s` field:DeprecationWarning")
async def test_a_fleet_may_be_there_before_its_deployment_and_sees_it_scale_on_recorded_stats(
    app: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "services.fleet.ray_serve")
    watch = Watch()
    task = asyncio.create_task(RayServeFleet("later", "Worker").run(watch.sets.append))
    await until(lambda: "no Serve deployment later/Worker yet" in caplog.text, DEADLINE_S)
    await asyncio.to_thread(
        serve.run, light_app(tmp_path, autoscaling=scaled()), name="later", route_prefix=None
    )
    await watch.until(lambda addresses: len(addresses) == 2)
    assert 1 in {len(addresses) for addresses in watch.sets}
    await asyncio.to_thread(serve.delete, "later")
    await watch.until(lambda addresses: not addresses)
    task.cancel()


async def test_a_killed_replica_leaves_the_fleet_and_its_replacement_joins(watch: Watch) -> None:
    victim, survivor = watch.now
    pid = await process_at(victim)
    os.kill(pid, signal.SIGKILL)
    await watch.until(lambda addresses: addresses == {survivor})
    after = await watch.until(lambda addresses: len(addresses) == 2)
    assert survivor in after
    assert victim not in after


async def test_a_redeploy_replaces_the_fleet_at_once_and_waits_for_what_runs(watch: Watch, app: Path) -> None:
    old = watch.now
    old_pids = {await process_at(address) for address in old}
    (app / "busy").touch()
    redeploy = asyncio.create_task(
        asyncio.to_thread(serve.run, light_app(app, version="2"), name="light", route_prefix=None)
    )
    await watch.until(lambda addresses: bool(old - addresses))
    leaving = old - watch.now
    for address in leaving:
        assert await process_at(address) in old_pids, "a replica that leaves the fleet still answers"
    (app / "busy").unlink()
    await redeploy
    await watch.until(lambda addresses: len(addresses) == 2 and not addresses & old)
    assert {int(pid) for pid in (app / "drained").read_text().split()} == old_pids
