"""A few prompts and decodes before the first request: nothing is compiled or allocated later, and the
engine's rates are measured."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Ordered
from itertools import count

import numpy as np

from services.wire.messages import SamplingParams
from services.worker.check import MAX_LOGPROBS
from services.worker.commit import commit
from services.worker.counters import Counters
from services.worker.grammar import Matcher, masks
from services.worker.pages import PagePool
from services.worker.rates import Rates
from services.worker.request import Request
from services.worker.runner import Runner, Unsampled
from services.worker.scheduler import Limits, Scheduler
from services.worker.sequence import Sequence

_PROMPT_TOKENS = 256
_NEW_TOKENS = 8

#: Kernels come in variants by the number of tokens of a step: so many prompt tokens, each beside the decodes
#: of the prompts before, meet all of them. The largest step is added to these.
_CHUNKS = (1, 14, 29, 60, 100, 200, 400, 1000)

#: And by whether many short chunks come together: prompts, and tokens of each.
_SHORT_CHUNKS = (64, 40)


def warm_up(
    runner: Runner, limits: Limits, pages: int, max_model_len: int, rates: Rates, clock: Callable[[], float]
) -> None:
    """Run on books of its own, so that no page and no block name is left behind. Feeds `rates`."""
    measured = max(1, min(_PROMPT_TOKENS, max_model_len // 2))
    new_tokens = min(_NEW_TOKENS, max_model_len - measured)
    longest = min(max_model_len - new_tokens, limits.max_step_tokens, (pages - 1) * limits.block_size)
    plain = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
    if runner.on_gpu:
        most, short = _SHORT_CHUNKS
        joining = [[length] for length in (*_CHUNKS, longest)] + [[short] * min(most, limits.max_running)]
        fitting = [lengths for lengths in joining if 0 < max(lengths) <= longest]
        for sampling in (plain, _explained(new_tokens)):
            _run(fitting, sampling, runner, limits, pages, Rates(), clock)
        _run(fitting[:1], plain, runner, limits, pages, Rates(), clock, _Anything())
    else:
        _run([[measured]], plain, runner, limits, pages, Rates(), clock)  # the first run tells nothing
    _run([[measured]], plain, runner, limits, pages, rates, clock)


def _explained(new_tokens: int) -> SamplingParams:
    """Parameters that have every part of the sampler do something."""
    return SamplingParams(
        max_tokens=new_tokens,
        temperature=1.0,
        top_p=0.9,
        top_k=50,
        presence_penalty=1.0,
        logit_bias={0: 1.0},
        logprobs=MAX_LOGPROBS,
        ignore_eos=True,
    )


def _run(
    joining: Ordered[Ordered[int]],
    sampling: SamplingParams,
    runner: Runner,
    limits: Limits,
    pages: int,
    rates: Rates,
    clock: Callable[[], float],
    matcher: Matcher | None = None,
) -> None:
    """Before each step the next prompts join, of the lengths given; all follow `matcher`."""
    scheduler = Scheduler(limits, PagePool(pages))
    waiting = deque(joining)
    numbers = count()
    while True:
        for length in waiting.popleft() if waiting else ():
            number = next(numbers)
            scheduler.add(_sequence(number, [number] * length, sampling, limits.block_size, matcher))
        plan = scheduler.plan(now=0.0)
        if plan is None:
            return
        started_s = clock()
        step = runner.launch(plan)
        if isinstance(step, Unsampled):
            matchers = [sequence.matcher for sequence in plan.sampled if sequence.matcher is not None]
            step = runner.sample(step, range(len(matchers)), masks(matchers, runner.vocab))
        sampled = step.result()
        rates.observe(
            prefill_tokens=plan.prefill_tokens, decodes=len(plan.decodes), seconds=clock() - started_s
        )
        commit(scheduler, plan, sampled, 0.0, Counters())


class _Anything:
    """A grammar that allows whatever comes."""

    complete = False
    fault = ""

    def allow(self, words: np.ndarray) -> None:
        words.fill(-1)

    def accept(self, token: int) -> None:
        pass


def _sequence(
    number: int, tokens: list[int], sampling: SamplingParams, block_size: int, matcher: Matcher | None
) -> Sequence:
    return Sequence(
        Request(key=number, tokens=tokens, root=b"", hashes=[], sampling=sampling, matcher=matcher),
        block_size=block_size,
        max_length=len(tokens) + sampling.max_tokens,
        stop_ids=frozenset(),
    )
