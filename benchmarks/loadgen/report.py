"""The figures of a run and their JSON form.

The JSON file is one `Report` object; its schema is the structs below, field by field. Times are milliseconds
(`_ms`) or seconds (`_s`), rates are per second of the run, which lasts from the moment the first request was
due to the end of the last. `SCHEMA` rises when a field changes its meaning or goes; new fields may come.

Latencies are of `ok` requests only; how many were not ok stands beside them. They count from the moment a
request was due (`ttft_ms`, `e2e_ms`). `tpot_ms` is (last token - first token) / (output tokens - 1) of one
request; `itl_ms` is the time between two chunks of one answer: a server that puts several tokens into a chunk
(`tokens.per_chunk`) has fewer and longer ones.
"""

from __future__ import annotations

import msgspec

from .record import Outcome

SCHEMA = 1


class Environment(msgspec.Struct):
    """What was run, on what."""

    command: list[str]
    label: str  # the user's words: the server's version and flags
    started: str  # UTC, ISO 8601
    url: str
    model: str
    api: str
    workload: str
    pace: str
    seed: int
    versions: dict[str, str]
    machine: dict[str, str | int]


class Counts(msgspec.Struct):
    sent: int
    ok: int
    error: int
    shed: int  # 429
    disconnected: int
    cancelled: int  # by Ctrl-C
    turns_not_sent: int  # of conversations that ended early


class Distribution(msgspec.Struct):
    """Linear interpolation between the closest ranks."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float


class Tokens(msgspec.Struct):
    """Sums over `ok` requests, by the server's usage."""

    input: int
    output: int
    cached: int | None  # input tokens that came from a cache; None: the server does not tell
    per_chunk: float | None  # output tokens in one streamed chunk
    estimated: int  # requests without usage, whose tokens are counted chunks


class Throughput(msgspec.Struct):
    requests_per_s: float
    input_tok_s: float
    out_tok_s: float
    total_tok_s: float


class Goodput(msgspec.Struct):
    """`ok` requests within every objective given."""

    slo_ttft_ms: float | None
    slo_tpot_ms: float | None
    requests_per_s: float
    share_of_sent: float


class Routing(msgspec.Struct):
    """What `x-reprise-route` said of the `ok` requests, and how that compares with what was measured."""

    workers: dict[str, int]
    max_over_mean: float  # 1 = even, over the workers that served at all
    reasons: dict[str, int]
    hit_tokens: dict[str, int]  # by tier, as the worker found them
    uncached_tokens: int
    predicted_hit_tokens: int
    ttft_above_prediction_ms: Distribution | None  # measured - predicted


class Cost(msgspec.Struct):
    dollars_per_hour: float
    output_tokens_per_dollar: float
    total_tokens_per_dollar: float
    dollars_per_million_output_tokens: float | None


class Generator(msgspec.Struct):
    """Was the generator itself the limit?"""

    cpu_share: float  # of one core
    send_lag_ms: Distribution | None  # from due to sent, of all requests
    peak_in_flight: int


class Row(msgspec.Struct):
    """One request. Times are from the start of the run."""

    session: str
    turn: int
    outcome: Outcome
    error: str
    status: int
    due_s: float
    sent_s: float
    end_s: float
    ttft_ms: float | None
    tpot_ms: float | None
    input_tokens: int
    output_tokens: int
    cached_tokens: int | None
    finish_reason: str | None
    route: dict[str, str]


class Report(msgspec.Struct):
    schema: int
    environment: Environment
    interrupted: bool
    duration_s: float
    requests: Counts
    errors: dict[str, int]  # messages of everything not ok, most frequent first
    ttft_ms: Distribution | None  # None: no such value
    tpot_ms: Distribution | None
    itl_ms: Distribution | None
    e2e_ms: Distribution | None
    tokens: Tokens
    throughput: Throughput
    goodput: Goodput | None  # None: no objective given
    routing: Routing | None  # None: no such header came
    cost: Cost | None  # None: no price given
    generator: Generator
    warnings: list[str]
    rows: list[Row]
