"""Workloads: which prompts are sent, as data. A prompt is a row of segments; equal names mean equal tokens.

Nothing here knows a clock, a socket or a tokenizer. The same seed gives the same sessions whatever the pace,
so that two endpoints, or two rates, see the same prompts.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of `tokens` tokens that depend on `name`, the seed and the vocabulary only."""

    name: str
    tokens: int


@dataclass(frozen=True, slots=True)
class Turn:
    """One request of a session: what the user adds, the answer's length, the wait after the last answer."""

    user: tuple[Segment, ...]
    output_tokens: int
    think_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Session:
    """One or more turns, each sent with all that came before it. `start_s`: the trace's own arrival time."""

    name: str
    turns: tuple[Turn, ...]
    system: tuple[Segment, ...] = ()
    start_s: float | None = None


@dataclass(frozen=True, slots=True)
class Workload:
    """`requests`: how many the sessions hold in all, None when they never end. `longest_tokens`: of the
    longest prompt with its answer that may come."""

    sessions: Iterator[Session]
    requests: int | None
    longest_tokens: int

    def first(self, requests: int | None) -> Workload:
        """At most `requests` of it, where each session is one request."""
        if requests is None or (self.requests is not None and self.requests <= requests):
            return self
        return Workload(itertools.islice(self.sessions, requests), requests, self.longest_tokens)


@dataclass(frozen=True, slots=True)
class Range:
    """Whole numbers from `low` to `high`, both included, drawn evenly."""

    low: int
    high: int

    def draw(self, rng: Random) -> int:
        return rng.randint(self.low, self.high)


@dataclass(frozen=True, slots=True)
class Span:
    """Seconds from `low_s` to `high_s`, drawn evenly."""

    low_s: float
    high_s: float

    def draw(self, rng: Random) -> float:
        return rng.uniform(self.low_s, self.high_s)


def random_prompts(seed: int, count: int | None, input_tokens: Range, output_tokens: Range) -> Workload:
    """Prompts that share nothing: what an engine does without any reuse."""
    return _unshared("random", seed, count, input_tokens, output_tokens)


def warmup_prompts(seed: int, count: int, input_tokens: Range, output_tokens: Range) -> Workload:
    """Like `random_prompts`, of tokens that no measured prompt shares."""
    return _unshared("warmup", seed, count, input_tokens, output_tokens)


def shared_prefix(
    seed: int,
    groups: int,
    prompts_per_group: int | None,
    prefix_tokens: Range,
    input_tokens: Range,
    output_tokens: Range,
) -> Workload:
    """`groups` system prompts, each followed by `prompts_per_group` different questions, in mixed order.

    The shape of llm-d's shared-prefix benchmark. Every round visits each group once in a new order, so that
    a group's prompts are spread over the whole run.
    """
    requests = None if prompts_per_group is None else groups * prompts_per_group

    def sessions() -> Iterator[Session]:
        rng = Random(f"{seed}/shared-prefix")
        prefixes = [Segment(f"prefix/{group}", prefix_tokens.draw(rng)) for group in range(groups)]
        for round_ in _count(prompts_per_group):
            order = list(range(groups))
            rng.shuffle(order)
            for group in order:
                name = f"group/{group}/question/{round_}"
                question = Segment(name, input_tokens.draw(rng))
                yield Session(name, (Turn((question,), output_tokens.draw(rng)),), (prefixes[group],))

    return Workload(sessions(), requests, prefix_tokens.high + input_tokens.high + output_tokens.high)


def conversation(
    seed: int,
    sessions: int | None,
    turns: int,
    prefix_tokens: Range,
    input_tokens: Range,
    output_tokens: Range,
    think: Span,
) -> Workload:
    """`sessions` dialogues of `turns` turns under one system prompt; each turn repeats the whole history."""

    def dialogues() -> Iterator[Session]:
        rng = Random(f"{seed}/conversation")
        prefix = prefix_tokens.draw(rng)
        system = (Segment("system", prefix),) if prefix else ()
        for index in _count(sessions):
            name = f"session/{index}"
            said = tuple(
                Turn(
                    (Segment(f"{name}/turn/{turn}", input_tokens.draw(rng)),),
                    output_tokens.draw(rng),
                    think.draw(rng) if turn else 0.0,
                )
                for turn in range(turns)
            )
            yield Session(name, said, system)

    longest_tokens = prefix_tokens.high + turns * (input_tokens.high + output_tokens.high)
    return Workload(dialogues(), None if sessions is None else sessions * turns, longest_tokens)


def _unshared(kind: str, seed: int, count: int | None, input_tokens: Range, output_tokens: Range) -> Workload:
    def sessions() -> Iterator[Session]:
        rng = Random(f"{seed}/{kind}")
        for index in _count(count):
            name = f"{kind}/{index}"
            yield Session(name, (Turn((Segment(name, input_tokens.draw(rng)),), output_tokens.draw(rng)),))

    return Workload(sessions(), count, input_tokens.high + output_tokens.high)


def _count(count: int | None) -> Iterator[int]:
    return iter(range(count)) if count is not None else itertools.count()
