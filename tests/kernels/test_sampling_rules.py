from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kernels.philox import philox_uniform_vocab
from kernels.sampling_rules import Bias, History, SampleResult, SamplingBatch, sample_rows


@dataclass(frozen=True)
class Row:
    """The parameters of one row of a SamplingBatch."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence: float = 0.0
    frequency: float = 0.0
    repetition: float = 1.0
    seed: int = 0
    position: int = 0


def batch(rows: Sequence[Row], bias: Bias | None = None, history: History | None = None) -> SamplingBatch:
    columns = {field.name: torch.tensor([getattr(row, field.name) for row in rows]) for field in fields(Row)}
    return SamplingBatch(**columns, bias=bias, history=history)


def gumbel(seed: int, position: int, vocab: int) -> torch.Tensor:
    uniform = philox_uniform_vocab(torch.tensor([seed]), torch.tensor([position]), vocab)[0]
    return -(-uniform.log()).log()


def kept(scaled: torch.Tensor, row: Row) -> set[int]:
    """Which tokens may be drawn: the rules of the module, on a sorted list in fp64."""
    order = sorted(range(len(scaled)), key=lambda token: -float(scaled[token]))
    weight = scaled.double().exp()
    order = [token for token in order if weight[token] >= row.min_p * weight[order[0]]]
    if row.top_k:
        order = [token for token in order if scaled[token] >= scaled[order[min(row.top_k, len(order)) - 1]]]
    total = sum(float(weight[token]) for token in order)
    mass, last = 0.0, order[-1]
    for token in order if row.top_p < 1 else ():
        mass += float(weight[token]) / total
        assume(abs(mass - row.top_p) > 1e-5)  # there rounding decides
        if mass >= row.top_p:
            last = token
            break
    return {token for token in order if scaled[token] >= scaled[last]}


def model(logits: torch.Tensor, row: Row) -> int:
    """The token that `sample_rows` must choose for one row of logits without bias and penalties."""
    if row.temperature == 0:
        return int(logits.tolist().index(float(logits.max())))
    scaled = (logits - logits.max()) / row.temperature
    tokens = sorted(kept(scaled, row))
    noise = gumbel(row.seed, row.position, len(logits))
    scores = [float(scaled[token] + noise[token]) for token in tokens]
    return tokens[scores.index(max(scores))]


# Steps of 1/4 and temperatures that divide exactly: ties are common and the model's thresholds are exact.
grid_logits = st.lists(st.integers(-40, 8).map(lambda n: n / 4), min_size=1, max_size=40)
rows = st.builds(
    Row,
    temperature=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    top_p=st.sampled_from([1.0, 1.0, 0.05, 0.5, 0.9, 0.99]),
    top_k=st.sampled_from([0, 0, 1, 2, 5, 40, 1000]),
    min_p=st.sampled_from([0.0, 0.0, 0.01, 0.3, 1.0]),
    seed=st.integers(-(2**63), 2**63 - 1),
    position=st.integers(0, 100_000),
)


@given(logits=grid_logits, row=rows)
@settings(max_examples=400)
def test_a_row_is_sampled_as_the_sorted_model_says(logits: list[float], row: Row) -> None:
    values = torch.tensor(logits)
    assert int(sample_rows(values[None], batch([row])).tokens) == model(values, row)


@given(logits=st.lists(grid_logits, min_size=2, max_size=6), data=st.data())
def test_the_batch_around_a_row_never_changes_it(logits: list[list[float]], data: st.DataObject) -> None:
    vocab = min(map(len, logits))
    table = torch.tensor([row[:vocab] for row in logits])
    params = data.draw(st.lists(rows, min_size=len(table), max_size=len(table)))
    together = sample_rows(table, batch(params), logprobs=1)
    for i, row in enumerate(params):
        alone = sample_rows(table[i : i + 1], batch([row]), logprobs=1)
        for field in fields(SampleResult):
            assert torch.equal(getattr(alone, field.name)[0], getattr(together, field.name)[i])


def test_a_row_over_a_whole_vocabulary_is_bitwise_the_same_in_every_batch() -> None:
    vocab = 49_152
    logits = 3 * torch.randn(6, vocab, generator=torch.Generator().manual_seed(0))
    params = [
        Row(),
        Row(temperature=0.0),
        Row(top_p=0.9, seed=1),
        Row(temperature=2.0, top_p=0.99, seed=2),
        Row(top_k=50, top_p=0.8, seed=3),
        Row(min_p=0.05, seed=4),
    ]
    together = sample_rows(logits, batch(params), logprobs=3)
    for i, row in enumerate(params):
        alone = sample_rows(logits[i : i + 1], batch([row]), logprobs=3)
        for field in fields(SampleResult):
            assert torch.equal(getattr(alone, field.name)[0], getattr(together, field.name)[i]), field.name


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.999])
def test_a_nucleus_of_thousands_of_tokens_is_cut_where_the_sorted_mass_reaches_top_p(top_p: float) -> None:
    vocab, draws = 20_000, 40
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(1)) * 0.1
    descending = logits.sort(descending=True)
    size = int((descending.values.double().softmax(0).cumsum(0) < top_p).sum()) + 1
    allowed = torch.full((vocab,), -torch.inf).scatter(0, descending.indices[:size], 0.0)
    expected = [int((logits + allowed + gumbel(0, position, vocab)).argmax()) for position in range(draws)]

    params = batch([Row(top_p=top_p, position=position) for position in range(draws)])
    assert sample_rows(logits.expand(draws, -1), params).tokens.tolist() == expected


@pytest.mark.parametrize(
    ("row", "allowed"),
    [
        (Row(top_k=3, min_p=0.5), {0}),
        (Row(top_k=2, min_p=0.01), {0, 1, 2}),  # 1 and 2 tie
        (Row(top_k=3, top_p=0.4), {0}),
        (Row(min_p=0.01, top_p=0.7), {0, 1, 2}),
        (Row(), {0, 1, 2, 3, 4}),
    ],
)
def test_the_strictest_restriction_holds(row: Row, allowed: set[int]) -> None:
    logits = torch.tensor([0.0, -1.0, -1.0, -1.5, -1.5]).expand(200, -1)
    tokens = sample_rows(logits, batch([replace(row, position=position) for position in range(200)])).tokens
    assert set(tokens.tolist()) == allowed


def test_draws_follow_the_distribution() -> None:
    probabilities = torch.tensor([0.5, 0.25, 0.15, 0.07, 0.03])
    draws = 4000
    params = batch([Row(seed=7, position=position) for position in range(draws)])
    tokens = sample_rows(probabilities.log().expand(draws, -1).contiguous(), params).tokens
    expected = probabilities * draws
    chi_square = float(((tokens.bincount(minlength=5) - expected) ** 2 / expected).sum())
    assert chi_square < 23.5  # 4 degrees of freedom: once in 10^4 seeds


def test_the_same_seed_and_position_repeat_the_token_and_others_do_not() -> None:
    logits = torch.zeros(1, 1000)
    first = [int(sample_rows(logits, batch([Row(seed=5, position=p)])).tokens) for p in range(20)]
    again = [int(sample_rows(logits, batch([Row(seed=5, position=p)])).tokens) for p in range(20)]
    other = [int(sample_rows(logits, batch([Row(seed=6, position=p)])).tokens) for p in range(20)]
    assert first == again
    assert len(set(first)) > 15
    assert sum(a == b for a, b in zip(first, other, strict=True)) < 5


@pytest.mark.parametrize("vocab", [3, 50_000])
def test_greedy_takes_the_lowest_id_of_equal_logits(vocab: int) -> None:
    logits = torch.zeros(4, vocab)
    logits[1, 1:] = 1.0
    logits[2, vocab - 1] = 1.0
    logits[3] = -torch.inf  # everything forbidden: still a token of the vocabulary
    assert sample_rows(logits, batch([Row(temperature=0.0)] * 4)).tokens.tolist() == [0, 1, vocab - 1, 0]
    assert 0 <= int(sample_rows(logits[3:], batch([Row()])).tokens) < vocab


@pytest.mark.parametrize("temperature", [1e-6, 1e-40])
def test_a_tiny_temperature_is_greedy_and_overflows_nowhere(temperature: float) -> None:
    logits = torch.tensor([[-3e4, 1.0, 0.5, 3e4]])
    for row in (
        Row(temperature),
        Row(temperature, top_p=0.9),
        Row(temperature, top_k=2),
        Row(temperature, min_p=0.1),
    ):
        assert int(sample_rows(logits, batch([row])).tokens) == 3


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_with_broken_logits_says_so_and_yields_token_0(temperature: float) -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0]] * 5)
    logits[1, 1], logits[2, 2], logits[3], logits[4, 2] = torch.nan, torch.inf, -torch.inf, -torch.inf
    result = sample_rows(logits, batch([Row(temperature, top_k=1)] * 5), logprobs=0)
    assert result.finite.tolist() == [True, False, False, False, True]
    assert result.tokens.tolist() == [2, 0, 0, 0, 1]


def test_logits_are_left_unchanged() -> None:
    logits = torch.randn(2, 30)
    before = logits.clone()
    bias = Bias(torch.tensor([0]), torch.tensor([1]), torch.tensor([5.0]))
    history = History(
        torch.tensor([1]), torch.zeros(1, 4, dtype=torch.int32), torch.tensor([1]), torch.tensor([2])
    )
    sample_rows(logits, batch([Row(top_k=3, presence=1.0)] * 2, bias, history), logprobs=2)
    assert torch.equal(logits, before)


def test_bias_is_added_to_its_row_and_token_and_minus_infinity_forbids() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
    bias = Bias(torch.tensor([0, 0, 1]), torch.tensor([2, 0, 0]), torch.tensor([-torch.inf, 0.5, 2.5]))
    result = sample_rows(logits, batch([Row(temperature=0.0)] * 2, bias), logprobs=3)
    assert result.tokens.tolist() == [1, 0]
    expected = torch.tensor([[1.5, 2.0, -torch.inf], [3.5, 2.0, 3.0]]).log_softmax(-1)
    assert result.top_tokens is not None
    assert result.top_logprobs is not None
    assert torch.allclose(expected.gather(-1, result.top_tokens), result.top_logprobs)


@given(
    logits=st.lists(st.floats(-5, 5, width=32), min_size=6, max_size=6),
    prompt=st.lists(st.integers(0, 5), max_size=5),
    generated=st.lists(st.integers(0, 5), max_size=8),
    presence=st.sampled_from([0.0, 0.5, -2.0]),
    frequency=st.sampled_from([0.0, 0.25, -1.0]),
    repetition=st.sampled_from([1.0, 1.5, 0.5]),
)
def test_penalties_are_those_of_openai_and_ctrl(
    logits: list[float],
    prompt: list[int],
    generated: list[int],
    presence: float,
    frequency: float,
    repetition: float,
) -> None:
    expected = list(logits)
    for token in {*prompt, *generated}:
        expected[token] *= repetition if expected[token] < 0 else 1 / repetition
    for token in set(generated):
        expected[token] -= presence + frequency * generated.count(token)

    tokens = [*prompt, *generated]
    history = History(
        rows=torch.tensor([1]),
        tokens=torch.tensor([[*tokens, *[3] * (16 - len(tokens))]], dtype=torch.int32),  # 3 is not said
        prompt_len=torch.tensor([len(prompt)]),
        total_len=torch.tensor([len(tokens)]),
    )
    row = Row(temperature=0.0, presence=presence, frequency=frequency, repetition=repetition)
    result = sample_rows(torch.tensor([logits, logits]), batch([row, row], history=history), logprobs=6)
    assert result.top_tokens is not None
    assert result.top_logprobs is not None
    for i, wanted in enumerate((logits, expected)):  # the first row has no history: left alone
        by_token = torch.empty(6).scatter(0, result.top_tokens[i], result.top_logprobs[i])
        assert torch.allclose(by_token, torch.tensor(wanted).log_softmax(0), atol=1e-5)


def test_a_tiny_repetition_penalty_gives_finite_logprobs() -> None:
    history = History(
        torch.tensor([0]), torch.tensor([[0, 1]], dtype=torch.int32), torch.tensor([2]), torch.tensor([2])
    )
    result = sample_rows(
        torch.tensor([[5.0, 4.0, 3.0]]), batch([Row(repetition=1e-40)], history=history), logprobs=2
    )
    assert result.chosen_logprob is not None
    assert result.chosen_logprob.isfinite().all()
    assert int(result.tokens) in {0, 1}


def test_logprobs_are_taken_before_temperature_and_restrictions() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0]])
    row = Row(temperature=0.1, top_k=1, seed=3)
    result = sample_rows(logits, batch([row]), logprobs=2)
    expected = logits.log_softmax(-1)[0]
    assert int(result.tokens) == 1
    assert result.chosen_logprob is not None
    assert torch.equal(result.chosen_logprob, expected[1:2])
    assert result.top_tokens is not None
    assert result.top_tokens.tolist() == [[1, 3]]
    assert result.top_logprobs is not None
    assert torch.equal(result.top_logprobs[0], expected[[1, 3]])


def test_logprobs_are_computed_only_when_asked_for() -> None:
    logits = torch.randn(2, 8)
    params = batch([Row(), Row(temperature=0.0)])
    none = sample_rows(logits, params)
    assert none.chosen_logprob is None
    assert none.top_tokens is None
    assert none.top_logprobs is None
    chosen_only = sample_rows(logits, params, logprobs=0)
    assert chosen_only.chosen_logprob is not None
    assert chosen_only.top_tokens is not None
    assert chosen_only.top_tokens.shape == (2, 0)
    assert math.isfinite(float(chosen_only.chosen_logprob.sum()))


def test_a_greedy_batch_draws_no_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise AssertionError("noise for a greedy batch")

    monkeypatch.setattr("kernels.sampling_rules.philox_uniform", fail)
    monkeypatch.setattr("kernels.sampling_rules.philox_uniform_vocab", fail)
    sample_rows(torch.randn(3, 100), batch([Row(temperature=0.0, top_p=0.5)] * 3), logprobs=2)


@pytest.mark.parametrize("row", [Row(top_k=50), Row(min_p=0.05), Row(temperature=0.5, top_p=0.5)])
def test_noise_is_drawn_only_for_the_tokens_that_are_left(monkeypatch: pytest.MonkeyPatch, row: Row) -> None:
    drawn = []

    def counted(seed: torch.Tensor, position: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
        drawn.append(len(token))
        return torch.full(token.shape, 0.5)

    monkeypatch.setattr("kernels.sampling_rules.philox_uniform", counted)
    logits = 4 * torch.randn(1, 49_152, generator=torch.Generator().manual_seed(0))
    sample_rows(logits, batch([row]))
    assert 0 < sum(drawn) < 500
