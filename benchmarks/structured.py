"""What structured output costs: a grammar's masks alone, and ms a token of an engine whose rows follow one.

    python -m benchmarks.structured [MODEL] [--device cuda] [--streams 1 8 32] [--tokens 64]

MODEL is a checkpoint with a tokenizer, by default the demo model.

Masks: microseconds to compile a grammar the first time, for the mask of the next token (mean, 99th
percentile) and to take a token in, along a document of some hundred tokens. Engine: (time of N tokens out -
time of 1 token out) / (N - 1), greedy and without an end, of rows that are free, that all follow a regular
expression, and of which one does; three repeats in turn, the best of each. Late kernels must be 0.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np

from benchmarks.engine import Offline
from services.router.answer.form import Body, answer_grammar, json_body, regex_body
from services.worker.config import EngineConfig
from services.worker.engine import Engine
from services.worker.grammar import Grammars
from services.worker.load import LoadedModel, load_model
from services.worker.request import Request

DEMO_MODEL = Path(__file__).parents[1] / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"

SCHEMA = {
    "type": "object",
    "properties": {
        "people": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "name": {"type": "string"},
                    "age": {"type": "integer", "minimum": 0, "maximum": 150},
                    "colour": {"enum": ["red", "green", "blue"]},
                },
                "required": ["name", "age", "colour"],
                "additionalProperties": False,
            },
        }
    },
    "required": ["people"],
    "additionalProperties": False,
}
PEOPLE = [{"name": f"Person number {i}", "age": 7 * i, "colour": "green"} for i in range(12)]
TEXT = "the quick brown fox jumps over the lazy dog " * 8
CASES: dict[str, tuple[Body, str]] = {
    "any JSON object": (json_body({"type": "object"}, strict=True), json.dumps({"people": PEOPLE})),
    "JSON schema": (json_body(SCHEMA, strict=True), json.dumps({"people": PEOPLE})),
    "words": (regex_body("([a-z]+ )+"), TEXT),
}

#: Never whole, and nearly everything is allowed.
ENDLESS = r"(.|\n){100000}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", default=DEMO_MODEL)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=64, help="out, more than 1 (default %(default)s)")
    options = parser.parse_args()
    model = load_model(options.model, device=options.device)
    grammars = Grammars(model.text.tokenizer, model.spec.vocab_size, model.eos_token_ids)
    for name, (body, text) in CASES.items():
        print(f"{name}: {_masks(model, grammars, answer_grammar([body], 'none', {}), text)}")
    _engine(model, grammars, options.device, options.streams, options.tokens)


def _masks(model: LoadedModel, grammars: Grammars, grammar: str, text: str) -> str:
    from tokenizers import Tokenizer

    tokens = Tokenizer.from_str(model.text.tokenizer.decode()).encode(text, add_special_tokens=False).ids
    words = np.zeros(-(-model.spec.vocab_size // 32), dtype=np.int32)
    started_s = time.perf_counter()
    matcher = grammars.matcher(grammar)
    compile_us = (time.perf_counter() - started_s) * 1e6
    allow_us, accept_us = [], []
    for token in tokens:
        allow_us.append(_microseconds(lambda: matcher.allow(words)))
        accept_us.append(_microseconds(lambda token=token: matcher.accept(token)))  # type: ignore[misc]
    if matcher.fault:
        sys.exit(f"the document does not follow its grammar: {matcher.fault}")
    mask = f"{np.mean(allow_us):.0f} us, p99 {np.percentile(allow_us, 99):.0f} us"
    accept = f"{np.mean(accept_us):.1f} us"
    return f"compile {compile_us:.0f} us; mask {mask}; accept {accept} ({len(tokens)} tokens)"


def _microseconds(work: Callable[[], None]) -> float:
    started_s = time.perf_counter()
    work()
    return (time.perf_counter() - started_s) * 1e6


class _Constrained(Offline):
    """Of the requests that it makes, the first `constrained` of a run follow the grammar."""

    def __init__(self, engine: Engine, model: LoadedModel, block_size: int, grammars: Grammars) -> None:
        self.constrained = 0
        self._grammars = grammars
        self._grammar = answer_grammar([regex_body(ENDLESS)], "none", {})
        self._made = 0
        super().__init__(engine, model, block_size)

    def run_rows(self, rows: int, constrained: int, tokens: int) -> float:
        """Seconds a token."""
        rng = random.Random(0)
        seconds = []
        for length in (1, tokens):
            self._made, self.constrained = 0, constrained
            prompts = [[rng.randrange(1000, 40_000) for _ in range(32)] for _ in range(rows)]
            seconds.append(self.run(prompts, [length] * rows))
        return (seconds[1] - seconds[0]) / (tokens - 1)

    def _request(self, prompt: list[int], length: int) -> Request:
        request = super()._request(prompt, length)
        self._made += 1
        if self._made > self.constrained:
            return request
        sampling = msgspec.structs.replace(request.sampling, grammar=self._grammar)
        return replace(request, sampling=sampling, matcher=self._grammars.matcher(self._grammar))


def _engine(model: LoadedModel, grammars: Grammars, device: str, streams: list[int], tokens: int) -> None:
    config = EngineConfig.for_device(device, max_running=max(16, *streams), max_step_tokens=8192)
    engine = Engine(model, config)
    engine.warm_up()
    offline = _Constrained(engine, model, config.block_size, grammars)
    for rows in streams:
        ways = {"free": 0, "one follows a grammar": 1, "all do": rows}
        for constrained in ways.values():
            offline.run_rows(rows, constrained, 8)  # captures graphs
        best = dict.fromkeys(ways, float("inf"))
        for _ in range(3):
            for way, constrained in ways.items():
                best[way] = min(best[way], offline.run_rows(rows, constrained, tokens))
        figures = ", ".join(f"{way} {seconds * 1e3:.2f}" for way, seconds in best.items())
        print(f"{rows} streams, ms a token: {figures}")
    late, failed = engine.counters.late_kernels, engine.counters.failed_steps
    engine.stop()
    print(f"late kernels {late}, failed steps {failed}")


if __name__ == "__main__":
    main()
