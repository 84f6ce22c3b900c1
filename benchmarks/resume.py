"""Whether an answer goes on with the same tokens on another engine: how often, and how far.

    python -m benchmarks.resume [MODEL] [--answers 16] [--tokens 128] [--device cpu] [--dtype float32]

Resuming computes at once, as a prompt, what was decoded token by token: sums are taken in another order, so
logits differ in their last bits, and where two tokens are as good as equal another one may be chosen. The
random numbers, penalties and limits are the same; so once the text differs, only rounding made it so.

Answers to passages of `pydoc_data.topics`, all at once, greedy and sampled, then every one of them resumed
after each eighth, its KV computed anew. `same` resumes gave exactly the undisturbed rest;
`parted` counts those that did not by where they parted. MODEL is what a worker takes (default: the demo
model, which takes some minutes).
"""

from __future__ import annotations

import argparse
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import msgspec
from tokenizers import Tokenizer

from services.wire.hashes import chain_hashes, pack_tokens, root_hash
from services.wire.messages import SamplingParams
from services.worker.config import EngineConfig
from services.worker.engine import Engine
from services.worker.load import LoadedModel, load_model
from services.worker.request import Request, StepReport
from tests.launch.started import DEMO_MODEL

PROMPT_TOKENS = 64
EIGHTHS = 8
WAYS = {
    "greedy": SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True),
    "sampled": SamplingParams(max_tokens=1, temperature=1.0, ignore_eos=True),
    "sampled, top_p 0.9": SamplingParams(max_tokens=1, temperature=0.8, top_p=0.9, ignore_eos=True),
    "greedy, penalties": SamplingParams(
        max_tokens=1, temperature=0.0, presence_penalty=0.5, frequency_penalty=0.5, ignore_eos=True
    ),
}


class Answers:
    """One engine, and what it made of the requests that it was given."""

    def __init__(self, model: LoadedModel, config: EngineConfig) -> None:
        self._engine = Engine(model, config)
        self._fingerprint = model.fingerprint
        self._block_size = config.block_size
        self._tokens: dict[Any, list[int]] = {}
        self._left = 0
        self._done = threading.Event()
        self._engine.warm_up()
        self._engine.start(self._listen)

    def to(self, requests: Mapping[Any, tuple[list[int], int, SamplingParams]]) -> dict[Any, list[int]]:
        """The tokens that follow (tokens, generated ones among them, sampling), by key. Each key has blocks
        of its own."""
        self._tokens = {key: [] for key in requests}
        self._left = len(requests)
        self._done.clear()
        for key, (tokens, generated, sampling) in requests.items():
            root = root_hash(self._fingerprint, repr(key).encode())
            hashes = chain_hashes(root, pack_tokens(tokens), self._block_size)
            self._engine.submit(Request(key, tokens, root, hashes, sampling, generated=generated))
        self._done.wait()
        return self._tokens

    def close(self) -> None:
        self._engine.stop()

    def _listen(self, report: StepReport) -> None:
        for output in report.outputs:
            self._tokens[output.key] += output.tokens
            if output.finish is not None:
                if output.finish.reason != "length":
                    sys.exit(f"resume: a request ended with {output.finish}")
                self._left -= 1
        if report.outputs and not self._left:
            self._done.set()


def main() -> int:
    options = _parser().parse_args()
    model = load_model(options.model, device=options.device, dtype=options.dtype)
    config = EngineConfig.for_device(options.device, max_running=options.answers, kv_bytes=1 << 30)
    engine = Answers(model, config)
    prompts = _passages(model, options.answers)
    size = f"{options.answers} answers of {options.tokens} tokens"
    print(f"{model.name}, {model.kv_dtype}, {size} on {options.device}")
    print(f"{'':<20} {'resumes':>8} {'same':>6} {'parted':>7}  tokens after the cut until they parted")
    for way, sampling in WAYS.items():
        parted, same = _resumes(engine, prompts, sampling, options.tokens, way)
        where = " ".join(map(str, sorted(parted)))
        print(f"{way:<20} {same + len(parted):>8} {same:>6} {len(parted):>7}  {where}")
    engine.close()
    return 0


def _resumes(
    engine: Answers, prompts: list[list[int]], like: SamplingParams, tokens: int, way: str
) -> tuple[list[int], int]:
    """How many tokens after its cut each resume parted that did, and how many did not."""
    samplings = [msgspec.structs.replace(like, max_tokens=tokens, seed=seed) for seed in range(len(prompts))]
    whole = engine.to({(way, i): (prompt, 0, samplings[i]) for i, prompt in enumerate(prompts)})
    parted: list[int] = []
    same = 0
    for cut in range(tokens // EIGHTHS, tokens, tokens // EIGHTHS):
        rests = engine.to(
            {
                (way, i, cut): (prompt + whole[way, i][:cut], cut, samplings[i])
                for i, prompt in enumerate(prompts)
            }
        )
        for (_, i, _), rest in rests.items():
            pairs = zip(rest, whole[way, i][cut:], strict=True)
            at = next((place for place, (left, right) in enumerate(pairs) if left != right), None)
            same += at is None
            parted += [] if at is None else [at]
    return parted, same


def _passages(model: LoadedModel, count: int) -> list[list[int]]:
    text = "\n".join(topics[name] for name in sorted(topics))
    tokens = Tokenizer.from_str(model.text.tokenizer.decode()).encode(text).ids
    starts = [i * (len(tokens) - PROMPT_TOKENS) // max(1, count - 1) for i in range(count)]
    return [tokens[start : start + PROMPT_TOKENS] for start in starts]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else "")
    add = parser.add_argument
    add("model", nargs="?", type=Path, default=DEMO_MODEL, metavar="MODEL", help="(default: the demo model)")
    add("--answers", type=int, default=16, help="(default %(default)s)")
    add("--tokens", type=int, default=128, help="of an answer (default %(default)s)")
    add("--device", default="cpu", help="(default %(default)s)")
    add("--dtype", help="by default float32 on the CPU, the model's own elsewhere")
    return parser


if __name__ == "__main__":
    sys.exit(main())
