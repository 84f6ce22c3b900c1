import pytest
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from services.wire.messages import Finish, Start, Stats
from services.worker.collectors import EngineCollector, StepHistogram
from services.worker.counters import Counters
from services.worker.memory import MemoryLedger
from services.worker.metrics import TOKEN_BUCKETS, LabelledRegistry, WorkerMetrics
from services.worker.request import Output

LABELS = {"model_name": "m", "engine": "0"}


class Scrape:
    """Worker metrics on a registry of their own, read by sample name."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.metrics = WorkerMetrics(
            LabelledRegistry(self.registry, "m"),
            max_model_len=4096,
            block_size=16,
            gpu_blocks=200,
            held={"gpu": 7, "host": 0, "store": 9}.__getitem__,
            routers=lambda: 2,
        )

    def __call__(self, name, **labels):
        return self.registry.get_sample_value(name, LABELS | labels)


@pytest.fixture
def scrape():
    return Scrape()


def test_vllms_names_are_all_there(scrape):
    families = {
        family.name: family
        for family in text_string_to_metric_families(generate_latest(scrape.registry).decode())
    }
    kinds = {
        "gauge": "num_requests_running num_requests_waiting kv_cache_usage_perc cache_config_info",
        "counter": "prompt_tokens generation_tokens request_success num_preemptions prefix_cache_queries "
        "prefix_cache_hits external_prefix_cache_queries external_prefix_cache_hits",
        "histogram": "time_to_first_token_seconds inter_token_latency_seconds e2e_request_latency_seconds "
        "request_queue_time_seconds request_prefill_time_seconds request_decode_time_seconds "
        "request_inference_time_seconds request_time_per_output_token_seconds request_prompt_tokens "
        "request_generation_tokens",
    }
    for kind, names in kinds.items():
        for name in names.split():
            assert families[f"vllm:{name}"].type == kind


def test_a_request_is_counted_from_arrival_to_end(scrape):
    metrics = scrape.metrics
    metrics.submitted("a", 10.0)
    start = Start(
        prompt_tokens=100, gpu_tokens=32, host_tokens=16, store_tokens=16, queue_s=0.5, prefill_s=1.0
    )
    metrics.step([Output("a", (1,), start)], 11.5)
    metrics.step([Output("a", (2,))], 11.6)
    metrics.step([Output("a", (3, 4))], 11.8)
    metrics.step([Output("a", (5,), finish=Finish("length", preemptions=2))], 12.0)
    assert scrape("vllm:prompt_tokens_total") == scrape("vllm:prefix_cache_queries_total") == 100
    assert scrape("vllm:prefix_cache_hits_total") == 32
    assert scrape("vllm:external_prefix_cache_queries_total") == 68
    assert scrape("vllm:external_prefix_cache_hits_total") == 32
    hits = {tier: scrape("reprise_prefix_hit_tokens_total", tier=tier) for tier in ("gpu", "host", "store")}
    assert hits == {"gpu": 32, "host": 16, "store": 16}
    assert scrape("vllm:generation_tokens_total") == scrape("vllm:request_generation_tokens_sum") == 5
    assert scrape("vllm:num_preemptions_total") == 2
    assert scrape("vllm:request_success_total", finished_reason="length") == 1
    sums = {
        "time_to_first_token": 1.5,
        "e2e_request_latency": 2.0,
        "request_queue_time": 0.5,
        "request_prefill_time": 1.0,
        "request_decode_time": 0.5,
        "request_inference_time": 1.5,
        "request_time_per_output_token": 0.125,
        "inter_token_latency": 0.5,
    }
    assert {name: scrape(f"vllm:{name}_seconds_sum") for name in sums} == pytest.approx(sums)
    assert scrape("vllm:inter_token_latency_seconds_count") == 3  # gaps between outputs, as vLLM counts


def test_a_request_that_ends_before_its_first_token_has_no_prefill_time(scrape):
    scrape.metrics.submitted("a", 1.0)
    scrape.metrics.step([Output("a", finish=Finish("cancelled"))], 4.0)
    assert scrape("vllm:request_success_total", finished_reason="abort") == 1
    assert scrape("vllm:e2e_request_latency_seconds_sum") == 3.0
    assert scrape("vllm:request_prefill_time_seconds_count") == 0


def test_outputs_of_requests_nobody_submitted_are_not_counted(scrape):
    scrape.metrics.step([Output("unknown", (1, 2))], 1.0)
    assert scrape("vllm:generation_tokens_total") == 0


def test_the_load_is_what_the_engine_said_last(scrape):
    assert scrape("vllm:kv_cache_usage_perc") == 0
    scrape.metrics.load(Stats(3, 4, 500, 50, 1000.0, 0.02, 77.0))
    assert scrape("vllm:num_requests_running") == 3
    assert scrape("vllm:num_requests_waiting") == 4
    assert scrape("vllm:kv_cache_usage_perc") == 0.75
    assert scrape("reprise_queued_prefill_tokens") == 500
    assert scrape("reprise_store_tokens_per_second") == 77
    assert scrape("reprise_held_blocks", tier="store") == 9
    assert scrape("reprise_connected_routers") == 2


def test_a_step_histogram_counts_like_prometheus_own():
    registry = CollectorRegistry()
    ours = StepHistogram("ours", "text", TOKEN_BUCKETS, {"a": "b"})
    registry.register(ours)
    theirs = Histogram("theirs", "text", ["a"], buckets=TOKEN_BUCKETS, registry=registry).labels("b")
    for value, count in ((0.0, 3), (0.01, 2), (0.0100001, 1), (0.7, 4), (80.0, 1), (1000.0, 2)):
        ours.observe(value, count)
        for _ in range(count):
            theirs.observe(value)
    text = generate_latest(registry).decode()
    lines = [line for line in text.splitlines() if "_created" not in line]
    mine = [line.removeprefix("ours") for line in lines if line.startswith("ours")]
    assert mine == [line.removeprefix("theirs") for line in lines if line.startswith("theirs")]
    assert len(mine) == len(TOKEN_BUCKETS) + 3


def test_the_engines_counters_are_read_when_scraped():
    registry = CollectorRegistry()
    counters = Counters()
    memory = MemoryLedger(total=100, weights=40, kv=30, activations=10, driver=5, free=15)
    registry.register(EngineCollector(counters, lambda: memory, LABELS))
    counters.steps, counters.step_s, counters.prefill_tokens = 4, 0.5, 300
    assert registry.get_sample_value("reprise_step_seconds_count", LABELS) == 4
    assert registry.get_sample_value("reprise_step_seconds_sum", LABELS) == 0.5
    assert registry.get_sample_value("reprise_computed_prompt_tokens_total", LABELS) == 300
    assert registry.get_sample_value("reprise_gpu_memory_bytes", {**LABELS, "part": "kv"}) == 30
    assert registry.get_sample_value("reprise_late_kernels_total", LABELS) == 0
