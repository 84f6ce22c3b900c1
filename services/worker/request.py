"""What goes into the engine and what comes out: requests, and one report a step."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

import msgspec

from services.wire.messages import Finish, Logprob, Retention, SamplingParams, Start, Stats, Tier
from services.worker.grammar import Matcher


class EngineClosed(Exception):
    """The engine takes nothing more; the message says why."""


class RequestError(ValueError):
    """The request cannot be served as it stands; the message names the field, the value and the limit."""


@dataclass(frozen=True)
class Request:
    """One prompt to continue. `key` is the caller's name for it, unique among live requests.

    `hashes` names the full blocks of `tokens` in order; `root` is the parent of block 0. Retention ranges are
    in prompt tokens, sorted and disjoint. The last `generated` tokens are the beginning of the answer, made
    by another worker: `sampling` counts them as its own.
    """

    key: Hashable
    tokens: Sequence[int]
    root: bytes
    hashes: Sequence[bytes]
    sampling: SamplingParams
    retention: tuple[Retention, ...] = ()
    priority: int = 0
    tenant: str = ""
    arrival_s: float = 0.0  # on the engine's clock
    generated: int = 0
    matcher: Matcher | None = None  # of `sampling.grammar`, where it has one: it has followed `generated`

    @property
    def prompt_length(self) -> int:
        return len(self.tokens) - self.generated


class Output(msgspec.Struct, frozen=True):
    """What one step did for one request; the fields are those of `messages.StepItem`.

    A struct, not a dataclass: one is made for every token, and a frozen dataclass costs several times more.
    """

    key: Hashable
    tokens: tuple[int, ...] = ()
    start: Start | None = None
    logprobs: tuple[Logprob, ...] = ()
    finish: Finish | None = None


@dataclass(frozen=True)
class StepReport:
    """Everything one engine step did: tokens for streams, blocks in and out of tiers, the load after it."""

    outputs: list[Output]
    stored: dict[Tier, list[bytes]] = field(default_factory=dict)
    removed: dict[Tier, list[bytes]] = field(default_factory=dict)  # apply before `stored`
    stats: Stats | None = None


#: Called on the engine's thread, once a step; must not block.
StepListener = Callable[[StepReport], None]
