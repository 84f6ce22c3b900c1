"""What the device knows of every running sequence: one row a slot, so that a step sends only what is new.

Tokens live here and not on the host: a step reads its input ids from the table and writes what it samples
into it, so the next step can be launched before anybody has seen a token. So do the pages of a sequence and
how it samples.

The host tells of changes in one copy and one launch, and waits for neither.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain

import numpy as np
import torch

from kernels.sampling_table import MAX_BIASES, MAX_STOPS, WORDS, SamplingTable, line
from kernels.table_writes import write_lines, write_pages
from services.worker.sequence import Sequence
from services.worker.staging import Staging

_MAX_FLOAT = np.finfo(np.float32).max


class Tables:
    """Rows for `slots` sequences of up to `max_length` tokens. The tensors never move."""

    def __init__(self, slots: int, max_length: int, block_size: int, device: torch.device) -> None:
        blocks = -(-max_length // block_size)
        self.device = device
        self.tokens = torch.zeros(slots, max_length, dtype=torch.int32, device=device)
        self.pages = torch.zeros(slots, blocks, dtype=torch.int32, device=device)
        self.sampling = SamplingTable.empty(slots, device)
        self._staging = Staging(device)

    def place(self, placed: Mapping[int, Sequence]) -> None:
        """New occupants of slots, with all the tokens they have."""
        if not placed:
            return
        records = np.empty((len(placed), 3), dtype=np.int32)  # as `write_lines` takes them
        parts: list[np.ndarray] = []
        start = 0
        for record, (slot, sequence) in zip(records, placed.items(), strict=True):
            record[:] = slot, start, len(sequence.tokens)
            parts += _occupant(sequence)
            start += sum(map(len, parts[-3:]))
        payload, sent = self._staging.send([np.concatenate(parts), records])
        write_lines(payload, sent, self.sampling, self.tokens, longest=int(records[:, 2].max()))

    def set_pages(self, changes: Mapping[tuple[int, int], int]) -> None:
        """(slot, block index) -> page."""
        if not changes:
            return
        count = len(changes)
        entries = np.empty((3, count), dtype=np.int32)
        where = np.fromiter(chain.from_iterable(changes), dtype=np.int32, count=2 * count)
        entries[0], entries[1] = where[::2], where[1::2]
        entries[2] = np.fromiter(changes.values(), dtype=np.int32, count=count)
        (sent,) = self._staging.send([entries])
        write_pages(sent, self.pages)


def _occupant(sequence: Sequence) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Its line of the sampling table, what the lists of it hold, and its tokens: int32."""
    p = sequence.request.sampling
    biases = p.logit_bias
    stops = sequence.stop_ids if p.min_tokens > 0 else frozenset()
    if len(biases) > MAX_BIASES or len(stops) > MAX_STOPS:
        raise ValueError(
            f"a slot takes {MAX_BIASES} biases and {MAX_STOPS} forbidden tokens, "
            f"got {len(biases)} and {len(stops)}"
        )
    parameters = line(
        temperature=p.temperature,
        top_p=p.top_p,
        top_k=p.top_k,
        min_p=p.min_p,
        presence=p.presence_penalty,
        frequency=p.frequency_penalty,
        repetition=p.repetition_penalty,
        seed=p.seed,
        prompt_length=sequence.prompt_length,
        logprobs=p.logprobs,
        biases=len(biases),
        stops=len(stops),
        min_tokens=p.min_tokens,
    )
    lists = _NO_LISTS
    if biases or stops:
        values = np.array([*biases.values(), *[-np.inf] * len(stops)], dtype=np.float64)
        values[: len(biases)] = values[: len(biases)].clip(-_MAX_FLOAT, _MAX_FLOAT)
        tokens = np.array([*biases, *stops], dtype=np.int32)
        lists = np.concatenate([tokens, values.astype(np.float32).view(np.int32)])
    # A view of the sequence's own memory, which cannot grow while it is held: nobody keeps it.
    return (
        np.frombuffer(parameters, dtype=np.int32, count=WORDS),
        lists,
        np.frombuffer(sequence.tokens, dtype=np.int32),
    )


_NO_LISTS = np.empty(0, dtype=np.int32)
