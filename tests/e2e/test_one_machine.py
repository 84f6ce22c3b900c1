"""What a stranger does: start everything with one command, ask, stop."""

from __future__ import annotations

import json
import re
import shlex
import signal
import socket
import urllib.request
from pathlib import Path

import httpx
import pytest

from tests.e2e.parts import eventually
from tests.launch.started import DEMO_MODEL, Started, free_port

pytestmark = [pytest.mark.slow, pytest.mark.e2e]


REPLICA = "ray::ServeReplica:reprise:Worker"


def fetch(url: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> bytes:
    request = urllib.request.Request(url, data=body, headers=headers or {})
    with urllib.request.urlopen(request, timeout=60) as answer:
        content: bytes = answer.read()
        return content


def sample(metric: str, url: str) -> float:
    """Of the one sample of `metric`."""
    (number,) = re.findall(rf"^{metric}(?:\{{.*\}})? (\S+)$", fetch(url).decode(), re.MULTILINE)
    return float(number)


def test_the_banner_tells_the_truth_and_ctrl_c_stops_everything() -> None:
    port = free_port()
    with Started("--model", str(DEMO_MODEL), "--workers", "2", "--port", str(port)) as started:
        banner = started.lines_to("Ctrl-C")

        # The request, word for word as a shell would read it.
        command = re.search(r"curl (.*?-d '.*?')$", banner, re.DOTALL | re.MULTILINE)
        assert command
        url, _, header, _, body = shlex.split(command[1].replace("\\\n", ""))
        name, _, value = header.partition(": ")
        answer = json.loads(fetch(url, body.encode(), {name: value}))
        assert answer["choices"][0]["message"]["content"]
        assert answer["usage"]["completion_tokens"] > 0

        metrics = dict(re.findall(r"^  ([a-z ]+) metrics +(.*)$", banner, re.MULTILINE))
        assert b"reprise_router_" in fetch(metrics["router"])
        assert sample("reprise_store_up", metrics["cache store"]) == 1
        workers = metrics["worker"].split()
        assert len(set(workers)) == 2
        generated = sum(sample("vllm:generation_tokens_total", worker) for worker in workers)
        assert generated == answer["usage"]["completion_tokens"]

        # The workers write their blocks behind, to the Redis that the store's upkeep looks after.
        eventually(lambda: sample("reprise_store_blocks", metrics["cache store"]) > 0)

        # A worker killed in a stream: the other goes on with it, and Ray brings one back.
        replicas = [p for p in started.processes() if REPLICA in " ".join(p.cmdline())]
        assert len(replicas) == 2
        long = {**json.loads(body), "stream": True, "ignore_eos": True, "max_tokens": 400}
        with httpx.stream("POST", url, json=long, timeout=60) as stream:
            lines = stream.iter_lines()
            assert next(lines).startswith("data: {")
            # Which of them it is, Linux knows: the one that computes.
            spent = {p: sum(p.cpu_times()[:2]) for p in replicas}
            eventually(lambda: max(sum(p.cpu_times()[:2]) - spent[p] for p in replicas) > 1)
            max(replicas, key=lambda p: sum(p.cpu_times()[:2]) - spent[p]).kill()
            *_, finish, done = (line.removeprefix("data: ") for line in lines if line)
        assert json.loads(finish)["choices"][0]["finish_reason"] == "length"
        assert done == "[DONE]"
        router = url.partition("/v1")[0]
        (resumes,) = re.findall(r'^reprise_router_resumes_total{reason="worker_lost"} (\S+)$',
                                fetch(f"{router}/metrics").decode(), re.MULTILINE)  # fmt: skip
        assert float(resumes) == 1
        assert json.loads(fetch(url, body.encode(), {name: value}))["choices"]
        eventually(lambda: json.loads(fetch(f"{router}/ready"))["ready_workers"] == 2)

        for part in ("services.router", "services.cache_store", REPLICA):
            started.part(part)
        logs = re.search(r"^  logs +(.*)$", banner, re.MULTILINE)

        assert started.stop(signal.SIGINT) == (0, "")
        assert started.left() == []
        assert logs
        assert not Path(logs[1]).exists()
        with socket.create_server(("127.0.0.1", port)):
            pass  # the port is free again
