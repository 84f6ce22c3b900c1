"""What the host changes in the device's tables between steps, all of it in one launch each.

    write_lines   new occupants of slots: how they sample and the tokens they have
    write_pages   single entries of the page table

The host packs what it has to say into one buffer; these scatter it. Bytes: twice what is written. Limit: the
launch.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Triton reads the annotations of its kernels: only constexpr may stand there.

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels import launcher
from kernels import sampling_table as words
from kernels.sampling_table import WORDS, SamplingTable

_WORDS = tl.constexpr(words.WORDS)
_BIASES = tl.constexpr(words.BIASES)
_STOPS = tl.constexpr(words.STOPS)
_LIST = tl.constexpr(words.MAX_BIASES + words.MAX_STOPS)
_LIST_BLOCK = tl.constexpr(triton.next_power_of_2(words.MAX_BIASES + words.MAX_STOPS))

#: Words of one program; 4 warps, 8 words a thread.
_BLOCK = 1024


def write_lines(
    payload: torch.Tensor, records: torch.Tensor, table: SamplingTable, tokens: torch.Tensor, *, longest: int
) -> None:
    """Write whole lines of `table` and the beginnings of lines of tokens [S, max_length] int32.

    records [N, 3] int32: slot, where its part of `payload` begins, number of tokens, at most `longest`. A
    part: one line of `SamplingTable.parameters`, the tokens of its lists, their values' bits, the tokens.
    """
    run = launch_lines if tokens.is_cuda else reference_lines
    run(payload, records, table, tokens, longest=longest)


def write_pages(entries: torch.Tensor, pages: torch.Tensor) -> None:
    """pages [S, max_blocks] int32: pages[slot, block] = page for every column of entries [3, N] int32."""
    (launch_pages if pages.is_cuda else reference_pages)(entries, pages)


def reference_lines(
    payload: torch.Tensor, records: torch.Tensor, table: SamplingTable, tokens: torch.Tensor, *, longest: int
) -> None:
    """`write_lines` in PyTorch."""
    for slot, start, count in records.tolist():
        line, rest = payload[start : start + WORDS], payload[start + WORDS :]
        listed = int(line[words.BIASES] + line[words.STOPS])
        table.parameters[slot] = line
        table.list_tokens[slot, :listed] = rest[:listed]
        table.list_values[slot, :listed] = rest[listed : 2 * listed].view(torch.float32)
        tokens[slot, :count] = rest[2 * listed : 2 * listed + count]


def reference_pages(entries: torch.Tensor, pages: torch.Tensor) -> None:
    """`write_pages` in PyTorch."""
    slots, blocks, values = entries
    pages[slots, blocks] = values


def launch_lines(
    payload: torch.Tensor, records: torch.Tensor, table: SamplingTable, tokens: torch.Tensor, *, longest: int
) -> None:
    """`write_lines` in Triton: one program for _BLOCK tokens of a slot."""
    launcher.launch(
        lines_kernel,
        (len(records), max(1, triton.cdiv(longest, _BLOCK))),
        payload,
        records,
        table.parameters,
        table.list_tokens,
        table.list_values.view(torch.int32),
        tokens,
        tokens.stride(0),
        BLOCK=_BLOCK,
        LINE=triton.next_power_of_2(WORDS),
        num_warps=4,
    )


def launch_pages(entries: torch.Tensor, pages: torch.Tensor) -> None:
    """`write_pages` in Triton."""
    count = entries.shape[1]
    launcher.launch(
        pages_kernel,
        (triton.cdiv(count, _BLOCK),),
        entries,
        pages,
        count,
        pages.stride(0),
        BLOCK=_BLOCK,
        num_warps=4,
    )


@triton.jit(do_not_specialize=["tokens_stride"])
def lines_kernel(
    payload,
    records,
    parameters,
    list_tokens,
    list_values,
    tokens,
    tokens_stride,
    BLOCK: tl.constexpr,
    LINE: tl.constexpr,
):
    record = records + tl.program_id(0) * 3
    slot = tl.load(record).to(tl.int64)
    payload += tl.load(record + 1)
    count = tl.load(record + 2)
    listed = tl.load(payload + _BIASES) + tl.load(payload + _STOPS)
    piece = tl.program_id(1)
    if piece == 0:
        word = tl.arange(0, LINE)
        there = word < _WORDS
        tl.store(parameters + slot * _WORDS + word, tl.load(payload + word, mask=there), mask=there)
        entry = tl.arange(0, _LIST_BLOCK)
        there = entry < listed
        source = payload + _WORDS + entry
        tl.store(list_tokens + slot * _LIST + entry, tl.load(source, mask=there), mask=there)
        tl.store(list_values + slot * _LIST + entry, tl.load(source + listed, mask=there), mask=there)
    place = piece * BLOCK + tl.arange(0, BLOCK)
    there = place < count
    token = tl.load(payload + _WORDS + 2 * listed + place, mask=there)
    tl.store(tokens + slot * tokens_stride + place, token, mask=there)


@triton.jit(do_not_specialize=["count", "pages_stride"])
def pages_kernel(entries, pages, count, pages_stride, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = i < count
    slot = tl.load(entries + i, mask=there, other=0).to(tl.int64)
    block = tl.load(entries + count + i, mask=there, other=0)
    tl.store(pages + slot * pages_stride + block, tl.load(entries + 2 * count + i, mask=there), mask=there)
