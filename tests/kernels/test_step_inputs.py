from __future__ import annotations

import pytest
import torch

from kernels.step_inputs import launch, reference
from tests.kernels import cases


@pytest.mark.parametrize("run", [launch, reference])
@pytest.mark.parametrize(("hidden", "block_size"), [(48, 16), (96, 64)])
def test_embeddings_and_kv_places_are_those_that_the_tables_say(
    run: object, hidden: int, block_size: int
) -> None:
    embedding = cases.random(50, hidden, seed=0, dtype=torch.float16, device="cpu")
    tokens = torch.arange(4 * 200, dtype=torch.int32).view(4, 200) % 50
    lines = [[7, 3, 9, 1] * 4, [2, 5, 8, 0] * 4, [0] * 16, [6, 4, 11, 10] * 4]
    pages = torch.tensor(lines, dtype=torch.int32)
    slots = torch.tensor([3, 1, 1, -1, 0], dtype=torch.int32)
    positions = torch.tensor([170, 0, 1, 0, 199], dtype=torch.int32)
    write_from = torch.tensor([170, 1, 1, 0, 5], dtype=torch.int32)
    with cases.poisoned_memory():
        x, kv_slots = run(  # type: ignore[operator]
            slots, positions, write_from, tokens, pages, embedding, block_size=block_size
        )
    assert x.shape == (5, hidden)
    for row, (slot, position) in enumerate(zip(slots.tolist(), positions.tolist(), strict=True)):
        token = 0 if slot < 0 else int(tokens[slot, position])
        assert torch.equal(x[row], embedding[token])
        written = slot >= 0 and position >= int(write_from[row])
        page = int(pages[slot, position // block_size])
        assert kv_slots[row] == (page * block_size + position % block_size if written else -1)
    assert (kv_slots < 0).tolist() == [False, True, False, True, False]
