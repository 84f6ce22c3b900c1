"""The command line of `benchmarks/serve.py`, checked once, as the objects it asks for."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn, get_args

from . import values
from .http import Address
from .pace import Arrival, ClosedLoop, OpenLoop, Pace, Scheduled
from .prompts import Api
from .summary import Terms
from .trace import TraceError, read_trace, replay
from .workload import Range, Span, Workload, conversation, random_prompts, shared_prefix

#: Every model family we know has at least this many ids. A constant, and not what the server says, so that
#: two servers are sent the same tokens.
DEFAULT_VOCAB_SIZE = 32_000

DEFAULT_REQUESTS = 100
DEFAULT_SESSIONS = 8
DEFAULT_PROMPTS_PER_GROUP = 16
DEFAULT_INPUT_TOKENS = Range(512, 512)
DEFAULT_OUTPUT_TOKENS = Range(128, 128)

_LENGTHS = ("input_tokens", "output_tokens")
#: Options that shape a workload: one that does not shape the chosen workload is refused.
_SHAPES: dict[str, tuple[str, ...]] = {
    "random": ("requests", *_LENGTHS),
    "shared-prefix": ("requests", "groups", "prompts_per_group", "prefix_tokens", *_LENGTHS),
    "conversation": ("sessions", "turns", "think_time", "prefix_tokens", *_LENGTHS),
    "trace": ("requests", "time_scale", "length_scale"),
}


@dataclass(frozen=True, slots=True)
class Options:
    address: Address
    model: str | None  # None: the only one that the server has
    api: Api
    workload_name: str
    workload: Workload
    pace: Pace
    pace_name: str
    duration_s: float | None
    warmup: int
    warmup_tokens: tuple[Range, Range]  # of input, of output
    seed: int
    vocab_size: int | None  # None: not given
    ignore_eos: bool
    extra: dict[str, Any]
    timeout_s: float
    verify: bool
    terms: Terms
    max_error_rate: float
    label: str
    json_path: Path | None
    plot_path: Path | None


def parse(argv: Sequence[str]) -> Options:
    """Exits with status 2 and one line on stderr where an option is wrong."""
    parser = _parser()
    given = parser.parse_args(argv)
    shape, _, trace_path = given.workload.partition(":")
    if shape not in _SHAPES or bool(trace_path) != (shape == "trace"):
        parser.error(
            f"--workload must be random, shared-prefix, conversation or trace:PATH, got {given.workload!r}"
        )
    for name in sorted({name for names in _SHAPES.values() for name in names} - set(_SHAPES[shape])):
        if getattr(given, name) is not None:
            parser.error(f"--{name.replace('_', '-')} has no effect with --workload {shape}")
    if given.arrival is not None and given.rate is None:
        parser.error("--arrival has no effect without --rate")
    try:
        workload = _workload(given, shape, Path(trace_path))
    except (TraceError, OSError) as error:
        parser.error(str(error))
    pace, pace_name = _pace(given, shape, parser)
    if workload.requests is None and given.rate == math.inf:
        parser.error("--rate inf needs a number of requests: it sends all of them at once")
    if given.plot is not None and find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install matplotlib")
    return Options(
        address=given.url,
        model=given.model,
        api=given.api or ("chat" if shape == "conversation" else "completions"),
        workload_name=given.workload,
        workload=workload,
        pace=pace,
        pace_name=pace_name,
        duration_s=given.duration,
        warmup=given.warmup,
        warmup_tokens=(
            given.input_tokens or DEFAULT_INPUT_TOKENS,
            given.output_tokens or DEFAULT_OUTPUT_TOKENS,
        ),
        seed=given.seed,
        vocab_size=given.vocab_size,
        ignore_eos=given.ignore_eos,
        extra=given.extra_body,
        timeout_s=given.timeout,
        verify=given.verify,
        terms=Terms(given.slo_ttft_ms, given.slo_tpot_ms, given.dollars_per_hour),
        max_error_rate=given.max_error_rate,
        label=given.label,
        json_path=given.json,
        plot_path=given.plot,
    )


def _workload(given: argparse.Namespace, shape: str, trace_path: Path) -> Workload:
    """Raises TraceError, OSError. With `--duration` and no number, a workload goes on without end."""
    endless = given.duration is not None
    input_tokens = given.input_tokens or DEFAULT_INPUT_TOKENS
    output_tokens = given.output_tokens or DEFAULT_OUTPUT_TOKENS
    if shape == "trace":
        lines = read_trace(trace_path, given.requests)
        return replay(lines, given.time_scale or 1.0, given.length_scale or 1.0)
    if shape == "conversation":
        sessions = given.sessions or (None if endless else DEFAULT_SESSIONS)
        prefix_tokens = given.prefix_tokens or Range(0, 0)
        think = given.think_time or Span(0.0, 0.0)
        return conversation(
            given.seed, sessions, given.turns or 6, prefix_tokens, input_tokens, output_tokens, think
        )
    if shape == "shared-prefix":
        endless = endless or given.requests is not None
        per_group = given.prompts_per_group or (None if endless else DEFAULT_PROMPTS_PER_GROUP)
        prefix_tokens = given.prefix_tokens or Range(2048, 2048)
        groups = given.groups or 8
        workload = shared_prefix(given.seed, groups, per_group, prefix_tokens, input_tokens, output_tokens)
        return workload.first(given.requests)
    requests = given.requests or (None if endless else DEFAULT_REQUESTS)
    return random_prompts(given.seed, requests, input_tokens, output_tokens)


def _pace(given: argparse.Namespace, shape: str, parser: argparse.ArgumentParser) -> tuple[Pace, str]:
    if given.concurrency is not None:
        return ClosedLoop(given.concurrency), f"closed loop, {given.concurrency} at a time"
    if given.rate is not None:
        arrival: Arrival = given.arrival or "poisson"
        return OpenLoop(given.rate, arrival), f"open loop, {given.rate:g}/s {arrival}"
    if shape != "trace":
        parser.error("give --rate or --concurrency (only a trace brings its own times)")
    return Scheduled(), f"open loop, the trace's times × {given.time_scale or 1:g}"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, without the usage before it."""
        print(f"{self.prog}: error: {message}", file=sys.stderr)
        sys.exit(2)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="serve.py",
        description="Load generator for any OpenAI-compatible endpoint. A key is taken from OPENAI_API_KEY.",
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=110),
    )
    add = parser.add_argument
    add("--url", type=values.address, default="http://127.0.0.1:8000", help="endpoint (default: %(default)s)")
    add("--model", help="model id (default: the only one in /v1/models)")
    add(
        "--api",
        choices=get_args(Api),
        help="token ids to /v1/completions, or words to /v1/chat/completions "
        "(default: completions; chat for conversation)",
    )
    add(
        "--workload",
        default="random",
        metavar="NAME",
        help="random | shared-prefix | conversation | trace:PATH (default: %(default)s)",
    )

    pace = parser.add_argument_group("pace: one of --rate and --concurrency; a trace brings its own times")
    one = pace.add_mutually_exclusive_group()
    one.add_argument(
        "--rate", type=values.rate, metavar="R", help="open loop: requests (conversations) a second, or inf"
    )
    one.add_argument(
        "--concurrency",
        type=values.count,
        metavar="C",
        help="closed loop: requests (conversations) at a time",
    )
    pace.add_argument("--arrival", choices=get_args(Arrival), help="of --rate (default: poisson)")
    pace.add_argument("--duration", type=values.positive, metavar="S", help="send no request after S seconds")

    shape = parser.add_argument_group("workload; A:B is drawn evenly, A alone is fixed")
    add = shape.add_argument
    add(
        "--requests",
        "--limit",
        dest="requests",
        type=values.count,
        metavar="N",
        help=f"requests in all; the first N of a trace (random: {DEFAULT_REQUESTS})",
    )
    add(
        "--input-tokens",
        type=values.lengths,
        metavar="A:B",
        help="of a prompt, a question, a user's turn (512)",
    )
    add("--output-tokens", type=values.lengths, metavar="A:B", help="of an answer (128)")
    add(
        "--prefix-tokens",
        type=values.lengths0,
        metavar="A:B",
        help="of a shared prefix (2048), of a conversation's system prompt (0)",
    )
    add("--groups", type=values.count, metavar="G", help="shared prefixes (8)")
    add("--prompts-per-group", type=values.count, metavar="P", help=f"({DEFAULT_PROMPTS_PER_GROUP})")
    add("--sessions", type=values.count, metavar="S", help=f"conversations ({DEFAULT_SESSIONS})")
    add("--turns", type=values.count, metavar="T", help="of a conversation (6)")
    add(
        "--think-time",
        type=values.seconds,
        metavar="A:B",
        help="seconds between an answer and the next turn (0)",
    )
    add("--time-scale", type=values.positive, metavar="X", help="of a trace: 0.5 replays twice as fast (1)")
    add(
        "--length-scale",
        type=values.positive,
        metavar="X",
        help="of a trace: 0.125 makes blocks of 64 tokens (1)",
    )
    add("--seed", type=int, default=0, help="same seed, same prompts (%(default)s)")
    add(
        "--vocab-size",
        type=values.vocab_size,
        metavar="V",
        help=f"token ids stay below V ({DEFAULT_VOCAB_SIZE}, or the server's where that is smaller)",
    )
    add("--warmup", type=values.count0, default=0, metavar="N", help="unmeasured requests before the run (0)")

    request = parser.add_argument_group("request")
    add = request.add_argument
    add(
        "--ignore-eos",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="answers are as long as asked (default: yes; an extension that vLLM and SGLang have too)",
    )
    add("--extra-body", type=values.json_object, default={}, metavar="JSON", help="fields for every request")
    add("--timeout", type=values.positive, default=600.0, metavar="S", help="for one request (%(default)g)")

    judge = parser.add_argument_group("judgement")
    add = judge.add_argument
    add(
        "--slo-ttft-ms",
        type=values.positive,
        metavar="MS",
        help="goodput counts requests within these objectives",
    )
    add("--slo-tpot-ms", type=values.positive, metavar="MS")
    add(
        "--dollars-per-hour",
        type=values.positive,
        metavar="D",
        help="of the whole deployment: tokens per dollar",
    )
    add(
        "--verify",
        action="store_true",
        help="count tokens by their logprobs and compare with usage (costs the server: not for figures)",
    )
    add(
        "--max-error-rate",
        type=values.share,
        default=0.0,
        metavar="X",
        help="exit 1 above this share (%(default)g)",
    )

    output = parser.add_argument_group("output")
    add = output.add_argument
    add("--label", default="", help="your words for the JSON: the server's version and flags")
    add("--json", type=values.output_file, metavar="FILE", help="write the report as JSON")
    add(
        "--plot",
        type=values.plot_file,
        metavar="FILE.png",
        help="draw TTFT and a timeline (needs matplotlib)",
    )
    return parser
