"""One prompt and a few decodes before the first request: nothing is compiled or allocated later, and the
engine's rates are measured."""

from __future__ import annotations

from collections.abc import Callable

from services.wire.messages import SamplingParams
from services.worker.commit import commit
from services.worker.counters import Counters
from services.worker.pages import PagePool
from services.worker.rates import Rates
from services.worker.request import Request
from services.worker.runner import Runner
from services.worker.scheduler import Limits, Scheduler
from services.worker.sequence import Sequence

_PROMPT_TOKENS = 256
_NEW_TOKENS = 8


def warm_up(
    runner: Runner, limits: Limits, pages: int, max_model_len: int, rates: Rates, clock: Callable[[], float]
) -> None:
    """Run on books of its own, so that no page and no block name is left behind. Feeds `rates`."""
    prompt = [0] * max(1, min(_PROMPT_TOKENS, max_model_len // 2))
    sampling = SamplingParams(max_tokens=min(_NEW_TOKENS, max_model_len - len(prompt)), temperature=0.0)
    request = Request(key=None, tokens=prompt, root=b"", hashes=[], sampling=sampling)
    _run(request, runner, Scheduler(limits, PagePool(pages)), Rates(), clock)  # the first run tells nothing
    _run(request, runner, Scheduler(limits, PagePool(pages)), rates, clock)


def _run(
    request: Request, runner: Runner, scheduler: Scheduler, rates: Rates, clock: Callable[[], float]
) -> None:
    scheduler.add(
        Sequence(
            request,
            block_size=scheduler.limits.block_size,
            max_length=len(request.tokens) + request.sampling.max_tokens,
            stop_ids=frozenset(),
        )
    )
    while (plan := scheduler.plan(now=0.0)) is not None:
        started_s = clock()
        sampled = runner.launch(plan).result()
        rates.observe(
            prefill_tokens=plan.prefill_tokens, decodes=len(plan.decodes), seconds=clock() - started_s
        )
        commit(scheduler, plan, sampled, 0.0, Counters())
