"""A whole worker in a running event loop: model, engine, channel and probes, put up and taken down.

`python -m services.worker` wraps this in a process of its own, the Ray Serve deployment in a replica.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec
import torch
from prometheus_client import CollectorRegistry, ProcessCollector

from kernels.kv_payload import Codec
from services.wire.channel_server import bind
from services.wire.messages import Hello, Stats
from services.worker.collectors import EngineCollector, TierCollector
from services.worker.config import EngineConfig
from services.worker.engine import Engine
from services.worker.load import LoadedModel, load_model
from services.worker.probes import ProbeServer
from services.worker.server import WorkerServer
from services.worker.tiers import StoreTier

if TYPE_CHECKING:
    from services.worker.store_tier import RedisStoreTier

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WorkerConfig:
    """Everything a worker is told. Port 0 means any free one."""

    model: str  # a .gguf file or a Hugging Face folder
    name: str  # this worker's id in routes, logs and metrics; unique in the fleet
    host: str = "127.0.0.1"
    port: int = 0
    metrics_port: int = 0
    secret: bytes = b""  # shared with the routers
    engine: EngineConfig = field(default_factory=EngineConfig)
    device: str = "cpu"
    dtype: str | None = None  # see load_model
    threads: int | None = None  # of PyTorch on the CPU; None leaves it to PyTorch
    redis_url: str | None = None  # the shared store's, or several; None = no cache but this worker's memory
    store_bytes: int | None = None  # capacity of the whole store, set where none is set yet


class Worker:
    """One worker, from `start` to `stop`; not to be started again.

    `port` and `metrics_port` are the true ones once `start` is under way.
    """

    def __init__(self, config: WorkerConfig) -> None:
        self.config = config
        self.port = config.port
        self.metrics_port = config.metrics_port
        self._registry = CollectorRegistry()
        self._resources = AsyncExitStack()
        self._server: WorkerServer | None = None  # once routers are let in
        self._draining = False

    async def start(self) -> None:
        """Take the ports, load the model, warm the engine up, let routers in.

        Raises OSError for a port that cannot be had, ValueError for a model or setting that cannot be served;
        nothing is left behind then.
        """
        try:
            await self._start()
        except BaseException:
            await self.stop()
            raise

    async def _start(self) -> None:
        config = self.config
        probes = ProbeServer(
            config.host,
            config.metrics_port,
            self._registry,
            {"/health": self.trouble, "/ready": self._unready},
        )
        self._resources.callback(probes.stop)
        self.metrics_port = probes.port
        sock = bind(config.host, config.port, config.secret)
        self._resources.callback(sock.close)
        self.port = sock.getsockname()[1]

        if config.threads:
            torch.set_num_threads(config.threads)
        model = await asyncio.to_thread(load_model, config.model, device=config.device, dtype=config.dtype)
        log.info("loaded %s", model.name)
        store = self._open_store(model)
        engine = await asyncio.to_thread(_engine, model, config.engine, store)
        await asyncio.to_thread(_warm_up, engine)
        rates = engine.stats()
        log.info(
            "warm: %d blocks of %d tokens, prefill %.0f tokens/s, decode step %.1f ms",
            engine.pages,
            config.engine.block_size,
            rates.prefill_tokens_per_s,
            rates.decode_step_s * 1e3,
        )
        if memory := engine.memory():
            parts = ", ".join(f"{part} {size / 2**30:.2f}" for part, size in memory.parts().items())
            log.info("GPU memory of %.2f GiB: %s", memory.total / 2**30, parts)

        hello = Hello(
            worker_id=config.name,
            epoch=time.time_ns(),
            proof=b"",
            model=msgspec.structs.replace(model.card, max_model_len=engine.max_model_len),
            block_size=config.engine.block_size,
            gpu_blocks=engine.pages,
            max_running=config.engine.max_running,
            prefill_tokens_per_s=rates.prefill_tokens_per_s,
            decode_step_s=rates.decode_step_s,
            max_step_tokens=config.engine.max_step_tokens,
        )
        server = WorkerServer(engine, hello, model.text, config.secret, self._registry)
        labels = server.labelled.labels
        self._registry.register(EngineCollector(engine.counters, engine.memory, labels))
        if store is not None:
            text = "What this worker did with the store: loads, written:stored, quarantined:…, errors, …"
            self._registry.register(TierCollector("reprise_store_tier", text, store.counts, labels))
        if config.engine.host_bytes:
            text = (
                "What this worker did with its host memory: blocks kept, evicted, loaded, given to the store"
            )
            self._registry.register(TierCollector("reprise_host_tier", text, engine.host_counts, labels))
        ProcessCollector(registry=self._registry)
        self._resources.push_async_callback(server.stop)
        await server.start(sock)
        self._server = server

    def _open_store(self, model: LoadedModel) -> RedisStoreTier | None:
        """Returns at once; a store that cannot be reached is tried again while the worker serves without."""
        config = self.config
        if config.redis_url is None:
            return None
        # Here and not above: a machine that serves without a store needs no redis package.
        from services.worker.store_tier import RedisStoreTier, StoreTierConfig

        spec = model.spec
        store = RedisStoreTier(
            StoreTierConfig(
                url=config.redis_url,
                fingerprint=model.fingerprint,
                block_shape=(spec.layers, 2, spec.kv_heads, config.engine.block_size, spec.head_dim),
                dtype=model.kv_dtype,
                capacity=config.store_bytes,
                pinned=config.device.startswith("cuda"),
                codec=Codec(config.engine.store_codec),
            )
        )
        self._resources.callback(store.close)
        return store

    def trouble(self) -> str:
        """Why this worker is not healthy, empty if it is or is still starting. Callable from any thread."""
        return self._server.trouble() if self._server else ""

    def stats(self) -> Stats | None:
        """The load, for whoever scales the fleet; None until the worker is ready."""
        return self._server.engine.stats() if self._server else None

    async def wait_failed(self) -> None:
        """Returns when the engine has died: the process should be replaced. Call after `start`."""
        if self._server:
            await self._server.failed.wait()

    async def drain(self, timeout_s: float) -> bool:
        """Refuse new requests and let the running ones finish. False when `timeout_s` was not enough."""
        self._draining = True
        return await self._server.drain(timeout_s) if self._server else True

    async def stop(self) -> None:
        """End everything that `start` put up; requests still running are lost."""
        await self._resources.aclose()

    def _unready(self) -> str:
        if self._server is None:
            return "starting"
        return "draining" if self._draining else self.trouble()


def _engine(model: LoadedModel, config: EngineConfig, store: StoreTier | None) -> Engine:
    """Allocates the KV memory. Raises ValueError when there is not so much."""
    try:
        return Engine(model, config, store)
    except (MemoryError, RuntimeError) as error:  # PyTorch's CPU allocator raises a plain RuntimeError
        reason = str(error).splitlines()[0]
        wanted = "the KV memory" if config.kv_bytes is None else f"kv_bytes of {config.kv_bytes}"
        raise ValueError(f"{wanted} cannot be allocated: {reason}") from error


def _warm_up(engine: Engine) -> None:
    """Raises ValueError when a GPU has too little memory left for it."""
    try:
        engine.warm_up()
    except torch.OutOfMemoryError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"warm-up needs more memory, lower gpu_memory or max_running: {reason}") from error
