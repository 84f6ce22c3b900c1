"""Who reads which keys in one step of decode attention: the batch cut into equal pieces, on the device.

The keys of every decode row are cut into tiles; laid end to end, the tiles of all rows are dealt out to a
fixed number of programs, so that each reads the same number of bytes whatever the lengths, and the grid does
not depend on them (a CUDA graph replays with others). Few rows are filled up so that no program has to do
with two. A row that more than one program reads is combined from partial results. Prefixes that rows share
are dealt out the same way to the programs of `shared_attention`; the rows' own tiles then begin after them.

The map is int32 lines of four, at fixed places:

    PROGRAMS         program: first row, last row (before the first = nothing to do), tiles a program
    PROGRAMS         program: the line of its first row, so that it need not wait for one to find the other
    MAX_ROWS         row: its first tile counted over all rows, first key, context, line of block_tables
    MAX_ROWS         row: first partial result of its shared prefix, how many, its first lane there
    SHARED_PROGRAMS  program: first and last group of rows, tiles a program
    MAX_TILES        group of rows: its first tile counted over all groups, tokens, line of block_tables

Bytes: 12 a row read, 32 written. Limit: the launch; one program, once a step for all layers.

Source: Sanovar et al., "Lean Attention" (arXiv 2405.10480).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Triton reads the annotations of its kernels: only constexpr may stand there.

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels import launcher
from kernels.pdl import PDL, launch_dependents, wait
from kernels.tuned import sm90

_LINE = 4  # numbers of a line


def shared_rows(n_q: int, n_kv: int) -> int:
    """Decode rows that read a shared prefix together: what fits a tile of tensor cores with all the heads
    of a group."""
    return sm90.SHARED_LANES // (n_q // n_kv)


class Workspace:
    """Device memory for the partial results of up to `max_rows` decode rows, used by one layer after the
    other. Allocated once: CUDA graphs hold its addresses."""

    def __init__(
        self,
        max_rows: int,
        n_q: int,
        n_kv: int,
        head_dim: int,
        device: torch.device | str,
        *,
        max_tiles: int | None = None,
        tile: sm90.DecodeTile | None = None,
        programs: int | None = None,
        shared_programs: int | None = None,
    ) -> None:
        """`max_tiles` bounds the tiles of shared prefixes (by default twice as many as hold all rows; 0 =
        none); `programs` and `shared_programs` are counted for each KV head and fill the device by default.
        """
        self.tile = tile or sm90.decode_tile(head_dim)
        self.group = n_q // n_kv
        self.n_kv = n_kv
        self.rows_a_tile = shared_rows(n_q, n_kv)
        self.max_rows = max_rows
        self.max_tiles = 2 * triton.cdiv(max_rows, self.rows_a_tile) if max_tiles is None else max_tiles
        sms = sm90.SMS
        if torch.device(device).type == "cuda":
            sms = torch.cuda.get_device_properties(device).multi_processor_count
        # Rounded down: one program too many for the device would wait until another ends: twice the time.
        self.programs = programs or max(1, sms * self.tile.programs_per_sm // n_kv)
        self.shared_programs = shared_programs or max(1, sms // n_kv)

        def floats(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=torch.float32, device=device)

        # Sums of weighted values, then (greatest score, sum of weights) of each query head. A piece's place
        # is its program + its row: no two pieces have the same, and those of a row follow each other.
        pieces = n_kv * (self.programs + max_rows)
        self.sums = floats(pieces, self.group, head_dim)
        self.stats = floats(pieces, self.group, 2)
        shared_pieces = n_kv * (self.shared_programs + self.max_tiles) if self.max_tiles else 0
        self.shared_sums = floats(shared_pieces, sm90.SHARED_LANES, head_dim)
        self.shared_stats = floats(shared_pieces, sm90.SHARED_LANES, 2)
        # Pieces of each (row, KV head) that are there; whoever combines them sets it back to 0.
        self.arrived = torch.zeros(max_rows, n_kv, dtype=torch.int32, device=device)


def launch(
    context_len: torch.Tensor,
    slots: torch.Tensor,
    decodes: int,
    workspace: Workspace,
    *,
    window: int = 0,
    shared_tokens: torch.Tensor | None = None,
    shared_tiles: torch.Tensor | None = None,
) -> torch.Tensor:
    """The map of the rows 0 to `decodes` as an int32 tensor.

    context_len [R], slots [R] int32; shared_tokens [decodes] and shared_tiles [n, rows_a_tile] int32, or
    None. Raises ValueError if `workspace` has no room for them.
    """
    w = workspace
    shared = shared_tokens is not None and shared_tiles is not None
    n_tiles = len(shared_tiles) if shared_tiles is not None else 0
    if decodes > w.max_rows:
        raise ValueError(f"{decodes} decode rows, but the attention workspace has room for {w.max_rows}")
    if n_tiles > w.max_tiles:
        raise ValueError(
            f"{n_tiles} tiles of shared prefixes, but the attention workspace has room for {w.max_tiles}"
        )
    lines = 2 * w.programs + 2 * w.max_rows + w.shared_programs + w.max_tiles
    task_map = torch.empty(lines, _LINE, dtype=torch.int32, device=context_len.device)
    # Two variants are enough for all batches: few rows, and as many as there may be.
    most = triton.next_power_of_2(w.max_rows)
    lanes = most if decodes > 64 else min(64, most)
    launcher.launch(
        map_kernel,
        (1,),
        context_len,
        slots,
        shared_tokens,
        shared_tiles,
        task_map,
        decodes,
        n_tiles,
        PROGRAMS=w.programs,
        MAX_ROWS=w.max_rows,
        KEYS=w.tile.keys,
        WINDOW=window,
        LEAST=w.tile.least_tiles,
        LANES=lanes,
        SHARED=shared,
        SHARED_PROGRAMS=w.shared_programs,
        SHARED_KEYS=sm90.shared_tile(w.sums.shape[-1]).keys,
        MAX_TILES=w.max_tiles,
        ROWS_A_TILE=w.rows_a_tile,
        GROUP=w.group,
        PDL=PDL,
        num_warps=4,
        launch_pdl=PDL,
    )
    return task_map


@triton.jit(
    do_not_specialize=["decodes", "n_tiles"],
    do_not_specialize_on_alignment=["context_len", "slots", "shared_tokens", "shared_tiles"],
)
def map_kernel(
    context_len,
    slots,
    shared_tokens,
    shared_tiles,
    task_map,
    decodes,
    n_tiles,
    PROGRAMS: tl.constexpr,
    MAX_ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WINDOW: tl.constexpr,
    LEAST: tl.constexpr,
    LANES: tl.constexpr,  # power of two, at least `decodes`
    SHARED: tl.constexpr,
    SHARED_PROGRAMS: tl.constexpr,
    SHARED_KEYS: tl.constexpr,
    MAX_TILES: tl.constexpr,
    ROWS_A_TILE: tl.constexpr,
    GROUP: tl.constexpr,
    PDL: tl.constexpr,
):
    wait(PDL)
    launch_dependents(PDL)
    row = tl.arange(0, LANES)
    real = row < decodes
    context = tl.load(context_len + row, mask=real, other=0)
    slot = tl.load(slots + row, mask=real, other=0)
    if SHARED:
        begin = tl.load(shared_tokens + row, mask=real, other=0)
    elif WINDOW:
        begin = tl.maximum(context - WINDOW, 0) // KEYS * KEYS
    else:
        begin = tl.zeros_like(context)
    # A padding row counts as one tile, so that somebody writes its zeros.
    tiles = tl.where(real, tl.maximum(tl.cdiv(context - begin, KEYS), 1), 0)
    per, tiles = _aligned(tiles, LEAST, PROGRAMS)
    ends = tl.cumsum(tiles, 0)
    total = tl.sum(tiles, 0)
    starts = ends - tiles
    slot = tl.maximum(slot, 0)
    rows = task_map + (2 * PROGRAMS + row) * 4
    tl.store(rows, starts, mask=real)
    tl.store(rows + 1, begin, mask=real)
    tl.store(rows + 2, context, mask=real)
    tl.store(rows + 3, slot, mask=real)

    program, first, item = _deal(task_map, ends, total, per, PROGRAMS, LANES)
    known = program < PROGRAMS
    busy = first < total
    of_first = task_map + (PROGRAMS + program) * 4
    # An idle program looks at the first page of the first slot, and at no key.
    tl.store(of_first, tl.where(busy, tl.gather(starts, item, 0), first), mask=known)
    tl.store(of_first + 1, tl.where(busy, tl.gather(begin, item, 0), 0), mask=known)
    tl.store(of_first + 2, tl.where(busy, tl.gather(context, item, 0), 0), mask=known)
    tl.store(of_first + 3, tl.where(busy, tl.gather(slot, item, 0), 0), mask=known)

    if SHARED:
        share = task_map + (2 * PROGRAMS + MAX_ROWS) * 4
        tl.store(share + row * 4 + 1, tl.zeros_like(row), mask=real)  # outside any tile: nothing is shared
        TILES: tl.constexpr = triton.next_power_of_2(MAX_TILES)
        tile = tl.arange(0, TILES)
        head = tl.load(shared_tiles + tile * ROWS_A_TILE, mask=tile < n_tiles, other=-1)
        full = head >= 0
        tokens = tl.load(shared_tokens + head, mask=full, other=0)
        pieces = tl.cdiv(tokens, SHARED_KEYS)
        ends = tl.cumsum(pieces, 0)
        begins = ends - pieces
        total = tl.sum(pieces, 0)
        programs = task_map + (2 * PROGRAMS + 2 * MAX_ROWS) * 4
        per = tl.maximum(tl.cdiv(total, SHARED_PROGRAMS), 1)
        _deal(programs, ends, total, per, SHARED_PROGRAMS, TILES)
        groups = programs + (SHARED_PROGRAMS + tile) * 4
        known = tile < MAX_TILES
        tl.store(groups, begins, mask=known)
        tl.store(groups + 1, tokens, mask=known)
        tl.store(groups + 2, tl.maximum(tl.load(slots + head, mask=full, other=0), 0), mask=known)

        lane = tl.arange(0, triton.next_power_of_2(ROWS_A_TILE))
        there = (tile < n_tiles)[:, None] & (lane < ROWS_A_TILE)[None, :]
        member = tl.load(shared_tiles + tile[:, None] * ROWS_A_TILE + lane[None, :], mask=there, other=-1)
        there &= (member >= 0) & (tokens > 0)[:, None]
        first = begins // per
        parts = tl.where(tokens > 0, (ends - 1) // per - first + 1, 0)
        place = share + member * 4
        tl.debug_barrier()  # the zeros above are written
        tl.store(place, tl.broadcast_to((first + tile)[:, None], there.shape), mask=there)
        tl.store(place + 1, tl.broadcast_to(parts[:, None], there.shape), mask=there)
        tl.store(place + 2, tl.broadcast_to((lane * GROUP)[None, :], there.shape), mask=there)


@triton.jit
def _aligned(tiles, LEAST: tl.constexpr, PROGRAMS: tl.constexpr):
    """Tiles a program, and `tiles` of each row, filled up to whole programs where that costs little.

    A program that ends one row and begins the next waits twice for q and keys, as long as two or three tiles
    take. So with up to two tiles a program more, every program has one row.
    """
    even = tl.maximum(tl.cdiv(tl.sum(tiles, 0), PROGRAMS), LEAST)
    per = even
    aligned = tiles
    for more in tl.static_range(2, -1, -1):
        needed = tl.cdiv(tiles, even + more)
        fits = tl.sum(needed, 0) <= PROGRAMS
        per = tl.where(fits, even + more, per)
        aligned = tl.where(fits, needed * (even + more), aligned)
    return per, aligned


@triton.jit
def _deal(lines, ends, total, per, PROGRAMS: tl.constexpr, LANES: tl.constexpr):
    """Writes the programs' lines: `ends` [LANES] are the tiles of the items up to and with each, summed up,
    `per` the tiles a program. Returns each program's number, first tile and first item."""
    program = tl.arange(0, triton.next_power_of_2(PROGRAMS))
    first = program * per
    last = tl.minimum(first + per, total) - 1
    known = program < PROGRAMS
    item = _owner(ends, first, LANES)
    tl.store(lines + program * 4, item, mask=known)
    tl.store(lines + program * 4 + 1, tl.where(first < total, _owner(ends, last, LANES), -1), mask=known)
    tl.store(lines + program * 4 + 2, tl.zeros_like(program) + per, mask=known)
    return program, first, item


@triton.jit
def _owner(ends, tile, LANES: tl.constexpr):
    """The item that each tile belongs to: how many of `ends` are not after it, by bisection."""
    found = tl.zeros_like(tile)
    step: tl.constexpr = LANES // 2
    for halving in tl.static_range(20):
        if (step >> halving) > 0:
            candidate = found + (step >> halving)
            found = tl.where(tl.gather(ends, candidate - 1, 0) <= tile, candidate, found)
    return found
