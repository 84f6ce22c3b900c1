"""The linear layers of a decoder on one GPU, with norm, SwiGLU and residual sum: time, bandwidth, tuning.

    python -m benchmarks.linear                                   # what `linear` does, against cuBLAS
    python -m benchmarks.linear --models llama-8b --tokens 1 16   # part of it
    python -m benchmarks.linear --tune --seconds 150 --out tiles.txt

Every time is that of a CUDA graph that goes through so many copies of the weights that none is found in the
L2 cache. `cuBLAS us` is the same layer with norm, SwiGLU and sum as kernels beside cuBLAS's product. The
floor is the larger of the weights' bytes / 3.0 TB/s (copy bandwidth of the card) and the operations /
750 TFLOP/s (cuBLAS, 8192^3). The chain is the four layers of a decoder layer, 16 of them with weights of
their own.

`--tune` prints rows for `kernels/tuned/gemm_sm90.py`: it compiles the candidates in parallel, compares each
with fp32, and times it. How much to prefetch is chosen last, in a chain with two small kernels in the place
of rope and attention, since what runs beside a layer decides it.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from kernels import decode_gemm, linear
from kernels.norm import rms_norm
from kernels.tuned.gemm_sm90 import BUCKETS, GemmTile, gemm_tile

EPS = 1e-5
DEVICE = "cuda"
DTYPE = torch.bfloat16
BYTES_PER_US = 3.0e6
FLOP_PER_US = 750e6
TOKENS = (1, 8, 16, 32, 64, 128, 256, 1024, 4096)
BEYOND_L2_BYTES = 400e6
CHAIN_LAYERS = 16
Launch = Callable[[], object]


@dataclass(frozen=True)
class Layer:
    """W [n, k] and what is fused with it."""

    name: str
    n: int
    k: int
    norm: bool = False
    swiglu: bool = False
    add: bool = False

    @property
    def columns(self) -> int:
        return self.n // 2 if self.swiglu else self.n

    def floor_us(self, tokens: int) -> float:
        return max(2 * self.n * self.k / BYTES_PER_US, 2 * self.n * self.k * tokens / FLOP_PER_US)


def layers(hidden: int, qkv: int, attended: int, ffn: int, vocab: int) -> tuple[Layer, ...]:
    return (
        Layer("qkv", qkv, hidden, norm=True),
        Layer("o", hidden, attended, add=True),
        Layer("gate_up", 2 * ffn, hidden, norm=True, swiglu=True),
        Layer("down", hidden, ffn, add=True),
        Layer("head", vocab, hidden, norm=True),
    )


MODELS = {
    "llama-8b": layers(hidden=4096, qkv=6144, attended=4096, ffn=14336, vocab=128256),
    "qwen3-0.6b": layers(hidden=1024, qkv=4096, attended=2048, ffn=3072, vocab=151936),
    "smollm2-135m": layers(hidden=576, qkv=960, attended=576, ffn=1536, vocab=49152),
}


@dataclass(frozen=True)
class Operands:
    """One layer's tensors; `weights` holds copies that together are larger than the L2 cache."""

    layer: Layer
    weights: torch.Tensor
    x: torch.Tensor
    target: torch.Tensor | None

    @classmethod
    def random(cls, layer: Layer, tokens: int, weights: torch.Tensor) -> Operands:
        x = torch.randn(tokens, layer.k, device=DEVICE, dtype=DTYPE)
        target = torch.randn(tokens, layer.n, device=DEVICE, dtype=DTYPE) if layer.add else None
        return cls(layer, weights, x, target)

    def ours(self, tile: GemmTile, copy: int = 0) -> torch.Tensor:
        eps, x = (EPS if self.layer.norm else None), self.x
        if eps and tile.norm_first:
            x, eps = rms_norm(x, None, eps), None
        return decode_gemm.launch(
            x,
            self.weights[copy],
            None,
            tile,
            norm_eps=eps,
            swiglu=self.layer.swiglu,
            add_to=self.target,
        )

    def through(self, run: Callable[..., torch.Tensor], copy: int = 0) -> torch.Tensor:
        """`run` is `linear.linear` or `linear.reference`."""
        norm = linear.Norm(EPS, None) if self.layer.norm else None
        swiglu = self.layer.swiglu
        return run(self.x, self.weights[copy], norm=norm, swiglu=swiglu, add_to=self.target)

    def expected(self) -> torch.Tensor:
        """fp32, of the first copy, before anything was added."""
        x = self.x.float()
        if self.layer.norm:
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)
        y = x @ self.weights[0].float().T
        if self.layer.swiglu:
            gate, up = y.chunk(2, dim=-1)
            y = torch.nn.functional.silu(gate) * up
        return y if self.target is None else y + self.target.float()


def random_weights(layer: Layer) -> torch.Tensor:
    copies = max(2, min(200, round(BEYOND_L2_BYTES / (2 * layer.n * layer.k))))
    weights = torch.empty(copies, layer.n, layer.k, device=DEVICE, dtype=DTYPE)
    return weights.normal_(std=layer.k**-0.5)


def time_us(launches: Sequence[Launch], repeats: int = 15) -> float:
    """Microseconds of one of `launches`, which run one after the other in a CUDA graph; the median."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        launches[0]()  # compiles, and makes the counters of split K
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        graph.capture_begin()  # torch.cuda.graph collects garbage first: 0.1 s for each of a thousand graphs
        for launch in launches:
            launch()
        graph.capture_end()
    times = []
    for _ in range(repeats + 2):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(launches))
    median: float = statistics.median(times[2:])
    return median


def copies_us(operands: Operands, run: Callable[[int], object]) -> float:
    return time_us([partial(run, copy) for copy in range(len(operands.weights))])


class Chain:
    """The layers of a decoder layer, `CHAIN_LAYERS` times with weights of their own."""

    def __init__(self, model: str) -> None:
        self._layers = MODELS[model][:4]
        self._weights = [
            torch.empty(CHAIN_LAYERS, layer.n, layer.k, device=DEVICE, dtype=DTYPE).normal_(std=0.01)
            for layer in self._layers
        ]

    def ms_of_32(
        self,
        tokens: int,
        run: Callable[..., torch.Tensor],
        tiles: Sequence[GemmTile | None] | None = None,
        small_kernels: int = 0,
    ) -> float:
        """Milliseconds of 32 decoder layers through `run`, or through `tiles` where they are not None."""
        qkv, o, gate_up, down = self._operands(tokens)
        chosen = tiles or [None] * 4

        def step(operands: Operands, tile: GemmTile | None, copy: int) -> None:
            operands.through(run, copy) if tile is None else operands.ours(tile, copy)

        def decoder_layer(copy: int) -> None:
            step(qkv, chosen[0], copy)
            for _ in range(small_kernels):
                rms_norm(o.x, None, EPS)
            for operands, tile in zip((o, gate_up, down), chosen[1:], strict=True):
                step(operands, tile, copy)

        return time_us([partial(decoder_layer, copy) for copy in range(CHAIN_LAYERS)]) * 32 / 1e3

    def _operands(self, tokens: int) -> list[Operands]:
        made = [
            Operands.random(layer, tokens, weights)
            for layer, weights in zip(self._layers, self._weights, strict=True)
        ]
        residual = made[1].target  # qkv and gate_up read what o and down add to, as in a decoder
        assert residual is not None
        return [
            replace(operands, x=residual) if operands.layer.norm else replace(operands, target=residual)
            for operands in made
        ]


def measure(models: Sequence[str], all_tokens: Sequence[int]) -> None:
    print("model layer tokens | us TB/s TFLOP/s | floor us | cuBLAS us | tile")
    for model in models:
        for layer in MODELS[model]:
            weights = random_weights(layer)
            for tokens in all_tokens:
                if layer.name == "head" and tokens > 256:
                    continue  # only rows that sample have logits
                operands = Operands.random(layer, tokens, weights)
                ours = copies_us(operands, partial(operands.through, linear.linear))
                cublas = copies_us(operands, partial(operands.through, linear.reference))
                terabytes_s = 2 * layer.n * layer.k / ours / 1e6
                print(
                    f"{model:12s} {layer.name:7s} {tokens:4d} | {ours:7.2f} {terabytes_s:5.2f} "
                    f"{terabytes_s * tokens:6.1f} | {layer.floor_us(tokens):7.2f} | {cublas:7.2f} | "
                    f"{_short(gemm_tile(layer.n, layer.k, tokens))}",
                    flush=True,
                )
            del weights, operands
        chain = Chain(model)
        for tokens in all_tokens:
            ours, cublas = (chain.ms_of_32(tokens, run) for run in (linear.linear, linear.reference))
            floor = sum(layer.floor_us(tokens) for layer in MODELS[model][:4]) * 32 / 1e3
            print(
                f"{model:12s} 4 layers x 32, {tokens:4d} tokens: {ours:7.3f} ms, cuBLAS {cublas:7.3f}, "
                f"floor {floor:7.3f}",
                flush=True,
            )
        del chain


def candidates(layer: Layer, bucket: int) -> Iterator[GemmTile]:
    """Tiles worth timing: those that divide K, with most of an SM's memory as stages, cut into programs
    for at least about half of 132 SMs."""
    if bucket <= 64:
        cuts = [(rows, bucket, 4) for rows in (16, 32, 64, 128) if rows >= bucket // 2]
        cuts += [(128, bucket, 8)] if bucket >= 32 else []
    elif bucket == 128:
        cuts = [(64, 128, 4), (128, 128, 8), (128, 64, 4), (256, 128, 8)]
    else:
        cuts = [(64, 128, 4), (128, 128, 8), (256, 128, 8)]
    depths = [depth for depth in (64, 128, 256) if layer.k % depth == 0 and (bucket <= 64 or depth <= 128)]
    for (rows, tokens, warps), depth, split in itertools.product(cuts, depths or [64], (1, 2, 4)):
        programs = -(-layer.n // rows) * -(-bucket // tokens) * split
        too_few_steps = layer.k < 4 * depth * split
        if split > 1 and (programs > 400 or too_few_steps):
            continue
        if programs < 60 and split < 4 and layer.k >= 8 * depth * split:
            continue  # more parts are possible
        if layer.swiglu and rows == 16:
            continue  # half gate, half up
        if programs > 2000 and rows < 64:
            continue
        # Few programs may still be worth half of the memory: those of the next kernel can start beside them.
        shares = (1, 2) if programs <= 132 or bucket > 64 else (2, 3)
        most = [216 * 1024 // share // (2 * (rows + tokens) * depth) for share in shares]
        for stages in sorted({min(8, count, -(-layer.k // depth) + 1) for count in most}):
            if stages < 3:
                continue
            tile = GemmTile(rows, tokens, depth, split, warps, stages)
            if layer.norm and bucket > 16:
                yield replace(tile, norm_first=True)
            if not layer.norm or bucket <= 64:
                yield tile


Job = tuple[Layer, GemmTile]


def _compile(job: Job) -> tuple[Job, str | None]:
    """Launch once in this process, which leaves the kernel in Triton's cache on disk; None, or what is wrong.

    The kernel depends on the shape only through what the tile divides, so the smallest such shape will do.
    """
    layer, tile = job
    outputs = tile.rows // 2 if layer.swiglu else tile.rows
    columns = 2 * outputs if layer.columns % outputs == 0 else outputs + 16
    k = 512 if layer.k % tile.depth == 0 else 528
    small = replace(layer, n=columns * (2 if layer.swiglu else 1), k=k)
    try:
        weights = torch.zeros(1, small.n, small.k, device=DEVICE, dtype=DTYPE)
        Operands.random(small, 1, weights).ours(tile)
        torch.cuda.synchronize()
        kernels = decode_gemm.decode_gemm_kernel.device_caches[torch.cuda.current_device()][0]
        spilled = list(kernels.values())[-1].n_spills
        return job, f"spills {spilled} bytes" if spilled else None
    except Exception as error:
        return job, f"{type(error).__name__}: {error}"[:160]


def compile_in_parallel(jobs: Sequence[Job]) -> set[Job]:
    """The jobs whose kernel is in order."""

    def kernel(job: Job) -> tuple[object, ...]:
        layer, tile = job
        outputs = tile.rows // 2 if layer.swiglu else tile.rows
        even = (layer.columns % outputs == 0, layer.k % tile.depth == 0)
        fused_norm = layer.norm and not tile.norm_first
        return fused_norm, layer.swiglu, layer.add, even, replace(tile, norm_first=False)

    groups: dict[tuple[object, ...], list[Job]] = {}
    for job in jobs:
        groups.setdefault(kernel(job), []).append(job)
    firsts = [group[0] for group in groups.values()]
    started = time.monotonic()
    workers = min(16, os.cpu_count() or 1)
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        wrong = {job: problem for job, problem in pool.map(_compile, firsts, chunksize=2) if problem}
    seconds = time.monotonic() - started
    print(f"# {len(firsts)} kernels compiled in {seconds:.0f} s, {len(wrong)} unfit", flush=True)
    for (layer, tile), problem in wrong.items():
        print(f"# unfit: {layer.name} {tile}: {problem}", flush=True)
    return {job for group in groups.values() if group[0] not in wrong for job in group}


@dataclass
class Choice:
    """The best tile of a layer and bucket so far; None = cuBLAS."""

    tile: GemmTile | None
    us: float
    cublas_us: float


def tune(models: Sequence[str], buckets: Sequence[int], seconds: float, out: Path | None) -> None:
    deadline = time.monotonic() + seconds
    cells = [(model, layer, bucket) for model in models for bucket in buckets for layer in MODELS[model]]
    jobs = [(layer, tile) for _, layer, bucket in cells for tile in candidates(layer, bucket)]
    fit = compile_in_parallel(jobs)
    choices: dict[tuple[str, str, int], Choice] = {}
    for model in models:
        for layer in MODELS[model]:
            weights = random_weights(layer)
            for bucket in buckets:
                if time.monotonic() > deadline:
                    print(f"# out of time before {model} {layer.name} {bucket}", flush=True)
                    break
                tiles = [tile for tile in candidates(layer, bucket) if (layer, tile) in fit]
                choices[model, layer.name, bucket] = _best(model, layer, bucket, tiles, weights)
            del weights
        _choose_prefetch(model, buckets, choices, deadline + 30)
    rows = [_row(model, name, bucket, choice) for (model, name, bucket), choice in choices.items()]
    text = "\n".join(rows) + "\n"
    print(text, end="", flush=True)
    if out is not None:
        out.write_text(text)


def _best(model: str, layer: Layer, bucket: int, tiles: Sequence[GemmTile], weights: torch.Tensor) -> Choice:
    """Fastest at `bucket` tokens; the smallest bucket counts its time at one token as much."""
    sizes = (1, bucket) if bucket == BUCKETS[0] else (bucket,)
    timed = [Operands.random(layer, tokens, weights) for tokens in sizes]
    largest = timed[-1]
    expected = largest.expected()
    before = None if largest.target is None else largest.target.clone()
    found: list[tuple[float, GemmTile]] = []
    for tile in tiles:
        for _ in range(2):  # a counter that split K leaves behind shows in the second
            if before is not None and largest.target is not None:
                largest.target.copy_(before)
            error = (largest.ours(tile).float() - expected).norm() / expected.norm()
        if not float(error) < 1e-2:
            print(f"# WRONG: {model} {layer.name} {tile}: relative error {float(error):.3g}", flush=True)
            continue
        us = statistics.mean(copies_us(o, partial(o.ours, tile)) for o in timed)
        found.append((us, tile))
    cublas = statistics.mean(copies_us(o, partial(o.through, linear.reference)) for o in timed)
    torch.cuda.empty_cache()  # the graphs' memory
    found.sort(key=lambda entry: entry[0])
    best = Choice(found[0][1], found[0][0], cublas) if found else Choice(None, cublas, cublas)
    next_best = ", ".join(f"{us:.2f} {_short(tile)}" for us, tile in found[1:4])
    print(
        f"# {model} {layer.name} {bucket}: {best.us:.2f} us {2 * layer.n * layer.k / best.us / 1e6:.2f} TB/s "
        f"{_short(best.tile)}, cuBLAS {cublas:.2f}, floor {layer.floor_us(bucket):.2f}; then {next_best}; "
        f"of {len(tiles)}",
        flush=True,
    )
    return best if best.us < 1.01 * cublas else Choice(None, cublas, cublas)


def _choose_prefetch(
    model: str, buckets: Sequence[int], choices: dict[tuple[str, str, int], Choice], deadline: float
) -> None:
    """Layer after layer, keep what makes the chain faster by more than its noise."""
    chain = Chain(model)
    names = [layer.name for layer in MODELS[model][:4]]
    for bucket in buckets:
        if bucket > 64 or not all((model, name, bucket) in choices for name in names):
            continue
        tokens = 1 if bucket == 16 else bucket
        tiles = [choices[model, name, bucket].tile for name in names]
        run = partial(chain.ms_of_32, tokens, linear.reference, small_kernels=2)
        best_ms = run(tiles)
        log = [f"{best_ms:.3f} ms without"]
        for index, (name, k) in enumerate((layer.name, layer.k) for layer in MODELS[model][:4]):
            for count in (256, 512, 1024, 2048):
                tile = tiles[index]
                if tile is None or count > k // tile.split or time.monotonic() > deadline:
                    continue
                tried = [*tiles[:index], replace(tile, prefetch=count), *tiles[index + 1 :]]
                ms = run(tried)
                log.append(f"{ms:.3f} {name} {count}")
                if ms < best_ms * 0.998:
                    best_ms, tiles = ms, tried
        for name, tile in zip(names, tiles, strict=True):
            choices[model, name, bucket].tile = tile
        print(f"# {model} chain of 32, {tokens} tokens, prefetch: {', '.join(log)}", flush=True)


def _short(tile: GemmTile | None) -> str:
    if tile is None:
        return "None"
    values = [tile.rows, tile.tokens, tile.depth, tile.split, tile.warps, tile.stages]
    parts = [str(value) for value in values + ([tile.prefetch] if tile.prefetch else [])]
    return f"GemmTile({', '.join(parts + (['norm_first=True'] if tile.norm_first else []))})"


def _row(model: str, name: str, bucket: int, choice: Choice) -> str:
    layer = next(layer for layer in MODELS[model] if layer.name == name)
    key, times = (layer.n, layer.k, bucket), f"{choice.us:.1f}, {choice.cublas_us:.1f}"
    return f"    {key}: ({_short(choice.tile)}, {times}),  # {model} {name}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--buckets", nargs="+", type=int, choices=BUCKETS, default=list(BUCKETS))
    parser.add_argument("--seconds", type=float, default=150.0, help="for --tune, compilation included")
    parser.add_argument("--out", type=Path, help="file for the rows that --tune found")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks.linear needs a CUDA device")
    torch.manual_seed(0)
    print(f"# {torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    if options.tune:
        tune(options.models, options.buckets, options.seconds, options.out)
    else:
        measure(options.models, options.tokens)
    return 0


if __name__ == "__main__":
    sys.exit(main())
