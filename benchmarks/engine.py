"""The engine alone, offline, on the workloads of the published peer figures.

    python -m benchmarks.engine MODEL [startup latency mixed prefix long] [--json FILE] [--profile] ...

MODEL is a folder with a config.json (random weights of that shape) or with a whole checkpoint (`--weights`).
Greedy, end of sequence ignored, token ids and batches from fixed seeds: the same as any engine driven with
the recipe in the functions below, so that figures of equal name can be laid side by side.

Figures: startup_s (from the start of this process to the first token possible), tpot_ms_bs{1,8,32,128}
(128 tokens in; (time of 257 out - time of 1 out) / 256), ttft_ms_{1024,4096} (one request, one token out),
mixed_out_tok_s (256 requests, 100 to 1024 tokens in and out), prefix_out_tok_s (8 prefixes of 4096 tokens,
512 requests of 128 more, 64 out), long_out_tok_s (256 requests, 1000 in and out).

Beside them: what tpot and ttft come to in bytes and FLOP a second (weights and KV read once a step); for each
workload host_ms (the engine's Python a step) and gpu_idle_pct (the device waited for the host); and
late_kernels, which must be 0. `--profile 1x4096x1` ends with the kernels of such a run, by name.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

_STARTED_S = time.perf_counter()

import torch  # noqa: E402  its import is part of the start-up measured

from services.wire.hashes import chain_hashes, pack_tokens, root_hash  # noqa: E402
from services.wire.messages import SamplingParams  # noqa: E402
from services.worker.config import EngineConfig  # noqa: E402
from services.worker.engine import Engine  # noqa: E402
from services.worker.kv import page_bytes  # noqa: E402
from services.worker.load import LoadedModel, load_model  # noqa: E402
from services.worker.models.random import random_model  # noqa: E402
from services.worker.request import Request, StepReport  # noqa: E402


class Offline:
    """Runs batches of prompts to their end on one engine."""

    def __init__(self, engine: Engine, model: LoadedModel, block_size: int) -> None:
        self.engine = engine
        self.model = model
        self._root = root_hash(model.fingerprint)
        self._block_size = block_size
        self._left = 0
        self._wrong = ""
        self._done = threading.Event()
        self._tokens = 0
        self._next_key = 0
        engine.start(self._listen)

    def run(self, prompts: Sequence[list[int]], lengths: Sequence[int]) -> float:
        """Seconds from the first submit to the last token. Each prompt gets exactly its length of tokens."""
        requests = [self._request(prompt, length) for prompt, length in zip(prompts, lengths, strict=True)]
        self._left, self._tokens = len(requests), 0
        self._done.clear()
        started_s = time.perf_counter()
        for request in requests:
            self.engine.submit(request)
        self._done.wait()
        seconds = time.perf_counter() - started_s
        if self._wrong or self._tokens != sum(lengths):
            sys.exit(f"engine: {self._wrong or f'{self._tokens} tokens instead of {sum(lengths)}'}")
        return seconds

    def _request(self, prompt: list[int], length: int) -> Request:
        packed = pack_tokens(prompt)
        self._next_key += 1
        return Request(
            key=self._next_key,
            tokens=prompt,
            root=self._root,
            hashes=chain_hashes(self._root, packed, self._block_size),
            sampling=SamplingParams(max_tokens=length, temperature=0.0, ignore_eos=True),
            arrival_s=time.monotonic(),
        )

    def _listen(self, report: StepReport) -> None:
        for output in report.outputs:
            self._tokens += len(output.tokens)
            if output.finish is not None:
                if output.finish.reason != "length":
                    self._wrong = f"a request ended with {output.finish}"
                self._left -= 1
        if self._left == 0 and report.outputs:
            self._done.set()


def startup(offline: Offline, out: Figures) -> None:
    """Nothing more than what every run begins with."""


def latency(offline: Offline, out: Figures) -> None:
    rng = random.Random(0)
    for size in (1, 8, 32, 128):
        prompts = lambda: [_tokens(rng, 128) for _ in range(size)]  # noqa: E731, B023  used in this round only
        offline.run(prompts(), [32] * size)
        best = min(
            (offline.run(prompts(), [257] * size) - offline.run(prompts(), [1] * size)) / 256
            for _ in range(3)
        )
        out.add(f"tpot_ms_bs{size}", best * 1e3, 3)
        read = _weight_bytes(offline.model) + size * 257 * _kv_bytes(offline.model)  # 257 tokens on average
        out.add(f"tpot_tb_s_bs{size}", read / best / 1e12, 2)
    for length in (1024, 4096):
        seconds = min(offline.run([_tokens(rng, length)], [1]) for _ in range(5))
        out.add(f"ttft_ms_{length}", seconds * 1e3, 2)
        out.add(f"ttft_tflop_s_{length}", _prefill_flop(offline.model, length) / seconds / 1e12, 0)


def mixed(offline: Offline, out: Figures) -> None:
    rng = random.Random(0)
    prompts = [[rng.randrange(10_000) for _ in range(rng.randint(100, 1024))] for _ in range(256)]
    lengths = [rng.randint(100, 1024) for _ in range(256)]
    for run in range(2):
        shifted = prompts if run else [[token + 10_000 for token in prompt] for prompt in prompts]
        out.add(f"mixed_out_tok_s_run{run}", sum(lengths) / offline.run(shifted, lengths), 1)


def prefix(offline: Offline, out: Figures) -> None:
    rng = random.Random(0)
    shared = [_tokens(rng, 4096) for _ in range(8)]
    for run in ("cold", "warm"):
        prompts = [shared[i % 8] + _tokens(rng, 128) for i in range(512)]
        out.add(f"prefix_out_tok_s_{run}", 512 * 64 / offline.run(prompts, [64] * 512), 1)


def long(offline: Offline, out: Figures) -> None:
    rng = random.Random(0)
    prompts = [_tokens(rng, 1000) for _ in range(256)]
    out.add("long_out_tok_s", 256_000 / offline.run(prompts, [1000] * 256), 1)


WORKLOADS = {"startup": startup, "latency": latency, "mixed": mixed, "prefix": prefix, "long": long}
BY_DEFAULT = ("latency", "mixed", "prefix")


def _tokens(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(1000, 30_000) for _ in range(count)]


def _weight_bytes(model: LoadedModel) -> int:
    """What a decode step reads of the weights: all but the embedding, unless that is the head too."""
    weights = model.decoder.weights
    matrices = [m for layer in weights.layers for m in (layer.qkv, layer.o, layer.gate_up, layer.down)]
    return sum(matrix.nbytes for matrix in [*matrices, weights.head])


def _kv_bytes(model: LoadedModel) -> int:
    return page_bytes(model.spec, 1, model.kv_dtype)


def _prefill_flop(model: LoadedModel, length: int) -> float:
    """Matrix products of every token and causal attention; the head runs for the last token only."""
    spec = model.spec
    layer = model.decoder.weights.layers[0]
    matrices = sum(m.numel() for m in (layer.qkv, layer.o, layer.gate_up, layer.down))
    attention = 4 * spec.heads * spec.head_dim * length * length / 2
    return spec.layers * (2.0 * matrices * length + attention)


class Figures:
    """Printed as they come, one JSON line each."""

    def __init__(self, model: str) -> None:
        self.model = model
        self.values: dict[str, float] = {}

    def add(self, figure: str, value: float, digits: int) -> None:
        self.values[figure] = round(value, digits)
        line = {"engine": "reprise", "model": self.model, "figure": figure, "value": self.values[figure]}
        print(json.dumps(line), flush=True)


def measure(name: str, offline: Offline, out: Figures) -> None:
    """One workload, and what the host did meanwhile."""
    counters = offline.engine.counters
    steps, host_s, idle_s = counters.steps, counters.host_s, counters.idle_s
    started_s = time.perf_counter()
    WORKLOADS[name](offline, out)
    wall_s = time.perf_counter() - started_s
    if counters.steps > steps:
        out.add(f"{name}_host_ms", (counters.host_s - host_s) / (counters.steps - steps) * 1e3, 3)
        out.add(f"{name}_gpu_idle_pct", 100 * (counters.idle_s - idle_s) / wall_s, 2)


def profile(offline: Offline, rows: int, prompt: int, out: int) -> None:
    """Prints where the time of the last step of a run goes: it sums up to the step.

    Dependent launches overlap: what counts for a kernel is from the end of whatever ran before to its own
    end. `alone` is from its own start, its wait for the kernels before included.
    """
    rng = random.Random(2)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        offline.run([_tokens(rng, prompt) for _ in range(rows)], [out] * rows)
    with tempfile.NamedTemporaryFile(suffix=".json") as trace:
        profiler.export_chrome_trace(trace.name)
        events = json.loads(Path(trace.name).read_bytes())["traceEvents"]
    on_device = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    on_device.sort(key=lambda event: float(event["ts"]))
    first = max(i for i, event in enumerate(on_device) if event["name"] == "inputs_kernel")
    spent: dict[tuple[str, str], list[float]] = {}  # (name, grid) -> launches, us, us alone
    end = begun = float(on_device[first]["ts"])
    for event in on_device[first:]:
        ends = float(event["ts"]) + float(event["dur"])
        row = spent.setdefault((event["name"], str(event["args"].get("grid", ""))), [0, 0.0, 0.0])
        row[0] += 1
        row[1] += max(0.0, ends - end)
        row[2] += float(event["dur"])
        end = max(end, ends)
    print(f"{rows} x {prompt} in, {out} out: the last step took {end - begun:.0f} us")
    print(f"  {'us':>9} {'launches':>8} {'each':>8} {'alone':>8}  kernel, grid")
    for (name, grid), (count, us, alone) in sorted(spent.items(), key=lambda item: -item[1][1]):
        print(f"  {us:9.1f} {count:8.0f} {us / count:8.2f} {alone / count:8.2f}  {name[:60]} {grid}")


def main() -> int:
    options = _parser().parse_args()
    torch.manual_seed(0)
    if options.weights:
        model = load_model(options.model, device=options.device, max_model_len=options.max_model_len)
    else:
        config = json.loads((options.model / "config.json").read_text())
        model = random_model(
            config,
            device=options.device,
            dtype=torch.bfloat16 if options.device == "cuda" else torch.float32,
            name=options.model.name,
            max_model_len=options.max_model_len,
        )
    config = EngineConfig.for_device(
        options.device,
        block_size=options.block_size,
        max_running=options.max_running,
        max_step_tokens=options.max_step_tokens,
        pipeline_depth=options.pipeline_depth,
    )
    engine = Engine(model, config)
    engine.warm_up()
    out = Figures(model.name)
    out.add("startup_s", time.perf_counter() - _STARTED_S, 1)
    out.add("kv_tokens", engine.pages * config.block_size, 0)
    if memory := engine.memory():
        for part, size in memory.parts().items():
            out.add(f"memory_{part}_gib", size / 2**30, 2)
    offline = Offline(engine, model, config.block_size)
    offline.run([_tokens(random.Random(1), 64)], [8])
    for name in options.workloads or BY_DEFAULT:
        measure(name, offline, out)
    out.add("late_kernels", engine.counters.late_kernels, 0)
    for run in options.profile or ():
        profile(offline, *map(int, run.split("x")))
    engine.stop()
    if options.json:
        options.json.write_text(json.dumps({"model": model.name, "figures": out.values}, indent=1))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine", description="The engine alone.")
    add = parser.add_argument
    add("model", type=Path, help="folder with a config.json")
    add("workloads", nargs="*", choices=WORKLOADS, help="(default latency, mixed, prefix)")
    add("--weights", action="store_true", help="load the checkpoint's weights (default: random ones)")
    add("--device", default="cuda")
    add("--block-size", type=int, help="tokens a page (default 64 on a GPU)")
    add("--max-running", type=int, default=512, help="(default %(default)s)")
    add("--max-step-tokens", type=int, help="(default 8192 on a GPU)")
    add("--max-model-len", type=int, default=8192, help="(default %(default)s)")
    add("--pipeline-depth", type=int, choices=(1, 2))
    add("--profile", nargs="+", metavar="ROWSxINxOUT", help="kernel times of such runs, as 1x4096x1")
    add("--json", type=Path, metavar="FILE")
    return parser


if __name__ == "__main__":
    sys.exit(main())
