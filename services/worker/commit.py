"""What the tokens of a finished step mean for their requests: outputs, ends, and blocks that got full."""

from __future__ import annotations

from collections.abc import Sequence as Ordered
from collections.abc import Set
from dataclasses import dataclass, field

from services.wire.messages import Finish, FinishReason, Logprob, Start
from services.worker.counters import Counters
from services.worker.plan import StepPlan
from services.worker.request import Output
from services.worker.scheduler import Scheduler
from services.worker.sequence import Phase, Sequence


@dataclass(frozen=True, slots=True)
class Sampled:
    """One token for each of `StepPlan.sampled`, in order; log-probabilities where the step has any."""

    tokens: Ordered[int]
    logprobs: Ordered[Logprob | None] | None = None
    broken: Set[int] = field(default_factory=frozenset)  # rows whose logits are not finite


def commit(
    scheduler: Scheduler, plan: StepPlan, sampled: Sampled, now: float, counters: Counters
) -> list[Output]:
    """Take over a step's tokens. Generated blocks that it completed are named and join `plan.filled`.

    A sequence that ended while the step ran (a stop found late, a cancel) has its token discarded; one that
    was preempted keeps it: it was computed before the pages went. An answer that its grammar says is whole
    ends without an end of sequence.
    """
    _name_generated_blocks(scheduler, plan, now)
    outputs: list[Output] = []
    failed: list[Output] = []
    finished = Phase.FINISHED
    logprobs = sampled.logprobs
    for row, sequence in enumerate(plan.sampled):
        if sequence.phase is finished:
            continue
        if row in sampled.broken:
            message = "the model's logits are not finite: its weights or its KV hold NaN or infinity"
            finish = end(scheduler, sequence, "error", now, counters, message=message)
            failed.append(Output(sequence.request.key, finish=finish))
            continue
        token = sampled.tokens[row]
        tokens = sequence.tokens
        start = _start(sequence, now, counters) if len(tokens) == sequence.given else None
        tokens.append(token)
        key = sequence.request.key
        logprob = logprobs[row] if logprobs is not None else None
        chosen = () if logprob is None else (logprob,)
        matcher = sequence.matcher
        if matcher is not None:
            matcher.accept(token)
            if matcher.fault:
                finish = end(scheduler, sequence, "error", now, counters, message=f"grammar: {matcher.fault}")
                failed.append(Output(key, finish=finish))
                continue
        if token in sequence.stop_ids:
            outputs.append(Output(key, (), start, (), end(scheduler, sequence, "stop", now, counters, token)))
        elif matcher is not None and matcher.complete:
            last = end(scheduler, sequence, "stop", now, counters)
            outputs.append(Output(key, (token,), start, chosen, last))
        elif len(tokens) >= sequence.max_length:
            last = end(scheduler, sequence, "length", now, counters)
            outputs.append(Output(key, (token,), start, chosen, last))
        else:
            outputs.append(Output(key, (token,), start, chosen))
    counters.generated_tokens += len(outputs)
    return outputs + failed


def end(
    scheduler: Scheduler,
    sequence: Sequence,
    reason: FinishReason,
    now: float,
    counters: Counters,
    stop_token: int | None = None,
    message: str = "",
) -> Finish:
    """Release what the sequence holds and say why it ended."""
    scheduler.release(sequence, now)
    counters.finished[reason] += 1
    return Finish(reason, stop_token, message, sequence.preemptions)


def _name_generated_blocks(scheduler: Scheduler, plan: StepPlan, now: float) -> None:
    size = scheduler.limits.block_size
    for sequence, start in zip(plan.decodes, plan.decode_starts, strict=True):
        if (start + 1) % size == 0 and sequence.phase is Phase.DECODE:
            block = scheduler.fill_generated(sequence, start // size, now)
            if block is not None:
                plan.filled.append(block)


def _start(sequence: Sequence, now: float, counters: Counters) -> Start:
    first_planned_s = sequence.first_planned_s
    assert first_planned_s is not None, "a token came from a step that nobody planned"
    counters.prompt_tokens += sequence.given
    counters.hit_tokens["gpu"] += sequence.gpu_tokens
    counters.hit_tokens["host"] += sequence.host_tokens
    counters.hit_tokens["store"] += sequence.store_tokens
    return Start(
        prompt_tokens=sequence.given,
        gpu_tokens=sequence.gpu_tokens,
        host_tokens=sequence.host_tokens,
        store_tokens=sequence.store_tokens,
        queue_s=max(0.0, first_planned_s - sequence.request.arrival_s),
        prefill_s=now - first_planned_s,
    )
