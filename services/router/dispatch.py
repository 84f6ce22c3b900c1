"""Requests to workers and their steps back: admission, routing, retries, and the accounts of all three.

Everything here runs to completion in the event loop. A job is in exactly one place at a time: in its model's
queue, on a worker (then it is in that worker's ledger), or gone.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial

from services.router.admission import QueueFull
from services.router.api.errors import ApiError, failed, invalid, unavailable
from services.router.api.sampling import for_choice
from services.router.config import RouterConfig
from services.router.index import Hit, PrefixIndex
from services.router.job import Job
from services.router.metrics import RouterMetrics
from services.router.retry import MAX_TRIES, RetryBudget
from services.router.routing import Policy, Route, RouteRequest
from services.router.workers import ServedModel, Worker
from services.wire.channel import WorkerUnavailable
from services.wire.hashes import join_hashes
from services.wire.messages import Finish, Start, StepItem

log = logging.getLogger(__name__)

#: A worker's events confirm what it was sent to hold within this time after its first token.
CONFIRM_S = 2.0


class Dispatcher:
    """Gives jobs to workers."""

    def __init__(
        self,
        config: RouterConfig,
        policy: Policy,
        index: PrefixIndex,
        metrics: RouterMetrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.on_workers: dict[int, Job] = {}  # by job number
        self._config = config
        self._policy = policy
        self._index = index
        self._metrics = metrics
        self._clock = clock
        self._retries = RetryBudget()
        self._closed = ""  # why nothing is taken any more

    # ---- for those who serve clients -------------------------------------------------------------

    def submit(self, job: Job) -> None:
        """Send the job to a worker, or queue it. Raises ApiError: 429 when the queue is full, 503 when the
        model has no worker. Whoever submits must `release`."""
        model = job.model
        if self._closed:
            raise unavailable(self._closed, "shutting_down")
        if not model.workers:
            raise unavailable(f"no worker of model {model.name} is ready", "no_worker")
        self._retries.earn()
        if model.queue.first is None and self._send(job):
            return
        try:
            model.queue.admit(job, self._clock())
        except QueueFull as full:
            self._metrics.shed.labels(model.name).inc()
            raise ApiError(
                429,
                f"model {model.name} is busy: {full}; try again in {full.retry_after_s} s",
                type="rate_limit_error",
                code="queue_full",
                retry_after_s=full.retry_after_s,
            ) from None

    def release(self, job: Job) -> None:
        """Whoever waited for the job does so no more: free whatever it holds. Idempotent."""
        job.model.queue.remove(job)
        self._leave_worker(job)
        job.items.clear()

    def stop_choice(self, job: Job, choice: int) -> None:
        """One of the answers is complete: the worker need not go on with it. Idempotent."""
        request = job.requests.pop(choice, None)
        if request is not None and job.worker is not None:
            job.worker.channel.cancel(request)
            if not job.requests:
                self._leave_worker(job, served=True)

    def close(self, models: Iterable[ServedModel], reason: str) -> None:
        """End every job with an error and take no more."""
        self._closed = reason
        for model in models:
            while job := model.queue.first:
                model.queue.remove(job)
                job.fail(unavailable(reason, "shutting_down"))
        for job in list(self.on_workers.values()):
            self._leave_worker(job)
            job.fail(unavailable(reason, "shutting_down"))

    # ---- for the workers' side -------------------------------------------------------------------

    def pump(self, model: ServedModel) -> None:
        """Send what waits for as long as there is room."""
        while (job := model.queue.first) is not None and self._send(job):
            pass

    def sweep(self, models: Iterable[ServedModel]) -> None:
        """End what has waited too long. Call it about once a second."""
        now_s = self._clock()
        self._index.expire(now_s)
        for model in models:
            for job in model.queue.overdue(now_s - self._config.queue_timeout_s):
                model.queue.remove(job)
                waited = f"no worker of model {model.name} had room within {self._config.queue_timeout_s:g} s"
                job.fail(unavailable(waited, "queue_timeout", model.queue.retry_after_s()))
        for job in list(self.on_workers.values()):
            if job.heard_s < now_s - self._config.stall_timeout_s:
                silent = f"silent about the request for {self._config.stall_timeout_s:g} s"
                self._broken(job, Finish("error", message=f"worker {job.worker_name}: {silent}"))

    # ---- sending ---------------------------------------------------------------------------------

    def _send(self, job: Job) -> bool:
        """Choose a worker and submit. False when none has room; True also when the job failed."""
        model = job.model
        same_tokens = [
            worker for worker in model.workers.values() if worker.hello.model.text_digest == job.text_digest
        ]
        if model.workers and not same_tokens:
            model.queue.remove(job)
            job.fail(
                unavailable(f"model {model.name} was replaced by one with another tokenizer", "replaced")
            )
            return True
        room = [worker for worker in same_tokens if worker.load.has_room(job.choices)]
        room = [worker for worker in room if worker.slot not in job.avoid] or room
        while room:
            route = self._choose(job, room)
            worker = model.workers[route.worker]
            try:
                self._submit(job, worker)
            except WorkerUnavailable as error:
                log.warning("%s", error)
                room.remove(worker)
                continue
            self._sent(job, worker, route)
            return True
        return False

    def _choose(self, job: Job, room: list[Worker]) -> Route:
        started_s = time.perf_counter()
        model = job.model
        hits: dict[int, Hit] = {}
        alike: dict[tuple[bytes, int], list[int]] = defaultdict(list)
        for worker in room:
            alike[worker.hello.model.fingerprint, worker.hello.block_size].append(worker.slot)
        for (fingerprint, block_size), slots in alike.items():
            hits |= self._index.match(job.prompt.hashes(fingerprint, block_size), slots)
        route = self._policy.choose(
            RouteRequest(len(job.prompt.tokens), job.sampling.max_tokens, job.choices, hits),
            {slot: worker.load for slot, worker in model.workers.items()},
            [worker.slot for worker in room],
            model.queue.wait_s,
        )
        self._metrics.decision.observe(time.perf_counter() - started_s)
        return route

    def _submit(self, job: Job, worker: Worker) -> None:
        """One request on the channel for each answer. Raises WorkerUnavailable, having sent none."""
        card = worker.hello.model
        hashes = join_hashes(job.prompt.hashes(card.fingerprint, worker.hello.block_size))
        root = job.prompt.root(card.fingerprint)
        try:
            for choice in range(job.choices):
                job.requests[choice] = worker.channel.submit(
                    partial(self._item, job, choice),
                    tokens=job.prompt.packed,
                    root=root,
                    hashes=hashes,
                    sampling=for_choice(job.sampling, choice),
                    retention=job.prompt.retention,
                    priority=job.priority,
                    tenant=job.tenant,
                    trace_id=job.trace_id,
                )
        except WorkerUnavailable:
            for request in job.requests.values():
                worker.channel.cancel(request)
            job.requests.clear()
            raise

    def _sent(self, job: Job, worker: Worker, route: Route) -> None:
        now_s = self._clock()
        model = job.model
        if job is model.queue.first:
            model.queue.depart(job, now_s)
        job.worker, job.worker_name, job.route = worker, worker.name, route
        job.sent_s = job.heard_s = now_s
        job.tries += 1
        self.on_workers[job.number] = job
        worker.load.sent(job.number, route.prediction.work, now_s)
        self._guess(job, worker, now_s + route.prediction.ttft_s)
        self._metrics.routes.labels(route.reason).inc()
        self._metrics.queued.labels(model.name).observe(now_s - job.arrival_s)

    def _guess(self, job: Job, worker: Worker, there_s: float) -> None:
        hashes = job.prompt.hashes(worker.hello.model.fingerprint, worker.hello.block_size)
        self._index.guess(worker.slot, hashes, there_s + CONFIRM_S)

    # ---- hearing ---------------------------------------------------------------------------------

    def _item(self, job: Job, choice: int, item: StepItem) -> None:
        """The sink of every request: what a step did for it."""
        job.heard_s = self._clock()
        if item.finish is not None:
            del job.requests[choice]
            if item.finish.reason in ("error", "cancelled"):
                self._broken(job, item.finish)
                return
        if item.start is not None and job.start is None:
            self._started(job, item.start)
        job.output_tokens += len(item.tokens)
        job.items.append((choice, item))
        job.wake.set()
        if len(job.items) > self._config.max_pending_tokens:
            self._leave_worker(job)
            job.fail(failed(f"the client is {len(job.items)} tokens behind", "client_too_slow"))
        elif not job.requests:
            self._leave_worker(job, served=True)

    def _started(self, job: Job, start: Start) -> None:
        """Compare with the prediction and learn from it."""
        assert job.worker is not None
        assert job.route is not None
        job.start = start
        worker, prediction, metrics, name = job.worker, job.route.prediction, self._metrics, job.model.name
        worker.load.started(job.number)
        if not start.store_tokens:  # a load's time says nothing of computing
            uncached = start.prompt_tokens - start.gpu_tokens - start.host_tokens
            rates = worker.load.rates
            rates.learn_prefill(uncached, start.prefill_s, job.model.median_rate or rates.prefill)
        self._correct(job, worker, start)
        ttft_s = job.heard_s - job.sent_s
        metrics.predicted_ttft.labels(name).observe(prediction.ttft_s)
        metrics.ttft_error.labels(name).observe(ttft_s - prediction.ttft_s)
        metrics.ttft.labels(name).observe(job.heard_s - job.arrival_s)
        metrics.prompt_tokens.labels(name).inc(start.prompt_tokens)
        for tier, tokens in (
            ("gpu", start.gpu_tokens),
            ("host", start.host_tokens),
            ("store", start.store_tokens),
        ):
            metrics.hit_tokens.labels(name, tier).inc(tokens)
        metrics.predicted_hit_tokens.labels(name, "gpu").inc(prediction.local_tokens)
        metrics.predicted_hit_tokens.labels(name, "store").inc(prediction.store_tokens)

    def _correct(self, job: Job, worker: Worker, start: Start) -> None:
        """Set the index right: the prompt's blocks are all there now, and those that were to come from the
        store and did not are not in it."""
        assert job.route is not None
        prediction = job.route.prediction
        self._guess(job, worker, job.heard_s)
        found = start.gpu_tokens + start.host_tokens + start.store_tokens
        expected = prediction.local_tokens + prediction.store_tokens
        if prediction.store_tokens and found < expected:
            size = worker.hello.block_size
            hashes = job.prompt.hashes(worker.hello.model.fingerprint, size)
            first = max(found, prediction.local_tokens) // size
            self._index.not_in_store(hashes[first : expected // size])

    def _broken(self, job: Job, finish: Finish) -> None:
        """The worker will not finish the job: try another, or tell the client."""
        worker = job.worker
        assert worker is not None
        self._leave_worker(job)
        if finish.error_kind == "invalid_request":
            job.fail(invalid(finish.message))
            return
        if finish.error_kind == "draining":
            worker.draining(finish.message)
        if job.start is None and self._may_retry(job, finish):
            self._metrics.retries.labels(finish.error_kind).inc()
            job.avoid.add(worker.slot)
            job.model.queue.put_back(job, self._clock())
            self.pump(job.model)
        elif finish.error_kind == "internal":
            job.fail(failed(f"worker {job.worker_name} failed: {finish.message}"))
        else:
            job.fail(unavailable(finish.message, finish.error_kind))

    def _may_retry(self, job: Job, finish: Finish) -> bool:
        if finish.error_kind == "draining":  # it has not done anything yet
            job.tries -= 1
            return True
        return job.tries < MAX_TRIES and self._retries.spend()

    def _leave_worker(self, job: Job, served: bool = False) -> None:
        """Take the job off its worker and out of the accounts. Idempotent."""
        worker = job.worker
        if worker is None:
            return
        job.worker = None
        for request in job.requests.values():
            worker.channel.cancel(request)
        job.requests.clear()
        del self.on_workers[job.number]
        output_tokens = job.output_tokens // job.choices if served else None
        worker.load.ended(job.number, self._clock(), output_tokens)
        worker.rest()
        self.pump(job.model)
