"""Workers, a router and a Redis as processes of their own, without Ray."""

from __future__ import annotations

import json
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openai import OpenAI

from tests.router.processes import first_line, start

SECRET = "end-to-end"


@dataclass
class WorkerProcess:
    name: str
    process: subprocess.Popen[str]
    channel: str
    metrics_url: str

    def metric(self, name: str, **labels: str) -> float:
        """Sum of the samples of a metric that have these labels."""
        with urllib.request.urlopen(self.metrics_url, timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        wanted = [f'{label}="{value}"' for label, value in labels.items()]
        return sum(
            float(line.split()[-1])
            for line in lines
            if line.startswith((f"{name}{{", f"{name} ")) and all(label in line for label in wanted)
        )


@dataclass
class Stack:
    """A router over `workers`; `client` is the official one."""

    url: str
    client: OpenAI
    workers: dict[str, WorkerProcess] = field(default_factory=dict)

    @property
    def model(self) -> str:
        """The id of the one model served."""
        return self.client.models.list().data[0].id

    def ready_workers(self) -> int:
        try:
            with urllib.request.urlopen(f"{self.url}/ready", timeout=10) as answer:
                count: int = json.load(answer)["ready_workers"]
                return count
        except OSError:
            return 0


@contextmanager
def worker(name: str, model: Path, *options: str) -> Iterator[WorkerProcess]:
    process = start(
        "services.worker", "--model", str(model), "--name", name, "--threads", "1", *options,
        REPRISE_CHANNEL_SECRET=SECRET,
    )  # fmt: skip
    try:
        words = dict(word.partition("=")[::2] for word in first_line(process).split())
        yield WorkerProcess(name, process, words["channel"], words["metrics"])
    finally:
        process.kill()
        process.communicate(timeout=20)


@contextmanager
def router(*workers: WorkerProcess) -> Iterator[Stack]:
    """A router that sees these workers."""
    channels = ",".join(w.channel for w in workers)
    with ExitStack() as parts:
        process = start(
            "services.router", "--port", "0", "--workers", channels, REPRISE_CHANNEL_SECRET=SECRET
        )
        parts.callback(process.communicate, timeout=20)
        parts.callback(process.kill)
        url = first_line(process).removeprefix("ready ")
        client = parts.enter_context(OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0))
        running = Stack(url, client, {w.name: w for w in workers})
        eventually(lambda: running.ready_workers() == len(workers))
        yield running


@contextmanager
def stack(model: Path, workers: int, *options: str) -> Iterator[Stack]:
    """`workers` workers w0, w1, … started with `options`, and a router that sees them all."""
    with ExitStack() as parts:
        started = [parts.enter_context(worker(f"w{i}", model, *options)) for i in range(workers)]
        yield parts.enter_context(router(*started))


def eventually(condition: Callable[[], object], timeout_s: float = 30.0) -> None:
    """Return when `condition()` is true; fail the test when it is not in time."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"not so within {timeout_s:g} s"
        time.sleep(0.02)


def route_of(headers: Any) -> dict[str, str]:
    """The fields of `x-reprise-route`."""
    pairs = (item.partition("=") for item in headers["x-reprise-route"].split(";"))
    return {key.strip(): value.strip() for key, _, value in pairs}
