"""What the router tells Prometheus: `reprise_router_*` and nothing of the workers' own."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

_TTFT = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80),
    *(160, 640, 2560),
)
_ITL = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.015,
    0.02,
    0.03,
    0.04,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.5,
    1,
    2.5,
    10,
)
_E2E = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 60, 120, 240, 480, 960, 1920, 7680)
_DECISION = (0.00001, 0.00002, 0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.05)
_ERROR = (-10, -5, -2, -1, -0.5, -0.2, -0.1, -0.05, -0.02, 0, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)


class RouterMetrics:
    """The router's instruments, on a registry of their own so that one process can hold several routers."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        counter, histogram = self._counter, self._histogram
        self.requests = counter(
            "requests",
            "Answers by endpoint and HTTP status; 499: the client left before the first byte",
            "endpoint",
            "code",
        )
        self.broken_streams = counter(
            "broken_streams",
            "Streams that ended with an error event after their first token",
            "model",
            "code",
        )
        self.disconnects = counter("disconnects", "Requests whose client left before the end", "model")
        self.shed = counter("shed", "Requests refused with 429 because the queue was full", "model")
        self.retries = counter(
            "retries", "Requests sent to another worker before their first token", "reason"
        )
        self.resumes = counter(
            "resumes", "Answers that went on on another worker after their first token", "reason"
        )
        self.resumed_tokens = counter(
            "resumed_tokens",
            "Tokens of prompts and answers that resumed answers began with, by where their KV came from",
            "model",
            "source",
        )
        self.quarantined = counter(
            "quarantined", "Requests given up because workers died while they computed its prompt", "model"
        )
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens of requests that were started", "model")
        self.completion_tokens = counter(
            "completion_tokens", "Tokens generated for requests that were answered to the end", "model"
        )
        self.hit_tokens = counter(
            "hit_tokens",
            "Prompt tokens that needed no computing, by the tier they came from",
            "model",
            "tier",
        )
        self.predicted_hit_tokens = counter(
            "predicted_hit_tokens", "The same as routing predicted it; host counts as gpu", "model", "tier"
        )
        self.routes = counter("routes", "Routing decisions by their reason", "reason")
        self.ttft = histogram(
            "time_to_first_token_seconds", "From a request's last byte to its first token", _TTFT, "model"
        )
        self.predicted_ttft = histogram(
            "predicted_ttft_seconds", "From submit to first token as routing predicted it", _TTFT, "model"
        )
        self.ttft_error = histogram(
            "ttft_error_seconds", "Actual minus predicted time from submit to first token", _ERROR, "model"
        )
        self.inter_token = histogram(
            "inter_token_latency_seconds", "Between two deliveries to one client", _ITL, "model"
        )
        self.resume_gap = histogram(
            "resume_gap_seconds",
            "From the last token that one worker gave an answer to the first of the next",
            _TTFT,
            "model",
        )
        self.e2e = histogram("request_seconds", "From a request's last byte to its last token", _E2E, "model")
        self.queued = histogram(
            "queue_seconds", "From a request's last byte to its submit to a worker", _TTFT, "model"
        )
        self.decision = histogram(
            "routing_decision_seconds", "Index look-up and choice of a worker", _DECISION
        )

    def watch(self, gauges: Callable[[], Iterable[Metric]]) -> None:
        """Have every scrape ask `gauges` for values that are only read off."""
        self.registry.register(_Gauges(gauges))

    def _counter(self, name: str, doc: str, *labels: str) -> Counter:
        return Counter(f"reprise_router_{name}", doc, labels, registry=self.registry)

    def _histogram(self, name: str, doc: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(f"reprise_router_{name}", doc, labels, registry=self.registry, buckets=buckets)


def gauge(name: str, doc: str, values: dict[tuple[str, ...], float], *labels: str) -> Metric:
    """One gauge of a scrape: `values` by label values."""
    family = GaugeMetricFamily(f"reprise_router_{name}", doc, labels=labels)
    for key, value in values.items():
        family.add_metric(key, value)
    return family


class _Gauges(Collector):
    def __init__(self, gauges: Callable[[], Iterable[Metric]]) -> None:
        self._gauges = gauges

    def collect(self) -> Iterable[Metric]:
        return self._gauges()

    def describe(self) -> Iterable[Metric]:
        """Nothing: values are not to be read at registration."""
        return ()
