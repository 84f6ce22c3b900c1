"""Workers killed at random while they answer: does any client notice?

    python -m benchmarks.chaos                                   # 4 workers, 200 streams, two minutes
    python -m benchmarks.chaos --tiny                            # real engines with a tiny random model
    python -m benchmarks.chaos --simulated                       # engines that compute nothing
    python -m benchmarks.chaos --workers 2 --streams 20 --seconds 30
    python -m benchmarks.chaos --model FOLDER --worker-options "--device cuda --kv-memory 8GiB"

Workers, a router and (for engines that compute) a Redis, all started for the purpose. Every stream has a
request of its own: greedy and sampled, with penalties, log-probabilities, stop strings, two choices, chat and
completion, streamed and whole. All are answered once undisturbed, all at the same time. Then every stream
asks again and again while a random worker gets SIGKILL every few seconds and starts again at once.

`failed`: no whole answer came. `different`: it is not the undisturbed one, to the last token. The gap is that
of an answer from the last token of one worker to the first of the next, as the router's histogram has it
(`reprise_router_resume_gap_seconds`, interpolated as Prometheus does). `left`: what router and workers hold
when all is over; must be empty. Exit status 1 if anything failed, differed or was left.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx

from services.cache_store.embedded import find_or_start_redis
from tests.fakes.checkpoint import write_tiny_checkpoint
from tests.fakes.until import until
from tests.launch.started import DEMO_MODEL, free_port

PROMPT_TOKENS = 40
#: Everything must have been paid back so long after the last answer.
SETTLE_S = 10.0
#: A worker that has not started by then never will.
START_S = 120.0

_PENALTIES = {"presence_penalty": 0.5, "frequency_penalty": 0.3, "repetition_penalty": 1.1}
_USAGE = {"stream": True, "stream_options": {"include_usage": True}}

#: What the streams ask for, in turn. A `prompt` or `messages` and a seed are added.
KINDS: tuple[dict[str, Any], ...] = (
    {"temperature": 0, "stream": True},
    {"temperature": 0},
    {"temperature": 0, **_PENALTIES, **_USAGE},
    {"stream": True},
    {"temperature": 0.9, **_PENALTIES, "stream": True},
    {"top_p": 0.8, "top_k": 50, "min_p": 0.01, **_USAGE},
    {"logit_bias": {"97": 3, "98": -3}},
    {"min_tokens": 20, "ignore_eos": False, "stream": True},
    {"stop": ["e", "zz", " of"], "min_tokens": 5, "stream": True},
    {"logprobs": 3},
    {"logprobs": 3, "stream": True},
    {"n": 2, "stream": True},
    {"n": 2},
    {"chat": True, **_USAGE},
    {"chat": True},
    {"chat": True, "n": 2, "logprobs": True, "top_logprobs": 2, "stream": True},
)


@dataclass(frozen=True)
class Plan:
    """What is done to whom."""

    worker: tuple[str, ...]  # module and options of a worker
    workers: int = 4
    streams: int = 200
    seconds: float = 120.0
    kill_every_s: float = 5.0
    tokens: int = 100  # of an answer
    seed: int = 0


@dataclass
class Result:
    undisturbed_s: float = 0.0
    answers: int = 0
    kills: int = 0
    failed: list[str] = field(default_factory=list)
    different: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    resumes: int = 0
    retries: int = 0
    gap_p50_s: float = 0.0
    gap_p95_s: float = 0.0
    resumed_tokens: dict[str, int] = field(default_factory=dict)  # by where their KV came from

    @property
    def good(self) -> bool:
        return not (self.failed or self.different or self.left)


# ---- processes -----------------------------------------------------------------------------------


class Process:
    """`python -m …` that prints one line when it is ready, and may be killed and started again."""

    def __init__(self, name: str, *arguments: str) -> None:
        self.name = name
        self.ready = ""  # that line; empty while there is none
        self._arguments = arguments
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Returns when it is ready; exits the benchmark when it never is."""
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", *self._arguments),
            env={**os.environ, "REPRISE_CHANNEL_SECRET": "chaos"},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
        assert self._process.stdout is not None
        async with asyncio.timeout(START_S):
            self.ready = (await self._process.stdout.readline()).decode().strip()
        if not self.ready:
            sys.exit(f"chaos: {self.name} did not start: python -m {' '.join(self._arguments)}")

    async def end(self, number: signal.Signals = signal.SIGKILL) -> None:
        assert self._process is not None
        self.ready = ""
        if self._process.returncode is None:
            self._process.send_signal(number)
        await self._process.wait()

    async def metrics(self) -> str:
        """What it tells Prometheus; empty if it tells nothing."""
        found = re.search(r"metrics=(\S+)", self.ready)
        return (await _get(found[1])) if found else ""


def _ready(url: str) -> int:
    """Workers that the router can use."""
    ready: int = httpx.get(f"{url}/ready").json()["ready_workers"]
    return ready


async def _get(url: str) -> str:
    async with httpx.AsyncClient(timeout=30) as client:
        return (await client.get(url)).text


@asynccontextmanager
async def fleet(plan: Plan) -> AsyncIterator[tuple[str, list[Process]]]:
    """The router's URL and the workers behind it, all of them ready."""
    async with AsyncExitStack() as stack:
        ports = [free_port() for _ in range(plan.workers)]
        workers = [
            Process(f"w{i}", *plan.worker, "--name", f"w{i}", "--port", str(port))
            for i, port in enumerate(ports)
        ]
        for worker in workers:
            stack.push_async_callback(worker.end)
        await asyncio.gather(*(worker.start() for worker in workers))
        channels = ",".join(f"127.0.0.1:{port}" for port in ports)
        router = Process("router", "services.router", "--port", "0", "--workers", channels)
        stack.push_async_callback(router.end)
        await router.start()
        url = router.ready.removeprefix("ready ")
        await until(lambda: _ready(url) == plan.workers, START_S)
        yield url, workers


# ---- one client ----------------------------------------------------------------------------------


def request(stream: int, plan: Plan, model: str) -> dict[str, Any]:
    """The one request that this stream asks again and again."""
    kind = dict(KINDS[stream % len(KINDS)])
    rng = random.Random(plan.seed * 1_000_003 + stream)
    text = "".join(rng.choice("abcdefgh ,.") for _ in range(PROMPT_TOKENS))
    chat = kind.pop("chat", False)
    prompt = {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
    common = {"model": model, "max_tokens": plan.tokens, "seed": stream, "ignore_eos": True}
    return {**common, **prompt, **kind}


async def ask(client: httpx.AsyncClient, body: dict[str, Any]) -> dict[str, Any]:
    """What the client has in the end: by choice text, finish reason and log-probabilities; and the usage.

    Raises ValueError for an answer that is not whole."""
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    if body.get("stream"):
        async with client.stream("POST", path, json=body) as answer:
            if answer.status_code != 200:
                raise ValueError(f"{answer.status_code} {(await answer.aread()).decode()}")
            documents = [document async for document in _events(answer)]
    else:
        answer = await client.post(path, json=body)
        if answer.status_code != 200:
            raise ValueError(f"{answer.status_code} {answer.text}")
        documents = [answer.json()]
    if len({document["id"] for document in documents}) != 1:
        raise ValueError("one answer has several ids")
    choices: dict[int, dict[str, Any]] = {}
    usage = None
    for document in documents:
        usage = document.get("usage") or usage
        for part in document["choices"]:
            choice = choices.setdefault(part["index"], {"text": "", "finish": None, "logprobs": []})
            if choice["finish"]:
                raise ValueError("a choice goes on after its end")
            said = part.get("delta") or part.get("message") or {"content": part.get("text")}
            choice["text"] += said.get("content") or ""
            choice["finish"] = part["finish_reason"]
            choice["logprobs"] += _logprobs(part["logprobs"])
    if not all(choice["finish"] for choice in choices.values()):
        raise ValueError("an answer without an end")
    return {"choices": choices, "usage": usage and (usage["prompt_tokens"], usage["completion_tokens"])}


async def _events(answer: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    rest = b""
    async for data in answer.aiter_bytes():  # not httpx's lines: it ends them at U+2028 and its like, too
        *events, rest = (rest + data).split(b"\n\n")
        for line in events:
            if line == b"data: [DONE]":
                return
            event = json.loads(line.removeprefix(b"data: "))
            if "error" in event:
                raise ValueError(f"an error event: {event['error']}")
            yield event
    raise ValueError("a stream without an end")


def _logprobs(logprobs: dict[str, Any] | None) -> list[tuple[str, float]]:
    if logprobs is None:
        return []
    if "content" in logprobs:
        return [(entry["token"], entry["logprob"]) for entry in logprobs["content"]]
    return list(zip(logprobs["tokens"], logprobs["token_logprobs"], strict=True))


def difference(answer: dict[str, Any], expected: dict[str, Any]) -> str:
    """Where an answer is not the expected one; empty if it is. Log-probabilities of one token agree within
    1e-3: a prefill rounds otherwise than a decode."""
    if answer["usage"] != expected["usage"]:
        return f"usage {answer['usage']} instead of {expected['usage']}"
    for index, choice in expected["choices"].items():
        mine = answer["choices"].get(index, {})
        for name in ("text", "finish"):
            if mine.get(name) != choice[name]:
                return f"{name} {mine.get(name)!r} instead of {choice[name]!r}"
        pairs = zip(mine["logprobs"], choice["logprobs"], strict=True)
        if any(left[0] != right[0] or abs(left[1] - right[1]) > 1e-3 for left, right in pairs):
            return f"log-probabilities {mine['logprobs']} instead of {choice['logprobs']}"
    return ""


# ---- all of them ---------------------------------------------------------------------------------


async def chaos(plan: Plan) -> Result:
    """Run the plan."""
    result = Result()
    async with fleet(plan) as (url, workers):
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=plan.streams)
        async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client:
            model = (await client.get("/v1/models")).json()["data"][0]["id"]
            requests = [request(i, plan, model) for i in range(plan.streams)]
            began_s = time.monotonic()
            expected = await asyncio.gather(*(ask(client, body) for body in requests))
            result.undisturbed_s = time.monotonic() - began_s

            async def stream(number: int, until_s: float) -> None:
                while time.monotonic() < until_s:
                    who = f"stream {number} ({_kind(requests[number])})"
                    try:
                        answer = await ask(client, requests[number])
                    except (ValueError, httpx.HTTPError) as error:
                        result.failed.append(f"{who}: {type(error).__name__} {error}")
                    else:
                        if where := difference(answer, expected[number]):
                            result.different.append(f"{who}: {where}")
                    result.answers += 1

            until_s = time.monotonic() + plan.seconds
            killer = asyncio.create_task(_kill(workers, plan, result, until_s))
            try:
                await asyncio.gather(*(stream(number, until_s) for number in range(plan.streams)))
                await killer
            finally:
                killer.cancel()
            result.left = await _settled(url, workers)
        told = await _get(f"{url}/metrics")
    result.resumes = int(_total(told, "reprise_router_resumes_total"))
    result.retries = int(_total(told, "reprise_router_retries_total"))
    result.gap_p50_s, result.gap_p95_s = (quantile(told, q) for q in (0.5, 0.95))
    result.resumed_tokens = {
        labels.partition('source="')[2].partition('"')[0]: int(tokens)
        for labels, tokens in _samples(told, "reprise_router_resumed_tokens_total")
    }
    return result


async def _kill(workers: list[Process], plan: Plan, result: Result, until_s: float) -> None:
    """SIGKILL a random worker of those that run, again and again; returns once all of them run again."""
    rng = random.Random(plan.seed)
    restarts: list[asyncio.Task[None]] = []
    while time.monotonic() + plan.kill_every_s < until_s:
        await asyncio.sleep(plan.kill_every_s)
        running = [worker for worker in workers if worker.ready]
        if running:
            worker = rng.choice(running)
            await worker.end()
            result.kills += 1
            restarts.append(asyncio.create_task(worker.start()))
    await asyncio.gather(*restarts)


async def _settled(url: str, workers: list[Process]) -> list[str]:
    """What is still held SETTLE_S after the end, empty as soon as nothing is."""
    deadline_s = time.monotonic() + SETTLE_S
    while True:
        told = {"router": await _get(f"{url}/metrics")}
        told |= {worker.name: await worker.metrics() for worker in workers}
        left = [
            f"{name}: {line}"
            for name, text in told.items()
            for line in text.splitlines()
            if line.startswith(
                (
                    "reprise_router_queue_length{",
                    "reprise_router_requests_on_workers{",
                    "vllm:num_requests_running{",
                    "vllm:num_requests_waiting{",
                    "vllm:kv_cache_usage_perc{",
                )
            )
            and float(line.split()[-1])
        ]
        if not left or time.monotonic() > deadline_s:
            return left
        await asyncio.sleep(0.2)


def _kind(body: dict[str, Any]) -> str:
    common = ("model", "prompt", "messages", "max_tokens", "seed", "ignore_eos")
    return ", ".join(f"{name}={value}" for name, value in body.items() if name not in common)


def _samples(text: str, name: str) -> list[tuple[str, float]]:
    """(labels, value) of every sample of a metric."""
    found = re.findall(rf"^{name}(?:{{(.*)}})? (\S+)$", text, re.MULTILINE)
    return [(labels, float(value)) for labels, value in found]


def _total(text: str, name: str) -> float:
    return sum(value for _, value in _samples(text, name))


def quantile(text: str, q: float, name: str = "reprise_router_resume_gap_seconds") -> float:
    """As Prometheus' histogram_quantile has it, over all label values; 0 without samples."""
    buckets: Counter[float] = Counter()
    for labels, count in _samples(text, f"{name}_bucket"):
        bound = re.search(r'le="([^"]+)"', labels)
        assert bound is not None
        buckets[float(bound[1])] += int(count)
    below, low = 0, 0.0
    for bound_s in sorted(buckets):
        count = buckets[bound_s]
        if count >= q * buckets[float("inf")] and count > below:
            if bound_s == float("inf"):
                return low
            return low + (bound_s - low) * (q * buckets[float("inf")] - below) / (count - below)
        below, low = count, bound_s
    return 0.0


def report(plan: Plan, result: Result) -> str:
    head = f"{plan.workers} workers, {plan.streams} streams, a worker killed every {plan.kill_every_s:g} s"
    sources = ", ".join(f"{tokens} {source}" for source, tokens in result.resumed_tokens.items() if tokens)
    lines = [
        f"{head} for {plan.seconds:g} s",
        f"  undisturbed    {result.undisturbed_s:8.1f} s for one answer of each stream",
        f"  answers        {result.answers:8}",
        f"  kills          {result.kills:8}",
        f"  resumes        {result.resumes:8}   before the first token: {result.retries}",
        f"  gap p50, p95   {result.gap_p50_s:8.3f} s {result.gap_p95_s:.3f} s",
        f"  KV, tokens     {sources:>8}",
        f"  failed         {len(result.failed):8}",
        f"  different      {len(result.different):8}",
        f"  left           {len(result.left):8}",
    ]
    return "\n".join(lines + [f"  {line}" for line in result.failed + result.different + result.left])


def main() -> int:
    options = _parser().parse_args()
    redis = None
    with tempfile.TemporaryDirectory(prefix="reprise-chaos-") as folder:
        worker: tuple[str, ...]
        if options.simulated:
            worker = ("tests.fakes.worker", "--sampled", "--step-ms", str(options.step_ms))
        else:
            model = write_tiny_checkpoint(Path(folder) / "tiny") if options.tiny else options.model
            url, redis = find_or_start_redis(max_memory=2 << 30)
            limits = f"--kv-memory 512MiB --store-capacity 1GiB --max-running {options.streams}".split()
            worker = ("services.worker", "--model", str(model), "--threads", "1", "--redis", url, *limits)
            worker += tuple(options.worker_options.split())
        plan = Plan(
            worker,
            workers=options.workers,
            streams=options.streams,
            seconds=options.seconds,
            kill_every_s=options.kill_every,
            tokens=options.tokens,
            seed=options.seed,
        )
        try:
            result = asyncio.run(chaos(plan))
        finally:
            if redis:
                redis.stop()
    print(report(plan, result))
    if options.json:
        options.json.write_text(json.dumps({"plan": asdict(plan), "result": asdict(result)}, indent=1))
    return 0 if result.good else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else "")
    add = parser.add_argument
    engine = parser.add_mutually_exclusive_group()
    engine.add_argument(
        "--model", type=Path, default=DEMO_MODEL, metavar="PATH", help="(default: the demo model)"
    )
    engine.add_argument("--tiny", action="store_true", help="a random Llama of 100 kB instead")
    engine.add_argument("--simulated", action="store_true", help="engines that compute nothing")
    add("--workers", type=int, default=4, help="(default %(default)s)")
    add("--streams", type=int, default=200, help="at the same time (default %(default)s)")
    add("--seconds", type=float, default=120.0, help="of killing (default %(default)g)")
    add("--kill-every", type=float, default=5.0, metavar="S", help="(default %(default)g s)")
    add("--tokens", type=int, default=100, help="of an answer (default %(default)s)")
    add(
        "--worker-options",
        default="",
        metavar="'--NAME VALUE …'",
        help="of real workers, `--device cuda` say",
    )
    add("--step-ms", type=float, default=25.0, help="of a simulated engine (default %(default)g)")
    add("--seed", type=int, default=0, help="(default %(default)s)")
    add("--json", type=Path, metavar="FILE", help="write the figures there too")
    return parser


if __name__ == "__main__":
    sys.exit(main())
