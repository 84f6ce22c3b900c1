"""What runs on one machine: in which order it starts, when it is ready, and that all of it stops."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from services.cache_store.embedded import LocalRedis, RedisUnavailable, find_or_start_redis, public_url
from services.launch.checks import StartError, check_model, check_port
from services.launch.local_ray import ray_environment
from services.launch.ray_host import METRICS, RAY_ADDRESS
from services.launch.ready import banner, wait_for_workers
from services.launch.supervisor import Child, ChildExited, Supervisor

HOST = "127.0.0.1"

#: What the cache store may hold, and what a Redis started here may use beyond that for its own accounts.
STORE_BYTES = 1 << 30
REDIS_BYTES = STORE_BYTES + (256 << 20)

#: After Ctrl-C, streams get so long to finish.
DRAIN_TIMEOUT_S = 3


@dataclass(frozen=True)
class Options:
    model: Path
    workers: int
    port: int


async def run(options: Options) -> None:
    """Start everything and keep it until told to stop.

    Raises StartError, ChildExited or StopRequested, when nothing runs any more. Only ChildExited leaves
    something behind: the logs, in the directory that its message names.
    """
    check_model(options.model)
    check_port(HOST, options.port)
    # Not below TMPDIR: the paths of Ray's sockets must stay short.
    directory = Path(tempfile.mkdtemp(prefix="reprise-", dir="/tmp"))
    redis: LocalRedis | None = None
    try:
        async with Supervisor(directory) as supervisor:
            try:
                redis_url, redis = find_or_start_redis(max_memory=REDIS_BYTES)
            except RedisUnavailable as error:
                raise StartError(str(error)) from error
            _say(f"Redis at {public_url(redis_url)}{', started for this run' if redis else ''}")
            if redis:
                supervisor.adopt(Child("Redis", redis.process, redis.directory / "log"))
                redis_url = redis.socket_url
            await _serve(options, supervisor, redis_url)
    except ChildExited as error:
        raise ChildExited(f"{error}\nlogs: {directory}") from error
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise
    finally:
        if redis:
            redis.stop()


async def _serve(options: Options, supervisor: Supervisor, redis_url: str) -> None:
    router_url = f"http://{HOST}:{options.port}"
    environment = {
        **os.environ,
        **ray_environment(),
        "REPRISE_CHANNEL_SECRET": os.environ.get("REPRISE_CHANNEL_SECRET") or secrets.token_hex(32),
        "REDIS_URL": redis_url,  # it may hold a password, which command lines would show to everybody
    }

    _say("starting Ray and the cache store")
    worker = {"model": str(options.model.resolve()), "store_bytes": STORE_BYTES}
    workers = supervisor.start(
        "workers",
        "services.launch.ray_host",
        str(supervisor.logs / "ray"),
        json.dumps({"replicas": options.workers, "worker": worker}),
        environment=environment,
        piped=True,
    )
    store = supervisor.start(
        "cache store",
        "services.cache_store",
        *("--capacity", str(STORE_BYTES)),
        environment=environment,
        piped=True,
    )
    ray_address = json.loads(await supervisor.watch(_line(workers)))[RAY_ADDRESS]

    _say(f"starting {options.workers} workers, which load {options.model.name}, and the router")
    supervisor.start(
        "router",
        "services.router",
        *("--host", HOST, "--port", str(options.port), "--drain-timeout", str(DRAIN_TIMEOUT_S)),
        *("--fleet", "ray"),
        environment={**environment, "RAY_ADDRESS": ray_address},
    )
    metrics = {
        "router": [f"{router_url}/metrics"],
        "cache store": [(await supervisor.watch(_line(store))).split()[-1]],
        "worker": json.loads(await supervisor.watch(_line(workers)))[METRICS],
    }
    await supervisor.watch(wait_for_workers(router_url, options.workers))

    print(banner(router_url, metrics, supervisor.logs), flush=True)
    await supervisor.watch(asyncio.Event().wait())


async def _line(child: Child) -> str:
    """The next line that a piped child tells us."""
    assert child.process.stdout is not None
    line = await asyncio.to_thread(child.process.stdout.readline)
    if not line:
        await asyncio.Event().wait()  # it has ended, which is not for us to report
    return line.decode()


def _say(progress: str) -> None:
    print(f"- {progress}", flush=True)
