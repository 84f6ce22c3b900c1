"""The workers of the fleet as this router sees them: connections, models, and what each holds and does."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Literal

from services.fleet import Address, Fleet
from services.router.admission import AdmissionQueue
from services.router.api.errors import invalid, unavailable
from services.router.index import PrefixIndex
from services.router.job import Job
from services.router.load import WorkerLoad
from services.router.pulse import Pulse
from services.router.rates import Rates
from services.router.text import ModelText
from services.wire.channel import WorkerChannel, WorkerUnavailable
from services.wire.messages import Events, Hello, ModelCard, Snapshot, Stats

log = logging.getLogger(__name__)

State = Literal["connecting", "starting", "ready", "stalled", "draining"]
STATES: tuple[State, ...] = ("connecting", "starting", "ready", "stalled", "draining")

#: The index keeps so many blocks of a worker for each of its GPU pages: room for its host tier and for
#: guesses. Too many cost memory, too few cost hits.
INDEX_BLOCKS_PER_PAGE = 8
LEAST_INDEX_BLOCKS = 65_536

_UNFIT = re.compile(r"[^\w.:/-]", re.ASCII)

#: Pause before a fleet that failed is asked again.
FLEET_PAUSE_S = 1.0


class ServedModel:
    """One model and the workers that serve it. It stays known when the last of them leaves."""

    def __init__(self, card: ModelCard, block_size: int, text: ModelText, max_queue: int) -> None:
        self.name = card.name
        self.card = card
        self.block_size = block_size
        self.text = text
        self.created = int(time.time())
        self.queue: AdmissionQueue[Job] = AdmissionQueue(max_queue)
        self.workers: dict[int, Worker] = {}  # ready ones, by slot

    @property
    def median_rate(self) -> float | None:
        """Of prefill, over the workers; None while there are none."""
        rates = [worker.load.rates.prefill for worker in self.workers.values()]
        return median(rates) if rates else None


class Worker:
    """One address of the fleet, the channel to it and what is known of the worker behind it.

    Goes from `connecting` through `starting` (its tokenizer is on its way) to `ready`, is `stalled` while it
    does not get on, perhaps `draining`, and `connecting` again when the connection is lost. `slot` is its
    number in the index.
    """

    hello: Hello  # not while `connecting`
    pulse: Pulse
    model: ServedModel  # these two once it has been `ready`
    load: WorkerLoad

    def __init__(self, slot: int, address: Address, pool: WorkerPool) -> None:
        self.slot = slot
        self.address = address
        self.state: State = "connecting"
        self.channel = WorkerChannel(
            address.host, address.port, secret=pool.secret, router_id=pool.router_id, listener=self
        )
        self.task = asyncio.create_task(self.channel.run(), name=f"channel {address}")
        self._pool = pool
        self._starting: asyncio.Task[None] | None = None
        self._unusable = ""
        self._retired = False

    @property
    def name(self) -> str:
        """What it calls itself, fit for headers and labels."""
        if self.state == "connecting":
            return str(self.address)
        return _UNFIT.sub("_", self.hello.worker_id[:100])

    @property
    def problem(self) -> str:
        """Why it is not ready; empty when it is, or about to be."""
        if self.state == "connecting":
            return self.channel.last_error
        return self._unusable if self.state == "starting" else ""

    # ---- WorkerListener --------------------------------------------------------------------------

    def connected(self, hello: Hello) -> None:
        self.hello = hello
        self.pulse = Pulse(hello)
        self.state = "starting"
        self._unusable = ""
        self._pool.index.join(self.slot, max(LEAST_INDEX_BLOCKS, INDEX_BLOCKS_PER_PAGE * hello.gpu_blocks))
        self._starting = asyncio.create_task(self._start(hello), name=f"text of {self.address}")

    def lost(self, reason: str) -> None:
        log.info("worker %s is lost: %s", self.name, reason)
        self._leave("connecting")
        self._pool.index.leave(self.slot)
        self.rest()

    def snapshot(self, snapshot: Snapshot) -> None:
        self._pool.index.apply_snapshot(self.slot, snapshot)

    def events(self, events: Events) -> None:
        self._pool.index.apply_events(self.slot, events)

    def stats(self, stats: Stats) -> None:
        gets_on = self.pulse.reported(stats)
        if self.state == "stalled" and gets_on:
            log.info("worker %s gets on again", self.name)
            self._join()
        if self.state == "ready":
            self.load.reported(stats, time.monotonic())
            self._pool.on_room(self.model)

    def draining(self, reason: str = "") -> None:
        if self.state in ("starting", "ready", "stalled"):
            log.info("worker %s drains%s", self.name, f": {reason}" if reason else "")
            served = self.state != "starting"
            self._leave("draining")
            if served:
                self._pool.on_drain(self)

    # ---- stalling ----------------------------------------------------------------------------------

    def stalled(self, silent_s: float) -> None:
        """It does not get on: no requests until it does."""
        if self.state == "ready":
            log.warning("worker %s has stalled: silent for %.1f s", self.name, silent_s)
            self._leave("stalled")

    # ---- leaving ---------------------------------------------------------------------------------

    def retire(self) -> None:
        """The fleet has no such address any more: close the channel once nothing runs on it."""
        self.draining("the fleet has taken it away")
        self._retired = True
        self.rest()

    def rest(self) -> None:
        """A request has left the worker."""
        if self._retired and not self.channel.live_requests:
            self.task.cancel()

    def _leave(self, state: State) -> None:
        """Take no new requests."""
        if self._starting:
            self._starting.cancel()
        if self.state == "ready":
            del self.model.workers[self.slot]
        self.state = state

    # ---- becoming ready --------------------------------------------------------------------------

    async def _start(self, hello: Hello) -> None:
        try:
            self.model = await self._pool.serve(self)
        except (WorkerUnavailable, ValueError) as error:
            self._unusable = str(error)
            log.warning("worker %s cannot be used: %s", self.name, error)
            return
        self.load = WorkerLoad(hello, Rates(hello, self.model.median_rate))
        if self.address.terminating:
            self.state = "draining"
            return
        log.info("worker %s serves %s", self.name, self.model.name)
        self._join()
        self._pool.on_room(self.model)

    def _join(self) -> None:
        self.state = "ready"
        self.model.workers[self.slot] = self


class WorkerPool:
    """Follows the fleet: one channel an address, one `ServedModel` a model name."""

    def __init__(
        self,
        fleet: Fleet,
        index: PrefixIndex,
        *,
        secret: bytes,
        router_id: str,
        max_queue: int,
        on_room: Callable[[ServedModel], None],
        on_drain: Callable[[Worker], None],
    ) -> None:
        """`on_room` is called whenever a model's workers may have become able to take more, `on_drain` when
        one that has served takes no new requests any more."""
        self.index = index
        self.secret = secret
        self.router_id = router_id
        self.on_room = on_room
        self.on_drain = on_drain
        self.workers: dict[tuple[str, int], Worker] = {}
        self.models: dict[str, ServedModel] = {}
        self._retiring: set[Worker] = set()
        self._fleet = fleet
        self._max_queue = max_queue
        self._names: dict[str, str] = {}  # names and aliases to the name of the model
        self._texts: dict[bytes, asyncio.Future[ModelText]] = {}  # by text digest

    async def run(self) -> None:
        """Keep up with the fleet until cancelled."""
        try:
            while True:
                try:
                    await self._fleet.run(self._follow)
                except Exception:
                    log.exception("the fleet failed; the workers known so far stay")
                await asyncio.sleep(FLEET_PAUSE_S)
        finally:
            tasks = [worker.task for worker in (*self.workers.values(), *self._retiring)]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def find(self, name: str) -> ServedModel | None:
        """The model of that name or alias."""
        return self.models.get(self._names.get(name, ""))

    def wanted(self, name: str) -> ServedModel:
        """The model of that name or alias. Raises ApiError: 404, or 503 while none has been ready."""
        model = self.find(name)
        if model is not None:
            return model
        if not self.models:
            raise unavailable("no worker has become ready yet", "no_worker")
        raise invalid(
            f"model: {name[:100]!r} is not served here; GET /v1/models lists what is",
            "model",
            "model_not_found",
            status=404,
        )

    @property
    def ready(self) -> int:
        """Workers that can be given requests."""
        return sum(worker.state == "ready" for worker in self.workers.values())

    async def serve(self, worker: Worker) -> ServedModel:
        """The model that a connected worker serves, with its text side. Raises WorkerUnavailable, or
        ValueError when its tokenizer or template cannot be used."""
        hello = worker.hello
        card = hello.model
        text = await self._text(worker, card)
        model = self.models.get(card.name)
        if model is None:
            model = self.models[card.name] = ServedModel(card, hello.block_size, text, self._max_queue)
        elif model.card != card:  # an update: new requests follow the newest worker
            model.card, model.block_size, model.text = card, hello.block_size, text
        for name in (card.name, *card.aliases):
            self._names[name] = card.name
        return model

    async def _text(self, worker: Worker, card: ModelCard) -> ModelText:
        """Asked for once for all workers with the same text digest; again where that worker was lost."""
        digest = card.text_digest
        while True:
            mine = digest not in self._texts
            if mine:
                self._texts[digest] = asyncio.ensure_future(self._fetch_text(worker, card.vocab_size))
            text = self._texts[digest]
            try:
                return await asyncio.shield(text)
            except (WorkerUnavailable, ValueError):
                if self._texts.get(digest) is text:
                    del self._texts[digest]
                if mine:
                    raise

    async def _fetch_text(self, worker: Worker, vocab_size: int) -> ModelText:
        assets = await worker.channel.text_assets()
        return await asyncio.to_thread(ModelText, assets, vocab_size)

    def _follow(self, addresses: frozenset[Address]) -> None:
        wanted = {(address.host, address.port): address for address in addresses}
        for place, address in wanted.items():
            worker = self.workers.get(place)
            if worker is None:
                self.workers[place] = Worker(self._free_slot(), address, self)
            else:
                worker.address = address
                if address.terminating:
                    worker.draining("the fleet takes it away")
        for place in self.workers.keys() - wanted.keys():
            worker = self.workers.pop(place)
            self._retiring.add(worker)
            worker.task.add_done_callback(partial(self._retired, worker))
            worker.retire()

    def _retired(self, worker: Worker, _: asyncio.Task[None]) -> None:
        self._retiring.discard(worker)

    def _free_slot(self) -> int:
        used = {worker.slot for worker in (*self.workers.values(), *self._retiring)}
        return next(slot for slot in range(len(used) + 1) if slot not in used)
