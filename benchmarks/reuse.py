"""What a prefix held somewhere saves: time to first token of one long prompt, by where its KV is.

    python -m benchmarks.reuse [--model PATH] [--tokens 1500] [--repeats 3] [--json FILE]

Two workers with one thread each, two routers and a Redis, all started for the purpose, through the HTTP API.
Every repeat takes a fresh prompt: `cold` is nowhere, `gpu` in the pages of the worker that served it before,
`store` only in the shared store: the worker that computed it gets no more requests and the other one loads.
The texts must be equal.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from random import Random

import httpx

from services.cache_store.embedded import find_or_start_redis
from tests.e2e.parts import WorkerProcess, eventually, router, worker
from tests.launch.started import DEMO_MODEL

ANSWER_TOKENS = 16


def main() -> int:
    options = _parser().parse_args()
    random = Random(0)
    seconds: dict[str, list[float]] = {"cold": [], "gpu": [], "store": []}
    url, redis = find_or_start_redis(max_memory=2 << 30)
    if redis:
        url = redis.socket_url  # as `make run` does
    try:
        arguments = ("--redis", url, "--store-capacity", "1GiB")
        with (
            worker("a", options.model, *arguments) as first,
            worker("b", options.model, *arguments) as second,
            router(first) as one,
            router(second) as other,
        ):
            for base_url in (one.url, other.url):  # what is lazily loaded is loaded now
                _ask(base_url, [random.randrange(100, 30_000) for _ in range(64)])
            for _ in range(options.repeats):
                prompt = [random.randrange(100, 30_000) for _ in range(options.tokens)]
                before = _stored(first)
                cold_s, text, _ = _ask(one.url, prompt)
                gpu_s, again, hit = _ask(one.url, prompt)
                _expect(again == text and hit >= 0.9 * options.tokens, "the second answer is no GPU hit")
                eventually(lambda: _stored(first) - before >= options.tokens // 16)  # noqa: B023  same round
                store_s, again, hit = _ask(other.url, prompt)
                _expect(again == text and hit >= 0.9 * options.tokens, "the third answer is no store hit")
                for name, value in (("cold", cold_s), ("gpu", gpu_s), ("store", store_s)):
                    seconds[name].append(value)
    finally:
        if redis:
            redis.stop()
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(
        f"time to first token of {options.tokens} tokens, {options.model.stem}, median of {options.repeats}"
    )
    for name, value in medians.items():
        print(f"  {name:<6} {value * 1000:8.0f} ms   {medians['cold'] / value:5.1f} x")
    if options.json:
        options.json.write_text(json.dumps({"tokens": options.tokens, "seconds": seconds}, indent=1))
    return 0


def _ask(url: str, prompt: list[int]) -> tuple[float, str, int]:
    """Seconds to the first token, the text, and the cached tokens."""
    body = {
        "model": httpx.get(f"{url}/v1/models").json()["data"][0]["id"],
        "prompt": prompt,
        "max_tokens": ANSWER_TOKENS,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    sent_s = time.perf_counter()
    first_s, text, cached = 0.0, "", 0
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=300) as answer:
        for line in answer.iter_lines():
            if not line.startswith("data: {"):
                continue
            first_s = first_s or time.perf_counter() - sent_s
            event = json.loads(line.removeprefix("data: "))
            text += "".join(choice["text"] for choice in event["choices"])
            if event["usage"]:
                cached = event["usage"]["prompt_tokens_details"]["cached_tokens"]
    return first_s, text, cached


def _stored(process: WorkerProcess) -> float:
    return process.metric("reprise_held_blocks", tier="store")


def _expect(condition: bool, otherwise: str) -> None:
    if not condition:
        sys.exit(f"reuse: {otherwise}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else "")
    add = parser.add_argument
    add("--model", type=Path, default=DEMO_MODEL, metavar="PATH", help="(default: the demo model)")
    add("--tokens", type=int, default=1500, help="of the prompt (default %(default)s)")
    add("--repeats", type=int, default=3, help="(default %(default)s)")
    add("--json", type=Path, metavar="FILE", help="write the figures there too")
    return parser


if __name__ == "__main__":
    sys.exit(main())
