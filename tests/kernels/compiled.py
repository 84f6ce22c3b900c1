"""Compile the shipped kernels for sm_90 on a machine without a GPU and count what the compiler made of them.

    python -m tests.kernels.compiled      # one JSON object a line

Runs without TRITON_INTERPRET: an interpreted kernel cannot be compiled. The Triton wheel brings ptxas and
cuobjdump along.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels import attention, norm, rope, swiglu
from kernels.tuned import sm90

_TARGET = GPUTarget("cuda", 90, 32)


@dataclass(frozen=True)
class Config:
    """One kernel with everything that the compiler specialises it on.

    `types` holds Triton's name of the type of every argument that is not a constant, pointers as `*bf16`;
    `constants` every constexpr, and optional pointers that are None.
    """

    name: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, object]
    warps: int
    stages: int = 3


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes: bytes a thread on the stack and in local memory are spills."""

    name: str
    registers: int
    stack_bytes: int
    local_bytes: int
    shared_bytes: int
    wgmma: int
    mma_sync: int


def compile_kernel(config: Config) -> Any:
    """The compiled kernel; `asm["cubin"]` is what runs."""
    names = config.kernel.arg_names
    signature = {name: config.types.get(name, "constexpr") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name][0] == "*"}
    source = ASTSource(
        fn=config.kernel, signature=signature, constexprs=dict(config.constants), attrs=aligned
    )
    options = {"num_warps": config.warps, "num_stages": config.stages}
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
        mma_sync=ptx.count("mma.sync"),
    )


def shipped() -> Iterator[Config]:
    """The shapes of the models that we serve: each tile with each, and the rarer variants once."""
    for model, group, n_kv, dim, block_size in (
        ("llama-8b", 4, 8, 128, 64),
        ("smollm2-135m", 3, 3, 64, 16),
        ("qwen2-7b", 7, 4, 128, 128),
    ):
        for max_query in (1, 8, 512):
            tile = sm90.attention_tile(group, max_query)
            yield _attention(f"{model}-{tile.rows}", group, n_kv, dim, block_size, 0, tile)
    whole = sm90.attention_tile(1, 512)
    yield _attention("mistral-window-128", 4, 8, 128, 64, 4096, whole)
    yield _attention("phi3-dim-96-128", 1, 32, 96, 64, 0, whole)

    for model, n_q, n_kv, dim, norm_type in (
        ("llama-8b", 32, 8, 128, None),
        ("qwen3-0.6b", 16, 8, 128, "*bf16"),
    ):
        norms = ("q_norm", "k_norm")
        yield Config(
            name=f"rope-{model}",
            kernel=rope.rope_kernel,
            types={
                **dict.fromkeys(("qkv", "k_pages", "v_pages", "q"), "*bf16"),
                **(dict.fromkeys(norms, norm_type) if norm_type else {}),
                "cos_sin": "*fp32",
                "positions": "*i64",
                "slots": "*i64",
                "eps": "fp32",
            },
            constants={
                **({} if norm_type else dict.fromkeys(norms)),
                "N_Q": n_q,
                "N_KV": n_kv,
                "BLOCK_SIZE": 64,
                "DIM": dim,
                "HALF": dim // 2,
            },
            warps=1,
        )
    for hidden, block in ((576, 1024), (4096, 4096)):
        yield Config(
            name=f"norm-{hidden}",
            kernel=norm.norm_kernel,
            types={**dict.fromkeys(("x", "weight", "residual", "y"), "*bf16"), "eps": "fp32"},
            constants={"HIDDEN": hidden, "BLOCK": block},
            warps=sm90.norm_warps(block),
        )
    yield Config(
        name="swiglu-14336",
        kernel=swiglu.swiglu_kernel,
        types={"gate_up": "*bf16", "out": "*bf16"},
        constants={"COLUMNS": 14336, "BLOCK": sm90.SWIGLU_COLUMNS},
        warps=4,
    )


def _attention(
    name: str, group: int, n_kv: int, dim: int, block_size: int, window: int, tile: sm90.Tile
) -> Config:
    return Config(
        name=f"attention-{name}",
        kernel=attention.attention_kernel,
        types={
            **dict.fromkeys(("q", "k_pages", "v_pages", "out"), "*bf16"),
            **dict.fromkeys(("block_tables", "query_start", "context_len"), "*i32"),
            "scale": "fp32",
            "table_stride": "i32",
        },
        constants={
            "GROUP": group,
            "N_KV": n_kv,
            "BLOCK_SIZE": block_size,
            "DIM": dim,
            "WINDOW": window,
            "ROWS": tile.rows,
            "KEYS": min(block_size, tile.keys),
        },
        warps=tile.warps,
        stages=tile.stages,
    )


if __name__ == "__main__":
    for shipped_config in shipped():
        print(json.dumps(asdict(resources(shipped_config))), flush=True)
