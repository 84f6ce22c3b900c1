"""The run as a picture: how TTFT is distributed, and what happened when. Nothing else needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from .record import Record
from .report import Report


def draw(report: Report, records: Sequence[Record], start_s: float, path: Path) -> None:
    """Write the picture; the suffix of `path` chooses its format."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    cumulative, timeline = figure.subplots(1, 2, width_ratios=(1, 1.6))
    figure.suptitle(f"{report.environment.workload}, {report.environment.pace}", fontsize=10)

    ok = [record for record in records if record.outcome == "ok"]
    ttft_ms = np.sort([record.ttft_s * 1e3 for record in ok if record.ttft_s is not None])
    cumulative.step(ttft_ms, np.arange(1, ttft_ms.size + 1) / max(1, ttft_ms.size), where="post")
    if report.goodput is not None and report.goodput.slo_ttft_ms is not None:
        cumulative.axvline(report.goodput.slo_ttft_ms, color="grey", linestyle=":")
    cumulative.set(xlabel="TTFT, ms", ylabel="share of answers", ylim=(0, 1))

    dues_s = [record.due_s - start_s for record in ok if record.ttft_s is not None]
    values_ms = [record.ttft_s * 1e3 for record in ok if record.ttft_s is not None]
    timeline.scatter(dues_s, values_ms, s=8, label="TTFT by time due")
    lost_s = [record.due_s - start_s for record in records if record.outcome != "ok"]
    timeline.scatter(lost_s, [0.0] * len(lost_s), s=14, marker="x", color="red", label="not ok")
    timeline.set(xlabel="seconds of the run", ylabel="TTFT, ms")

    chunk_s = np.concatenate([np.frombuffer(r.times_s) for r in ok if r.times_s] or [np.empty(0)]) - start_s
    width_s = max(0.1, report.duration_s / 100)
    edges_s = np.arange(0, report.duration_s + width_s, width_s)
    per_s = np.histogram(chunk_s, edges_s)[0] / width_s * (report.tokens.per_chunk or 1)
    rate = timeline.twinx()
    rate.stairs(per_s, edges_s, color="tab:orange", alpha=0.6)
    rate.set_ylabel("output tokens/s", color="tab:orange")
    timeline.legend(loc="upper right", fontsize=8)
    figure.savefig(path, dpi=130)
