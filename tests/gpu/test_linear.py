from __future__ import annotations

import pytest
import torch

from kernels import decode_gemm, linear
from kernels.linear import Norm
from kernels.tuned.gemm_sm90 import MEASURED, GemmTile
from tests.kernels import cases
from tests.kernels.cases import LinearCase

DEVICE = "cuda"
dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
LAYERS = [
    LinearCase(300, 6144, 4096, norm="folded"),
    LinearCase(300, 4608, 3584, norm="gain", bias=True),
    LinearCase(300, 4096, 4096, add=True),
    LinearCase(300, 14336, 4096, norm="folded", swiglu=True),
    LinearCase(300, 4096, 14336, add=True),
    LinearCase(300, 4096, 1024, norm="folded"),
    LinearCase(300, 1024, 2048, add=True, bias=True),
    LinearCase(300, 3072, 1024, norm="folded", swiglu=True),
    LinearCase(300, 960, 576, norm="gain"),
    LinearCase(300, 576, 576, add=True),
    LinearCase(300, 1536, 576, norm="folded", swiglu=True, bias=True),
    LinearCase(300, 576, 1536, add=True),
]


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_linear_is_that_of_fp64(layer: LinearCase) -> None:
    inputs = layer.inputs(torch.bfloat16, DEVICE)
    expected = layer.expected(inputs)
    for tokens in (1, 7, 16, 33, 64, 65, 200, 300):
        add_to = inputs["add_to"]
        some = {
            **inputs,
            "x": inputs["x"][:tokens],
            "add_to": None if add_to is None else add_to[:tokens].clone(),
        }
        with cases.poisoned_memory():
            # Many tokens: norm and SwiGLU are kernels of their own, which round too.
            cases.assert_close(linear.linear(**some), expected[:tokens], roundings=2)


@dtypes
@pytest.mark.parametrize("columns", [1, 30, 1000])
@pytest.mark.parametrize("depth", [1, 72, 1000])
@pytest.mark.parametrize("swiglu", [False, True])
def test_odd_shapes_are_those_of_fp64(dtype: torch.dtype, columns: int, depth: int, swiglu: bool) -> None:
    case = LinearCase(5, columns, depth, norm="folded", bias=True, swiglu=swiglu, add=True)
    inputs = case.inputs(dtype, DEVICE)
    expected = case.expected(inputs)
    with cases.poisoned_memory():
        cases.assert_close(linear.linear(**inputs), expected)


@pytest.mark.parametrize(("vocab", "depth"), [(128_256, 4096), (151_936, 1024)])
@pytest.mark.parametrize("tokens", [1, 64])
def test_the_output_head_is_that_of_the_reference(vocab: int, depth: int, tokens: int) -> None:
    x = cases.random(tokens, depth, seed=0, dtype=torch.bfloat16, device=DEVICE)
    weight = torch.randn(vocab, depth, device=DEVICE, dtype=torch.bfloat16) * depth**-0.5
    norm = Norm(eps=1e-6, gain=None)
    cases.assert_close(
        linear.linear(x, weight, norm=norm), linear.reference(x, weight, norm=norm).double().cpu()
    )


@pytest.mark.parametrize("norm", [None, "folded"])
@pytest.mark.parametrize(
    "tile",
    [
        GemmTile(64, 16, 128, 4, 4, 4, prefetch=512),
        GemmTile(32, 16, 256, 2, 4, 4, prefetch=1024),
        GemmTile(64, 64, 64, 2, 4, 4),
        GemmTile(128, 128, 64, 2, 8, 3, prefetch=32),
        *{tile for tile, _, _ in MEASURED.values() if tile is not None and tile.split > 1},
    ],
    ids=str,
)
def test_split_products_repeat_bit_for_bit_and_leave_the_counters_zero(
    tile: GemmTile, norm: str | None
) -> None:
    case = LinearCase(tile.tokens, 1024, 4096, norm=norm)
    inputs = case.inputs(torch.bfloat16, DEVICE)
    fused = inputs.pop("norm")
    eps = fused.eps if fused else None
    runs = [decode_gemm.launch(**inputs, tile=tile, norm_eps=eps) for _ in range(100)]
    cases.assert_close(runs[0], case.expected(case.inputs(torch.bfloat16, DEVICE)))
    assert all(torch.equal(run, runs[0]) for run in runs)


@pytest.mark.parametrize("tokens", [1, 48])
def test_a_chain_of_layers_replays_from_a_graph_with_other_inputs(tokens: int) -> None:
    """Each kernel starts before the one before has ended, and must wait for what that one writes."""
    generator = torch.Generator(DEVICE).manual_seed(0)

    def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, generator=generator, device=DEVICE) * scale).bfloat16()

    hidden, ffn = 1024, 3072
    weights = [
        (random(2 * ffn, hidden, scale=hidden**-0.5), random(hidden, ffn, scale=ffn**-0.5)) for _ in range(8)
    ]
    norm = Norm(eps=1e-5, gain=None)
    residual = random(tokens, hidden)

    def step(x: torch.Tensor) -> torch.Tensor:
        for gate_up, down in weights:
            linear.linear(linear.linear(x, gate_up, norm=norm, swiglu=True), down, add_to=x)
        return x

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(residual.clone())
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        step(residual)
    for _ in range(20):
        x = random(tokens, hidden)
        eager = step(x.clone())
        residual.copy_(x)
        graph.replay()
        assert torch.equal(residual, eager)
        for gate_up, down in weights:
            linear.reference(linear.reference(x, gate_up, norm=norm, swiglu=True), down, add_to=x)
        assert (residual - x).norm() < 2e-2 * x.norm()


def test_a_capture_on_a_stream_that_never_split_a_product_is_refused() -> None:
    x, weight = torch.ones(1, 64, device=DEVICE).bfloat16(), torch.ones(64, 64, device=DEVICE).bfloat16()
    tile = GemmTile(64, 16, 32, 2, 4, 3)
    decode_gemm.launch(x, weight, None, tile)
    graph = torch.cuda.CUDAGraph()
    with (
        pytest.raises(RuntimeError, match="run the step once on the stream of the capture"),
        torch.cuda.graph(graph, stream=torch.cuda.Stream(priority=-1)),
    ):
        decode_gemm.launch(x, weight, None, tile)
