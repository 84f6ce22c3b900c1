"""Compile the shipped kernels for sm_90 on a machine without a GPU and count what the compiler made of them.

    python -m tests.kernels.compiled      # one JSON object a line

Runs without TRITON_INTERPRET: an interpreted kernel cannot be compiled. The Triton wheel brings ptxas and
cuobjdump along.
"""

from __future__ import annotations

import json
import multiprocessing
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels import (
    decode_attention,
    decode_gemm,
    decode_map,
    kv_codec_kernels,
    norm,
    prefill_attention,
    rope,
    sampling_edit,
    sampling_kernels,
    sampling_mask,
    sampling_table,
    shared_attention,
    step_inputs,
    swiglu,
    table_writes,
)
from kernels.kv_payload import Codec, KVShape
from kernels.tuned import gemm_sm90, sampling_sm90, sm90

_TARGET = GPUTarget("cuda", 90, 32)


@dataclass(frozen=True)
class Config:
    """One kernel with everything that the compiler specialises it on.

    `types` holds Triton's name of the type of every argument that is not a constant, pointers as `*bf16`;
    `constants` every constexpr, and optional pointers that are None. Pointers are aligned, and the integers
    named in `multiples_of_16`.
    """

    name: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, object]
    warps: int
    stages: int = 3
    multiples_of_16: tuple[str, ...] = ()
    most_registers: int | None = None
    fp_fusion: bool = True


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes: bytes a thread on the stack and in local memory are spills."""

    name: str
    registers: int
    stack_bytes: int
    local_bytes: int
    shared_bytes: int
    wgmma: int
    wgmma_left_running: int  # waits that let the last one read on
    mma_sync: int


def compile_kernel(config: Config) -> Any:
    """The compiled kernel; `asm["cubin"]` is what runs."""
    names = config.kernel.arg_names
    signature = {name: config.types.get(name, "constexpr") for name in names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature[name][0] == "*" or name in config.multiples_of_16
    }
    source = ASTSource(
        fn=config.kernel, signature=signature, constexprs=dict(config.constants), attrs=aligned
    )
    options = {
        "num_warps": config.warps,
        "num_stages": config.stages,
        "launch_pdl": True,
        "maxnreg": config.most_registers,
        "enable_fp_fusion": config.fp_fusion,
    }
    return triton.compile(source, target=_TARGET, options=options)


def resources(config: Config) -> Resources:
    """Compile and count."""
    compiled = compile_kernel(config)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        usage = subprocess.run(
            [tool, "-res-usage", cubin.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump's answer for {config.name} has no resource line: {usage!r}")
    registers, stack, local = map(int, found.groups())
    ptx = compiled.asm["ptx"]
    return Resources(
        name=config.name,
        registers=registers,
        stack_bytes=stack,
        local_bytes=local,
        shared_bytes=compiled.metadata.shared,  # static and dynamic; cuobjdump knows the static part only
        wgmma=ptx.count("wgmma.mma_async"),
        wgmma_left_running=len(re.findall(r"wgmma\.wait_group\.sync\.aligned\s+[1-9]", ptx)),
        mma_sync=ptx.count("mma.sync"),
    )


def shipped() -> Iterator[Config]:
    """The shapes of the models that we serve, and the rarer variants once."""
    yield from _attention()
    for model, n_q, n_kv, dim, norm_type in (
        ("llama-8b", 32, 8, 128, None),
        ("qwen3-0.6b", 16, 8, 128, "*bf16"),
    ):
        for tokens in (1, 128, 8192):
            yield _rope(f"{model}-{tokens}", n_q, n_kv, dim, norm_type, tokens)
    yield Config(
        name="step-inputs",
        kernel=step_inputs.inputs_kernel,
        types={
            **dict.fromkeys(("slots", "positions", "write_from", "tokens", "pages"), "*i32"),
            **dict.fromkeys(("embedding", "x"), "*bf16"),
            "kv_slots": "*i64",
            "tokens_stride": "i32",
            "pages_stride": "i32",
        },
        constants={"BLOCK_SIZE": 64, "HIDDEN": 4096, "BLOCK": 4096, "PDL": True},
        warps=4,
    )
    yield from _linear_layers()
    yield from _sampling()
    yield from _codecs()


def _rope(name: str, n_q: int, n_kv: int, dim: int, norm_type: str | None, tokens: int) -> Config:
    norms = ("q_norm", "k_norm")
    tile, warps = sm90.rope_tile(tokens)
    return Config(
        name=f"rope-{name}",
        kernel=rope.rope_kernel,
        types={
            **dict.fromkeys(("qkv", "k_pages", "v_pages", "q"), "*bf16"),
            **(dict.fromkeys(norms, norm_type) if norm_type else {}),
            "cos_sin": "*fp32",
            "positions": "*i32",
            "slots": "*i64",
            "tokens": "i32",
            "eps": "fp32",
        },
        constants={
            **({} if norm_type else dict.fromkeys(norms)),
            "N_Q": n_q,
            "N_KV": n_kv,
            "BLOCK_SIZE": 64,
            "DIM": dim,
            "HALF": dim // 2,
            "TOKENS": tile,
            "PDL": True,
        },
        warps=warps,
    )


def _attention() -> Iterator[Config]:
    """Every tile with every model; windows, and prefixes that rows share, with one."""
    for model, group, n_kv, dim, block_size in (
        ("llama-8b", 4, 8, 128, 64),
        ("qwen3-0.6b", 2, 8, 128, 64),
        ("smollm2-135m", 3, 3, 64, 16),
        ("qwen2-7b", 7, 4, 128, 128),
        ("phi3", 1, 32, 96, 64),
        ("gemma3-4b", 2, 4, 256, 64),
    ):
        shape = {"GROUP": group, "N_KV": n_kv, "BLOCK_SIZE": block_size, "DIM": dim}
        tiles = {sm90.prefill_tile(group, dim, 256, heads) for heads in (1, 256)}
        for windowed, window in (("", 0), ("-window", 4096)):
            yield _decode(f"{model}{windowed}", shape, window, shared=False)
            for tile in tiles:
                yield _prefill(f"{model}{windowed}", shape, window, tile)
        yield _decode(f"{model}-shared", shape, 0, shared=True)
        yield _shared(model, shape)
    for lanes in (64, 1024):
        yield _map(lanes, 0, shared=False)
        yield _map(lanes, 4096, shared=False)
        yield _map(lanes, 0, shared=True)


def _decode(name: str, shape: Mapping[str, int], window: int, *, shared: bool) -> Config:
    group, dim = shape["GROUP"], shape["DIM"]
    tile = sm90.decode_tile(dim)
    parts = ("shared_sums", "shared_stats")
    heads = triton.next_power_of_2(group)
    return Config(
        name=f"attention-decode-{name}",
        kernel=decode_attention.decode_kernel,
        types={
            **dict.fromkeys(("q", "k_pages", "v_pages", "out"), "*bf16"),
            **dict.fromkeys(("block_tables", "task_map", "arrived"), "*i32"),
            **dict.fromkeys(("sums", "stats", *(parts if shared else ())), "*fp32"),
            "scale": "fp32",
            "table_stride": "i32",
        },
        constants={
            **shape,
            **({} if shared else dict.fromkeys(parts)),
            "WINDOW": window,
            "ROWS": max(16, heads),
            "KEYS": tile.keys,
            "PROGRAMS": sm90.SMS * tile.programs_per_sm // shape["N_KV"],
            "MAX_ROWS": 1024,
            "AT_ONCE": tile.combined // (heads * triton.next_power_of_2(dim)),
            "SHARED_PIECES": 80,
            "SHARED_LANES": sm90.SHARED_LANES,
            "PDL": True,
        },
        warps=tile.warps,
        stages=tile.stages,
        most_registers=tile.registers,
    )


def _prefill(name: str, shape: Mapping[str, int], window: int, tile: sm90.Tile) -> Config:
    return Config(
        name=f"attention-prefill-{name}-{tile.rows}",
        kernel=prefill_attention.prefill_kernel,
        types={
            **dict.fromkeys(("q", "k_pages", "v_pages", "out"), "*bf16"),
            **dict.fromkeys(("block_tables", "slots", "query_start", "context_len"), "*i32"),
            "scale": "fp32",
            "first_row": "i32",
            "table_stride": "i32",
        },
        constants={**shape, "WINDOW": window, "ROWS": tile.rows, "KEYS": tile.keys, "PDL": True},
        warps=tile.warps,
        stages=tile.stages,
    )


def _shared(name: str, shape: Mapping[str, int]) -> Config:
    tile = sm90.shared_tile(shape["DIM"])
    return Config(
        name=f"attention-shared-{name}",
        kernel=shared_attention.shared_kernel,
        types={
            **dict.fromkeys(("q", "k_pages", "v_pages"), "*bf16"),
            **dict.fromkeys(("block_tables", "task_map", "shared_tiles"), "*i32"),
            **dict.fromkeys(("shared_sums", "shared_stats"), "*fp32"),
            "scale": "fp32",
            "table_stride": "i32",
        },
        constants={
            **shape,
            "ROWS": tile.rows,
            "KEYS": tile.keys,
            "ROWS_A_TILE": tile.rows // shape["GROUP"],
            "PROGRAMS": sm90.SMS // shape["N_KV"],
            "MAX_TILES": 64,
            "FIRST_LINE": 2114,
            "PDL": True,
        },
        warps=tile.warps,
        stages=tile.stages,
    )


def _map(lanes: int, window: int, *, shared: bool) -> Config:
    of_shared = ("shared_tokens", "shared_tiles")
    return Config(
        name=f"attention-map-{lanes}{'-window' if window else ''}{'-shared' if shared else ''}",
        kernel=decode_map.map_kernel,
        types={
            **dict.fromkeys(("context_len", "slots", "task_map"), "*i32"),
            **dict.fromkeys(of_shared if shared else (), "*i32"),
            "decodes": "i32",
            "n_tiles": "i32",
        },
        constants={
            **({} if shared else dict.fromkeys(of_shared)),
            "PROGRAMS": 33,
            "MAX_ROWS": 1024,
            "KEYS": 64,
            "WINDOW": window,
            "LEAST": 2,
            "LANES": lanes,
            "SHARED": shared,
            "SHARED_PROGRAMS": 16,
            "SHARED_KEYS": 64,
            "MAX_TILES": 64,
            "ROWS_A_TILE": 32,
            "GROUP": 4,
            "PDL": True,
        },
        warps=4,
    )


_LAYERS = {
    # N, K, then what is fused
    "llama-8b-qkv": (6144, 4096, ("NORM",)),
    "llama-8b-o": (4096, 4096, ("ADD",)),
    "llama-8b-gate_up": (28672, 4096, ("NORM", "SWIGLU")),
    "llama-8b-down": (4096, 14336, ("ADD",)),
    "llama-8b-head": (128256, 4096, ("NORM",)),
    "qwen3-0.6b-qkv": (4096, 1024, ("NORM",)),
    "qwen3-0.6b-o": (1024, 2048, ("ADD",)),
    "qwen3-0.6b-gate_up": (6144, 1024, ("NORM", "SWIGLU")),
    "qwen3-0.6b-down": (1024, 3072, ("ADD",)),
    "qwen3-0.6b-head": (151936, 1024, ("NORM",)),
    "qwen2-7b-qkv": (4608, 3584, ("NORM", "BIAS")),
    "smollm2-135m-qkv": (960, 576, ("NORM",)),
    "smollm2-135m-o": (576, 576, ("ADD",)),
    "smollm2-135m-gate_up": (3072, 576, ("NORM", "SWIGLU")),
    "smollm2-135m-down": (576, 1536, ("ADD",)),
    "smollm2-135m-head": (49152, 576, ("NORM",)),
}


def _linear_layers() -> Iterator[Config]:
    """The decode GEMM for all buckets of tokens, each kernel once, and what stands around cuBLAS."""
    configs = [
        _gemm(name, n, k, fused, tile)
        for name, (n, k, fused) in _LAYERS.items()
        for tile in (gemm_sm90.gemm_tile(n, k, bucket) for bucket in gemm_sm90.BUCKETS)
        if tile is not None
    ]
    yield from {repr(replace(config, name="")): config for config in configs}.values()
    for hidden, block in ((576, 1024), (4096, 4096)):
        yield Config(
            name=f"norm-{hidden}",
            kernel=norm.norm_kernel,
            types={**dict.fromkeys(("x", "gain", "y"), "*bf16"), "eps": "fp32"},
            constants={"HIDDEN": hidden, "BLOCK": block, "PDL": True},
            warps=sm90.norm_warps(block),
        )
    yield Config(
        name="swiglu-14336",
        kernel=swiglu.swiglu_kernel,
        types={"gate_up": "*bf16", "out": "*bf16"},
        constants={"COLUMNS": 14336, "BLOCK": sm90.SWIGLU_COLUMNS, "PDL": True},
        warps=4,
    )


def _gemm(name: str, n: int, k: int, fused: tuple[str, ...], tile: gemm_sm90.GemmTile) -> Config:
    if tile.norm_first:
        fused = tuple(flag for flag in fused if flag != "NORM")
    swiglu_fused = "SWIGLU" in fused
    outputs = tile.rows // 2 if swiglu_fused else tile.rows
    optional = {"bias": "*bf16" if "BIAS" in fused else None}
    optional |= {"partials": "*fp32", "counters": "*i32"} if tile.split > 1 else {}
    cut = f"{tile.rows}x{tile.tokens}x{tile.depth}x{tile.split}"
    return Config(
        name=f"gemm-{'norm-' if 'NORM' in fused else ''}{name}-{cut}",
        kernel=decode_gemm.decode_gemm_kernel,
        types={
            **dict.fromkeys(("x", "weight", "y"), "*bf16"),
            **dict.fromkeys(("tokens", "n", "k", "prefetch"), "i32"),
            **{argument: type_ for argument, type_ in optional.items() if type_ is not None},
            "eps": "fp32",
        },
        constants={
            **{argument: None for argument in ("bias", "partials", "counters") if not optional.get(argument)},
            **{flag: flag in fused for flag in ("NORM", "SWIGLU", "ADD")},
            "EVEN_N": (n // 2 if swiglu_fused else n) % outputs == 0,
            "EVEN_K": k % tile.depth == 0,
            "ROWS": tile.rows,
            "TOKENS": tile.tokens,
            "DEPTH": tile.depth,
            "SPLIT": tile.split,
            "PDL": True,
        },
        warps=tile.warps,
        stages=tile.stages,
        multiples_of_16=("n", "k"),
    )


def _sampling() -> Iterator[Config]:
    """The sampler for three vocabularies, and for logits in fp32 and with log-probabilities; table writes."""
    tuned = sampling_sm90
    for model, vocab, logits, explain in (
        ("llama-8b", 128256, "*bf16", False),
        ("qwen3-0.6b", 151936, "*bf16", False),
        ("qwen3-0.6b-explain", 151936, "*bf16", True),
        ("smollm2-135m-fp32", 49152, "*fp32", False),
        ("smollm2-135m-fp32-explain", 49152, "*fp32", True),
    ):
        chunks = triton.cdiv(vocab, tuned.CHUNK)
        groups = tuned.CHUNK // tuned.GROUP
        explained = {"out_logprob": "*fp32", "out_top_tokens": "*i32", "out_top_logprobs": "*fp32"}
        types = {"logits": logits, "chunk_floats": "*fp32", "group_best": "*fp32", "out_finite": "*u8"}
        names = ("slots", "lengths", "parameters", "tokens", "chunk_tokens", "lists", "out_tokens")
        types |= dict.fromkeys(names, "*i32")
        shape = {
            "VOCAB": vocab,
            "CHUNKS": chunks,
            "SLOTTED": triton.next_power_of_2(chunks),
            "EXPLAIN": explain,
            "PDL": True,
        }
        yield Config(
            name=f"sample-chunks-{model}",
            kernel=sampling_kernels.chunk_kernel,
            types=types,
            constants={**shape, "CHUNK": tuned.CHUNK, "GROUP": tuned.GROUP, "PART": tuned.PART},
            warps=tuned.CHUNK_WARPS,
            fp_fusion=False,
        )
        yield Config(
            name=f"sample-rows-{model}",
            kernel=sampling_kernels.row_kernel,
            types={
                **types,
                **dict.fromkeys(("tokens_stride", "max_length", "best"), "i32"),
                **(explained if explain else {}),
            },
            constants={
                **shape,
                **({} if explain else dict.fromkeys(explained)),
                "SHIFT": tuned.GROUP.bit_length() - 1,
                "GROUPS": chunks * groups,
                "TILE": tuned.TILE,
                "BITS": 16 if logits == "*bf16" else 32,
            },
            warps=tuned.ROW_WARPS,
            fp_fusion=False,
        )
        if not explain:
            yield Config(
                name=f"sample-edit-{model}",
                kernel=sampling_edit.edit_kernel,
                types={
                    **types,
                    **dict.fromkeys(("list_tokens", "scratch"), "*i32"),
                    **dict.fromkeys(("rows", "tokens_stride"), "i32"),
                    "list_values": "*fp32",
                },
                constants={"VOCAB": vocab, "LARGEST": 3.3e38, "TILE": tuned.EDIT_TILE, "PDL": True},
                warps=tuned.EDIT_WARPS,
                fp_fusion=False,
            )
            yield Config(
                name=f"sample-mask-{model}",
                kernel=sampling_mask.mask_kernel,
                types={"logits": logits, "rows": "*i32", "words": "*i32"},
                constants={"VOCAB": vocab, "TILE": tuned.MASK_TILE, "PDL": True},
                warps=tuned.MASK_WARPS,
            )
    lines = ("payload", "records", "parameters", "list_tokens", "list_values", "tokens")
    yield Config(
        name="write-lines",
        kernel=table_writes.lines_kernel,
        types={**dict.fromkeys(lines, "*i32"), "tokens_stride": "i32"},
        constants={"BLOCK": 1024, "LINE": triton.next_power_of_2(sampling_table.WORDS)},
        warps=4,
    )
    yield Config(
        name="write-pages",
        kernel=table_writes.pages_kernel,
        types={**dict.fromkeys(("entries", "pages"), "*i32"), "count": "i32", "pages_stride": "i32"},
        constants={"BLOCK": 1024},
        warps=4,
    )


def _codecs() -> Iterator[Config]:
    """Every codec with bf16 pages of every model; pages of other dtypes once."""
    for model, shape in (
        ("llama-8b", KVShape(32, 8, 64, 128, torch.bfloat16)),
        ("smollm2-135m", KVShape(30, 3, 16, 64, torch.bfloat16)),
        ("phi3", KVShape(32, 32, 256, 96, torch.bfloat16)),
        ("llama-8b-fp16", KVShape(32, 8, 64, 128, torch.float16)),
        ("llama-8b-fp32", KVShape(32, 8, 64, 128, torch.float32)),
    ):
        pages = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}[shape.dtype]
        for codec in Codec:
            codes = {Codec.NONE: pages, Codec.FP8: "*fp8e4nv"}.get(codec, "*i8")
            for kernel in (kv_codec_kernels.encode_kernel, kv_codec_kernels.decode_kernel):
                yield Config(
                    name=f"codec-{kernel.fn.__name__.split('_')[0]}-{codec}-{model}",
                    kernel=kernel,
                    types={
                        "storage": pages,
                        "pages": "*i32",
                        "codes": codes,
                        "parameters": "*i16",
                        "n_pages": "i32",
                    },
                    constants=kv_codec_kernels.launch_constants(shape, codec),
                    warps=sm90.KV_CODEC_WARPS,
                    fp_fusion=False,
                )


def _report(index: int) -> str:
    return json.dumps(asdict(resources(list(shipped())[index])))


if __name__ == "__main__":
    with multiprocessing.Pool() as pool:
        for report in pool.imap(_report, range(len(list(shipped())))):
            print(report, flush=True)
