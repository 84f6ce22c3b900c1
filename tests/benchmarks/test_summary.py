from array import array
from typing import Any

import msgspec
import pytest

from benchmarks.loadgen.record import Record
from benchmarks.loadgen.report import Environment, Report
from benchmarks.loadgen.summary import Terms, distribution, failed, summarise
from benchmarks.loadgen.table import render

ENVIRONMENT = Environment([], "", "", "http://a:1", "m", "completions", "random", "closed loop", 0, {}, {})


def ok(
    due_s: float = 0.0, ttft_s: float = 0.1, tpot_s: float = 0.01, tokens: int = 11, **fields: Any
) -> Record:
    first_s = due_s + ttft_s
    last_s = first_s + tpot_s * (tokens - 1)
    record = Record("s", 0, due_s, due_s, last_s, "ok", status=200, first_s=first_s, last_s=last_s)
    record.times_s = array("d", (first_s + tpot_s * token for token in range(tokens)))
    record.input_tokens, record.output_tokens, record.has_usage = 100, tokens, True
    for name, value in fields.items():
        setattr(record, name, value)
    return record


def bad(outcome: str, error: str = "") -> Record:
    return Record("s", 0, 0.0, 0.0, 0.5, outcome, error)  # type: ignore[arg-type]


def report_of(*records: Record, terms: Terms | None = None, cpu_s: float = 0.1, **fields: Any) -> Report:
    fields = {"start_s": 0.0, "peak_in_flight": 1} | fields
    return summarise(records, ENVIRONMENT, terms or Terms(), cpu_s=cpu_s, **fields)


def test_percentiles_interpolate_between_the_closest_ranks() -> None:
    values = distribution(float(value) for value in reversed(range(1, 102)))
    assert values is not None
    assert (values.count, values.mean, values.p50, values.p90, values.p99) == (101, 51, 51, 91, 100)
    assert distribution([]) is None


def test_latencies_are_of_ok_requests_in_milliseconds() -> None:
    report = report_of(ok(ttft_s=0.1, tpot_s=0.01), ok(ttft_s=0.3, tpot_s=0.03), bad("error"))
    assert report.ttft_ms is not None
    assert report.tpot_ms is not None
    assert report.itl_ms is not None
    assert report.e2e_ms is not None
    assert report.ttft_ms.count == 2
    assert report.ttft_ms.mean == pytest.approx(200)
    assert report.tpot_ms.p50 == pytest.approx(20)
    assert report.itl_ms.count == 20
    assert report.itl_ms.mean == pytest.approx(20)
    assert report.e2e_ms.mean == pytest.approx((200 + 600) / 2)


def test_outcomes_stand_side_by_side_and_messages_are_counted() -> None:
    report = report_of(
        ok(), bad("error", "boom"), bad("error", "boom"), bad("shed", "full"), bad("disconnected", "gone"),
        bad("cancelled"), turns_not_sent=3,
    )  # fmt: skip
    assert msgspec.to_builtins(report.requests) == {
        "sent": 6, "ok": 1, "error": 2, "shed": 1, "disconnected": 1, "cancelled": 1, "turns_not_sent": 3,
    }  # fmt: skip
    assert list(report.errors.items()) == [("boom", 2), ("full", 1), ("gone", 1)]


def test_rates_are_per_second_from_the_start_to_the_last_end() -> None:
    report = report_of(ok(due_s=0.0), ok(due_s=1.8), start_s=0.0)
    assert report.duration_s == pytest.approx(2.0)
    rates = report.throughput
    assert msgspec.structs.astuple(rates) == pytest.approx((1, 100, 11, 111))


def test_goodput_counts_requests_within_every_objective_of_all_that_were_sent() -> None:
    records = [
        ok(ttft_s=0.1, tpot_s=0.01),
        ok(ttft_s=0.9, tpot_s=0.01),
        ok(ttft_s=0.1, tpot_s=0.5),
        bad("shed"),
    ]
    both = report_of(*records, terms=Terms(slo_ttft_ms=500, slo_tpot_ms=50)).goodput
    first = report_of(*records, terms=Terms(slo_ttft_ms=500)).goodput
    assert both is not None
    assert first is not None
    assert (both.share_of_sent, first.share_of_sent) == (0.25, 0.5)
    assert both.requests_per_s == pytest.approx(1 / max(record.end_s for record in records))
    assert report_of(*records).goodput is None


def test_an_answer_without_first_token_meets_no_first_token_objective() -> None:
    report = report_of(ok(first_s=None, last_s=None), terms=Terms(slo_ttft_ms=1e9))
    assert report.goodput is not None
    assert report.goodput.share_of_sent == 0


def test_cached_tokens_are_summed_where_told_and_absent_where_not() -> None:
    assert report_of(ok(cached_tokens=64), ok(cached_tokens=None), ok(cached_tokens=0)).tokens.cached == 64
    assert report_of(ok()).tokens.cached is None


def test_routing_shows_balance_reasons_and_hits_by_tier_against_the_prediction() -> None:
    def routed(worker: str, **fields: str) -> Record:
        return ok(route={"worker": worker, **fields})

    routing = report_of(
        routed("a", hit_gpu="64", hit_store="0", uncached="36", reason="seconds", predicted_ttft_ms="40"),
        routed("a", hit_gpu="0", hit_store="16", uncached="84", reason="seconds", predicted_hit="32"),
        routed("a", hit_gpu="broken", predicted_ttft_ms="nan"),
        routed("b", reason="retry"),
        ok(),
    ).routing
    assert routing is not None
    assert routing.workers == {"a": 3, "b": 1}
    assert routing.max_over_mean == 1.5
    assert routing.reasons == {"seconds": 2, "retry": 1}
    assert routing.hit_tokens == {"gpu": 64, "store": 16}
    assert routing.uncached_tokens == 120
    assert routing.predicted_hit_tokens == 32
    assert routing.ttft_above_prediction_ms is not None
    assert routing.ttft_above_prediction_ms.count == 1
    assert routing.ttft_above_prediction_ms.mean == pytest.approx(60)
    assert report_of(ok()).routing is None


def test_tokens_per_dollar_follow_from_the_rate_and_the_price() -> None:
    cost = report_of(ok(due_s=0.0), ok(due_s=1.8), terms=Terms(dollars_per_hour=2.0)).cost
    assert cost is not None
    assert cost.output_tokens_per_dollar == pytest.approx(11 * 3600 / 2)
    assert cost.total_tokens_per_dollar == pytest.approx(111 * 3600 / 2)
    assert cost.dollars_per_million_output_tokens == pytest.approx(1e6 / (11 * 1800))


def test_the_generator_says_when_it_may_be_the_limit() -> None:
    assert report_of(ok(due_s=9.0), cpu_s=1.0).warnings == []
    (warning,) = report_of(ok(due_s=9.0), cpu_s=8.0).warnings
    assert "87% of a core" in warning
    (warning,) = report_of(ok(), ok(sent_s=0.05)).warnings
    assert "late" in warning
    (warning,) = report_of(ok(has_usage=False)).warnings
    assert "no usage" in warning


def test_a_run_fails_above_its_error_rate_and_when_nothing_succeeded() -> None:
    assert failed(report_of(ok(), bad("shed"), bad("cancelled")), 0.0) is None
    assert failed(report_of(ok(), bad("error")), 0.5) is None
    assert "50.00%" in (failed(report_of(ok(), bad("disconnected")), 0.1) or "")
    assert failed(report_of(bad("shed")), 1.0) == "no request succeeded"
    assert failed(report_of(), 1.0) == "no request succeeded"


def test_every_report_has_a_table_even_an_empty_one() -> None:
    terms = Terms(100, 10, 2.5)
    empty = render(report_of(terms=terms))
    assert "ok 0" in empty
    full = render(report_of(
        ok(cached_tokens=50, route={"worker": "w0", "hit_gpu": "50"}), bad("shed", "full"), bad("cancelled"),
        terms=terms, cpu_s=9.0, interrupted=True, turns_not_sent=1,
    ))  # fmt: skip
    for part in (
        "interrupted",
        "shed (429) 1",
        "cached 50 = 50.0%",
        "w0 1",
        "gpu 50",
        "per dollar",
        "goodput",
    ):
        assert part in full
    assert len(full.splitlines()) < 30


def test_many_different_errors_are_cut_in_the_table_but_not_in_the_report() -> None:
    report = report_of(*(bad("error", f"e{index}") for index in range(9)))
    assert "and 4 other messages" in render(report)
    assert len(report.errors) == 9
