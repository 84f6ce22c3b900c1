"""What a worker tells Prometheus: vLLM's names, so that existing dashboards and autoscalers work, and ours.

vLLM's semantics are kept: prefix cache counters count tokens, `prefix_cache` is the GPU tier and
`external_prefix_cache` what other tiers were asked for and gave; `kv_cache_usage_perc` is 0 to 1 and counts
evictable pages as free; a cancelled request finishes with reason `abort`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from services.wire.messages import TIERS, ErrorKind, Finish, Start, Stats, Tier
from services.worker.collectors import StepHistogram
from services.worker.request import Output

# vLLM's bucket bounds (vllm/v1/metrics/loggers.py), so that quantiles of mixed fleets add up.
# fmt: off
TTFT_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
    80.0, 160.0, 640.0, 2560.0,
)
TOKEN_BUCKETS = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)
REQUEST_BUCKETS = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0,
    960.0, 1920.0, 7680.0,
)
# fmt: on

FINISHED_REASONS = {"stop": "stop", "length": "length", "cancelled": "abort", "error": "error"}


class LabelledRegistry:
    """Makes metrics that all carry the same labels."""

    def __init__(self, registry: CollectorRegistry, model_name: str) -> None:
        self.registry = registry
        self.labels = {"model_name": model_name, "engine": "0"}

    def gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        """A value that is read when scraped."""
        Gauge(name, text, self.labels, registry=self.registry).labels(**self.labels).set_function(read)

    def counter(self, name: str, text: str) -> Counter:
        return Counter(name, text, self.labels, registry=self.registry).labels(**self.labels)

    def counters(self, name: str, text: str, label: str, values: Iterable[str]) -> dict[str, Counter]:
        """One counter for each value of a further label, present in the output from the start."""
        family = Counter(name, text, [*self.labels, label], registry=self.registry)
        return {value: family.labels(**self.labels, **{label: value}) for value in values}

    def histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        family = Histogram(name, text, self.labels, buckets=buckets, registry=self.registry)
        return family.labels(**self.labels)


@dataclass(slots=True)
class _Live:
    arrival_s: float
    last_s: float  # when its last token came
    tokens: int = 0
    start: Start | None = None


class WorkerMetrics:
    """Counts what requests and steps report. Updated by one thread, read by any.

    `held` answers how many blocks of a tier this worker holds, `routers` how many are connected.
    """

    def __init__(
        self,
        metrics: LabelledRegistry,
        *,
        max_model_len: int,
        block_size: int,
        gpu_blocks: int,
        held: Callable[[Tier], int],
        routers: Callable[[], int],
    ) -> None:
        self._live: dict[Hashable, _Live] = {}
        self._stats = Stats(0, 0, 0, gpu_blocks, 0.0, 0.0, 0.0)
        self._show_load(metrics, gpu_blocks)

        size = {"block_size": str(block_size), "num_gpu_blocks": str(gpu_blocks), "engine": "0"}
        info = Gauge("vllm:cache_config_info", "Size of the KV cache.", size, registry=metrics.registry)
        info.labels(**size).set(1)
        blocks = Gauge(
            "reprise_held_blocks",
            "Blocks this worker reports to routers.",
            [*metrics.labels, "tier"],
            registry=metrics.registry,
        )
        for tier in TIERS:
            blocks.labels(**metrics.labels, tier=tier).set_function(partial(held, tier))
        metrics.gauge("reprise_connected_routers", "Routers with an open token channel.", routers)

        counter, histogram = metrics.counter, metrics.histogram
        self._prompt_tokens = counter("vllm:prompt_tokens", "Prompt tokens of requests that got a token.")
        self._generation_tokens = counter("vllm:generation_tokens", "Tokens generated.")
        self._preemptions = counter("vllm:num_preemptions", "Preemptions, counted when a request ends.")
        self._queries = counter("vllm:prefix_cache_queries", "Prompt tokens looked up in the GPU tier.")
        self._hits = counter("vllm:prefix_cache_hits", "Prompt tokens found in the GPU tier.")
        self._external_queries = counter(
            "vllm:external_prefix_cache_queries", "Prompt tokens not in the GPU tier, wanted from the others."
        )
        self._external_hits = counter(
            "vllm:external_prefix_cache_hits", "Prompt tokens found in the host and store tiers."
        )
        self._tier_hits = metrics.counters(
            "reprise_prefix_hit_tokens", "Prompt tokens whose KV came from a tier.", "tier", TIERS
        )
        self._finished = metrics.counters(
            "vllm:request_success", "Requests ended.", "finished_reason", FINISHED_REASONS.values()
        )
        self._refused = metrics.counters(
            "reprise_requests_refused",
            "Requests not taken, by kind of error.",
            "kind",
            ("invalid_request", "draining"),
        )

        self._ttft = histogram(
            "vllm:time_to_first_token_seconds", "From arrival at the worker to the first token.", TTFT_BUCKETS
        )
        self._itl = StepHistogram(
            "vllm:inter_token_latency_seconds", "Between tokens of a request.", TOKEN_BUCKETS, metrics.labels
        )
        metrics.registry.register(self._itl)
        self._tpot = histogram(
            "vllm:request_time_per_output_token_seconds",
            "Mean time per token after the first, one value a request.",
            TOKEN_BUCKETS,
        )
        self._e2e = histogram("vllm:e2e_request_latency_seconds", "From arrival to end.", REQUEST_BUCKETS)
        self._queue = histogram(
            "vllm:request_queue_time_seconds", "From arrival to the first step.", REQUEST_BUCKETS
        )
        self._prefill = histogram(
            "vllm:request_prefill_time_seconds", "From the first step to the first token.", REQUEST_BUCKETS
        )
        self._decode = histogram(
            "vllm:request_decode_time_seconds", "From the first token to the end.", REQUEST_BUCKETS
        )
        self._inference = histogram(
            "vllm:request_inference_time_seconds", "From the first step to the end.", REQUEST_BUCKETS
        )
        lengths = _one_two_five(max_model_len)
        self._request_prompt = histogram("vllm:request_prompt_tokens", "Prompt length.", lengths)
        self._request_generation = histogram("vllm:request_generation_tokens", "Tokens generated.", lengths)

    def _show_load(self, metrics: LabelledRegistry, gpu_blocks: int) -> None:
        gauge = metrics.gauge
        gauge("vllm:num_requests_running", "Requests in the running batch.", lambda: self._stats.running)
        gauge("vllm:num_requests_waiting", "Requests waiting to run.", lambda: self._stats.waiting)
        gauge(
            "vllm:kv_cache_usage_perc",
            "Part of the GPU's KV pages in use, 0 to 1; evictable pages count as free.",
            lambda: 1 - self._stats.free_blocks / gpu_blocks,
        )
        gauge(
            "reprise_queued_prefill_tokens",
            "Uncached prompt tokens not yet computed.",
            lambda: self._stats.queued_prefill_tokens,
        )
        gauge(
            "reprise_prefill_tokens_per_second",
            "Learned prefill rate.",
            lambda: self._stats.prefill_tokens_per_s,
        )
        gauge("reprise_decode_step_seconds", "Learned time of a decode.", lambda: self._stats.decode_step_s)
        gauge(
            "reprise_store_tokens_per_second",
            "Measured load rate of the store; 0 while it cannot be reached.",
            lambda: self._stats.store_tokens_per_s,
        )

    def submitted(self, key: Hashable, now_s: float) -> None:
        self._live[key] = _Live(arrival_s=now_s, last_s=now_s)

    def refused(self, kind: ErrorKind) -> None:
        self._refused[kind].inc()

    def load(self, stats: Stats) -> None:
        self._stats = stats

    def step(self, outputs: Iterable[Output], now_s: float) -> None:
        """One engine step ended at `now_s`."""
        tokens = 0
        gaps: dict[float, int] = {}
        for output in outputs:
            live = self._live.get(output.key)
            if live is None:
                continue
            if output.tokens:
                tokens += len(output.tokens)
                live.tokens += len(output.tokens)
                if live.start is not None:
                    gaps[live.last_s] = gaps.get(live.last_s, 0) + 1
                live.last_s = now_s
            if output.start is not None:
                live.start = output.start
                self._started(output.start)
            if output.finish is not None:
                del self._live[output.key]
                self._ended(live, output.finish, now_s)
        if tokens:
            self._generation_tokens.inc(tokens)
        for last_s, count in gaps.items():
            self._itl.observe(now_s - last_s, count)

    def _started(self, start: Start) -> None:
        outside = start.host_tokens + start.store_tokens
        self._prompt_tokens.inc(start.prompt_tokens)
        self._queries.inc(start.prompt_tokens)
        self._hits.inc(start.gpu_tokens)
        self._external_queries.inc(start.prompt_tokens - start.gpu_tokens)
        self._external_hits.inc(outside)
        self._tier_hits["gpu"].inc(start.gpu_tokens)
        self._tier_hits["host"].inc(start.host_tokens)
        self._tier_hits["store"].inc(start.store_tokens)
        self._ttft.observe(start.queue_s + start.prefill_s)

    def _ended(self, live: _Live, finish: Finish, now_s: float) -> None:
        self._finished[FINISHED_REASONS[finish.reason]].inc()
        self._preemptions.inc(finish.preemptions)
        e2e_s = now_s - live.arrival_s
        self._e2e.observe(e2e_s)
        if (start := live.start) is None:
            return  # ended before its first token
        decode_s = max(0.0, e2e_s - start.queue_s - start.prefill_s)
        self._queue.observe(start.queue_s)
        self._prefill.observe(start.prefill_s)
        self._decode.observe(decode_s)
        self._inference.observe(start.prefill_s + decode_s)
        self._request_prompt.observe(start.prompt_tokens)
        self._request_generation.observe(live.tokens)
        if live.tokens > 1:
            self._tpot.observe(decode_s / (live.tokens - 1))


def _one_two_five(limit: int) -> list[float]:
    """1, 2, 5, 10, 20, … up to `limit`: vLLM's buckets for lengths."""
    bounds = [m * 10.0**e for e in range(len(str(limit))) for m in (1, 2, 5)]
    return [bound for bound in bounds if bound <= limit]
