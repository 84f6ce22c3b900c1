"""A Serve deployment with the life of a worker and none of the weight: it says where it is and drains."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy


class LightWorker:
    """Is busy while `directory/busy` exists; notes in `directory/drained` that it was left to finish."""

    async def __init__(self, directory: str, drain_s: float) -> None:
        self.directory = Path(directory)
        self.drain_s = drain_s
        self.server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port: int = self.server.sockets[0].getsockname()[1]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Any connection is told which process this is."""
        writer.write(str(os.getpid()).encode())
        writer.close()

    def record_replica_metadata(self) -> dict[str, Any]:
        return {"host": "127.0.0.1", "port": self.port}

    def record_autoscaling_stats(self) -> dict[str, float]:
        return {"predicted_wait_s": 1.5}

    async def __del__(self) -> None:
        for _ in range(int(self.drain_s / 0.05)):
            if not (self.directory / "busy").exists():
                break
            await asyncio.sleep(0.05)
        else:
            return
        with (self.directory / "drained").open("a") as file:
            file.write(f"{os.getpid()}\n")


def one_more_where_work_waits(context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
    """An autoscaling policy on what the replicas record: two replicas once any says that work waits."""
    waits = (context.aggregated_metrics or {}).get("predicted_wait_s", {}).values()
    return 2 if any(wait > 1 for wait in waits) else 1, {}


def scaled() -> AutoscalingConfig:
    return AutoscalingConfig(
        min_replicas=1,
        max_replicas=2,
        upscale_delay_s=0,
        metrics_interval_s=0.5,  # deprecated, but what is to replace it does nothing in 2.60
        policy=AutoscalingPolicy(policy_function="tests.fleet.replicas:one_more_where_work_waits"),
    )


def light_app(
    directory: Path, version: str = "1", autoscaling: AutoscalingConfig | None = None
) -> serve.Application:
    """Two replicas, or as many as `autoscaling` decides; a new `version` makes Serve replace them."""
    return serve.deployment(
        LightWorker,
        name="Worker",
        num_replicas=None if autoscaling else 2,
        autoscaling_config=autoscaling,
        health_check_period_s=1,
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=30,
        request_router_config={"request_router_class": "services.fleet.replica_observer:ReplicaObserver"},
        ray_actor_options={"num_cpus": 0.1, "runtime_env": {"env_vars": {"VERSION": version}}},
    ).bind(str(directory), 20)
