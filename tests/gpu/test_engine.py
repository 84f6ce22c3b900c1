"""The engine on the device: graphs, sizing of memory, faults, and the tokens of the CPU."""

from __future__ import annotations

import functools
from collections.abc import Hashable
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import torch

from services.worker.config import EngineConfig
from services.worker.engine import Engine
from services.worker.load import LoadedModel, load_model
from services.worker.models.random import random_model
from services.worker.request import Request
from tests.worker.driver import Driver
from tests.worker.requests import make_request, prompt
from tests.worker.stairs import Stairs, climbs
from tests.worker.stepping import Stepped

BLOCK = 64
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 1031,
    "hidden_size": 320,
    "intermediate_size": 448,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
LENGTHS = [1, 2, 63, 64, 65, 100, 127, 128, 129, 200, 300, 500]


@functools.cache
def model(dtype: torch.dtype = torch.bfloat16) -> LoadedModel:
    return random_model(CONFIG, device="cuda", dtype=dtype)


def stepped(*, warm: bool = True, **config: int) -> Stepped:
    engine = Stepped(
        model=model(),
        **{"block_size": BLOCK, "pages": 256, "max_step_tokens": 600, "pipeline_depth": 2} | config,  # type: ignore[arg-type]
    )
    if warm:
        engine.engine.warm_up()
    return engine


def requests(
    count: int = len(LENGTHS), shared: int = 0, max_tokens: int | None = None, **sampling: object
) -> list[Request]:
    """Requests of many lengths; the first `shared` tokens are the same in all."""
    return [
        make_request(
            i,
            prompt(shared, seed=99, vocab=1000) + prompt(LENGTHS[i % len(LENGTHS)], seed=i, vocab=1000),
            max_tokens=max_tokens or 20 + i,
            block_size=BLOCK,
            ignore_eos=True,
            seed=i,
            **sampling,  # type: ignore[arg-type]
        )
        for i in range(count)
    ]


def agreement(left: dict[Hashable, list[int]], right: dict[Hashable, list[int]]) -> float:
    """Share of the tokens before each pair of texts parts."""
    same = total = 0
    for key, tokens in left.items():
        assert len(tokens) == len(right[key])
        total += len(tokens)
        same += next(
            (i for i, pair in enumerate(zip(tokens, right[key], strict=True)) if len(set(pair)) > 1),
            len(tokens),
        )
    return same / total


def test_a_graph_gives_the_tokens_of_its_kernels_launched_one_by_one() -> None:
    eight = requests(8, max_tokens=24, temperature=0.8, top_p=0.9)
    replayed = stepped(max_running=8)
    launched = stepped(max_running=8)
    launched.engine.runner._graphs = None
    graphs = replayed.engine.runner._graphs
    assert graphs is not None
    graphs._chunk_tokens = []  # the prompts are launched in both: padding would choose other tiles
    assert replayed.run(eight) == launched.run(eight)


def test_mixed_steps_replay_graphs_and_change_little() -> None:
    replayed, launched = stepped(max_running=16), stepped(max_running=16)
    assert replayed.engine.runner._graphs is not None
    assert replayed.engine.runner._graphs._chunk_tokens
    assert launched.engine.runner._graphs is not None
    launched.engine.runner._graphs._chunk_tokens = []
    run = replayed.run(requests(40), every=1)
    assert agreement(run, launched.run(requests(40), every=1)) > 0.6
    replayed.check_empty()


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_answers_that_go_on_on_another_engine_change_little(temperature: float) -> None:
    """The same random numbers and penalties; what was decoded is prefilled, whose rounding differs."""
    sampling = {"temperature": temperature, "top_p": 0.9, "presence_penalty": 0.5, "min_tokens": 8}
    begun = requests(**sampling)
    whole = stepped(max_running=16).run(begun)
    cuts = {request.key: len(whole[request.key]) // 2 for request in begun}
    goes_on = [
        make_request(
            request.key,
            [*request.tokens, *whole[request.key][: cuts[request.key]]],
            block_size=BLOCK,
            generated=cuts[request.key],
            **msgspec.structs.asdict(request.sampling),
        )
        for request in begun
    ]
    other = stepped(max_running=16)
    rest = other.run(goes_on)
    assert agreement(rest, {key: tokens[cuts[key] :] for key, tokens in whole.items()}) > 0.6
    other.check_empty()


@pytest.mark.parametrize("depth", [1, 2])
def test_padding_rows_and_pipelining_change_little(depth: int) -> None:
    """Other numbers of rows take other tiles, whose rounding differs: texts part late or never."""
    alone: dict[Hashable, list[int]] = {}
    for request in requests():
        alone |= stepped(max_running=1, warm=False).run([request])
    together = stepped(pipeline_depth=depth, max_running=16).run(requests(), every=1)
    assert agreement(alone, together) > 0.6


def test_a_shared_prefix_read_once_changes_little() -> None:
    many = requests(24, shared=5 * BLOCK)
    grouped = stepped(max_running=32)
    plans = []
    launch = grouped.engine.runner.launch
    grouped.engine.runner.launch = lambda plan: plans.append(plan) or launch(plan)  # type: ignore[method-assign,func-returns-value]
    alone = stepped(max_running=32)
    alone.engine._scheduler.limits = alone.engine._scheduler.limits.__class__(BLOCK, 32, 600)
    assert agreement(grouped.run(many), alone.run(many)) > 0.6
    assert any(plan.prefixes and len(plan.prefixes[0].rows) >= 20 for plan in plans)


def stairs(count: int, every_other: bool = False) -> list[Request]:
    """Requests whose answers climb stairs, all or every other one."""
    return [
        replace(
            request, matcher=Stairs(30), sampling=msgspec.structs.replace(request.sampling, grammar="Stairs")
        )
        if i % 2 == 0 or not every_other
        else request
        for i, request in enumerate(requests(count, max_tokens=40, temperature=1.0))
    ]


@pytest.mark.parametrize("depth", [1, 2])
def test_rows_follow_their_grammars_in_graphs_and_without(depth: int) -> None:
    replayed, launched = (stepped(max_running=16, pipeline_depth=depth) for _ in range(2))
    launched.engine.runner._graphs = None
    for engine in (replayed, launched):
        tokens = engine.run(stairs(30, every_other=True), every=1)
        for key, answer in tokens.items():
            followed = key % 2 == 0  # type: ignore[operator]
            assert (climbs(answer) and len(answer) == 30) if followed else len(answer) == 40
        assert engine.engine.counters.failed_steps == 0
        engine.check_empty()
    graphs = replayed.engine.runner._graphs
    assert graphs is not None
    assert {bool(v.size.chunks) for v in graphs._graphs if v.masked} == {False, True}


def test_a_pipelined_row_with_a_grammar_gets_a_token_every_step() -> None:
    engine = stepped(max_running=8)
    engine.run(stairs(1))
    assert engine.engine.counters.steps <= 31


def test_nothing_is_compiled_after_the_warm_up() -> None:
    engine = stepped(max_running=48)
    engine.run(requests(40), every=2)
    engine.run(requests(30, shared=3 * BLOCK, temperature=1.0, top_p=0.8, presence_penalty=0.5))
    engine.run(requests(9, logprobs=5, logit_bias={3: -5.0}, min_tokens=4))
    engine.run(stairs(9, every_other=True), every=1)
    assert engine.engine.counters.late_kernels == 0
    assert engine.engine.counters.failed_steps == 0


def test_a_request_whose_logits_are_not_finite_fails_alone() -> None:
    broken = random_model(CONFIG | {"tie_word_embeddings": False}, device="cuda", dtype=torch.bfloat16)
    broken.decoder.weights.embedding[1005] = torch.nan
    engine = Stepped(model=broken, block_size=BLOCK, pages=256, max_step_tokens=600, pipeline_depth=2)
    engine.engine.warm_up()
    bad = make_request("bad", [1, 2, 1005, 4], block_size=BLOCK, max_tokens=5)
    engine.run([*requests(4), bad])
    assert engine.finishes["bad"].reason == "error"
    assert "not finite" in engine.finishes["bad"].message
    assert all(engine.finishes[i].reason == "length" for i in range(4))
    engine.check_empty()


def test_kv_pages_take_what_is_left_of_the_card_and_the_ledger_adds_up() -> None:
    engine = Engine(
        model(), EngineConfig.for_device("cuda", gpu_memory=0.5, max_step_tokens=1024, max_running=64)
    )
    engine.warm_up()
    memory = engine.memory()
    assert memory is not None
    assert sum(memory.parts().values()) == memory.total
    assert all(size >= 0 for size in memory.parts().values())
    used = memory.total - memory.free
    assert 0.45 < used / memory.total < 0.5
    assert memory.kv > 0.8 * used


def test_too_little_memory_for_a_page_is_said_so() -> None:
    with pytest.raises(ValueError, match=r"kv_bytes must hold at least one page .*left of gpu_memory 0\.001"):
        Engine(model(), EngineConfig.for_device("cuda", gpu_memory=0.001))


def test_the_demo_model_says_what_it_says_on_the_cpu(demo_model_path: Path) -> None:
    on_cpu, on_gpu = load_model(demo_model_path), load_model(demo_model_path, device="cuda")
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, on_cpu.spec.vocab_size, (40,), generator=generator).tolist()
    text = Driver(on_cpu).greedy(tokens, 300)  # the model's own text, where it is sure of itself
    sequence = tokens + text
    expected = Driver(on_cpu).logits(sequence)
    driver = Driver(on_gpu, block_size=BLOCK)
    prefilled = driver.logits(sequence).float().cpu()
    decoded = torch.cat([driver.step([("decode", [token])])[0] for token in sequence]).float().cpu()
    for logits in (prefilled, decoded):
        difference = (logits - expected).abs()
        spread = expected.std()
        assert difference.mean() < 0.03 * spread
        agree = (logits.argmax(-1) == expected.argmax(-1))[len(tokens) - 1 :]
        assert agree.float().mean() > 0.95
