"""One line that tells how far a run is, on a terminal only."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from typing import TextIO

from .pace import Run

INTERVAL_S = 0.25
BAR_CELLS = 24


async def show_progress(run: Run, total: int | None, out: TextIO) -> None:
    """Redraws the line until cancelled, then wipes it. Does nothing where `out` is no terminal."""
    if not out.isatty():
        return
    try:
        while True:
            out.write(f"\r{progress_line(run, total, time.perf_counter())}\x1b[K")
            out.flush()
            await asyncio.sleep(INTERVAL_S)
    finally:
        out.write("\r\x1b[K")
        out.flush()


def progress_line(run: Run, total: int | None, now_s: float) -> str:
    """`total`: the requests of the run, None if it ends by time."""
    outcomes = Counter(record.outcome for record in run.records)
    ended = len(run.records) - run.in_flight
    if total is not None:
        share, goal = ended / total, f"{ended:,}/{total:,}"
    else:
        share = (now_s - run.start_s) / run.duration_s if run.duration_s else 0.0
        goal = f"{ended:,}"
    filled = min(BAR_CELLS, int(share * BAR_CELLS))
    lost = "".join(
        f"  {name} {outcomes[name]:,}" for name in ("error", "shed", "disconnected") if outcomes[name]
    )
    return (
        f"[{'#' * filled}{'.' * (BAR_CELLS - filled)}] {goal} done  {run.in_flight:,} in flight{lost}"
        f"  {now_s - run.start_s:.0f} s"
    )
