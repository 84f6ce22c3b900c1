"""One request on its way: from admission to its last token."""

from __future__ import annotations

import asyncio
from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from services.router.api.errors import ApiError
from services.router.prompt import Prompt
from services.router.retry import Losses
from services.router.routing import Route
from services.wire.messages import SamplingParams, Start, StepItem

if TYPE_CHECKING:
    from services.router.workers import ServedModel, Worker


@dataclass(frozen=True, slots=True)
class Beginning:
    """Who gave a request its first token: what its client is told of, whoever goes on with it."""

    worker_name: str
    fingerprint: bytes  # of the model there: only the same one continues the answer
    route: Route
    start: Start


@dataclass(eq=False, slots=True)
class Job:
    """What the dispatcher keeps of a request. Who relays it waits for `wake`, then takes `items` and looks at
    `failure` and `client_gone`; all other fields belong to the dispatcher."""

    number: int  # rises with every request
    model: ServedModel
    text_digest: bytes  # of the tokenizer that made the prompt
    prompt: Prompt
    sampling: SamplingParams
    choices: int  # `n`
    priority: int
    tenant: str
    trace_id: str
    arrival_s: float

    # ---- for the relay
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    items: list[tuple[int, StepItem]] = field(default_factory=list)  # (choice, what a step did for it)
    failure: ApiError | None = None
    client_gone: bool = False
    began: Beginning | None = None  # comes with the first token

    # ---- for the dispatcher
    answers: dict[int, array[int]] = field(init=False)  # tokens so far of the unfinished choices
    worker: Worker | None = None
    worker_name: str = ""
    route: Route | None = None  # of the present try
    requests: dict[int, int] = field(default_factory=dict)  # unfinished choice -> number on the channel
    served: bool = False  # the present worker has given it a token
    losses: Losses = field(default_factory=Losses)
    avoid: set[int] = field(default_factory=set)  # epochs of the workers that failed it
    waiting_since_s: float = field(init=False)  # for a worker
    sent_s: float = 0.0
    heard_s: float = 0.0  # last sign of life from the worker
    token_s: float = 0.0  # when its last token came
    output_tokens: int = 0

    def __post_init__(self) -> None:
        self.answers = {choice: array("I") for choice in range(self.choices)}
        self.waiting_since_s = self.arrival_s

    @property
    def longest_answer(self) -> array[int]:
        """Of the unfinished choices, of which there must be one."""
        return max(self.answers.values(), key=len)

    def fail(self, error: ApiError) -> None:
        """End it with this error; the first one stays."""
        if self.failure is None:
            self.failure = error
        self.wake.set()
