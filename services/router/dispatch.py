"""Requests to workers and their steps back: admission, routing, resuming, and the accounts of all three.

Everything here runs to completion in the event loop. A job is in exactly one place at a time: in its model's
queue, on a worker (then it is in that worker's ledger), or gone.

A job whose worker dies, stalls or drains goes on on another one, from its prompt and the tokens that have
come so far: those are relayed or about to be, and nothing of the old worker is heard any more. Sampling draws
from (seed, position), so the other worker continues the same random stream.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from typing import Literal

from services.router.admission import QueueFull
from services.router.api.errors import ApiError, failed, invalid, unavailable
from services.router.api.sampling import for_choice
from services.router.config import RouterConfig
from services.router.index import Hit, PrefixIndex
from services.router.job import Beginning, Job
from services.router.metrics import RouterMetrics
from services.router.retry import Quarantine, RetryBudget
from services.router.routing import Policy, Route, RouteRequest
from services.router.workers import ServedModel, Worker
from services.wire.channel import WorkerUnavailable
from services.wire.hashes import join_hashes
from services.wire.messages import ErrorKind, Start, StepItem, Tier

log = logging.getLogger(__name__)

#: A worker's events confirm what it was sent to hold within this time after its first token.
CONFIRM_S = 2.0

#: A draining worker's answers move to one with less prefill queued than this: until then they run on where
#: they are, and nobody's gap is longer than this and its own prefill.
MOVE_QUEUE_S = 1.0

#: Why a worker does not finish a job: what it said, or that it says nothing.
Loss = ErrorKind | Literal["stalled"]


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
        self._quarantine = Quarantine()
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
        if self._quarantine.holds(job.prompt.packed, self._clock()):
            raise _quarantined("workers died while they computed this prompt")
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
        """One of the answers is complete: no worker need go on with it. Idempotent."""
        job.answers.pop(choice, None)
        request = job.requests.pop(choice, None)
        if request is not None and job.worker is not None:
            job.worker.channel.cancel(request)
        if not job.answers:
            job.model.queue.remove(job)
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

    def drain(self, worker: Worker) -> None:
        """The worker takes no new requests: what it has goes on elsewhere, as soon as that costs no wait."""
        for job in sorted(self._jobs_on(worker), key=lambda job: len(job.answers)):
            if not self._move(job):
                break

    def sweep(self, models: Iterable[ServedModel]) -> None:
        """End what has waited too long, and take jobs from workers that do not get on or are to end. Call it
        about twice a second."""
        now_s = self._clock()
        self._index.expire(now_s)
        for model in models:
            for job in model.queue.overdue(now_s - self._config.queue_timeout_s):
                model.queue.remove(job)
                waited = f"no worker of model {model.name} had room within {self._config.queue_timeout_s:g} s"
                job.fail(unavailable(waited, "queue_timeout", model.queue.retry_after_s()))
        most_s = self._config.stall_timeout_s
        for worker in {job.worker for job in self.on_workers.values() if job.worker is not None}:
            if worker.state == "draining":
                self.drain(worker)
            silent_s = worker.pulse.look(now_s)
            if silent_s > worker.pulse.limit_s(most_s):
                worker.stalled(silent_s)
                self._worker_lost(worker, "stalled", f"silent for {silent_s:.1f} s")
        for job in list(self.on_workers.values()):
            if job.heard_s < now_s - most_s:
                self._lost(job, "internal", f"silent about the request for {most_s:g} s")

    # ---- sending ---------------------------------------------------------------------------------

    def _send(self, job: Job) -> bool:
        """Choose a worker and submit. False when none has room; True also when the job failed."""
        model = job.model
        fit = [worker for worker in model.workers.values() if _fits(job, worker)]
        if model.workers and not fit:
            model.queue.remove(job)
            what = "another one" if job.began else "one with another tokenizer"
            job.fail(unavailable(f"model {model.name} was replaced by {what}", "replaced"))
            return True
        room = [worker for worker in fit if worker.load.has_room(len(job.answers))]
        room = [worker for worker in room if worker.hello.epoch not in job.avoid] or room
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
        model, answer = job.model, job.longest_answer
        hits: dict[int, Hit] = {}
        alike: dict[tuple[bytes, int], list[int]] = defaultdict(list)
        for worker in room:
            alike[worker.hello.model.fingerprint, worker.hello.block_size].append(worker.slot)
        for (fingerprint, block_size), slots in alike.items():
            _, hashes = job.prompt.with_answer(answer, fingerprint, block_size)
            hits |= self._index.match(hashes, slots)
        tokens = len(job.prompt.tokens) + sum(map(len, job.answers.values()))
        route = self._policy.choose(
            RouteRequest(tokens, job.sampling.max_tokens - len(answer), len(job.answers), hits),
            {slot: worker.load for slot, worker in model.workers.items()},
            [worker.slot for worker in room],
            model.queue.wait_s,
        )
        self._metrics.decision.observe(time.perf_counter() - started_s)
        return route

    def _submit(self, job: Job, worker: Worker) -> None:
        """One request on the channel a choice. Raises WorkerUnavailable, having sent none."""
        card, size = worker.hello.model, worker.hello.block_size
        root = job.prompt.root(card.fingerprint)
        try:
            for choice, answer in job.answers.items():
                tokens, hashes = job.prompt.with_answer(answer, card.fingerprint, size)
                job.requests[choice] = worker.channel.submit(
                    partial(self._item, job, choice),
                    tokens=tokens,
                    root=root,
                    hashes=join_hashes(hashes),
                    sampling=for_choice(job.sampling, choice),
                    retention=job.prompt.retention,
                    priority=job.priority,
                    tenant=job.tenant,
                    trace_id=job.trace_id,
                    generated=len(answer),
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
        job.served = False
        if not worker.load.requests:
            worker.pulse.beat()  # it had nothing to say
        self.on_workers[job.number] = job
        worker.load.sent(job.number, route.prediction.work, now_s)
        self._guess(job, worker, now_s + route.prediction.ttft_s)
        self._metrics.routes.labels(route.reason).inc()
        if not job.began:
            self._metrics.queued.labels(model.name).observe(now_s - job.arrival_s)

    def _guess(self, job: Job, worker: Worker, there_s: float) -> None:
        hello = worker.hello
        _, hashes = job.prompt.with_answer(job.longest_answer, hello.model.fingerprint, hello.block_size)
        self._index.guess(worker.slot, hashes, there_s + CONFIRM_S)

    # ---- hearing ---------------------------------------------------------------------------------

    def _item(self, job: Job, choice: int, item: StepItem) -> None:
        """The sink of every request: what a step did for it."""
        assert job.worker is not None
        job.heard_s = self._clock()
        job.worker.pulse.beat()
        finish = item.finish
        if finish is not None and finish.reason in ("error", "cancelled"):
            del job.requests[choice]
            if finish.error_kind == "worker_lost":
                self._worker_lost(job.worker, "worker_lost", finish.message)
            else:
                self._lost(job, finish.error_kind, finish.message)
            return
        if item.start is not None and not job.served:
            self._started(job, item.start)
        job.token_s = job.heard_s
        job.answers[choice].extend(item.tokens)
        if finish is not None:
            del job.requests[choice], job.answers[choice]
        job.output_tokens += len(item.tokens)
        job.items.append((choice, item))
        job.wake.set()
        if len(job.items) > self._config.max_pending_tokens:
            self._leave_worker(job)
            job.fail(failed(f"the client is {len(job.items)} tokens behind", "client_too_slow"))
        elif not job.requests:
            self._leave_worker(job, served=True)

    def _started(self, job: Job, start: Start) -> None:
        """The first token from this worker: compare with the prediction and learn from it."""
        assert job.worker is not None
        assert job.route is not None
        job.served = True
        worker, prediction, metrics, name = job.worker, job.route.prediction, self._metrics, job.model.name
        worker.load.started(job.number)
        if not start.store_tokens:  # a load's time says nothing of computing
            uncached = start.prompt_tokens - start.gpu_tokens - start.host_tokens
            rates = worker.load.rates
            rates.learn_prefill(uncached, start.prefill_s, job.model.median_rate or rates.prefill)
        self._correct(job, worker, start)
        if job.began:
            metrics.resume_gap.labels(name).observe(job.heard_s - job.token_s)
            for source, tokens in _sources(start):
                metrics.resumed_tokens.labels(name, source).inc(tokens)
            return
        job.began = Beginning(worker.name, worker.hello.model.fingerprint, job.route, start)
        ttft_s = job.heard_s - job.sent_s
        metrics.predicted_ttft.labels(name).observe(prediction.ttft_s)
        metrics.ttft_error.labels(name).observe(ttft_s - prediction.ttft_s)
        metrics.ttft.labels(name).observe(job.heard_s - job.arrival_s)
        metrics.prompt_tokens.labels(name).inc(start.prompt_tokens)
        for source, tokens in _sources(start):
            if source != "computed":
                metrics.hit_tokens.labels(name, source).inc(tokens)
        metrics.predicted_hit_tokens.labels(name, "gpu").inc(prediction.local_tokens)
        metrics.predicted_hit_tokens.labels(name, "store").inc(prediction.store_tokens)

    def _correct(self, job: Job, worker: Worker, start: Start) -> None:
        """Set the index right: the blocks that it was given are all there now, and those that were to come
        from the store and did not are not in it."""
        assert job.route is not None
        prediction = job.route.prediction
        self._guess(job, worker, job.heard_s)
        found = start.gpu_tokens + start.host_tokens + start.store_tokens
        expected = prediction.local_tokens + prediction.store_tokens
        if prediction.store_tokens and found < expected:
            fingerprint, size = worker.hello.model.fingerprint, worker.hello.block_size
            _, hashes = job.prompt.with_answer(job.longest_answer, fingerprint, size)
            first = max(found, prediction.local_tokens) // size
            self._index.not_in_store(hashes[first : expected // size])

    # ---- going on elsewhere ------------------------------------------------------------------------

    def _worker_lost(self, worker: Worker, why: Loss, message: str) -> None:
        """The worker will finish nothing that it has."""
        jobs = self._jobs_on(worker)
        suspects = sum(not job.served for job in jobs)
        for job in jobs:
            self._lost(job, why, message, suspects)

    def _lost(self, job: Job, why: Loss, message: str, suspects: int = 1) -> None:
        """The worker will not finish the job: another one goes on with it, or the client is told. `suspects`:
        how many jobs the worker may be lost for that had not got a token from it."""
        worker = job.worker
        assert worker is not None
        self._leave_worker(job)
        if why == "draining":
            worker.draining(message)
        elif why == "invalid_request" and not job.began:
            job.fail(invalid(message))
            return
        else:
            job.avoid.add(worker.hello.epoch)
            job.losses.add(job.served, suspects)
            if error := self._given_up(job, why, message):
                job.fail(error)
                return
        self._again(job, why)

    def _given_up(self, job: Job, why: Loss, message: str) -> ApiError | None:
        """The error that ends a job which has just lost a worker; None when it may go on."""
        if why in ("internal", "invalid_request"):  # the worker lives: it could not do this one
            if job.losses.too_many or not (job.began or self._retries.spend()):
                return failed(f"worker {job.worker_name} failed: {message}")
            return None
        if not job.losses.too_many:
            return None
        if job.losses.guilty:
            self._quarantine.add(job.prompt.packed, self._clock())
            self._metrics.quarantined.labels(job.model.name).inc()
            dead = "workers died while they computed this prompt"
            return _quarantined(f"{dead}, the last one, {job.worker_name}: {message}")
        return unavailable(f"the request lost {job.losses.total} workers, the last one: {message}", why)

    def _again(self, job: Job, why: Loss) -> None:
        """Send it to another worker, or queue it before those that came later."""
        (self._metrics.resumes if job.began else self._metrics.retries).labels(why).inc()
        now_s = self._clock()
        if job.began:
            job.waiting_since_s = now_s
        if job.model.queue.first is None and self._send(job):
            return
        job.model.queue.put_back(job, now_s)
        self.pump(job.model)

    def _move(self, job: Job) -> bool:
        """Take the job off its draining worker if another one goes on with it at once."""
        model = job.model
        if model.queue.first is None and any(
            _fits(job, worker)
            and worker.load.has_room(len(job.answers))
            and worker.load.queued_s < MOVE_QUEUE_S
            for worker in model.workers.values()
        ):
            self._leave_worker(job)
            self._again(job, "draining")
            return True
        return False

    def _jobs_on(self, worker: Worker) -> list[Job]:
        return [job for job in self.on_workers.values() if job.worker is worker]

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


def _fits(job: Job, worker: Worker) -> bool:
    """Would this worker give the job the tokens that it is to get?"""
    card = worker.hello.model
    if job.began is None:
        return card.text_digest == job.text_digest
    longest = len(job.prompt.tokens) + len(job.longest_answer)
    return card.fingerprint == job.began.fingerprint and longest < card.max_model_len


def _sources(start: Start) -> Iterable[tuple[Tier | Literal["computed"], int]]:
    """Where the KV of what a worker was given came from, in tokens."""
    hits = start.gpu_tokens + start.host_tokens + start.store_tokens
    yield "gpu", start.gpu_tokens
    yield "host", start.host_tokens
    yield "store", start.store_tokens
    yield "computed", start.prompt_tokens - hits


def _quarantined(message: str) -> ApiError:
    """Clients that retry by themselves are told not to: the next try may cost two workers more."""
    error = failed(f"{message}; it is not tried again", "quarantined")
    error.headers += (("x-should-retry", "false"),)
    return error
