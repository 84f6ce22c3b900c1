"""What a request gets back never depends on what runs beside it, on how its prompt was cut, or on where its
prefix came from."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Hashable

import pytest

from services.wire.messages import Retention
from services.worker.engine import Engine, EngineConfig
from services.worker.request import Request, StepReport
from tests.worker.requests import make_request, prompt
from tests.worker.stepping import MemoryStore, Stepped, tiny_model

LENGTHS = [1, 2, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 100, 127, 150, 200]


def mixed(temperature: float = 0.0) -> list[Request]:
    return [
        make_request(
            i, prompt(length, seed=i), max_tokens=10 + i, temperature=temperature, seed=i, ignore_eos=True
        )
        for i, length in enumerate(LENGTHS)
    ]


@functools.cache
def alone(temperature: float = 0.0) -> dict[Hashable, list[int]]:
    """Every request of `mixed` in an engine of its own, its prompt in one piece."""
    tokens: dict[Hashable, list[int]] = {}
    for request in mixed(temperature):
        tokens |= Stepped(max_step_tokens=512).run([request])
    return tokens


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("chunk", [16, 50, 512])
def test_a_batch_of_sixteen_gives_the_tokens_of_each_alone(depth: int, chunk: int) -> None:
    stepped = Stepped(pipeline_depth=depth, max_step_tokens=chunk)
    assert stepped.run(mixed()) == alone()
    stepped.check_empty()


@pytest.mark.parametrize("depth", [1, 2])
def test_arrivals_in_the_middle_of_others_change_nothing(depth: int) -> None:
    stepped = Stepped(pipeline_depth=depth, max_step_tokens=40, max_running=5)
    assert stepped.run(mixed(), every=3) == alone()


@pytest.mark.parametrize("depth", [1, 2])
def test_a_seed_gives_the_same_text_in_any_company(depth: int) -> None:
    stepped = Stepped(pipeline_depth=depth, max_step_tokens=40)
    assert stepped.run(mixed(temperature=1.0), every=1) == alone(temperature=1.0)
    assert alone(temperature=1.0) != alone()


@pytest.mark.parametrize("depth", [1, 2])
def test_preempted_requests_continue_as_if_nothing_had_happened(depth: int) -> None:
    growing = [make_request(i, prompt(20 + i, seed=i), max_tokens=90, ignore_eos=True) for i in range(8)]
    roomy = Stepped(pipeline_depth=depth)
    stepped = Stepped(pipeline_depth=depth, pages=20)
    assert stepped.run(growing) == roomy.run(growing)
    assert roomy.engine.counters.preemptions == 0
    assert sum(finish.preemptions for finish in stepped.finishes.values()) >= 5
    assert stepped.engine.counters.preemptions >= 5
    stepped.check_empty()


def test_a_prefix_hit_gives_the_tokens_of_the_cold_run() -> None:
    stepped = Stepped()
    stepped.run(mixed())
    again = [Request(**{**vars(r), "key": (r.key, "again")}) for r in mixed()]
    stepped.run(again)
    for request in again:
        first, _ = request.key  # type: ignore[misc]
        assert stepped.tokens[request.key] == alone()[first]
        assert stepped.starts[request.key].gpu_tokens == len(request.tokens) // 16 * 16


def test_the_next_turn_of_a_conversation_hits_what_was_generated() -> None:
    stepped = Stepped()
    first = make_request("turn 1", prompt(50), max_tokens=40, ignore_eos=True)
    answer = stepped.run([first])["turn 1"]
    conversation = [*first.tokens, *answer, *prompt(20, seed=1)]
    cold = Stepped().run([make_request("turn 2", conversation)])
    assert stepped.run([make_request("turn 2", conversation)])["turn 2"] == cold["turn 2"]
    assert stepped.starts["turn 2"].gpu_tokens == 80


def test_equal_prompts_at_once_are_computed_once_and_agree() -> None:
    stepped = Stepped()
    tokens = stepped.run([make_request(i, prompt(150), ignore_eos=True) for i in range(8)])
    assert all(tokens[i] == tokens[0] for i in range(8))
    assert stepped.engine.counters.prefill_tokens == 150 + 7 * 6, "144 of 150 tokens are whole blocks"
    stepped.check_empty()


def test_equal_prompts_with_different_seeds_differ() -> None:
    stepped = Stepped()
    requests = [make_request(i, prompt(40), temperature=1.0, seed=i, max_tokens=20) for i in range(4)]
    assert len({tuple(tokens) for tokens in stepped.run(requests).values()}) == 4


# ---- the store


def stored(requests: list[Request]) -> MemoryStore:
    """A store with everything that one engine computed for these requests."""
    store = MemoryStore()
    stepped = Stepped(store)
    stepped.run(requests)
    stepped.settle()
    return store


@pytest.mark.parametrize("depth", [1, 2])
def test_a_store_hit_gives_the_tokens_of_the_cold_run(depth: int) -> None:
    store = stored(mixed())
    stepped = Stepped(store, pipeline_depth=depth)
    assert stepped.run(mixed(), every=1) == alone()
    for request in mixed():
        assert stepped.starts[request.key].store_tokens == len(request.tokens) // 16 * 16
    assert stepped.engine.counters.hit_tokens["store"] == sum(length // 16 * 16 for length in LENGTHS)
    stepped.check_empty()


def test_a_load_that_comes_back_short_is_completed_by_computing() -> None:
    store = stored(mixed())
    store.most = 2
    stepped = Stepped(store)
    assert stepped.run(mixed()) == alone()
    assert stepped.starts[15].store_tokens == 32


def test_blocks_reach_the_store_with_their_place_and_what_their_request_says_of_them() -> None:
    retention = (Retention(start=0, end=20, priority=90, ttl_s=60.0), Retention(start=40, priority=50))
    request = make_request("a", prompt(70), max_tokens=20, retention=retention, tenant="t", ignore_eos=True)
    store = stored([request])
    blocks = sorted(store.blocks.values(), key=lambda block: block.depth)
    assert [block.depth for block in blocks] == [0, 1, 2, 3, 4]
    assert [block.hash for block in blocks[:4]] == list(request.hashes)
    assert [block.parent for block in blocks] == [request.root, *(block.hash for block in blocks[:4])]
    assert [block.priority for block in blocks] == [90, 90, 50, 50, 50], "block 1 is touched by a 90"
    assert [block.ttl_s for block in blocks] == [60.0, 60.0, None, None, None]
    assert {block.tenant for block in blocks} == {"t"}


@pytest.mark.parametrize("from_store", [False, True])
def test_a_hit_passes_on_what_its_request_says_of_blocks_that_nobody_offers_again(from_store: bool) -> None:
    plain = make_request("plain", prompt(70))
    store = MemoryStore()
    stepped = Stepped(store)
    stepped.run([plain])
    stepped.settle()
    assert store.retained == []
    retention = (Retention(start=0, end=20, priority=90, ttl_s=60.0), Retention(start=40, priority=50))
    if from_store:
        stepped = Stepped(store)
    stepped.run([make_request("again", prompt(70), retention=retention, tenant="t")])
    assert store.retained == [
        (list(plain.hashes[:2]), 90, 60.0, "t"),
        (list(plain.hashes[2:]), 50, None, "t"),
    ]


def test_the_store_is_asked_with_the_time_that_computing_would_take() -> None:
    store = MemoryStore()
    stepped = Stepped(store)
    stepped.engine.warm_up()
    stepped.run([make_request("a", prompt(64))])
    recompute_s = store.recompute_s[0]
    per_token_s = 1 / stepped.reports[0].stats.prefill_tokens_per_s  # type: ignore[union-attr]
    assert recompute_s == pytest.approx([16 * n * per_token_s for n in (1, 2, 3, 4)], rel=0.5)
    assert list(recompute_s) == sorted(recompute_s)


def test_blocks_that_the_store_has_or_has_no_room_for_are_not_copied_again() -> None:
    store = MemoryStore(size=3)
    stepped = Stepped(store)
    stepped.run([make_request("a", prompt(100))])
    stepped.settle()
    assert stepped.engine.counters.offered_blocks == 3
    assert stepped.engine.counters.unoffered_blocks > 0
    assert stepped.held["store"] == set(store.blocks)


def test_what_the_store_lost_is_offered_again_on_the_next_hit_parents_first() -> None:
    store = MemoryStore()
    stepped = Stepped(store, max_step_tokens=50)
    stepped.run([make_request("a", prompt(70))])
    stepped.settle()
    store.blocks.clear()
    longer = make_request("b", prompt(200))
    stepped.run([longer])
    stepped.settle()
    assert [block.hash for block in store.blocks.values()][: len(longer.hashes)] == list(longer.hashes)


def test_copies_after_a_step_take_a_share_of_its_time() -> None:
    store = MemoryStore()
    stepped = Stepped(store, max_step_tokens=512)
    stepped.engine.submit(make_request("a", prompt(500), max_tokens=4, ignore_eos=True))
    copied = []
    while not stepped.engine.idle:
        before = len(store.blocks)
        stepped.turn()
        copied.append(len(store.blocks) - before)
    assert copied[0] == 1, "nothing is known of copies yet"
    assert all(1 <= pages <= 3 for pages in copied), "31 blocks wait; the clock gives a copy 1/1 of a step"
    stepped.settle()
    assert len(store.blocks) == 31


def test_blocks_wait_for_a_server_that_is_behind_and_for_no_other() -> None:
    store = MemoryStore(servers=2)
    requests = [make_request(i, prompt(100, seed=i)) for i in range(8)]
    behind = {request.key for request in requests if store.server(request.hashes[0]) == 1}
    assert 0 < len(behind) < len(requests)
    store.rooms[1] = 0
    stepped = Stepped(store, pages=200, max_running=8)
    stepped.run(requests)
    stepped.turn(100)
    for request in requests:
        assert set(store.blocks).isdisjoint(request.hashes) == (request.key in behind)
    store.rooms[1] = 3
    stepped.settle()
    for request in requests:
        assert set(store.blocks).issuperset(request.hashes)
    assert stepped.engine.counters.unoffered_blocks == 0


def test_blocks_that_another_worker_waits_for_go_first_and_all_at_once() -> None:
    store = MemoryStore()
    stepped = Stepped(store, max_step_tokens=512)
    requests = [make_request(key, prompt(200, seed=seed)) for seed, key in enumerate("ab")]
    for request in requests:
        stepped.engine.submit(request)
    stepped.turn()
    assert len(store.blocks) == 1, "of the first, and 23 wait"
    store.awaited = frozenset(requests[1].hashes)
    stepped.turn()
    assert list(store.blocks)[1:] == list(requests[1].hashes)
    store.awaited = frozenset()
    stepped.run()
    stepped.settle()
    assert set(store.blocks) >= {*requests[0].hashes, *requests[1].hashes}


def test_a_block_whose_page_went_to_another_is_never_offered() -> None:
    store = MemoryStore()
    stepped = Stepped(store, pages=12, max_step_tokens=200)
    for i in range(6):
        stepped.run([make_request(i, prompt(150, seed=i), max_tokens=2, ignore_eos=True)])
    stepped.settle()
    assert stepped.engine.counters.unoffered_blocks > 0
    cold = Stepped(pages=64)
    for i in range(6):
        cold.run([make_request(i, prompt(150, seed=i), max_tokens=2, ignore_eos=True)])
    assert store.blocks
    for hash, block in store.blocks.items():
        expected = cold.engine.kv.storage[:, :, cold.engine._pool._page_of[hash]]
        stored = block.kv.payload.view(expected.dtype).view(expected.shape)
        assert stored.allclose(expected, atol=1e-5)


def test_foreign_blocks_from_the_store_are_refused_and_the_prompt_is_computed() -> None:
    store = stored(mixed())
    for block in store.blocks.values():
        block.kv.payload.resize_(1)
    stepped = Stepped(store)
    assert stepped.run(mixed()) == alone()
    assert stepped.engine.counters.hit_tokens["store"] == 0


# ---- ends and sampling


def test_the_end_of_sequence_token_ends_a_text_unless_ignored() -> None:
    base = {"max_tokens": 5, "logit_bias": {7: 100.0}}  # token 7 always wins
    stepped = Stepped()
    stepped.run(
        [make_request("a", prompt(20), **base), make_request("b", prompt(20), ignore_eos=True, **base)]
    )
    assert (stepped.tokens["a"], stepped.finishes["a"].reason) == ([], "stop")
    assert stepped.finishes["a"].stop_token == 7
    assert (stepped.tokens["b"], stepped.finishes["b"].reason) == ([7] * 5, "length")
    assert set(stepped.starts) == {"a", "b"}


@pytest.mark.parametrize("depth", [1, 2])
def test_a_stop_token_id_ends_the_text_before_it(depth: int) -> None:
    text = alone()[15]
    stop = text[6]
    expected = text[: text.index(stop)]
    stepped = Stepped(pipeline_depth=depth)
    request = make_request(
        "a", prompt(200, seed=15), max_tokens=20, ignore_eos=True, stop_token_ids=(stop, 319)
    )
    assert stepped.run([request])["a"] == expected
    assert stepped.finishes["a"].stop_token == stop
    stepped.check_empty()


@pytest.mark.parametrize("depth", [1, 2])
def test_min_tokens_forbids_every_stop_until_then(depth: int) -> None:
    stepped = Stepped(pipeline_depth=depth)
    request = make_request(
        "a", prompt(20), max_tokens=9, min_tokens=4, stop_token_ids=(9,), logit_bias={7: 100.0, 9: 90.0}
    )
    tokens = stepped.run([request])["a"]
    assert len(tokens) == 4
    assert not {7, 9} & set(tokens)
    assert stepped.finishes["a"].stop_token == 7


def test_the_models_length_limit_ends_a_text() -> None:
    stepped = Stepped(max_model_len=64)
    stepped.run([make_request("a", prompt(60), max_tokens=100, ignore_eos=True)])
    assert len(stepped.tokens["a"]) == 4
    assert stepped.finishes["a"].reason == "length"


def test_a_text_may_fill_every_page_there_is() -> None:
    stepped = Stepped(pages=4)
    stepped.run([make_request(i, prompt(30, seed=i), max_tokens=500, ignore_eos=True) for i in range(3)])
    assert [len(stepped.tokens[i]) for i in range(3)] == [34, 34, 34]
    stepped.check_empty()


def test_log_probabilities_come_with_the_tokens_of_those_who_ask() -> None:
    stepped = Stepped()
    stepped.run(
        [
            make_request("three", prompt(20), logprobs=3, ignore_eos=True),
            make_request("chosen", prompt(20), logprobs=0, ignore_eos=True),
            make_request("none", prompt(20), ignore_eos=True),
        ]
    )
    assert stepped.tokens["three"] == stepped.tokens["chosen"] == stepped.tokens["none"]
    assert stepped.logprobs["none"] == []
    assert [logprob.top for logprob in stepped.logprobs["chosen"]] == [()] * 8
    for token, logprob in zip(stepped.tokens["three"], stepped.logprobs["three"], strict=True):
        assert len(logprob.top) == 3
        assert logprob.top[0] == (token, logprob.chosen), "greedy takes the most likely one"
        assert logprob.chosen < 0


def test_a_frequency_penalty_acts_on_what_the_request_itself_generated() -> None:
    stepped = Stepped()
    bias = {5: 50.0}
    stepped.run(
        [
            make_request("free", prompt(20), logit_bias=bias, max_tokens=6),
            make_request("held", prompt(20), logit_bias={5: 3.0}, max_tokens=40, frequency_penalty=2.0),
        ]
    )
    assert stepped.tokens["free"] == [5] * 6
    assert stepped.tokens["held"].count(5) < 5


def test_a_slot_forgets_the_sampling_of_its_last_occupant() -> None:
    stepped = Stepped(max_running=1)
    special = {"logit_bias": {5: 100.0}, "logprobs": 2, "frequency_penalty": 2.0, "min_tokens": 3}
    stepped.run([make_request("special", prompt(20), **special)])
    stepped.run([make_request("plain", prompt(200, seed=15), max_tokens=25, ignore_eos=True)])
    assert stepped.tokens["plain"] == alone()[15]
    assert stepped.logprobs["plain"] == []


# ---- cancels, life, load


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("turns", [0, 1, 4, 8])
def test_a_cancel_frees_everything_within_one_step(depth: int, turns: int) -> None:
    stepped = Stepped(pipeline_depth=depth, max_step_tokens=32)
    stepped.engine.submit(make_request("a", prompt(120), max_tokens=50, ignore_eos=True))
    stepped.turn(turns)
    stepped.engine.cancel("a")
    stepped.engine.cancel("a")
    stepped.turn()
    assert stepped.finishes["a"].reason == "cancelled"
    stepped.check_empty()
    stepped.turn(2)
    stepped.check_empty()


def test_a_cancel_during_a_load_is_passed_on() -> None:
    store = stored(mixed())
    store.polls = 1_000_000
    stepped = Stepped(store)
    stepped.engine.submit(mixed()[15])
    stepped.turn(1)
    assert stepped.engine._pool.referenced > 0
    stepped.engine.cancel(15)
    stepped.turn()
    assert store.loads[0].cancelled
    stepped.check_empty()


def test_unknown_keys_may_be_cancelled() -> None:
    stepped = Stepped()
    stepped.engine.cancel("nobody")
    stepped.turn()
    assert stepped.reports == []


def test_reports_carry_the_load_after_each_step() -> None:
    stepped = Stepped(max_running=2, max_step_tokens=32)
    for i in range(3):
        stepped.engine.submit(make_request(i, prompt(40, seed=i), max_tokens=3, ignore_eos=True))
    stepped.turn()
    stats = stepped.reports[0].stats
    assert stats is not None
    assert (stats.running, stats.waiting, stats.queued_prefill_tokens) == (1, 2, 8 + 80)
    stepped.run()
    stats = stepped.engine.stats()
    assert (stats.running, stats.waiting, stats.queued_prefill_tokens, stats.free_blocks) == (0, 0, 0, 128)


def test_the_counters_add_up() -> None:
    stepped = Stepped()
    stepped.run(mixed())
    counters = stepped.engine.counters
    assert counters.prompt_tokens == counters.prefill_tokens == sum(LENGTHS)
    assert counters.generated_tokens == sum(map(len, stepped.tokens.values()))
    assert counters.finished == {"stop": 0, "length": 16, "cancelled": 0, "error": 0}
    assert counters.steps == len(stepped.reports)


def test_warming_up_measures_the_rates_and_leaves_no_trace() -> None:
    stepped = Stepped(max_step_tokens=512)
    stepped.engine.warm_up()
    stats = stepped.engine.stats()
    assert stats.prefill_tokens_per_s > 0
    assert stats.decode_step_s > 0
    assert stats.free_blocks == 128
    assert stepped.run(mixed()) == alone()
    stepped.check_empty()


def test_retention_keeps_a_prompt_while_others_stream_through() -> None:
    def reused(retention: tuple[Retention, ...]) -> int:
        stepped = Stepped(pages=24)
        system = prompt(64, seed=99)
        stepped.run([make_request("system", system, retention=retention, max_tokens=1)])
        for i in range(20):
            stepped.run([make_request(i, prompt(200, seed=i), max_tokens=1)])
        stepped.run([make_request("again", [*system, 1, 2, 3])])
        return stepped.starts["again"].gpu_tokens

    assert reused((Retention(start=0, priority=90),)) == 64
    assert reused(()) == 0


# ---- the thread


def wait_for(condition: object, timeout_s: float = 30.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline_s, "it did not happen in time"
        time.sleep(0.001)


def test_a_started_engine_serves_many_threads_and_stops() -> None:
    engine = Engine(tiny_model(), EngineConfig(pages=128, max_step_tokens=64))
    reports: list[StepReport] = []
    assert not engine.healthy()
    engine.start(reports.append)
    assert engine.healthy()
    submitters = [threading.Thread(target=engine.submit, args=(request,)) for request in mixed()]
    for thread in submitters:
        thread.start()
    for thread in submitters:
        thread.join()
    wait_for(lambda: engine.idle)
    tokens: dict[Hashable, list[int]] = {}
    for report in reports:
        for output in report.outputs:
            tokens.setdefault(output.key, []).extend(output.tokens)
    assert tokens == alone()
    engine.stop()
    assert not engine.healthy()
    engine.stop()  # twice is once
    with pytest.raises(RuntimeError, match="started before"):
        engine.start(reports.append)
