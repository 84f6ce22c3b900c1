"""What prefix-aware routing finds again, with round robin beside it: conversations over two workers.

    python -m benchmarks.routing [--model PATH] [--turn-tokens 150] [--repeats 3] [--json FILE]

Both policies meet the same conversations, eight of six turns at once, over two fresh workers of one thread
each, by turns as often as is asked. There is no shared store: what is hit is in the pages of the worker that
was chosen. Hits and requests are counts; seconds on a machine that does other work too differ by half from
one repeat to the next, so their range is given.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import statistics
import sys
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import httpx

from services.fleet import StaticFleet
from services.router.config import RouterConfig
from services.router.router import Router
from services.router.routing import Policy, PredictedSeconds, RoundRobin
from tests.e2e.parts import SECRET, route_of, worker
from tests.fakes.until import until
from tests.launch.started import DEMO_MODEL

SESSIONS, TURNS, BLOCK_SIZE = 8, 6, 16
ANSWER_TOKENS = 4

#: Ids below this are tokens of every vocabulary, that of a byte tokenizer included.
VOCABULARY = 256


@dataclass
class Outcome:
    """Of one policy. Reusable is what a conversation has sent before, in whole blocks."""

    reusable_tokens: int = 0
    hit_tokens: int = 0
    requests: Counter[str] = field(default_factory=Counter)  # by worker
    seconds: list[float] = field(default_factory=list)  # of each request

    @property
    def hit_share(self) -> float:
        """Of the reusable tokens."""
        return self.hit_tokens / self.reusable_tokens

    @property
    def imbalance(self) -> float:
        """Requests of the busier worker over those of the other; infinite if that had none."""
        most = max(self.requests.values())
        return most / (self.requests.total() - most) if most < self.requests.total() else math.inf


async def converse(model: Path, policy: Policy, turn_tokens: int) -> Outcome:
    """All conversations at once over two fresh workers. The prompts are the same in every call."""
    outcome = Outcome()
    with ExitStack() as parts:
        workers = [parts.enter_context(worker(f"w{i}", model)) for i in range(2)]
        fleet = StaticFleet(",".join(w.channel for w in workers))
        async with (
            Router(RouterConfig(channel_secret=SECRET.encode()), fleet, policy) as router,
            httpx.AsyncClient(
                transport=httpx.ASGITransport(router), base_url="http://router", timeout=300
            ) as http,
        ):
            await until(lambda: router.pool.ready == len(workers))
            name = (await http.get("/v1/models")).json()["data"][0]["id"]
            await asyncio.gather(
                *(_converse(http, name, Random(seed), turn_tokens, outcome) for seed in range(SESSIONS))
            )
    return outcome


async def _converse(
    http: httpx.AsyncClient, model: str, random: Random, turn_tokens: int, outcome: Outcome
) -> None:
    """One conversation; the answers are no part of what is sent again."""
    history: list[int] = []
    for _ in range(TURNS):
        outcome.reusable_tokens += len(history) // BLOCK_SIZE * BLOCK_SIZE
        history += random.choices(range(VOCABULARY), k=turn_tokens)
        body = {"model": model, "prompt": history, "max_tokens": ANSWER_TOKENS, "ignore_eos": True}
        sent_s = time.perf_counter()
        answer = await http.post("/v1/completions", json=body)
        answer.raise_for_status()
        outcome.seconds.append(time.perf_counter() - sent_s)
        outcome.hit_tokens += answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
        outcome.requests[route_of(answer.headers)["worker"]] += 1


def main() -> int:
    options = _parser().parse_args()
    outcomes: dict[str, list[Outcome]] = {"reprise": [], "round robin": []}
    for repeat in range(options.repeats):
        policies: dict[str, Policy] = {
            "reprise": PredictedSeconds(Random(repeat)),
            "round robin": RoundRobin(),
        }
        for name, policy in policies.items():
            outcomes[name].append(asyncio.run(converse(options.model, policy, options.turn_tokens)))
    print(
        f"{SESSIONS} conversations of {TURNS} turns over two workers, {options.model.stem}, "
        f"least to most of {options.repeats}"
    )
    for name, found in outcomes.items():
        print(
            f"  {name:<12} hit {_range([o.hit_share * 100 for o in found], '.0f')} % of the reusable tokens, "
            f"requests 1 : {_range([o.imbalance for o in found], '.1f')}, "
            f"mean request {_range([statistics.mean(o.seconds) for o in found], '.1f')} s"
        )
    if options.json:
        figures = {name: [vars(outcome) for outcome in found] for name, found in outcomes.items()}
        options.json.write_text(json.dumps(figures, indent=1))
    return 0


def _range(values: list[float], form: str) -> str:
    return f"{min(values):{form}} to {max(values):{form}}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else "")
    add = parser.add_argument
    add("--model", type=Path, default=DEMO_MODEL, metavar="PATH", help="(default: the demo model)")
    add("--turn-tokens", type=int, default=150, help="that a turn adds to a prompt (default %(default)s)")
    add("--repeats", type=int, default=3, help="(default %(default)s)")
    add("--json", type=Path, metavar="FILE", help="write the figures there too")
    return parser


if __name__ == "__main__":
    sys.exit(main())
