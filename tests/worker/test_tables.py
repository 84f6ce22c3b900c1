from __future__ import annotations

from typing import Any

import pytest
import torch

from kernels.sampling import sample
from services.worker.sequence import Sequence
from services.worker.tables import Tables
from tests.worker.requests import make_request, prompt


def sequence(tokens: list[int], stop_ids: frozenset[int] = frozenset(), **sampling: Any) -> Sequence:
    request = make_request("a", tokens, **sampling)
    return Sequence(request, block_size=16, max_length=512, stop_ids=stop_ids)


def tables() -> Tables:
    return Tables(slots=6, max_length=512, block_size=16, device=torch.device("cpu"))


def greedy(tables: Tables, slots: list[int], lengths: list[int], logits: torch.Tensor) -> list[int]:
    rows = (torch.tensor(numbers, dtype=torch.int32) for numbers in (slots, lengths))
    return sample(logits, tables.sampling, tables.tokens, *rows).tokens.tolist()


def test_placing_writes_tokens_and_the_way_to_sample() -> None:
    it = tables()
    texts = {4: prompt(200, seed=1), 0: prompt(3, seed=2)}
    first = sequence(texts[4], temperature=0.0, logit_bias={7: 100.0})
    second = sequence(texts[0], frozenset([9, 8]), temperature=0.0, min_tokens=3, max_tokens=5)
    it.place({4: first, 0: second})
    assert it.tokens[4, :200].tolist() == texts[4]
    assert it.tokens[0, :3].tolist() == texts[0]

    logits = torch.zeros(2, 20)
    logits[:, 9], logits[:, 8], logits[:, 5] = 3.0, 2.0, 1.0
    assert greedy(it, [4, 0], [200, 3], logits) == [7, 5]
    assert (int(it.tokens[4, 200]), int(it.tokens[0, 3])) == (7, 5)
    assert greedy(it, [0], [6], logits[:1]) == [9], "three were generated"
    first.tokens.append(1)  # nobody holds its memory


def test_a_new_occupant_inherits_nothing() -> None:
    it = tables()
    it.place({2: sequence(prompt(20), temperature=0.0, logit_bias={7: 100.0}, frequency_penalty=2.0)})
    it.place({2: sequence(prompt(5), temperature=0.0)})
    logits = torch.zeros(1, 20)
    logits[0, 3] = 1.0
    assert greedy(it, [2], [5], logits) == [3]


def test_pages_go_where_they_belong() -> None:
    it = tables()
    it.place({})
    it.set_pages({})
    it.set_pages({(1, 3): 77, (5, 31): 78, (0, 0): 79})
    assert {(s, b): int(it.pages[s, b]) for s, b in it.pages.nonzero().tolist()} == {
        (1, 3): 77,
        (5, 31): 78,
        (0, 0): 79,
    }


def test_more_than_a_slot_holds_is_refused_before_anything_is_written() -> None:
    it = tables()
    with pytest.raises(ValueError, match="128 forbidden tokens, got 0 and 200"):
        it.place({1: sequence(prompt(5), frozenset(range(200)), min_tokens=1)})
    assert not it.tokens.any()
