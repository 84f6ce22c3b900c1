"""The engine: one thread that plans a step, launches it, commits the one before, and reports.

A turn: commands in, plan, launch, commit the oldest step, report, copies to the store.

With `pipeline_depth` 2 the next step is launched before the last one is committed, so the device never waits
for the host. A step with a row that follows a grammar is launched as far as its logits; while the device
computes those the step before is committed, and what its tokens allow next goes over in time to sample.

Whatever happens to a request, it gets exactly one output with a `finish`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass

from kernels.compiled import kernels_compiled
from kernels.kv_payload import Codec
from services.wire.messages import ErrorKind, Finish, FinishReason, Stats, Tier
from services.worker.block_copies import BlockCopies
from services.worker.check import RequestLimits, check_request
from services.worker.commit import commit, end
from services.worker.config import EngineConfig
from services.worker.counters import Counters
from services.worker.grammar import masks
from services.worker.host_tier import HostTier
from services.worker.inbox import Inbox
from services.worker.kv import KVCache, page_bytes
from services.worker.load import LoadedModel
from services.worker.memory import MemoryLedger, kv_bytes_available, ledger
from services.worker.pages import PagePool
from services.worker.plan import StepPlan
from services.worker.rates import Rates
from services.worker.request import Output, Request, StepListener, StepReport
from services.worker.runner import Launched, Runner, Unsampled
from services.worker.scheduler import Limits, Scheduler
from services.worker.sequence import Phase, Sequence
from services.worker.store_traffic import StoreLoads, WriteBehind
from services.worker.tiers import StoreTier
from services.worker.warm_up import warm_up

log = logging.getLogger(__name__)

#: For KV pages on a CPU unless the config says otherwise.
_CPU_KV_BYTES = 1 << 30

#: How often a turn without a step looks at copies under way.
_COPY_POLL_S = 0.0005

#: A turn without anything to do still happens this often: it passes on the store's events.
_IDLE_TURN_S = 0.1

#: A turn that takes longer than this is stuck: the slowest honest step is seconds of CPU prefill.
_STALL_S = 120.0


@dataclass(slots=True)
class _Step:
    """A step under way."""

    plan: StepPlan
    launched: Launched | Unsampled  # the latter for a moment only, of the last step
    launched_s: float
    behind: Launched | None  # the step that was under way at the launch

    @property
    def sampled(self) -> Launched:
        assert isinstance(self.launched, Launched)
        return self.launched


class Engine:
    """Serves one model. `submit`, `cancel`, `drain`, `stop` and the queries are safe from any thread."""

    def __init__(
        self,
        model: LoadedModel,
        config: EngineConfig,
        store: StoreTier | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Allocates the KV memory. `store` stays the caller's to close, after `stop`."""
        decoder = model.decoder
        on_gpu = decoder.device.type == "cuda"
        available = _CPU_KV_BYTES
        if on_gpu and config.pages is None and config.kv_bytes is None:
            available = kv_bytes_available(decoder, config, config.max_model_len or model.max_model_len)
        self.pages = config.page_count(page_bytes(model.spec, config.block_size, model.kv_dtype), available)
        self.max_model_len = config.model_len(model.max_model_len, self.pages)
        self.counters = Counters()
        self.kv = KVCache(model.spec, self.pages, config.block_size, model.kv_dtype, decoder.device)
        self.runner = Runner(
            decoder,
            self.kv,
            max_running=config.max_running,
            max_step_tokens=config.max_step_tokens,
            max_length=self.max_model_len,
        )
        self._decoder = decoder
        self._config = config
        self._eos = frozenset(model.eos_token_ids)
        self._request_limits = RequestLimits(
            vocab_size=model.spec.vocab_size,
            block_size=config.block_size,
            kv_tokens=self.pages * config.block_size,
            max_model_len=self.max_model_len,
        )
        self._store = store
        self._clock = clock
        self._rates = Rates()
        self._kernels_warm = 0
        self._pool = PagePool(self.pages)
        self._loads: StoreLoads | None = None
        self._write_behind: WriteBehind | None = None
        self._copies = BlockCopies(self.kv, Codec(config.store_codec))
        self._host: HostTier | None = None
        tier = store
        if config.host_bytes:
            tier = self._host = HostTier(config.host_bytes, self._copies, store, clock)
        if tier is not None:
            self._loads = StoreLoads(
                tier, self._copies, self._rates, config.block_size, config.max_step_tokens, self._host
            )
            self._write_behind = WriteBehind(tier, self._copies, self._pool, self.counters, clock, self._host)
        limits = Limits(config.block_size, config.max_running, config.max_step_tokens, group_prefixes=on_gpu)
        self._scheduler = Scheduler(limits, self._pool, self._loads)

        self._inbox = Inbox()
        self._steps: deque[_Step] = deque()  # under way, oldest first
        self._committed_s = 0.0
        self._turned_s = 0.0
        self._stats = self._current_stats()
        self._listener: StepListener | None = None
        self._thread: threading.Thread | None = None
        self._stopping = False

    # ---- for callers on any thread

    def warm_up(self) -> None:
        """Before `start`: make the first request as fast as the second and measure the rates in `stats`."""
        limits = self._scheduler.limits
        self.runner.capture()
        warm_up(self.runner, limits, self.pages, self.max_model_len, self._rates, self._clock)
        if self.runner.on_gpu and self._loads is not None:
            self._copies.warm_up()
        self._stats = self._current_stats()
        self._kernels_warm = kernels_compiled()

    def start(self, listener: StepListener) -> None:
        """Begin to step. `listener` gets every report, on the engine's thread."""
        if self._thread is not None:
            raise RuntimeError("the engine was started before")
        self._listener = listener
        self._turned_s = self._clock()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> None:
        """Queue a request. Raises RequestError if it cannot be served, EngineClosed if none can any more."""
        check_request(request, self._request_limits)
        sampling = request.sampling
        stop_ids = frozenset(sampling.stop_token_ids)
        self._inbox.submit(
            Sequence(
                request,
                block_size=self._config.block_size,
                max_length=min(request.prompt_length + sampling.max_tokens, self.max_model_len),
                # A grammar allows an end of sequence where the answer is whole, and it is one.
                stop_ids=stop_ids if sampling.ignore_eos and not sampling.grammar else stop_ids | self._eos,
            )
        )

    def cancel(self, key: Hashable) -> None:
        """End the request and free what it holds, within one step. Unknown keys are fine."""
        self._inbox.cancel(key)

    def drain(self) -> None:
        """Take no new requests; those taken go on."""
        self._inbox.close("the engine is draining")

    def stop(self) -> None:
        """End the thread after the turn under way. Requests still there finish with an error."""
        self._stopping = True
        self._inbox.close("the engine was stopped")
        if self._thread is not None:
            self._thread.join()
        if self._host is not None:
            self._host.close()

    def memory(self) -> MemoryLedger | None:
        """Who has what of the GPU's memory now; None on a CPU."""
        return ledger(self._decoder, self.kv) if self._decoder.device.type == "cuda" else None

    def host_counts(self) -> dict[str, int]:
        """Counters of host memory (see HostTier.counts), empty without any."""
        return self._host.counts() if self._host is not None else {}

    @property
    def idle(self) -> bool:
        """Every request taken has finished and its last report is delivered."""
        return self._inbox.idle

    def stats(self) -> Stats:
        """The load as of the last report."""
        return self._stats

    def healthy(self) -> bool:
        """The thread is alive and not stuck in a step."""
        alive = self._thread is not None and self._thread.is_alive()
        return alive and self._clock() - self._turned_s < _STALL_S

    # ---- the engine's thread

    def _run(self) -> None:
        kind: ErrorKind = "draining"
        reason = "the engine was stopped"
        try:
            while not self._stopping:
                self._turn()
        except Exception as error:
            log.exception("the engine failed")
            kind = "worker_lost"
            reason = f"the engine failed: {_describe(error)}"
        finally:
            self._end_all(reason, kind)

    def _turn(self) -> None:
        self._turned_s = self._clock()
        waited_s = self.counters.wait_s
        submitted, cancelled = self._inbox.take()
        for sequence in submitted:
            self._scheduler.add(sequence)
        outputs = self._end(cancelled, "cancelled")
        plan = self._scheduler.plan(self._turned_s, self._busy_s())
        if plan is not None:
            outputs += self._launch(plan)
        step_s = 0.0
        if self._steps and isinstance(self._steps[-1].launched, Unsampled):
            while len(self._steps) > 1:
                committed, last_s = self._commit_oldest()
                outputs += committed
                step_s += last_s
            outputs += self._sample()
        if self._steps and (plan is None or len(self._steps) >= self._config.pipeline_depth):
            committed, last_s = self._commit_oldest()
            outputs += committed
            step_s += last_s
        self._report(outputs)
        if self._write_behind:
            self._write_behind.copy(step_s)
        if plan is not None or step_s:
            turn_s = self._clock() - self._turned_s
            self.counters.host_s += turn_s - (self.counters.wait_s - waited_s)
        elif not self._steps:
            look_again_s = _COPY_POLL_S if self._write_behind else _IDLE_TURN_S
            if self._loads is not None:
                look_again_s = min(look_again_s, self._loads.look_again_s)
            self._inbox.wait(look_again_s)

    def _busy_s(self) -> float:
        """Predicted seconds until the device is done with the steps under way."""
        if not self._steps:
            return 0.0
        plans = [step.plan for step in self._steps]
        steps_s = sum(self._rates.step_s(plan.prefill_tokens, len(plan.decodes)) for plan in plans)
        began_s = max(self._steps[0].launched_s, self._committed_s)
        return max(0.0, began_s + steps_s - self._turned_s)

    def _launch(self, plan: StepPlan) -> list[Output]:
        launched_s = self._clock()
        try:
            behind = self._steps[-1].sampled if self._steps else None
            self._steps.append(_Step(plan, self.runner.launch(plan), launched_s, behind))
        except Exception as error:
            return self._fail([plan], error)
        return []

    def _sample(self) -> list[Output]:
        """Have the last step sample, if it is still there: all steps before it are committed, so grammars
        know where they stand. The device computes its logits meanwhile."""
        if not self._steps:
            return []
        step = self._steps[-1]
        assert isinstance(step.launched, Unsampled)
        try:
            rows = [
                (row, sequence.matcher)
                for row, sequence in enumerate(step.plan.sampled)
                if sequence.matcher is not None and sequence.phase is not Phase.FINISHED
            ]
            words = masks([matcher for _, matcher in rows], self.runner.vocab)
            step.launched = self.runner.sample(step.launched, [row for row, _ in rows], words)
        except Exception as error:
            self._steps.pop()
            return self._fail([step.plan], error)
        return []

    def _commit_oldest(self) -> tuple[list[Output], float]:
        """Outputs of the oldest step and the seconds that the device spent on it."""
        step = self._steps.popleft()
        waiting_s = self._clock()
        try:
            sampled = step.sampled.result()
        except Exception as error:
            plans = [step.plan, *(later.plan for later in self._steps)]  # they read what this one wrote
            self._steps.clear()
            return self._fail(plans, error), 0.0
        now = self._clock()
        self.counters.wait_s += now - waiting_s
        if step.behind is not None:
            self.counters.idle_s += step.sampled.idle_s(step.behind)
        step_s = now - max(step.launched_s, self._committed_s)
        self._committed_s = now
        outputs = commit(self._scheduler, step.plan, sampled, now, self.counters)
        if self._write_behind is not None:
            for chunk in step.plan.chunks:
                self._write_behind.add_missing(chunk.sequence, chunk.write_from // self._config.block_size)
            self._write_behind.add(step.plan.filled)
            for chunk in step.plan.chunks:
                if chunk.samples:
                    self._write_behind.retain(chunk.sequence)
        prefill_tokens = step.plan.prefill_tokens
        self._rates.observe(prefill_tokens=prefill_tokens, decodes=len(step.plan.decodes), seconds=step_s)
        self.counters.steps += 1
        self.counters.step_s += step_s
        self.counters.prefill_tokens += prefill_tokens
        self.counters.preemptions = self._scheduler.preemptions
        self.counters.late_kernels = kernels_compiled() - self._kernels_warm
        return outputs, step_s

    def _fail(self, plans: list[StepPlan], error: Exception) -> list[Output]:
        """A step raised: its requests end, nobody reads what it was to write, the others go on."""
        log.error("a step failed", exc_info=error)
        self.counters.failed_steps += len(plans)
        members = dict.fromkeys(sequence for plan in plans for sequence in plan.members)
        outputs = self._end(members, "error", f"the step failed: {_describe(error)}")
        for plan in reversed(plans):  # the latest first: what it says of a slot holds
            self._scheduler.undo(plan, self._turned_s)
        return outputs

    def _end(self, sequences: Iterable[Sequence], reason: FinishReason, message: str = "") -> list[Output]:
        now = self._turned_s
        return [
            Output(s.request.key, finish=end(self._scheduler, s, reason, now, self.counters, message=message))
            for s in sequences
            if s.phase is not Phase.FINISHED
        ]

    def _end_all(self, reason: str, kind: ErrorKind) -> None:
        """The engine is over. Its books may be what broke: nothing is released but what the store holds."""
        self._inbox.close(reason)
        if self._loads is not None:
            self._loads.cancel_all()
        outputs = []
        for sequence in self._inbox.live():
            self.counters.finished["error"] += 1
            finish = Finish("error", message=reason, preemptions=sequence.preemptions, error_kind=kind)
            outputs.append(Output(sequence.request.key, finish=finish))
        self._deliver(StepReport(outputs))

    # ---- reports

    def _report(self, outputs: list[Output]) -> None:
        stored: dict[Tier, list[bytes]] = {}
        removed: dict[Tier, list[bytes]] = {}
        stored["gpu"], removed["gpu"] = self._pool.take_events()
        if self._host is not None:
            stored["host"], removed["host"] = self._host.take_host_events()
        if self._store is not None:
            stored["store"], removed["store"] = self._store.take_events()
        stats = self._current_stats()
        if outputs or any(stored.values()) or any(removed.values()) or stats != self._stats:
            self._stats = stats
            self._deliver(StepReport(outputs, stored, removed, stats))

    def _deliver(self, report: StepReport) -> None:
        assert self._listener is not None
        self._inbox.begin_delivery(output.key for output in report.outputs if output.finish is not None)
        try:
            self._listener(report)
        except Exception:
            log.exception("the listener failed on a report")
        finally:
            self._inbox.end_delivery()

    def _current_stats(self) -> Stats:
        return Stats(
            running=self._scheduler.running,
            waiting=self._scheduler.waiting,
            queued_prefill_tokens=self._scheduler.queued_prefill_tokens,
            free_blocks=self._pool.available,
            prefill_tokens_per_s=self._rates.prefill_tokens_per_s,
            decode_step_s=self._rates.decode_step_s,
            store_tokens_per_s=self._store.tokens_per_s() if self._store is not None else 0.0,
        )


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:500]
