"""What was seen of one request: sent, timed and judged."""

from __future__ import annotations

import asyncio
import time
from array import array
from dataclasses import dataclass, field
from typing import Literal

from .http import BadAnswer, ConnectionFailed, HttpClient
from .prompts import Prepared
from .stream import AnswerStream, Usage, one_line

#: `shed`: the server said 429. `disconnected`: no connection, or it broke before the answer's end.
#: `cancelled`: we hung up (Ctrl-C). `error`: everything else that is not a complete, correct answer.
Outcome = Literal["ok", "error", "shed", "disconnected", "cancelled"]

ROUTE_HEADER = "x-reprise-route"

#: Reasons that end a good answer in the OpenAI API; servers report failures as other ones ("abort", "error").
GOOD_FINISH = frozenset({"stop", "length", "tool_calls", "function_call", "content_filter"})


@dataclass(slots=True)
class Record:
    """Times are `time.perf_counter` seconds. Latencies count from `due_s`, when the request should have
    been sent: a request that waits because the generator or the server was slow has waited all the same.
    """

    session: str
    turn: int
    due_s: float
    sent_s: float
    end_s: float = 0.0
    outcome: Outcome = "cancelled"
    error: str = ""
    status: int = 0
    first_s: float | None = None
    last_s: float | None = None
    times_s: array[float] = field(default_factory=lambda: array("d"))  # of each chunk that bore tokens
    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int | None = None  # prefix hits by the server's usage; None: not told
    has_usage: bool = False
    finish_reason: str | None = None
    route: dict[str, str] = field(default_factory=dict)
    text: str = ""

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_s is None else self.first_s - self.due_s

    @property
    def tpot_s(self) -> float | None:
        """Seconds per output token after the first."""
        if self.first_s is None or self.last_s is None or self.output_tokens < 2:
            return None
        return (self.last_s - self.first_s) / (self.output_tokens - 1)

    @property
    def e2e_s(self) -> float:
        return self.end_s - self.due_s


@dataclass(frozen=True, slots=True)
class Sender:
    """Sends prepared requests and judges the answers. `verify`: usage must agree with what was counted."""

    client: HttpClient
    path: str
    timeout_s: float
    verify: bool = False
    keep_text: bool = False

    async def send(self, record: Record, prepared: Prepared) -> None:
        """Fill in `record`. Never raises but for cancellation, which it records."""
        answer = AnswerStream()
        record.sent_s = time.perf_counter()
        try:
            async with asyncio.timeout(self.timeout_s):
                await self.client.exchange("POST", self.path, prepared.body, answer)
            record.outcome, record.error = self._judge(answer, prepared)
        except ConnectionFailed as error:
            if answer.complete or answer.error is not None:  # said all there was to say before it broke
                record.outcome, record.error = self._judge(answer, prepared)
            else:
                record.outcome, record.error = "disconnected", str(error)
        except BadAnswer as error:
            record.outcome, record.error = "error", str(error)
        except TimeoutError:
            record.outcome, record.error = "error", f"timeout: no end after {self.timeout_s:g} s"
        finally:
            record.end_s = time.perf_counter()
            self._fill(record, answer, prepared)

    def _fill(self, record: Record, answer: AnswerStream, prepared: Prepared) -> None:
        record.status = answer.status
        record.times_s = answer.times_s
        record.first_s = answer.first_s()
        record.last_s = answer.last_s()
        record.finish_reason = answer.finish_reason
        record.route = parse_route(answer.headers.get(ROUTE_HEADER, ""))
        if self.keep_text:
            record.text = "".join(answer.text)
        if answer.usage is not None:
            record.has_usage = True
            record.input_tokens = answer.usage.prompt_tokens
            record.output_tokens = answer.usage.completion_tokens
            record.cached_tokens = answer.usage.cached_tokens
        else:
            record.input_tokens = prepared.prompt_tokens or 0
            record.output_tokens = len(answer.times_s)

    def _judge(self, answer: AnswerStream, prepared: Prepared) -> tuple[Outcome, str]:
        if answer.status == 429:
            return "shed", f"HTTP 429: {answer.refusal()}"
        if answer.status != 200:
            return "error", f"HTTP {answer.status}: {answer.refusal()}"
        if answer.error is not None:
            return "error", f"error in the stream: {answer.error}"
        if not answer.complete:
            kind = answer.headers.get("content-type", "no content type")
            return "error", f"the stream ({one_line(kind)}) ended without [DONE]"
        if answer.finish_reason is None:
            return "error", "the stream ended without a finish_reason"
        if answer.finish_reason not in GOOD_FINISH:
            return "error", f"finish_reason {one_line(answer.finish_reason)!r}"
        if self.verify:
            mismatch = _mismatch(answer, prepared)
            if mismatch:
                return "error", f"verify: {mismatch}"
        return "ok", ""


def parse_route(header: str) -> dict[str, str]:
    """`worker=w0; hit_gpu=64; …` as a dict; parts that are not `name=value` are left out."""
    pairs = (part.split("=", 1) for part in header.split(";") if "=" in part)
    return {name.strip(): value.strip() for name, value in pairs}


def _mismatch(answer: AnswerStream, prepared: Prepared) -> str | None:
    """How the usage contradicts the request or the tokens in the stream, if it does."""
    usage: Usage | None = answer.usage
    if usage is None:
        return "the stream has no usage"
    if prepared.prompt_tokens is not None and usage.prompt_tokens != prepared.prompt_tokens:
        return f"usage says {usage.prompt_tokens} prompt tokens, {prepared.prompt_tokens} were sent"
    # The token that stops an answer has no text: servers differ in whether they count it.
    stop = 1 if answer.finish_reason == "stop" else 0
    if abs(usage.completion_tokens - answer.counted_tokens) > stop:
        return f"usage says {usage.completion_tokens} completion tokens, {answer.counted_tokens} were counted"
    if answer.finish_reason == "length" and usage.completion_tokens != prepared.max_tokens:
        return (
            f"stopped for length after {usage.completion_tokens} tokens, max_tokens is {prepared.max_tokens}"
        )
    return None
