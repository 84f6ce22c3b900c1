from __future__ import annotations

import numpy as np
import pytest
import torch

from kernels import table_writes
from kernels.sampling_table import MAX_BIASES, MAX_STOPS, WORDS, SamplingTable, line


def part(lists: int, tokens: int, seed: int) -> np.ndarray:
    """One occupant's part of a payload, with a bias for half of the listed tokens."""
    rng = np.random.default_rng(seed)
    parameters = line(
        temperature=0.5 + seed,
        seed=-seed,
        prompt_length=tokens,
        biases=lists // 2,
        stops=lists - lists // 2,
        min_tokens=2**40,
    )
    return np.concatenate(
        [
            np.frombuffer(parameters, dtype=np.int32),
            rng.integers(0, 50_000, lists, dtype=np.int32),
            rng.standard_normal(lists, dtype=np.float32).view(np.int32),
            rng.integers(0, 50_000, tokens, dtype=np.int32),
        ]
    )


def test_lines_are_written_to_their_slots_and_nowhere_else() -> None:
    parts = [part(0, 1, 1), part(5, 1024, 2), part(MAX_BIASES + MAX_STOPS, 2500, 3)]
    starts = np.cumsum([0, *map(len, parts)])[:3]
    records = torch.tensor([[4, starts[0], 1], [0, starts[1], 1024], [2, starts[2], 2500]], dtype=torch.int32)
    payload = torch.from_numpy(np.concatenate(parts))

    written = []
    for write in (table_writes.launch_lines, table_writes.reference_lines):
        table = SamplingTable.empty(5, "cpu")
        for tensor in (table.parameters, table.list_tokens, table.list_values):
            tensor.fill_(-3)
        tokens = torch.full((5, 2501), -3, dtype=torch.int32)
        write(payload, records, table, tokens, longest=2500)
        written.append((table, tokens))
    (table, tokens), (expected, expected_tokens) = written
    assert torch.equal(tokens, expected_tokens)
    for name in ("parameters", "list_tokens", "list_values"):
        assert torch.equal(getattr(table, name), getattr(expected, name))
    assert torch.equal(tokens[2, :2500], torch.from_numpy(parts[2][-2500:]))
    assert torch.equal(table.parameters[0], torch.from_numpy(parts[1][:WORDS]))
    assert torch.equal(
        table.list_values[2], torch.from_numpy(parts[2]).view(torch.float32)[-2500 - 1152 : -2500]
    )
    assert (tokens[[1, 3]] == -3).all()
    assert int(tokens[2, 2500]) == -3


@pytest.mark.parametrize("count", [1, 3, 1500])
def test_pages_are_written_where_the_entries_say(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    where = torch.randperm(40 * 100, generator=generator)[:count]
    entries = torch.stack([where // 100, where % 100, torch.arange(count) + 1]).int()
    pages, expected = torch.zeros(40, 100, dtype=torch.int32), torch.zeros(40, 100, dtype=torch.int32)
    table_writes.launch_pages(entries, pages)
    table_writes.reference_pages(entries, expected)
    assert torch.equal(pages, expected)
    assert int((pages > 0).sum()) == count


def test_numbers_that_no_word_holds_become_its_largest() -> None:
    parameters = torch.from_numpy(
        np.frombuffer(
            line(temperature=1e300, repetition=1e300, prompt_length=1, min_tokens=2**50), dtype=np.int32
        ).copy()
    )
    floats = parameters.view(torch.float32)
    assert floats[0] == floats[5] == torch.finfo(torch.float32).max
    assert int(parameters[13]) == 2**31 - 1


@pytest.mark.parametrize("value", [1.0, 0.7, 3.0, 1e-30, 3.4e38, 1.1])
def test_reciprocals_are_those_of_fp32(value: float) -> None:
    parameters = line(temperature=value, repetition=value, prompt_length=1)
    floats = torch.from_numpy(np.frombuffer(parameters, dtype=np.float32).copy())
    assert floats[15] == floats[16] == 1 / torch.tensor(value)
