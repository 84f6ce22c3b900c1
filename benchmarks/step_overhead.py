"""What the engine's Python costs a step: plan and commit with a device that takes no time.

    python -m benchmarks.step_overhead [--sequences 256] [--steps 400]

Decodes only, block_size 16, the worst ordinary mix: a sixteenth of the sequences completes a block each step.
Prints microseconds a step of each part, best and median of the steps; targets: plan + commit <= 300 µs on a
GPU machine's CPU, <= 1000 µs on a slow one.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time

from services.wire.messages import SamplingParams
from services.worker.commit import Sampled, commit
from services.worker.counters import Counters
from services.worker.pages import PagePool
from services.worker.request import Request
from services.worker.scheduler import Limits, Scheduler
from services.worker.sequence import Sequence

BLOCK = 16
PROMPT = 64


def measure(sequences: int, steps: int) -> dict[str, list[float]]:
    """Seconds of each step, by part."""
    pool = PagePool(sequences * (PROMPT + steps) // BLOCK * 2)
    scheduler = Scheduler(Limits(BLOCK, sequences, sequences * PROMPT), pool)
    rng = random.Random(0)
    for number in range(sequences):
        length = PROMPT - rng.randrange(BLOCK)  # so that blocks fill at different steps
        tokens = [rng.randrange(50_000) for _ in range(length)]
        hashes = [rng.randbytes(16) for _ in range(length // BLOCK)]
        request = Request(number, tokens, b"r" * 16, hashes, SamplingParams(max_tokens=10_000_000))
        scheduler.add(
            Sequence(request, block_size=BLOCK, max_length=10_000_000, stop_ids=frozenset([50_001]))
        )
    counters = Counters()
    seconds: dict[str, list[float]] = {"plan": [], "commit": [], "both": []}
    while (plan := scheduler.plan(0.0)) is not None and not plan.decodes:
        commit(scheduler, plan, Sampled([1] * len(plan.sampled)), 0.0, counters)
    assert plan is not None
    for _ in range(steps):
        sampled = Sampled([rng.randrange(50_000) for _ in plan.sampled])
        started_s = time.perf_counter()
        commit(scheduler, plan, sampled, 0.0, counters)
        committed_s = time.perf_counter()
        plan = scheduler.plan(0.0)
        planned_s = time.perf_counter()
        assert plan is not None
        assert len(plan.decodes) == sequences
        seconds["commit"].append(committed_s - started_s)
        seconds["plan"].append(planned_s - committed_s)
        seconds["both"].append(planned_s - started_s)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--steps", type=int, default=400)
    options = parser.parse_args()
    print(f"{options.sequences} decoding sequences, {options.steps} steps, µs a step")
    for part, seconds in measure(options.sequences, options.steps).items():
        print(f"{part:>8}  best {min(seconds) * 1e6:7.0f}  median {statistics.median(seconds) * 1e6:7.0f}")


if __name__ == "__main__":
    main()
