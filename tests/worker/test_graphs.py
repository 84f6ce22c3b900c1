"""What the graphs run, without a GPU: a graph here is the step itself, run again over the same inputs. So
buckets, padding and what the host sends are tested; that a CUDA graph repeats its kernels is tests/gpu's."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, ClassVar

import pytest
import torch

from kernels.attention import Workspace
from kernels.sampling import SampleResult
from services.worker import graphs
from services.worker.graphs import Logits, StepGraphs, Variant, _Captured
from services.worker.request import Request
from services.worker.rows import Rows, Size
from services.worker.scheduler import Limits
from tests.worker.requests import BLOCK, make_request, prompt
from tests.worker.stairs import Stairs, climbs
from tests.worker.stepping import Stepped
from tests.worker.test_engine import alone, mixed


class Again:
    """Stands for a CUDA graph."""

    def __init__(self, step: Callable[[], SampleResult | Logits]) -> None:
        self._step = step
        self.result = step()

    def replay(self) -> None:
        for kept, fresh in zip(vars(self.result).values(), vars(self._step()).values(), strict=True):
            if kept is not None:
                kept.copy_(fresh)


class HostGraphs(StepGraphs):
    """Counts what it replays, by variant."""

    replayed: ClassVar[dict[Variant, int]] = {}

    def _host_is_slower(self, variant: Variant) -> bool:
        return variant.size.tokens <= 64

    def _capture(self, variant: Variant) -> None:
        with torch.inference_mode():
            graph = Again(self._step(variant))
        self._graphs[variant] = _Captured(graph, graph.result)  # type: ignore[arg-type]

    def replay(self, variant: Variant, rows: Rows, groups: Any) -> SampleResult | Logits:
        self.replayed[variant] = self.replayed.get(variant, 0) + 1
        result = super().replay(variant, rows, groups)
        # The runner copies results off a GPU before the next replay rewrites them; on the CPU it does not.
        kept = {name: None if value is None else value.clone() for name, value in vars(result).items()}
        return type(result)(**kept)


@pytest.fixture
def stepped(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Stepped]:
    """An engine on the CPU whose steps run as graphs would."""
    monkeypatch.setattr(graphs.torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(graphs.torch.cuda, "Stream", lambda: type("S", (), {"wait_stream": id})())
    monkeypatch.setattr(graphs.torch.cuda, "current_stream", nullcontext)
    monkeypatch.setattr(graphs, "DECODES", (1, 2, 4, 8))

    def make(**config: int) -> Stepped:
        made = Stepped(**config)
        engine, runner = made.engine, made.engine.runner
        spec = runner._decoder.spec
        rows = engine._config.max_running
        workspace = Workspace(rows, spec.heads, spec.kv_heads, spec.head_dim, device="cpu")
        HostGraphs.replayed.clear()
        runner._graphs = HostGraphs(
            runner._decoder,
            runner._kv,
            runner._tables,
            workspace,
            runner._staging,
            rows,
            engine._config.max_step_tokens,
        )
        runner._workspace = workspace
        limits = Limits(BLOCK, rows, engine._config.max_step_tokens, group_prefixes=True)
        engine._scheduler.limits = limits
        return made

    return make


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_steps_padded_to_a_graph_give_the_tokens_of_each_request_alone(
    stepped: Callable[..., Stepped], depth: int, temperature: float
) -> None:
    engine = stepped(pipeline_depth=depth, max_step_tokens=64)
    assert engine.run(mixed(temperature), every=2) == alone(temperature)
    engine.check_empty()
    sizes = {variant.size for variant in HostGraphs.replayed}
    assert {size.decodes for size in sizes if not size.chunks} == {1, 2, 4, 8}
    assert {size.tokens for size in sizes if size.chunks} == {32, 64}


def test_a_step_takes_the_smallest_graph_that_holds_it(stepped: Callable[..., Stepped]) -> None:
    engine = stepped(max_step_tokens=100, max_running=10)
    chosen = engine.engine.runner._graphs
    assert chosen is not None

    def variant(decodes: int, chunks: int = 0, tokens: int = 0, **how: Any) -> Variant | None:
        rows = Rows.__new__(Rows)
        rows.size = Size(decodes, chunks, tokens)
        return chosen.variant(rows, how.get("groups", ()), how.get("logprobs", -1), how.get("masked", False))

    assert variant(3) == Variant(Size(4))
    assert variant(9) == Variant(Size(10))
    assert variant(4, groups=[()]) == Variant(Size(4), shared=True)
    assert variant(1, logprobs=0) == Variant(Size(1), logprobs=True)
    assert variant(0, 1, 33) == Variant(Size(0, 8, 64))
    assert variant(3, masked=True, logprobs=0) == Variant(Size(4), masked=True)
    assert variant(0, 1, 33, masked=True, logprobs=0) == Variant(Size(0, 8, 64), masked=True)
    assert variant(9, 8, 8) == Variant(Size(10, 8, 32))
    assert variant(1, 1, 65) is None, "there the device is the slower one"
    assert variant(1, 9, 32) is None, "more chunks than a graph has rows for"
    assert variant(1, 1, 20, logprobs=3) is None
    assert variant(5, 1, 20, groups=[()]) is None


def test_prefixes_and_logprobs_have_graphs_of_their_own(stepped: Callable[..., Stepped]) -> None:
    shared = prompt(6 * BLOCK, seed=3)
    requests = [
        make_request(i, shared + prompt(5 + i, seed=i), max_tokens=12, logprobs=2 if i == 0 else -1)
        for i in range(6)
    ]
    expected = Stepped()
    expected.run(requests)
    engine = stepped(max_step_tokens=200)
    assert engine.run(requests) == expected.tokens
    assert [p.chosen for p in engine.logprobs[0]] == pytest.approx(
        [p.chosen for p in expected.logprobs[0]], abs=1e-4
    )
    assert any(variant.shared for variant in HostGraphs.replayed)
    assert any(variant.logprobs for variant in HostGraphs.replayed)


@pytest.mark.parametrize("depth", [1, 2])
def test_rows_with_a_grammar_have_graphs_that_end_with_the_logits(
    stepped: Callable[..., Stepped], depth: int
) -> None:
    def requests(masked: bool) -> list[Request]:
        return mixed(1.0) + [
            make_request(
                ("stairs", i),
                prompt(5 + 9 * i, seed=i),
                max_tokens=40,
                temperature=1.0,
                seed=i,
                logprobs=1 if i == 2 else -1,
                matcher=Stairs(10 + i),
                grammar="Stairs",
            )
            for i in range(4 * masked)
        ]

    expected = Stepped()
    expected.run(requests(masked=True))
    engine = stepped(pipeline_depth=depth, max_step_tokens=64)
    tokens = engine.run(requests(masked=True), every=1)
    assert tokens == expected.tokens
    assert all(climbs(tokens["stairs", i]) and len(tokens["stairs", i]) == 10 + i for i in range(4))
    masked = [variant for variant in HostGraphs.replayed if variant.masked]
    assert {bool(variant.size.chunks) for variant in masked} == {False, True}
    HostGraphs.replayed.clear()
    engine.tokens, engine.finishes, engine.starts = {}, {}, {}
    assert engine.run(requests(masked=False)) == alone(1.0)
    assert not any(variant.masked for variant in HostGraphs.replayed), "nobody else pays for it"
