"""The engine on the real demo model: company, chunks and caches change no greedy token."""

from __future__ import annotations

import pytest

from services.worker.load import LoadedModel
from tests.worker.requests import make_request, prompt
from tests.worker.stepping import MemoryStore, Stepped

LENGTHS = [3, 17, 40, 64, 90, 21, 33, 8, 55, 16, 70, 5, 12, 48, 26, 80]


@pytest.mark.slow
def test_cold_batched_cached_and_loaded_runs_agree(demo_model: LoadedModel) -> None:
    requests = [
        make_request(i, prompt(length, seed=i, vocab=49_000), max_tokens=8)
        for i, length in enumerate(LENGTHS)
    ]
    alone = {}
    for request in requests[::3]:
        alone |= Stepped(model=demo_model, max_step_tokens=512, max_model_len=256).run([request])
    store = MemoryStore()
    batched = Stepped(store, demo_model, max_step_tokens=100, max_model_len=256, pipeline_depth=2)
    tokens = batched.run(requests, every=1)
    assert {key: tokens[key] for key in alone} == alone
    batched.settle()
    batched.check_empty()

    batched.tokens = {}
    batched.starts.clear()
    batched.finishes.clear()
    assert batched.run(requests) == tokens
    blocks = sum(length // 16 for length in LENGTHS)
    assert sum(start.gpu_tokens for start in batched.starts.values()) == blocks * 16

    loaded = Stepped(store, demo_model, max_step_tokens=100, max_model_len=256)
    assert loaded.run(requests) == tokens
    assert sum(start.store_tokens for start in loaded.starts.values()) == blocks * 16
