"""A router over fake workers behind its true HTTP server, in this process."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import httpx
from openai import AsyncOpenAI

from services.fleet import StaticFleet
from services.router.config import RouterConfig
from services.router.router import Router
from services.router.routing import Policy
from services.router.server import HttpServer
from tests.fakes import FakeEngine, FakeWorker
from tests.fakes.until import until


@dataclass
class Served:
    router: Router
    workers: list[FakeWorker]
    server: HttpServer
    port: int
    http: httpx.AsyncClient
    openai: AsyncOpenAI

    @property
    def engines(self) -> list[FakeEngine]:
        return [worker.engine for worker in self.workers]

    def sample(self, name: str, **labels: str) -> float:
        """A metric's present value; 0 where it has none."""
        return self.router.metrics.registry.get_sample_value(f"reprise_router_{name}", labels) or 0.0

    def held(self) -> str:
        """What the router still has in its books; empty when all is paid back."""
        router = self.router
        books = [f"{job.number} on a worker" for job in router.dispatcher.on_workers.values()]
        for model in router.pool.models.values():
            books += [f"{len(model.queue)} queued"] * bool(len(model.queue))
        for worker in router.pool.workers.values():
            if worker.state == "ready":
                load = worker.load
                books += [f"{worker.name}: {load.requests} {load.sequences}"] * bool(
                    load.requests or load.sequences
                )
            books += [f"{worker.name}: live"] * bool(worker.channel.live_requests)
        return "; ".join(books)

    async def paid_back(self) -> None:
        """Fail unless queue, ledgers and channels are empty soon, and the engines with them."""
        try:
            await until(lambda: not self.held())
        except AssertionError:
            raise AssertionError(self.held()) from None
        for engine in self.engines:
            if engine.healthy():
                await until(lambda engine=engine: engine.idle)


@asynccontextmanager
async def serving(
    *engines: FakeEngine, config: RouterConfig | None = None, policy: Policy | None = None
) -> AsyncIterator[Served]:
    """Serve with one worker an engine (one endless worker without), named w0, w1, …; at the end everything
    must have been paid back."""
    async with AsyncExitStack() as stack:
        workers = [
            await stack.enter_async_context(FakeWorker(engine, name=f"w{i}"))
            for i, engine in enumerate(engines or [FakeEngine()])
        ]
        fleet = StaticFleet(",".join(f"127.0.0.1:{worker.port}" for worker in workers))
        router = await stack.enter_async_context(Router(config or RouterConfig(), fleet, policy))
        sock = socket.create_server(("127.0.0.1", 0))
        port = sock.getsockname()[1]
        server = HttpServer(router, drain_timeout_s=1.0)
        task = asyncio.create_task(server.serve(sockets=[sock]))
        await until(lambda: server.started and router.pool.ready == len(workers))
        url = f"http://127.0.0.1:{port}"
        http = await stack.enter_async_context(httpx.AsyncClient(base_url=url, timeout=30))
        openai = await stack.enter_async_context(
            AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=30)
        )
        served = Served(router, workers, server, port, http, openai)
        try:
            yield served
            await served.paid_back()
        finally:
            server.should_exit = True
            await task


def chat(content: str = "hello", **fields: object) -> dict[str, object]:
    """A chat request's body."""
    return {"model": "fake", "messages": [{"role": "user", "content": content}], **fields}
