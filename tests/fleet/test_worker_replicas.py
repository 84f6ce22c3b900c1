"""True workers as a Serve deployment, found by a fleet and spoken to over the token channel."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from ray import serve

from services.fleet.base import Address
from services.fleet.ray_serve import RayServeFleet
from services.wire.channel import WorkerChannel
from services.wire.hashes import pack_tokens, root_hash
from services.wire.messages import SamplingParams, StepItem
from services.worker import deployment
from tests.fakes.checkpoint import write_tiny_checkpoint
from tests.fakes.until import until
from tests.fleet.conftest import CHANNEL_SECRET
from tests.wire.peers import Listener

pytestmark = [pytest.mark.slow]

DEADLINE_S = 60
STREAMS, TOKENS = 8, 900


def args(model: Path, max_running: int = STREAMS) -> deployment.AppArgs:
    engine = {"max_running": max_running, "kv_bytes": 64 << 20}
    return deployment.AppArgs(replicas=2, worker={"model": str(model), "engine": engine})


async def deploy(args: deployment.AppArgs) -> None:
    await asyncio.to_thread(serve.run, deployment.app(args), name="workers", route_prefix=None)


class Fleet:
    """The addresses of the workers, kept up to date."""

    def __init__(self) -> None:
        self.addresses: frozenset[Address] = frozenset()

    def changed(self, addresses: frozenset[Address]) -> None:
        self.addresses = addresses


@pytest.fixture
async def fleet(ray_address: str) -> AsyncIterator[Fleet]:
    fleet = Fleet()
    task = asyncio.create_task(RayServeFleet("workers", deployment.DEPLOYMENT).run(fleet.changed))
    yield fleet
    task.cancel()
    await asyncio.to_thread(serve.delete, "workers")


class Client:
    """A router's view of one worker, with streams on it."""

    def __init__(self, address: Address) -> None:
        self.heard = Listener()
        self.streams: list[list[StepItem]] = []
        self.channel = WorkerChannel(
            address.host, address.port, secret=CHANNEL_SECRET, router_id="test", listener=self.heard
        )
        self.task = asyncio.create_task(self.channel.run())

    async def start_streams(self) -> None:
        """All of them have their first token when this returns."""
        await until(lambda: self.channel.hello, DEADLINE_S)
        root = root_hash(self.channel.hello.model.fingerprint)
        for number in range(STREAMS):
            items: list[StepItem] = []
            sampling = SamplingParams(max_tokens=TOKENS, ignore_eos=True, seed=number)
            tokens = pack_tokens([1, 2, 3, number])
            self.channel.submit(items.append, tokens=tokens, root=root, hashes=b"", sampling=sampling)
            self.streams.append(items)
        await until(lambda: all(self.streams), DEADLINE_S)

    @property
    def running(self) -> int:
        return sum(items[-1].finish is None for items in self.streams)

    @property
    def complete(self) -> list[bool]:
        return [
            items[-1].finish is not None
            and items[-1].finish.reason == "length"
            and sum(len(item.tokens) for item in items) == TOKENS
            for items in self.streams
        ]


async def test_streams_outlive_the_redeploy_of_their_workers(fleet: Fleet, tmp_path: Path) -> None:
    model = write_tiny_checkpoint(tmp_path / "tiny")
    await deploy(args(model))
    await until(lambda: len(fleet.addresses) == 2, DEADLINE_S)
    old = fleet.addresses
    clients = [Client(address) for address in old]
    for client in clients:
        await client.start_streams()
    assert {client.channel.hello.model.name for client in clients} == {"tiny"}
    assert len({client.channel.hello.worker_id for client in clients}) == 2

    redeployed = asyncio.create_task(deploy(args(model, max_running=STREAMS + 1)))
    await until(lambda: any("draining" in client.heard.what() for client in clients), DEADLINE_S)
    assert any(client.running for client in clients if "draining" in client.heard.what())
    await redeployed
    await until(lambda: len(fleet.addresses) == 2 and not fleet.addresses & old, DEADLINE_S)
    await until(lambda: not any(client.running for client in clients), DEADLINE_S)
    assert all(all(client.complete) for client in clients)
    for client in clients:
        client.task.cancel()


async def test_a_model_that_cannot_be_served_fails_the_deployment_with_the_reason(
    fleet: Fleet, tmp_path: Path
) -> None:
    with pytest.raises(RuntimeError):
        await deploy(args(tmp_path / "none"))
    status = serve.status().applications["workers"].deployments[deployment.DEPLOYMENT]
    assert f"{tmp_path}/none" in status.message.splitlines()[-1]
    assert fleet.addresses == frozenset()
