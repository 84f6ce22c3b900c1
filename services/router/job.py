"""One request on its way: from admission to its last token."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from services.router.api.errors import ApiError
from services.router.prompt import Prompt
from services.router.routing import Route
from services.wire.messages import SamplingParams, Start, StepItem

if TYPE_CHECKING:
    from services.router.workers import ServedModel, Worker


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
    route: Route | None = None  # of the present try
    start: Start | None = None  # comes with the first token

    # ---- for the dispatcher
    worker: Worker | None = None
    worker_name: str = ""
    requests: dict[int, int] = field(default_factory=dict)  # choice -> number on the channel, unfinished ones
    tries: int = 0
    avoid: set[int] = field(default_factory=set)  # workers that failed it
    sent_s: float = 0.0
    heard_s: float = 0.0  # last sign of life from the worker
    output_tokens: int = 0

    def fail(self, error: ApiError) -> None:
        """End it with this error; the first one stays."""
        if self.failure is None:
            self.failure = error
        self.wake.set()
