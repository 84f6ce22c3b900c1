"""The sampler as CUDA runs it: vocabularies of real models, real batches, in graphs.

Tokens must be those of the rules on the CPU for the same logits. Where they are not, both must score within
1e-5 of each other, or the rounding of a mass may have decided: `assert_rounding_decided`.
"""

from __future__ import annotations

import pytest
import torch

from kernels import sampling, table_writes
from kernels.compiled import kernels_compiled
from kernels.philox import philox_uniform_vocab
from kernels.sampling_table import SamplingTable
from kernels.tuned import sampling_sm90 as tuned
from tests.kernels import cases
from tests.kernels.sampling_rows import Asked, Step, assert_same, mask_of
from tests.kernels.test_philox import uniform_kernel
from tests.kernels.test_table_writes import part

DEVICE = "cuda"
VOCABS = (49_152, 128_256, 151_936)

#: One of each kind; rows of a batch take them in turn.
KINDS = (
    {},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 1.0, "top_k": 50, "top_p": 0.95},
    {"temperature": 1.5, "min_p": 0.02},
    {"temperature": 0.8, "top_k": 5000},
    {"temperature": 1.0, "top_p": 0.999, "min_p": 1e-4, "top_k": 700},
    {"temperature": 0.9, "presence": 0.6, "frequency": 0.3, "repetition": 1.15},
    {"temperature": 3.0, "top_p": 0.97},
)


def asked(rows: int, vocab: int, logprobs: bool = False) -> list[Asked]:
    """Of every 8 rows one is padding; some have lists; histories are of 1 to 1,500 tokens."""
    generator = torch.Generator().manual_seed(rows)
    result = []
    for row in range(rows):
        how = {"temperature": 0.0, "seed": 1000 * row - 7, **KINDS[row % len(KINDS)]}
        if logprobs and row % 2 == 0:
            how["logprobs"] = row % 21
        length = 1 + 1499 * row // rows
        history = torch.randint(0, min(vocab, 900), (length,), generator=generator).tolist()
        listed = row % 5 == 3
        result.append(
            Asked(
                how={**how, "min_tokens": 10_000 if listed else 0},
                bias={token: token % 7 - 3.0 for token in range(row)} if listed else {},
                stops=(1, 2, 5000) if listed else (),
                history=history,
                prompt=length // 2,
                padding=rows > 1 and row % 8 == 5,
            )
        )
    return result


def logits_of(rows: int, vocab: int, seed: int = 0) -> torch.Tensor:
    """From peaked to nearly flat."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.linspace(0.3, 4.0, rows).unsqueeze(-1) if rows > 1 else 2.5
    return scale * torch.randn(rows, vocab, generator=generator)


def assert_sampled_as_ruled(logits: torch.Tensor, rows: list[Asked], logprobs: int) -> None:
    ruled = Step.of(rows, max_length=1600)
    step = ruled.to(DEVICE)
    expected = sampling.reference(logits, *ruled.arguments, logprobs=logprobs)
    with cases.poisoned_memory():
        actual = sampling.sample(logits.to(DEVICE), *step.arguments, logprobs=logprobs)
    assert not step.table.scratch(tuned.EDITORS, logits.shape[1]).any()
    different = (actual.tokens.cpu() != expected.tokens).nonzero().squeeze(-1).tolist()
    for row in different:
        assert_rounding_decided(logits[row], rows[row], int(actual.tokens[row]), int(expected.tokens[row]))
    same = [row for row in range(len(rows)) if row not in different]
    picked = [
        sampling.SampleResult(
            **{name: None if v is None else v.cpu()[same] for name, v in vars(result).items()}
        )
        for result in (actual, expected)
    ]
    assert_same(*picked, [rows[row] for row in same])
    slots, lengths = ruled.slots[same].long(), ruled.lengths[same].long()
    real = slots >= 0
    slots, lengths = slots[real], lengths[real]
    assert torch.equal(step.tokens.cpu()[slots, lengths], ruled.tokens[slots, lengths])


def assert_rounding_decided(logits: torch.Tensor, row: Asked, actual: int, expected: int) -> None:
    """Both tokens have scores within 1e-5, or else top_p was at stake and the token that lost its place has
    the mass of all better ones within 1e-5 of top_p."""
    assert not row.bias, "rows with lists of biases are not near ties"
    assert not {"presence", "frequency", "repetition"} & set(row.how)
    scaled = (logits - logits.max()) / row.how["temperature"]
    position = torch.tensor([len(row.history) - row.prompt])
    noise = philox_uniform_vocab(torch.tensor([row.how["seed"]]), position, len(logits))[0]
    score = scaled - (-noise.log()).log()
    if abs(float(score[actual] - score[expected])) <= 1e-5:
        return
    assert "top_p" in row.how
    weight = scaled.double().exp()
    if "min_p" in row.how:
        weight[scaled < torch.tensor(row.how["min_p"]).log()] = 0
    if row.how.get("top_k"):
        weight[scaled < scaled.topk(row.how["top_k"]).values[-1]] = 0
    better = float(weight[scaled > min(scaled[actual], scaled[expected])].sum() / weight.sum())
    assert abs(better - row.how["top_p"]) <= 1e-5


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("rows", [1, 32, 72])
@pytest.mark.parametrize("logprobs", [-1, 20])
def test_rows_of_every_kind_are_sampled_as_the_rules_say(vocab: int, rows: int, logprobs: int) -> None:
    assert_sampled_as_ruled(logits_of(rows, vocab, seed=rows), asked(rows, vocab, logprobs >= 0), logprobs)


def test_256_rows_are_sampled_as_the_rules_say() -> None:
    assert_sampled_as_ruled(logits_of(256, 49_152, seed=9), asked(256, 49_152), -1)


def test_bf16_logits_are_sampled_as_the_same_numbers_in_fp32() -> None:
    rows = [each for each in asked(48, 151_936) if not each.bias and "presence" not in each.how]
    logits = logits_of(len(rows), 151_936).bfloat16()
    narrow, wide = (Step.of(rows, max_length=1600).to(DEVICE) for _ in range(2))
    actual = sampling.sample(logits.to(DEVICE), *narrow.arguments, logprobs=5)
    expected = sampling.sample(logits.to(DEVICE).float(), *wide.arguments, logprobs=5)
    assert torch.equal(actual.tokens, expected.tokens)
    assert torch.equal(narrow.tokens, wide.tokens)


def test_bf16_logits_are_edited_and_rounded_to_nearest() -> None:
    row = Asked({"repetition": 1.3, "presence": 0.7, "frequency": 0.4}, history=[5, 6, 6, 7, 6], prompt=1)
    logits = logits_of(1, 49_152).to(DEVICE).bfloat16()
    before = logits[0].float().cpu()
    sampling.sample(logits, *Step.of([row]).to(DEVICE).arguments)
    expected = before.clone()
    for token, count in ((5, 0), (6, 3), (7, 1)):
        x = before[token]
        x = x * (1 / torch.tensor(1.3) if x > 0 else torch.tensor(1.3))
        expected[token] = x - torch.tensor(0.4) * count - torch.tensor(0.7) * (count > 0)
    assert torch.equal(logits[0].cpu(), expected.bfloat16())


def test_the_batch_around_a_row_never_changes_it() -> None:
    vocab = 128_256
    rows = asked(200, vocab)
    logits = logits_of(200, vocab).to(DEVICE)
    together = sampling.sample(logits.clone(), *Step.of(rows, max_length=1600).to(DEVICE).arguments)
    for row in range(0, 200, 7):
        step = Step.of(rows[row : row + 1], max_length=1600).to(DEVICE)
        alone = sampling.sample(logits[row : row + 1].clone(), *step.arguments)
        assert int(alone.tokens) == int(together.tokens[row]), row


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", VOCABS)
def test_rows_say_what_their_grammars_allow_and_others_what_they_like(vocab: int, dtype: torch.dtype) -> None:
    ways = ({}, {"temperature": 1.0, "seed": 3}, {"temperature": 0.8, "top_k": 4, "seed": 1})
    allowed = ([vocab - 1], [31, 32, 4095, 4096], range(7, vocab, 5), None)
    rows = [Asked(how, allowed=tokens) for how in ways for tokens in allowed]
    logits = logits_of(len(rows), vocab).to(dtype)
    ruled = Step.of(rows)
    step = ruled.to(DEVICE)
    expected = sampling.reference(logits, *ruled.arguments, mask=mask_of(rows, vocab))
    actual = sampling.sample(logits.to(DEVICE), *step.arguments, mask=mask_of(rows, vocab, DEVICE))
    assert_same(actual, expected, rows)
    assert torch.equal(step.tokens.cpu(), ruled.tokens)


@pytest.mark.parametrize("how", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.9}])
def test_broken_logits_yield_token_0_and_say_so(how: dict[str, float]) -> None:
    logits = logits_of(5, 49_152)
    logits[0, 40_000], logits[1, 3], logits[2], logits[3] = torch.nan, torch.inf, torch.nan, -torch.inf
    rows = [Asked({**how, "logprobs": 3, "frequency": 0.5}, bias={3: 1.0}, history=(3, 40_000, 3))] * 5
    result = sampling.sample(logits.to(DEVICE), *Step.of(rows).to(DEVICE).arguments, logprobs=20)
    assert result.finite.tolist() == [False] * 4 + [True]
    assert result.tokens[:4].tolist() == [0] * 4


@pytest.mark.parametrize("logprobs", [-1, 20])
def test_a_graph_samples_whatever_the_tables_say_when_it_replays(logprobs: int) -> None:
    vocab, count = 128_256, 24
    captured = [Asked({"temperature": 0.0}, history=(1, 2)) for _ in range(count)]
    step = Step.of(captured, max_length=1600).to(DEVICE)
    logits = torch.zeros(count, vocab, device=DEVICE)
    sampling.sample(logits, *step.arguments, logprobs=logprobs)  # compiles, allocates the scratch
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = sampling.sample(logits, *step.arguments, logprobs=logprobs)
    for turn in range(3):
        rows = asked(count, vocab, logprobs >= 0)[turn:] + captured[:turn]
        fresh = logits_of(count, vocab, seed=turn)
        logits.copy_(fresh)
        step.fill(rows)
        graph.replay()
        eager = Step.of(rows, max_length=1600).to(DEVICE)
        expected = sampling.sample(fresh.to(DEVICE), *eager.arguments, logprobs=logprobs)
        assert_same(result, expected, rows)


def test_nothing_is_compiled_for_another_number_of_rows_or_log_probabilities() -> None:
    vocab = 49_152

    def sample(rows: int, logprobs: int) -> None:
        asked = [Asked(allowed=[5])] * rows
        step = Step.of(asked, max_length=50 + rows).to(DEVICE)
        logits, mask = torch.zeros(rows, vocab, device=DEVICE), mask_of(asked, vocab, DEVICE)
        sampling.sample(logits, *step.arguments, logprobs=logprobs, mask=mask)

    sample(8, -1)
    sample(8, 20)
    compiled = kernels_compiled()
    for rows in (1, 2, 3, 16, 17, 100):
        for logprobs in (-1, 0, 1, 5, 16):
            sample(rows, logprobs)
    assert kernels_compiled() == compiled


def test_kernels_get_the_numbers_of_the_cpu() -> None:
    tokens = torch.randperm(200_000)[:1024]
    out = torch.empty(2, 1024, device=DEVICE)
    seed = torch.tensor([-(2**62) - 12345], device=DEVICE)
    uniform_kernel[(1,)](out, seed, 777, 4096, tokens.int().to(DEVICE), COUNT=1024)
    numbers = philox_uniform_vocab(seed.cpu(), torch.tensor([777]), 200_000)[0]
    assert torch.equal(out[0].cpu(), numbers[4096 : 4096 + 1024])
    assert torch.equal(out[1].cpu(), numbers[tokens])


def test_lines_and_pages_reach_their_tables() -> None:
    parts = [part(0, 1, 1), part(1100, 70_000, 2)]
    payload = torch.cat([torch.from_numpy(each) for each in parts])
    records = torch.tensor([[4, 0, 1], [0, len(parts[0]), 70_000]], dtype=torch.int32)
    entries = torch.stack([torch.arange(5), torch.arange(5) * 1000, torch.arange(5) + 9]).int()
    written = []
    for device in ("cpu", DEVICE):
        table = SamplingTable.empty(5, device)
        tokens = torch.zeros(5, 70_001, dtype=torch.int32, device=device)
        pages = torch.zeros(5, 5000, dtype=torch.int32, device=device)
        table_writes.write_lines(payload.to(device), records.to(device), table, tokens, longest=70_000)
        table_writes.write_pages(entries.to(device), pages)
        written.append([table.parameters, table.list_tokens, table.list_values, tokens, pages])
    for expected, actual in zip(*written, strict=True):
        assert torch.equal(actual.cpu().view(torch.int32), expected.view(torch.int32))
