from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.philox import (
    philox,
    philox_uniform,
    philox_uniform_vocab,
    uniform_in_kernel,
    uniform_run_in_kernel,
)

#: kat_vectors of Random123 1.14, philox4x32 with 10 rounds: counter, key, output.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]

seeds = st.integers(-(2**63), 2**63 - 1)


@triton.jit
def philox_kernel(out, seeds, positions, quads, COUNT: tl.constexpr):
    i = tl.arange(0, COUNT)
    seed = tl.load(seeds + i)
    a, b, c, d = tl.philox(seed, tl.load(quads + i), tl.load(positions + i), 0, 0)
    tl.store(out + 4 * i, a)
    tl.store(out + 4 * i + 1, b)
    tl.store(out + 4 * i + 2, c)
    tl.store(out + 4 * i + 3, d)


@triton.jit
def uniform_kernel(out, seeds, position, first, tokens, COUNT: tl.constexpr):
    i = tl.arange(0, COUNT)
    seed = tl.load(seeds)
    tl.store(out + i, uniform_run_in_kernel(seed, position, first, COUNT))
    tl.store(out + COUNT + i, uniform_in_kernel(seed, position, tl.load(tokens + i)))


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_gives_the_published_vectors(
    counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]
) -> None:
    seed = torch.tensor([key[0] | key[1] << 32], dtype=torch.uint64).view(torch.int64)
    c0, c1 = (torch.tensor([c]) for c in counter[:2])
    assert tuple(int(lane) for lane in philox(seed, c0, c1, *counter[2:])) == expected


@given(seed=st.lists(seeds, min_size=8, max_size=8), position=st.integers(0, 2**31 - 1), data=st.data())
@settings(max_examples=10)
def test_philox_gives_the_bits_of_triton(seed: list[int], position: int, data: st.DataObject) -> None:
    quads = data.draw(st.lists(st.integers(0, 2**31 - 1), min_size=8, max_size=8))
    seed_t, position_t, quad_t = torch.tensor(seed), torch.full((8,), position), torch.tensor(quads)
    out = torch.zeros(8, 4, dtype=torch.int32)
    philox_kernel[(1,)](out, seed_t, position_t.int(), quad_t.int(), COUNT=8)
    ours = torch.stack(philox(seed_t, quad_t, position_t, 0, 0), dim=-1)
    assert torch.equal(out.long() & 0xFFFFFFFF, ours)


@given(
    seed=st.lists(seeds, min_size=1, max_size=3), vocab=st.integers(1, 20), position=st.integers(0, 2**32 - 1)
)
def test_the_number_of_a_token_is_its_lane_of_its_quad(seed: list[int], vocab: int, position: int) -> None:
    seed_t, position_t = torch.tensor(seed), torch.full((len(seed),), position)
    table = philox_uniform_vocab(seed_t, position_t, vocab)
    for row in range(len(seed)):
        for token in range(vocab):
            lane = philox(seed_t[row], torch.tensor(token // 4), position_t[row], 0, 0)[token % 4]
            assert float(table[row, token]) == ((int(lane) >> 9) + 0.5) / 2**23
    assert torch.equal(table, philox_uniform(seed_t[:, None], position_t[:, None], torch.arange(vocab)))


@given(seed=seeds, position=st.integers(0, 2**31 - 1), quad=st.integers(0, 2**20))
@settings(max_examples=10)
def test_kernels_get_the_same_numbers_in_runs_and_one_by_one(seed: int, position: int, quad: int) -> None:
    tokens = torch.randperm(200_000)[:16]
    out = torch.zeros(2, 16)
    uniform_kernel[(1,)](out, torch.tensor([seed]), position, 4 * quad, tokens.int(), COUNT=16)
    seed_t, position_t = torch.tensor(seed), torch.tensor(position)
    assert torch.equal(out[0], philox_uniform(seed_t, position_t, 4 * quad + torch.arange(16)))
    assert torch.equal(out[1], philox_uniform(seed_t, position_t, tokens))


def test_numbers_are_uniform_and_never_0_or_1() -> None:
    u = philox_uniform_vocab(torch.tensor([42]), torch.tensor([3]), 1 << 18).squeeze(0)
    assert 0 < float(u.min()) < 1e-4
    assert 1 - 1e-4 < float(u.max()) < 1
    counts = torch.histc(u, bins=64, min=0, max=1)
    expected = len(u) / 64
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert chi_square < 120  # 63 degrees of freedom: once in 10^5 seeds
