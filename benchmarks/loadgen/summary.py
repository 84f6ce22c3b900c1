"""From records to figures."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from .record import Record
from .report import (
    SCHEMA,
    Cost,
    Counts,
    Distribution,
    Environment,
    Generator,
    Goodput,
    Report,
    Routing,
    Row,
    Throughput,
    Tokens,
)

#: More than this share of a core, and the generator may be what is measured.
MAX_CPU_SHARE = 0.8
#: More than this between due and sent, and the generator was late.
MAX_SEND_LAG_MS = 20.0


@dataclass(frozen=True, slots=True)
class Terms:
    """What the user wants the run to be judged by."""

    slo_ttft_ms: float | None = None
    slo_tpot_ms: float | None = None
    dollars_per_hour: float | None = None


def distribution(values: Iterable[float]) -> Distribution | None:
    """None where there are no values."""
    array = np.fromiter(values, dtype=np.float64)
    if not array.size:
        return None
    p50, p90, p99 = np.percentile(array, (50, 90, 99))
    return Distribution(array.size, float(array.mean()), float(p50), float(p90), float(p99))


def summarise(
    records: Sequence[Record],
    environment: Environment,
    terms: Terms,
    *,
    start_s: float,
    cpu_s: float,
    peak_in_flight: int,
    turns_not_sent: int = 0,
    interrupted: bool = False,
) -> Report:
    """The report of one run. `start_s` is on the records' clock; `cpu_s` is what the generator used."""
    ok = [record for record in records if record.outcome == "ok"]
    outcomes = Counter(record.outcome for record in records)
    duration_s = max((record.end_s for record in records), default=start_s) - start_s
    tokens = _tokens(ok)
    per_s = 1 / duration_s if duration_s > 0 else 0.0
    throughput = Throughput(
        requests_per_s=len(ok) * per_s,
        input_tok_s=tokens.input * per_s,
        out_tok_s=tokens.output * per_s,
        total_tok_s=(tokens.input + tokens.output) * per_s,
    )
    generator = Generator(
        cpu_share=cpu_s * per_s,
        send_lag_ms=distribution((record.sent_s - record.due_s) * 1e3 for record in records),
        peak_in_flight=peak_in_flight,
    )
    errors = Counter(record.error for record in records if record.error)
    return Report(
        schema=SCHEMA,
        environment=environment,
        interrupted=interrupted,
        duration_s=duration_s,
        requests=Counts(
            sent=len(records),
            ok=outcomes["ok"],
            error=outcomes["error"],
            shed=outcomes["shed"],
            disconnected=outcomes["disconnected"],
            cancelled=outcomes["cancelled"],
            turns_not_sent=turns_not_sent,
        ),
        errors=dict(errors.most_common()),
        ttft_ms=distribution(r.ttft_s * 1e3 for r in ok if r.ttft_s is not None),
        tpot_ms=distribution(r.tpot_s * 1e3 for r in ok if r.tpot_s is not None),
        itl_ms=distribution(gap for r in ok for gap in np.diff(r.times_s) * 1e3),
        e2e_ms=distribution(r.e2e_s * 1e3 for r in ok),
        tokens=tokens,
        throughput=throughput,
        goodput=_goodput(ok, len(records), per_s, terms),
        routing=_routing(ok),
        cost=None if terms.dollars_per_hour is None else _cost(terms.dollars_per_hour, throughput),
        generator=generator,
        warnings=_warnings(generator, tokens, duration_s),
        rows=[_row(record, start_s) for record in records],
    )


def failed(report: Report, max_error_rate: float) -> str | None:
    """Why the run does not count as passed, or None. Shed requests were answered: they are no errors."""
    broken = report.requests.error + report.requests.disconnected
    ended = report.requests.sent - report.requests.cancelled
    if ended and broken / ended > max_error_rate:
        return f"error rate {broken / ended:.2%} is above --max-error-rate {max_error_rate:.2%}"
    if not report.requests.ok:
        return "no request succeeded"
    return None


def _tokens(ok: Sequence[Record]) -> Tokens:
    output = sum(record.output_tokens for record in ok)
    chunks = sum(len(record.times_s) for record in ok)
    cached = [record.cached_tokens for record in ok if record.cached_tokens is not None]
    return Tokens(
        input=sum(record.input_tokens for record in ok),
        output=output,
        cached=sum(cached) if cached else None,
        per_chunk=output / chunks if chunks else None,
        estimated=sum(not record.has_usage for record in ok),
    )


def _goodput(ok: Sequence[Record], sent: int, per_s: float, terms: Terms) -> Goodput | None:
    if terms.slo_ttft_ms is None and terms.slo_tpot_ms is None:
        return None
    good = sum(
        _within(record.ttft_s, terms.slo_ttft_ms) and _within(record.tpot_s or 0.0, terms.slo_tpot_ms)
        for record in ok
    )
    return Goodput(terms.slo_ttft_ms, terms.slo_tpot_ms, good * per_s, good / sent if sent else 0.0)


def _within(value_s: float | None, limit_ms: float | None) -> bool:
    return limit_ms is None or (value_s is not None and value_s * 1e3 <= limit_ms)


def _routing(ok: Sequence[Record]) -> Routing | None:
    routed = [record for record in ok if record.route]
    if not routed:
        return None
    routes = [record.route for record in routed]
    workers = Counter(route["worker"] for route in routes if "worker" in route)
    hits: Counter[str] = Counter()
    for route in routes:
        for name, value in route.items():
            if name.startswith("hit_"):
                hits[name.removeprefix("hit_")] += _integer(value)
    return Routing(
        workers=dict(sorted(workers.items())),
        max_over_mean=max(workers.values()) * len(workers) / workers.total() if workers else 0.0,
        reasons=dict(Counter(route["reason"] for route in routes if "reason" in route).most_common()),
        hit_tokens=dict(hits),
        uncached_tokens=sum(_integer(route.get("uncached", "")) for route in routes),
        predicted_hit_tokens=sum(_integer(route.get("predicted_hit", "")) for route in routes),
        ttft_above_prediction_ms=distribution(_above_prediction_ms(routed)),
    )


def _above_prediction_ms(routed: Iterable[Record]) -> Iterator[float]:
    for record in routed:
        predicted_ms = _number(record.route.get("predicted_ttft_ms", ""))
        if predicted_ms is not None and record.ttft_s is not None:
            yield record.ttft_s * 1e3 - predicted_ms


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _integer(text: str) -> int:
    return int(text) if text.isascii() and text.isdigit() else 0


def _cost(dollars_per_hour: float, throughput: Throughput) -> Cost:
    output = throughput.out_tok_s * 3600 / dollars_per_hour
    return Cost(
        dollars_per_hour=dollars_per_hour,
        output_tokens_per_dollar=output,
        total_tokens_per_dollar=throughput.total_tok_s * 3600 / dollars_per_hour,
        dollars_per_million_output_tokens=1e6 / output if output else None,
    )


def _warnings(generator: Generator, tokens: Tokens, duration_s: float) -> list[str]:
    warnings = []
    if generator.cpu_share > MAX_CPU_SHARE and duration_s > 1:
        warnings.append(
            f"the generator used {generator.cpu_share:.0%} of a core: it may be what limits these figures"
        )
    lag = generator.send_lag_ms
    if lag is not None and lag.p99 > MAX_SEND_LAG_MS:
        warnings.append(
            f"requests were sent up to {lag.p99:.0f} ms late (p99): the latencies hold this wait, "
            "which is the generator's and not the server's"
        )
    if tokens.estimated:
        warnings.append(f"{tokens.estimated} answers had no usage: their tokens are counted chunks")
    return warnings


def _row(record: Record, start_s: float) -> Row:
    return Row(
        session=record.session,
        turn=record.turn,
        outcome=record.outcome,
        error=record.error,
        status=record.status,
        due_s=record.due_s - start_s,
        sent_s=record.sent_s - start_s,
        end_s=record.end_s - start_s,
        ttft_ms=None if record.ttft_s is None else record.ttft_s * 1e3,
        tpot_ms=None if record.tpot_s is None else record.tpot_s * 1e3,
        input_tokens=record.input_tokens,
        output_tokens=record.output_tokens,
        cached_tokens=record.cached_tokens,
        finish_reason=record.finish_reason,
        route=record.route,
    )
