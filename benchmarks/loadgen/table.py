"""The report as a page of text."""

from __future__ import annotations

from collections.abc import Iterator

from .report import Distribution, Goodput, Report, Routing

MAX_ERRORS = 5


def render(report: Report) -> str:
    """Everything of the report but its rows."""
    return "\n".join(_lines(report)) + "\n"


def _lines(report: Report) -> Iterator[str]:
    environment, requests = report.environment, report.requests
    yield ""
    yield (
        f"{environment.workload}, {environment.pace}, seed {environment.seed}, {report.duration_s:.1f} s"
        + (" (interrupted: what follows is partial)" if report.interrupted else "")
    )
    yield f"{environment.model} at {environment.url} ({environment.api}) {environment.label}".rstrip()
    yield ""
    counts = [
        f"sent {requests.sent:,}",
        f"ok {requests.ok:,}",
        f"error {requests.error:,}",
        f"shed (429) {requests.shed:,}",
        f"disconnected {requests.disconnected:,}",
    ]
    if requests.cancelled:
        counts.append(f"cancelled {requests.cancelled:,}")
    if requests.turns_not_sent:
        counts.append(f"turns not sent {requests.turns_not_sent:,}")
    yield _row("requests", "   ".join(counts))
    errors = list(report.errors.items())
    for message, count in errors[:MAX_ERRORS]:
        yield _row("", f"{count:,} × {message}")
    if len(errors) > MAX_ERRORS:
        yield _row("", f"and {len(errors) - MAX_ERRORS} other messages")
    yield ""
    yield _row("latency, ms", "".join(f"{name:>11}" for name in ("mean", "p50", "p90", "p99")))
    yield _latency("  TTFT", report.ttft_ms)
    yield _latency("  TPOT", report.tpot_ms)
    yield _latency("  ITL", report.itl_ms)
    yield _latency("  e2e", report.e2e_ms)
    yield ""
    rates = report.throughput
    yield _row(
        "throughput",
        f"{rates.requests_per_s:,.2f} requests/s   {rates.input_tok_s:,.1f} input, "
        f"{rates.out_tok_s:,.1f} output, {rates.total_tok_s:,.1f} total tokens/s",
    )
    yield _row("tokens", _tokens(report))
    if report.goodput is not None:
        yield _row("goodput", _goodput(report.goodput))
    if report.routing is not None:
        yield from _routing(report.routing)
    if report.cost is not None:
        yield _row(
            "cost",
            f"{report.cost.output_tokens_per_dollar:,.0f} output, "
            f"{report.cost.total_tokens_per_dollar:,.0f} total tokens per dollar "
            f"at ${report.cost.dollars_per_hour:g}/h",
        )
    lag = report.generator.send_lag_ms
    yield _row(
        "generator",
        f"{report.generator.cpu_share:.0%} of a core   sent late by {lag.p99 if lag else 0:.1f} ms (p99)   "
        f"{report.generator.peak_in_flight:,} in flight at most",
    )
    for warning in report.warnings:
        yield _row("warning", warning)


def _row(name: str, text: str) -> str:
    return f"{name:<14}{text}".rstrip()


def _latency(name: str, values: Distribution | None) -> str:
    if values is None:
        return _row(name, f"{'–':>11}")
    figures = (values.mean, values.p50, values.p90, values.p99)
    return _row(name, "".join(f"{figure:>11,.2f}" for figure in figures))


def _tokens(report: Report) -> str:
    tokens = report.tokens
    cached = "cached: not told"
    if tokens.cached is not None:
        cached = f"cached {tokens.cached:,}" + (
            f" = {tokens.cached / tokens.input:.1%}" if tokens.input else ""
        )
    chunk = "" if tokens.per_chunk is None else f"   {tokens.per_chunk:.2f} a chunk"
    return f"{tokens.input:,} input ({cached})   {tokens.output:,} output{chunk}"


def _goodput(goodput: Goodput) -> str:
    objectives = []
    if goodput.slo_ttft_ms is not None:
        objectives.append(f"TTFT ≤ {goodput.slo_ttft_ms:g} ms")
    if goodput.slo_tpot_ms is not None:
        objectives.append(f"TPOT ≤ {goodput.slo_tpot_ms:g} ms")
    return (
        f"{goodput.requests_per_s:,.2f} requests/s   {goodput.share_of_sent:.1%} of those sent "
        f"({', '.join(objectives)})"
    )


def _routing(routing: Routing) -> Iterator[str]:
    workers = ", ".join(f"{worker} {count:,}" for worker, count in routing.workers.items())
    yield _row("routing", f"{workers}   max/mean {routing.max_over_mean:.2f}")
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in routing.reasons.items())
    if reasons:
        yield _row("", f"reasons: {reasons}")
    hits = ", ".join(f"{tier} {tokens:,}" for tier, tokens in routing.hit_tokens.items())
    yield _row(
        "",
        f"hit tokens: {hits or 'none'} (predicted {routing.predicted_hit_tokens:,}); "
        f"uncached {routing.uncached_tokens:,}",
    )
    above = routing.ttft_above_prediction_ms
    if above is not None:
        yield _row("", f"TTFT above its prediction: {above.p50:,.1f} ms (p50), {above.p99:,.1f} ms (p99)")
