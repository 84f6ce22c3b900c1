"""Workers as a Ray Serve deployment: Ray Serve places, restarts, scales and updates them and sees no token.

Every replica is the worker of `process.py` in Serve's event loop. It opens its own token channel on a free
port and publishes where, which is how routers find it (`services.fleet.ray_serve`). On a cluster, with
REDIS_URL and REPRISE_CHANNEL_SECRET in the environment of Ray's nodes:

    serve run services.worker.deployment:app replicas=8 worker='{model: /models/m, device: cuda}'

or the same as `import_path` and `args` of a Serve config file. Routers belong in no Serve application, least
of all in this one: deploying an application replaces all of its deployments.
"""

import logging
import os
from typing import Any

import ray
from pydantic import BaseModel, Field
from ray import serve

from services.wire.messages import PROTOCOL_VERSION

APP = "reprise"  # name of the Serve application, unless `serve run --name` says otherwise
DEPLOYMENT = "Worker"

#: Longer than any stream should be: Serve kills a replica that has not drained by then.
DRAIN_TIMEOUT_S = 120.0


class AppArgs(BaseModel, extra="forbid"):
    """What `serve run`, or `args` in a Serve config file, may say."""

    replicas: int = Field(default=1, ge=1)
    worker: dict[str, Any] = Field(description="fields of WorkerConfig; `engine` those of EngineConfig")


class WorkerReplica:
    """The methods that Serve calls on a replica, in the event loop that the channel runs in."""

    async def __init__(self, args: AppArgs) -> None:  # type: ignore[misc]  # Serve awaits it
        # Here and not above: whoever only deploys needs neither torch nor a GPU.
        from services.worker.config import EngineConfig
        from services.worker.process import Worker, WorkerConfig

        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        self.host = ray.util.get_node_ip_address()
        settings = {
            "name": f"worker-{serve.get_replica_context().replica_id.unique_id}",
            "host": self.host,
            # Serve shows arguments to whoever asks it, so what holds a password comes in the environment.
            "secret": os.environ.get("REPRISE_CHANNEL_SECRET", "").encode(),
            "redis_url": os.environ.get("REDIS_URL"),
            **args.worker,
        }
        device = settings.get("device", "cpu")
        settings["engine"] = EngineConfig.for_device(device, **settings.get("engine", {}))
        if device == "cpu":
            # Replicas on one machine share its cores; more threads than cores would halve the speed of all.
            cores = len(os.sched_getaffinity(0))
            settings.setdefault("threads", max(1, cores // args.replicas))
        self.worker = Worker(WorkerConfig(**settings))
        await self.worker.start()

    def record_replica_metadata(self) -> dict[str, Any]:
        """Asked once, when the replica is ready; pushed to every process that holds a handle."""
        return {
            "host": self.host,
            "port": self.worker.port,
            "protocol": PROTOCOL_VERSION,
            "metrics_port": self.worker.metrics_port,
        }

    def record_autoscaling_stats(self) -> dict[str, float]:
        """For an autoscaling policy: seconds of prefill that a new request would wait for, and the load."""
        stats = self.worker.stats()
        if stats is None:
            return {}
        rate = stats.prefill_tokens_per_s
        return {
            "predicted_wait_s": stats.queued_prefill_tokens / rate if rate else 0.0,
            "running": stats.running,
            "waiting": stats.waiting,
        }

    def check_health(self) -> None:
        if trouble := self.worker.trouble():
            raise RuntimeError(trouble)

    def metrics_url(self) -> str:
        return f"http://{self.host}:{self.worker.metrics_port}/metrics"

    async def __del__(self) -> None:
        """Serve awaits this before it ends a replica, for as long as `graceful_shutdown_timeout_s`."""
        worker = getattr(self, "worker", None)
        if worker is None or worker.trouble():
            return  # nothing is running, or nothing gets on
        await worker.drain(DRAIN_TIMEOUT_S)
        await worker.stop()


def app(args: AppArgs) -> serve.Application:
    """The Serve application of the workers."""
    on_gpu = not str(args.worker.get("device", "cpu")).startswith("cpu")
    deployment = serve.deployment(
        WorkerReplica,
        name=DEPLOYMENT,
        num_replicas=args.replicas,
        max_ongoing_requests=1000,  # control calls only, but the default of 5 would queue them
        health_check_period_s=1,
        health_check_timeout_s=10,
        graceful_shutdown_timeout_s=DRAIN_TIMEOUT_S,
        graceful_shutdown_wait_loop_s=0.1,  # how often Serve looks for requests of its own; it has none
        request_router_config={"request_router_class": "services.fleet.replica_observer:ReplicaObserver"},
        # On the CPU Ray's bookkeeping of cores would only refuse what the machine can run.
        ray_actor_options={"num_cpus": 1, "num_gpus": 1} if on_gpu else {"num_cpus": 0.1},
    )
    return deployment.bind(args)
