"""What Serve is told of a replica; tests/fleet/ has the replicas on a real Ray."""

from __future__ import annotations

import asyncio

import pydantic
import pytest

from services.wire.messages import PROTOCOL_VERSION, Stats
from services.worker.deployment import AppArgs, WorkerReplica, app

# Serve awaits a replica's __del__; here the garbage collector calls it too and finds nobody to await it.
pytestmark = pytest.mark.filterwarnings("ignore:coroutine 'WorkerReplica.__del__':RuntimeWarning")


class StandIn:
    """A worker in whatever state a test wants."""

    port, metrics_port = 9101, 9102

    def __init__(self, trouble: str = "", stats: Stats | None = None) -> None:
        self.trouble = lambda: trouble
        self.stats = lambda: stats
        self.calls: list[str] = []

    async def drain(self, timeout_s: float) -> bool:
        self.calls.append("drain")
        return True

    async def stop(self) -> None:
        self.calls.append("stop")


def replica(worker: StandIn) -> WorkerReplica:
    made = object.__new__(WorkerReplica)
    made.host, made.worker = "10.0.0.1", worker
    return made


def test_a_replica_publishes_where_it_is() -> None:
    made = replica(StandIn())
    assert made.record_replica_metadata() == {
        "host": "10.0.0.1", "port": 9101, "protocol": PROTOCOL_VERSION, "metrics_port": 9102,
    }  # fmt: skip
    assert made.metrics_url() == "http://10.0.0.1:9102/metrics"


def test_it_reports_the_seconds_that_a_new_request_would_wait() -> None:
    stats = Stats(3, 2, 5_000, 10, prefill_tokens_per_s=1_000, decode_step_s=0.01, store_tokens_per_s=0)
    made = replica(StandIn(stats=stats))
    assert made.record_autoscaling_stats() == {"predicted_wait_s": 5.0, "running": 3, "waiting": 2}


def test_it_reports_nothing_before_it_is_ready() -> None:
    made = replica(StandIn(stats=None))
    assert made.record_autoscaling_stats() == {}


def test_a_healthy_worker_passes_the_health_check() -> None:
    made = replica(StandIn())
    made.check_health()


def test_a_stalled_engine_fails_the_health_check_with_the_reason() -> None:
    made = replica(StandIn(trouble="the engine does not step"))
    with pytest.raises(RuntimeError, match="the engine does not step"):
        made.check_health()


def test_ending_a_replica_drains_before_it_stops() -> None:
    worker = StandIn()
    asyncio.run(replica(worker).__del__())
    assert worker.calls == ["drain", "stop"]


def test_a_stalled_engine_is_not_waited_for() -> None:
    worker = StandIn(trouble="the engine does not step")
    asyncio.run(replica(worker).__del__())
    assert worker.calls == []


def test_unknown_arguments_are_refused_by_name() -> None:
    with pytest.raises(pydantic.ValidationError, match="replica\n  Extra inputs are not permitted"):
        AppArgs(replica=2, worker={"model": "m"})


@pytest.mark.parametrize(
    ("device", "resources"), [("cpu", {"num_cpus": 0.1}), ("cuda", {"num_cpus": 1, "num_gpus": 1})]
)
def test_a_replica_asks_ray_for_a_gpu_only_when_it_uses_one(device: str, resources: dict) -> None:
    built = app(AppArgs(replicas=3, worker={"model": "m", "device": device}))
    options = built._bound_deployment
    assert options.num_replicas == 3
    assert {key: options.ray_actor_options[key] for key in resources} == resources
    assert ("num_gpus" in options.ray_actor_options) == ("num_gpus" in resources)
