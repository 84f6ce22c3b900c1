"""One router: the ASGI application and everything behind it."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Iterable, MutableMapping
from random import Random
from typing import Any

from prometheus_client.core import Metric

from services.fleet import Fleet
from services.router.body import Receive
from services.router.cold import make_cold_app
from services.router.config import RouterConfig
from services.router.dispatch import Dispatcher
from services.router.generate import ENDPOINTS, Generate
from services.router.index import PrefixIndex
from services.router.metrics import RouterMetrics, gauge
from services.router.prompt import PromptBuilder
from services.router.relay import Send
from services.router.routing import Policy, PredictedSeconds
from services.router.tenants import Tenants
from services.router.workers import STATES, ServedModel, WorkerPool

#: How often waiting times are looked at and guesses of the index expire.
SWEEP_S = 0.5


class Router:
    """Serves the OpenAI API over a fleet of workers.

    async with Router(config, fleet) as router:   # an ASGI application while the block lasts
        await uvicorn.Server(uvicorn.Config(router, …)).serve()
    """

    def __init__(self, config: RouterConfig, fleet: Fleet, policy: Policy | None = None) -> None:
        self.metrics = RouterMetrics()
        self.metrics.watch(self._gauges)
        self.index = PrefixIndex()
        self.dispatcher = Dispatcher(config, policy or PredictedSeconds(Random()), self.index, self.metrics)
        self.pool = WorkerPool(
            fleet,
            self.index,
            secret=config.channel_secret,
            router_id=uuid.uuid4().hex,
            max_queue=config.max_queue,
            on_room=self.dispatcher.pump,
            on_drain=self.dispatcher.drain,
        )
        salt_secret = config.channel_secret if config.salt_secret is None else config.salt_secret
        tenants = Tenants(salt_secret, config.api_keys)
        self._prompts = PromptBuilder()
        self._generate = Generate(config, tenants, self.pool, self.dispatcher, self.metrics, self._prompts)
        self._cold = make_cold_app(config, self.pool, tenants, self.metrics, self._prompts)
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Router:
        self._tasks = [asyncio.create_task(self.pool.run()), asyncio.create_task(self._sweep())]
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.abort("the router is shutting down")
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._prompts.close()

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] in ENDPOINTS:
            await self._generate.serve(scope, receive, send)
        else:
            await self._cold(scope, receive, send)

    def abort(self, reason: str) -> None:
        """End every request with an error now, and refuse those to come."""
        self.dispatcher.close(self.pool.models.values(), reason)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            self.dispatcher.sweep(self.pool.models.values())

    def _gauges(self) -> Iterable[Metric]:
        states = [worker.state for worker in self.pool.workers.values()]
        models = self.pool.models.values()
        yield gauge(
            "workers", "Workers of the fleet by state",
            {(state,): states.count(state) for state in STATES}, "state",
        )  # fmt: skip
        yield gauge(
            "queue_length", "Requests that wait for a worker",
            {(model.name,): len(model.queue) for model in models}, "model",
        )  # fmt: skip
        yield gauge(
            "requests_on_workers", "Requests that this router has on a worker",
            {(worker.name,): worker.load.requests for model in models for worker in model.workers.values()},
            "worker",
        )  # fmt: skip
        yield gauge(
            "predicted_wait_seconds", "Time that a request arriving now would wait before its own prefill",
            {(model.name,): _predicted_wait_s(model) for model in models if model.workers}, "model",
        )  # fmt: skip
        yield gauge(
            "index_blocks", "Distinct blocks in the prefix index",
            {("local",): self.index.local_blocks, ("store",): self.index.store_blocks}, "tier",
        )  # fmt: skip


def _predicted_wait_s(model: ServedModel) -> float:
    return model.queue.wait_s + min(worker.load.queued_s for worker in model.workers.values())
