"""The Triton sampler in the interpreter against the rules, row by row. 9,001 tokens are three chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import sampling
from kernels.tuned import sampling_sm90 as tuned
from tests.kernels import cases
from tests.kernels.sampling_rows import Asked, Step, assert_same, mask_of

VOCAB = 9001
DRAWN = {"temperature": 1.0, "seed": 5}


def random_logits(rows: int, vocab: int = VOCAB, scale: float = 3.0, seed: int = 0) -> torch.Tensor:
    return scale * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def check(
    logits: torch.Tensor, asked: Sequence[Asked], *, logprobs: int = -1, max_length: int = 64
) -> sampling.SampleResult:
    """Kernels and rules agree on the result and on the token table; the kernels' result."""
    step = Step.of(asked, max_length=max_length)
    ruled = step.clone()
    mask = mask_of(asked, logits.shape[1])
    expected = sampling.reference(logits, *ruled.arguments, logprobs=logprobs, mask=mask)
    with cases.poisoned_memory():
        actual = sampling.launch(logits.clone(), *step.arguments, logprobs=logprobs, mask=mask)
    assert_same(actual, expected, asked)
    assert torch.equal(step.tokens, ruled.tokens)
    scratch = step.table.scratch(tuned.EDITORS, logits.shape[1])
    assert not scratch.any(), "the scratch lines are zeros again"
    return actual


MIXED = (
    Asked({"logprobs": 5}, history=range(10)),
    Asked({"temperature": 1.0, "seed": -5, "logprobs": 0}, history=range(20)),
    Asked({"temperature": 0.7, "top_k": 50, "seed": 2**62 + 3}),
    Asked(padding=True),
    Asked({"temperature": 1.0, "top_p": 0.9, "seed": 4, "logprobs": 20}, history=range(3), prompt=2),
    Asked({"temperature": 1.0, "min_p": 0.05, "seed": -(2**63)}),
    Asked({"temperature": 1.3, "top_p": 0.8, "top_k": 100, "min_p": 0.001, "seed": 9}),
    Asked({"temperature": 1.0, "top_p": 0.7, "min_p": 0.01, "seed": 1}),
    Asked({"temperature": 2.5, "top_p": 0.95, "seed": 2}),
    Asked({"temperature": 1e-40, "top_p": 0.5}),
    Asked(
        {"presence": 1.0, "frequency": 0.5, "repetition": 1.2, "min_tokens": 9, "logprobs": 3},
        bias={5: 3.0, 77: 100.0},
        stops=(77,),
        history=(1, 5, 5, 9, 1),
        prompt=2,
    ),
)


@pytest.mark.parametrize("logprobs", [-1, 20])
def test_every_kind_of_row_in_one_step_is_sampled_by_the_rules(logprobs: int) -> None:
    check(random_logits(len(MIXED)), MIXED, logprobs=logprobs)


def test_the_batch_around_a_row_never_changes_it() -> None:
    logits = random_logits(len(MIXED), seed=1)
    together = check(logits, MIXED, logprobs=20)
    for row in (1, 4, 6, 10):
        alone = check(logits[row : row + 1], MIXED[row : row + 1], logprobs=20)
        assert alone.tokens[0] == together.tokens[row]
        assert alone.chosen_logprob is not None
        assert together.chosen_logprob is not None
        if MIXED[row].how.get("logprobs", -1) >= 0:
            assert alone.chosen_logprob[0] == together.chosen_logprob[row]


# Steps of 1/4 and temperatures that are powers of two: ties are common and no rounding decides.
ways = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.5, 1.0, 2.0]),
        "top_p": st.sampled_from([1.0, 1.0, 0.05, 0.517, 0.917, 0.993]),
        "top_k": st.sampled_from([0, 0, 1, 2, 5, 40, 1000]),
        "min_p": st.sampled_from([0.0, 0.0, 0.01, 0.3, 1.0]),
        "seed": st.integers(-(2**63), 2**63 - 1),
        "logprobs": st.integers(-1, 8),
    }
)


@given(
    grid=st.lists(st.integers(-40, 8), min_size=1, max_size=300), how=st.lists(ways, min_size=6, max_size=6)
)
@settings(max_examples=12)
def test_ties_are_kept_and_go_to_the_lowest_id(grid: list[int], how: list[dict[str, float]]) -> None:
    logits = torch.tensor(grid).repeat(len(how), 1) / 4
    check(logits, [Asked(each, history=range(4)) for each in how], logprobs=8)


@pytest.mark.parametrize("scale", [0.0, 0.1])
def test_a_flat_distribution_is_cut_where_its_lists_are_too_long(scale: float) -> None:
    ways_to_cut = (
        {"top_p": 0.5},
        {"top_p": 0.999},
        {"top_k": 3000},
        {"top_k": 8999, "top_p": 0.9},
        {"top_k": 9000},
        {"min_p": 0.8},
        {"min_p": 1e-6, "top_p": 0.3},
    )
    asked = [Asked({**DRAWN, **how, "seed": seed}) for seed, how in enumerate(ways_to_cut)]
    check(random_logits(len(asked), scale=scale), asked)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_logits_of_16_bits_are_told_apart_by_their_own_bits(dtype: torch.dtype) -> None:
    asked = [
        replace(each, bias={}, how=each.how | {"presence": 0, "frequency": 0, "repetition": 1})
        for each in MIXED
    ]
    asked = [replace(each, how=each.how | {"min_tokens": 0}) for each in asked]
    for scale in (3.0, 0.1):
        check(random_logits(len(asked), scale=scale, seed=2).to(dtype), asked, logprobs=20)


@pytest.mark.parametrize("vocab", [1, 5, 4096, 4097])
def test_a_vocabulary_may_end_anywhere(vocab: int) -> None:
    asked = [
        Asked({"logprobs": 20}),
        Asked({**DRAWN, "logprobs": 4}),
        Asked({**DRAWN, "top_p": 0.9, "top_k": 3, "logprobs": 0}),
    ]
    check(random_logits(3, vocab=vocab), asked, logprobs=20)


def test_the_smallest_top_p_keeps_the_best_token() -> None:
    asked = [
        Asked({**DRAWN, "top_p": top_p, "seed": seed}) for seed, top_p in enumerate((1e-46, 1e-40, 1e-3))
    ]
    logits = random_logits(3, scale=0.1)
    assert check(logits, asked).tokens[:2].tolist() == logits[:2].argmax(-1).tolist()


# ---- edits


def test_penalties_count_what_the_sequence_said_and_nothing_else() -> None:
    generator = torch.Generator().manual_seed(3)
    history = torch.randint(0, 300, (2500,), generator=generator).tolist()
    penalties = (
        {"presence": 0.7},
        {"frequency": 0.3},
        {"frequency": -2.0, "presence": -2.0},
        {"repetition": 1.7},
        {"repetition": 0.3, "frequency": 0.11, "presence": 0.23},
        {"repetition": 1e-40},
    )
    asked = [
        Asked({**how, "logprobs": 20}, history=history[: 2500 - 300 * row], prompt=700 - 100 * row)
        for row, how in enumerate(penalties)
    ]
    asked += [Asked({"logprobs": 20}, history=history)]  # nothing is changed for it
    check(random_logits(len(asked), vocab=400), asked, logprobs=20, max_length=2600)


def test_edited_logits_are_those_of_the_rules_bit_by_bit() -> None:
    asked = [
        Asked(
            {"repetition": 1.3, "presence": 0.7, "frequency": 0.37, "min_tokens": 3},
            bias={token: 0.1 * token for token in range(1000)},
            stops=(3, 1500),
            history=[*range(990, 1010), *([1003] * 5), 3],
            prompt=24,
        )
    ]
    logits = random_logits(1, vocab=2000)
    step = Step.of(asked)
    edited = logits.clone()
    sampling.launch(edited, *step.arguments)
    expected = logits[0].clone()
    expected[:1000] += torch.tensor([0.1 * token for token in range(1000)])
    expected[[3, 1500]] = -torch.inf
    seen = sorted(set(asked[0].history))
    rows = expected[seen]
    expected[seen] = rows * torch.where(rows > 0, 1 / torch.tensor(1.3), torch.tensor(1.3))
    expected[1003] = expected[1003] - torch.tensor(0.37) - torch.tensor(0.7)  # of 6 times one is generated
    expected[3] = -torch.inf
    assert torch.equal(edited[0], expected)


@pytest.mark.parametrize(("generated", "forbidden"), [(0, True), (3, True), (4, False)])
def test_min_tokens_forbids_its_stops_until_then(generated: int, forbidden: bool) -> None:
    logits = torch.zeros(1, 50)
    logits[0, 7] = 9.0
    asked = [Asked({"min_tokens": 4}, bias={7: 100.0}, stops=(7, 8), history=range(2 + generated), prompt=2)]
    assert (int(check(logits, asked).tokens) == 7) != forbidden


def test_few_programs_edit_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuned, "EDITORS", 2)
    asked = [Asked({"frequency": 1.0}, history=(1, row, row)) for row in range(40)]
    asked[5] = asked[33] = Asked(padding=True)
    check(random_logits(40, vocab=50, scale=1.0), asked)


# ---- masks


def test_a_grammar_allows_what_it_allows_and_other_rows_everything() -> None:
    ways = ({}, DRAWN, {**DRAWN, "top_p": 0.9}, {**DRAWN, "top_k": 3}, {"repetition": 1e-40})
    allowed = ([31, 32, 4095, 4096, VOCAB - 1], [8192], range(0, VOCAB, 7), [0, 63, 64])
    asked = [Asked({**how, "logprobs": 3}, allowed=tokens) for how in ways for tokens in allowed]
    asked[3] = Asked(padding=True)
    asked[6] = Asked({**DRAWN, "logprobs": 3})
    asked[9] = Asked({"logprobs": 2}, bias={77: 1000.0, 7: 500.0}, allowed=[7, 8], history=(7, 7, 8))
    logits = random_logits(len(asked), seed=4)
    result = check(logits, asked, logprobs=3)
    for row, each in enumerate(asked):
        if each.allowed is not None:
            assert int(result.tokens[row]) in each.allowed
    assert int(result.tokens[9]) == 7
    assert result.chosen_logprob is not None
    assert float(result.chosen_logprob[1]) == 0.0, "the one token that is allowed is certain"


@pytest.mark.parametrize("vocab", [1, 31, 33, 4097])
def test_a_mask_may_end_anywhere(vocab: int) -> None:
    asked = [Asked({}, allowed=[vocab - 1]), Asked(DRAWN, allowed=[0])]
    assert check(random_logits(2, vocab=vocab), asked).tokens.tolist() == [vocab - 1, 0]


def test_a_mask_hides_no_broken_logit_and_may_forbid_everything() -> None:
    logits = random_logits(3)
    logits[0, 8000] = torch.nan
    logits[1, 5] = torch.inf
    asked = [Asked(allowed=[1]), Asked(allowed=[1]), Asked(allowed=[])]
    assert check(logits, asked).finite.tolist() == [False] * 3


# ---- what cannot be sampled


@pytest.mark.parametrize("how", [{}, DRAWN, {**DRAWN, "top_p": 0.9}, {"frequency": 1.0, "repetition": 2.0}])
def test_a_row_with_broken_logits_says_so_and_yields_token_0(how: dict[str, float]) -> None:
    logits = random_logits(6)
    logits[0, 8000] = torch.nan
    logits[1, 5] = torch.inf
    logits[2] = torch.nan
    logits[3] = -torch.inf
    logits[4, 2:] = -torch.inf
    asked = [Asked({**how, "logprobs": 2}, bias={5: 1.0}, history=(5, 8000, 5)) for _ in range(6)]
    result = check(logits, asked, logprobs=2)
    assert result.finite.tolist() == [False] * 4 + [True] * 2
    assert result.tokens[:4].tolist() == [0] * 4


def test_a_full_line_of_the_token_table_is_not_written_beyond() -> None:
    step = Step.of([Asked({}, history=range(4)), Asked({}, history=range(4))], max_length=4)
    before = step.tokens.clone()
    sampling.launch(random_logits(2, vocab=40), *step.arguments)
    assert torch.equal(step.tokens, before)


def test_no_rows_are_no_work() -> None:
    step = Step.of([])
    assert sampling.launch(torch.empty(0, 40), *step.arguments, logprobs=3).top_tokens is not None
