"""Totals since the engine started, for metrics: only ever rise, written by the engine's thread alone."""

from __future__ import annotations

from dataclasses import dataclass, field

from services.wire.messages import TIERS, FinishReason, Tier


@dataclass(slots=True)
class Counters:
    steps: int = 0
    step_s: float = 0.0  # device time of steps, as seen from the host
    wait_s: float = 0.0  # the engine's thread waited for the device
    host_s: float = 0.0  # it worked in turns with steps: planning, launching, committing, reporting
    idle_s: float = 0.0  # the device waited for the host, between a step and the one launched behind it
    prefill_tokens: int = 0  # computed, recomputing after preemption included
    generated_tokens: int = 0
    prompt_tokens: int = 0  # of the requests that got their first token
    hit_tokens: dict[Tier, int] = field(default_factory=lambda: dict.fromkeys(TIERS, 0))  # of these prompts
    finished: dict[FinishReason, int] = field(
        default_factory=lambda: {"stop": 0, "length": 0, "cancelled": 0, "error": 0}
    )
    failed_steps: int = 0
    preemptions: int = 0
    late_kernels: int = 0  # compiled or loaded after warm-up: requests waited for them, should stay 0
    offered_blocks: int = 0  # copied and handed to the store
    unoffered_blocks: int = 0  # lost their page, or the store had no room, before the copy's turn came
