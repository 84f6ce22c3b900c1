"""The token path: fake workers, the token channel, the router, and clients that read server-sent events.

    python -m benchmarks.channel                                  # both rows at both rates
    python -m benchmarks.channel --rows router --step-ms 12.5     # 256 clients at 20,480 tokens/s
    python -m benchmarks.channel --json results/channel.json

Row `channel`: worker processes -> `WorkerChannel` and its sinks in this process, no HTTP. Row `router`:
worker processes -> one router process -> SSE clients in this process. Engines compute nothing, so all CPU is
the path's; the fake engines run on threads of their own, whose share of the workers' is told apart. Each
token carries the time it was made, so a delay is from engine to reader. Times hold for this machine with all
of it on it; CPU a token is the robust figure.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import platform
import re
import signal
import statistics
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import psutil
import uvloop

from services.wire.channel import WorkerChannel
from services.wire.hashes import chain_hashes, join_hashes, pack_tokens, root_hash
from services.wire.messages import SamplingParams, StepItem
from tests.fakes.clock import CLOCK_S, CLOCK_TOKENS
from tests.fakes.text import FAKE_VOCAB
from tests.fakes.until import until

ROOT = Path(__file__).parents[1]
WARM_UP_S = 3.0
#: Delays are taken from every so many-th stream: reading the clock for all would cost more than the path.
SAMPLED = 8


@dataclass(frozen=True)
class Load:
    """A closed loop: every stream asks again when its answer is complete."""

    streams: int
    workers: int
    prompt_tokens: int
    answer_tokens: int
    step_ms: float
    seconds: float

    @property
    def offered(self) -> float:
        """Tokens/s if nothing ever waited: the first token comes at once, then one a step."""
        return self.streams * self.answer_tokens / ((self.answer_tokens - 1) * self.step_ms / 1000)


@dataclass
class Meter:
    """What readers saw in the measured window."""

    on: bool = False
    tokens: int = 0
    answers: int = 0
    wrong: int = 0  # answers with another number of tokens than asked for
    first_s: list[float] = field(default_factory=list)
    delays_s: list[float] = field(default_factory=list)

    def arrived(self, words: Iterable[int]) -> None:
        """Words of the clock were read just now."""
        now = time.monotonic() / CLOCK_S
        self.delays_s += [(now - word) % CLOCK_TOKENS * CLOCK_S for word in words]


@dataclass(frozen=True)
class Row:
    name: str
    offered_tok_s: float
    tok_s: float
    ttft_p50_ms: float
    ttft_p99_ms: float
    delay_p50_ms: float
    delay_p99_ms: float
    cores: dict[str, float]  # by role
    us_per_token: dict[str, float]  # CPU by role; `engines` is part of `workers`; `path`: all but clients
    answers: int
    wrong: int


# ---- readers -------------------------------------------------------------------------------------


class ChannelReader:
    """One stream straight from the channel."""

    def __init__(self, channel: WorkerChannel, load: Load, meter: Meter, number: int) -> None:
        self._channel = channel
        self._load = load
        self._meter = meter
        self._number = number
        self._received = 0

    def ask(self) -> None:
        assert self._channel.hello
        tokens = pack_tokens([(self._number + n) % 256 for n in range(self._load.prompt_tokens)])
        root = root_hash(self._channel.hello.model.fingerprint)
        hashes = join_hashes(chain_hashes(root, tokens, self._channel.hello.block_size))
        self._asked_s = time.monotonic()
        self._received = 0
        sampling = SamplingParams(max_tokens=self._load.answer_tokens)
        self._channel.submit(self._sink, tokens=tokens, root=root, hashes=hashes, sampling=sampling)

    def _sink(self, item: StepItem) -> None:
        meter = self._meter
        if meter.on:
            meter.tokens += len(item.tokens)
            if item.start:
                meter.first_s.append(time.monotonic() - self._asked_s)
            if self._number % SAMPLED == 0:
                meter.arrived(token - FAKE_VOCAB for token in item.tokens)
        self._received += len(item.tokens)
        if item.finish:
            meter.answers += meter.on
            meter.wrong += self._received != self._load.answer_tokens
            if item.finish.error_kind != "worker_lost":
                self.ask()


class SseReader(asyncio.Protocol):
    """One HTTP client on a kept connection, reading no more of the answer than it must."""

    WORD = re.compile(rb" (\d{5})")
    END = b"\r\n0\r\n\r\n"

    def __init__(self, load: Load, meter: Meter, number: int) -> None:
        body = json.dumps(
            {
                "model": "fake",
                "messages": [{"role": "user", "content": f"{number:x>{load.prompt_tokens}}"}],
                "max_tokens": load.answer_tokens,
                "stream": True,
            }
        )
        self._request = (
            "POST /v1/chat/completions HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\n\r\n{body}"
        ).encode()
        self._load = load
        self._meter = meter
        self._sampled = number % SAMPLED == 0
        self._rest = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self.ask()

    def ask(self) -> None:
        self._in_head = True
        self._received = 0
        self._asked_s = time.monotonic()
        self._transport.write(self._request)  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        data = self._rest + data
        if self._in_head:
            head, separator, data = data.partition(b"\r\n\r\n")
            if not separator:
                self._rest = head
                return
            if not head.startswith(b"HTTP/1.1 200"):
                raise RuntimeError(f"the router answered {head.splitlines()[0]!r} {data!r}")
            self._in_head = False
        whole = data.rfind(b"\n\n") + 2  # behind the last complete event
        words = self.WORD.findall(data, 0, whole)
        meter = self._meter
        if words and meter.on:
            meter.tokens += len(words)
            if not self._received:
                meter.first_s.append(time.monotonic() - self._asked_s)
            if self._sampled:
                meter.arrived(map(int, words))
        self._received += len(words)
        if data.endswith(self.END):
            self._rest = b""
            meter.answers += meter.on
            meter.wrong += self._received != self._load.answer_tokens
            self.ask()
        else:
            self._rest = data[whole:]


class Deaf:
    """A listener that has no use for what workers tell."""

    def __getattr__(self, name: str) -> Callable[[object], None]:
        return lambda value: None


# ---- processes -----------------------------------------------------------------------------------


@asynccontextmanager
async def process(*arguments: str) -> AsyncIterator[tuple[psutil.Process, str]]:
    """A Python process that has printed its `ready` line; ended on leaving."""
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", *arguments, cwd=ROOT, stdout=asyncio.subprocess.PIPE
    )
    assert child.stdout
    try:
        line = (await asyncio.wait_for(child.stdout.readline(), 60)).decode()
        if not line.startswith("ready "):
            raise RuntimeError(f"{' '.join(arguments)} did not start: {line!r}")
        yield psutil.Process(child.pid), line
    finally:
        if child.returncode is None:
            child.send_signal(signal.SIGTERM)
            try:
                await asyncio.wait_for(child.wait(), 5)
            except TimeoutError:
                child.kill()
                await child.wait()


async def start_workers(load: Load, stack: AsyncExitStack) -> tuple[list[psutil.Process], list[str]]:
    """Processes and channel addresses."""
    processes, addresses = [], []
    for n in range(load.workers):
        child, line = await stack.enter_async_context(
            process(
                "tests.fakes.worker",
                *("--clock", "--name", f"w{n}", "--step-ms", str(load.step_ms), "--drain-timeout", "0"),
                *("--max-running", str(load.streams)),
            )
        )
        processes.append(child)
        addresses.append(line.split("channel=")[1].strip())
    return processes, addresses


# ---- rows ----------------------------------------------------------------------------------------


async def measure(name: str, load: Load, meter: Meter, roles: dict[str, list[psutil.Process]]) -> Row:
    """Let it warm up, then read everybody's CPU around the measured window."""

    def cpu_s() -> dict[str, float]:
        used = {role: sum(map(_cpu_s, processes)) for role, processes in roles.items()}
        return used | {"engines": sum(map(_other_threads_cpu_s, roles["workers"]))}

    await asyncio.sleep(WARM_UP_S)
    before, started_s, meter.on = cpu_s(), time.monotonic(), True
    await asyncio.sleep(load.seconds)
    meter.on = False
    seconds, after = time.monotonic() - started_s, cpu_s()
    if not meter.tokens or not meter.first_s:
        raise RuntimeError("no tokens in the measured window")
    used = {role: after[role] - before[role] for role in after}
    us_per_token = {role: cpu / meter.tokens * 1e6 for role, cpu in used.items()}
    us_per_token["path"] = us_per_token["router"] + us_per_token["workers"]
    first, delays = _percentiles_ms(meter.first_s), _percentiles_ms(meter.delays_s)
    return Row(
        name,
        load.offered,
        meter.tokens / seconds,
        *first,
        *delays,
        {role: cpu / seconds for role, cpu in used.items()},
        us_per_token,
        meter.answers,
        meter.wrong,
    )


async def channel_row(load: Load) -> Row:
    async with AsyncExitStack() as stack:
        workers, addresses = await start_workers(load, stack)
        channels = []
        for address in addresses:
            host, port = address.split(":")
            channel = WorkerChannel(host, int(port), secret=_secret(), router_id="bench", listener=Deaf())
            task = asyncio.create_task(channel.run())
            stack.callback(task.cancel)
            channels.append(channel)
        await until(lambda: all(channel.hello for channel in channels))
        meter = Meter()
        for number, channel in zip(range(load.streams), itertools.cycle(channels)):
            ChannelReader(channel, load, meter, number).ask()
            await asyncio.sleep(1 / load.streams)
        return await measure("channel", load, meter, {"router": [psutil.Process()], "workers": workers})


async def router_row(load: Load) -> Row:
    async with AsyncExitStack() as stack:
        workers, addresses = await start_workers(load, stack)
        router, line = await stack.enter_async_context(
            process(
                "services.router",
                *("--workers", ",".join(addresses), "--port", "0", "--drain-timeout", "0"),
                *("--log-level", "warning"),
            )
        )
        host, port = line.split("//")[1].strip().split(":")
        await _until_ready(host, int(port))
        meter = Meter()
        loop = asyncio.get_running_loop()
        for number in range(load.streams):
            reader = partial(SseReader, load, meter, number)
            transport, _ = await loop.create_connection(reader, host, int(port))
            stack.callback(transport.abort)
            await asyncio.sleep(1 / load.streams)
        roles = {"router": [router], "workers": workers, "clients": [psutil.Process()]}
        return await measure("router", load, meter, roles)


async def _until_ready(host: str, port: int, timeout_s: float = 30.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        reader, writer = await asyncio.open_connection(host, port)
        writer.write(b"GET /ready HTTP/1.1\r\nhost: bench\r\nconnection: close\r\n\r\n")
        answer = await reader.read()
        writer.close()
        if answer.startswith(b"HTTP/1.1 200"):
            return
        await asyncio.sleep(0.05)
    raise RuntimeError(f"the router was not ready within {timeout_s:g} s: {answer!r}")


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _other_threads_cpu_s(process: psutil.Process) -> float:
    """Of all threads but the main one, on which the event loop runs."""
    others = [thread for thread in process.threads() if thread.id != process.pid]
    return float(sum(thread.user_time + thread.system_time for thread in others))


def _percentiles_ms(seconds: list[float]) -> tuple[float, float]:
    cuts = statistics.quantiles(seconds, n=100)
    return cuts[49] * 1e3, cuts[98] * 1e3


def _secret() -> bytes:
    return os.environ.get("REPRISE_CHANNEL_SECRET", "").encode()


# ---- report --------------------------------------------------------------------------------------


def render(rows: list[Row], heading: bool = True) -> str:
    columns = ["", "offered", "tok/s", "TTFT p50/p99 ms", "delay p50/p99 ms", "path", "router", "workers"]
    columns += ["(engines)", "cores router/workers/clients", "answers", "wrong"]
    widths = [max(8, len(column)) for column in columns]
    lines = [columns] if heading else []
    for row in rows:
        us = row.us_per_token
        cores = [row.cores[role] for role in ("router", "workers", "clients") if role in row.cores]
        lines.append(
            [
                row.name,
                f"{row.offered_tok_s:,.0f}",
                f"{row.tok_s:,.0f}",
                f"{row.ttft_p50_ms:.1f} / {row.ttft_p99_ms:.1f}",
                f"{row.delay_p50_ms:.1f} / {row.delay_p99_ms:.1f}",
                *(f"{us[name]:.1f} µs" for name in ("path", "router", "workers", "engines")),
                " / ".join(f"{used:.2f}" for used in cores),
                f"{row.answers:,}",
                f"{row.wrong:,}",
            ]
        )
    return "\n".join("  ".join(map(str.rjust, line, widths)) for line in lines)


def main() -> int:
    """0; 1 when an answer had the wrong number of tokens."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.channel", description=__doc__.split("\n\n")[0]
    )
    add = parser.add_argument
    add("--rows", default="channel,router", help="which of channel, router (default both)")
    add(
        "--step-ms",
        default="12.5,5",
        help="of the engines, one run each; sets the rate (default %(default)s)",
    )
    add("--streams", type=int, default=256, help="(default %(default)s)")
    add("--workers", type=int, default=2, help="(default %(default)s)")
    add("--prompt-tokens", type=int, default=200, help="(default %(default)s)")
    add("--answer-tokens", type=int, default=256, help="at least 2 (default %(default)s)")
    add("--seconds", type=float, default=7.0, help="measured, after 3 s of warm-up (default %(default)g)")
    add("--json", type=Path, metavar="FILE", help="write the figures there too")
    options = parser.parse_args()
    run = {"channel": channel_row, "router": router_row}
    names = options.rows.split(",")
    if unknown := set(names) - set(run):
        parser.error(f"--rows must be of {', '.join(run)}, got {', '.join(unknown)}")
    rows = []
    for name in names:
        for step_ms in map(float, options.step_ms.split(",")):
            load = Load(
                options.streams,
                options.workers,
                options.prompt_tokens,
                options.answer_tokens,
                step_ms,
                options.seconds,
            )
            rows.append(uvloop.run(run[name](load)))
            print(render(rows[-1:], heading=len(rows) == 1), flush=True)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        machine = {"system": platform.platform(), "cpus": os.cpu_count(), "python": platform.python_version()}
        report = {"command": sys.argv, "machine": machine, "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(report, indent=2))
    return 1 if any(row.wrong for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
