"""What a KV codec costs: bytes, perplexity and time.

    python -m benchmarks.codecs [--model PATH] [--windows 16] [--threads 1] [--device cpu] [--formats]

Perplexity over passages of `pydoc_data.topics` (what Python's help() prints; the text depends a little on the
version of Python). Each block of KV goes through the codec and back as soon as it is full: a token sees the
codec's values of every block before its own chunk, and its KV is computed from them. That is more than a
worker does to a prefix, which it loads and then continues exactly. `change` is against codec none, with the
standard error of the difference; `agree` is the share of positions whose likeliest token is the same.

`--formats` adds what the codecs could have been: int8 with scales in fp32, K8V4 with a step and low for a
whole head or a quarter of one. `bytes` are those of bf16 with heads of the model's size.

Encode and decode: bytes of pages a second, pages to payloads on the same device and back, in the model's own
shape on the CPU with `--threads`; `none` is the plain copy that the others are to be compared with. With
`--device cuda` also in the shape of Llama-3.1-8B, bf16, blocks of 64 tokens.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics

import torch
from tokenizers import Tokenizer

from kernels.kv_codec import decode, encode
from kernels.kv_payload import LEAST_SCALE, Codec, KVShape
from services.worker.load import LoadedModel, load_model
from tests.launch.started import DEMO_MODEL
from tests.worker.driver import Driver

WINDOW = 512  # tokens of a passage
CHUNK = 64  # of them computed at once; then their blocks go through the codec
BLOCK_SIZE = 16

#: Numbers [..., dim] as they are after a codec.
Change = Callable[[torch.Tensor], torch.Tensor]

#: Changes the blocks in some pages of a KV cache as a codec would.
Travel = Callable[[torch.Tensor, list[int]], None]

#: Blocks that are encoded and decoded at once.
BLOCKS = 16


@dataclass(frozen=True)
class Quality:
    """Of each token that a passage predicts: the logarithm of its likelihood, negative, and the likeliest."""

    losses: torch.Tensor
    best: torch.Tensor

    @property
    def perplexity(self) -> float:
        return math.exp(self.losses.mean().item())

    def change(self, exact: Quality) -> tuple[float, float]:
        """Relative change of the perplexity, and its standard error."""
        difference = self.losses - exact.losses
        error = difference.std().item() / math.sqrt(len(difference))
        return math.expm1(difference.mean().item()), error

    def agreement(self, exact: Quality) -> float:
        return (self.best == exact.best).float().mean().item()


def passages(model: LoadedModel, windows: int) -> list[list[int]]:
    """Passages of WINDOW tokens, evenly spaced in the text."""
    text = "\n".join(topics[name] for name in sorted(topics))
    tokens = Tokenizer.from_str(model.text.tokenizer.decode()).encode(text).ids
    starts = [i * (len(tokens) - WINDOW) // max(1, windows - 1) for i in range(windows)]
    return [tokens[start : start + WINDOW] for start in starts]


def quality(model: LoadedModel, texts: Sequence[Sequence[int]], travel: Travel) -> Quality:
    """The model on `texts`, all at once, with KV that `travel` changed in its pages."""
    driver = Driver(model, pages=len(texts) * WINDOW // BLOCK_SIZE, block_size=BLOCK_SIZE, slots=len(texts))
    losses, best = [], []
    for start in range(0, WINDOW, CHUNK):
        logits = driver.step([(i, text[start : start + CHUNK]) for i, text in enumerate(texts)])
        for text, predicted in zip(texts, logits, strict=True):
            targets = torch.tensor(text[start + 1 : start + CHUNK + 1], device=predicted.device)
            predicted = predicted[: len(targets)].float()
            losses.append(torch.nn.functional.cross_entropy(predicted, targets, reduction="none").cpu())
            best.append(predicted.argmax(-1).cpu())
        full = slice(start // BLOCK_SIZE, (start + CHUNK) // BLOCK_SIZE)
        travel(driver.kv.storage, [page for i in range(len(texts)) for page in driver.pages(i)[full]])
    return Quality(torch.cat(losses), torch.cat(best))


def through(codec: Codec) -> Travel:
    """Blocks through a codec and back."""

    def travel(storage: torch.Tensor, pages: list[int]) -> None:
        decode(encode(storage, pages, codec), storage, pages, codec)

    return travel


def int8_with_fp32_scales(x: torch.Tensor) -> torch.Tensor:
    """x [..., dim] as int8 and back."""
    scale = x.abs().amax(-1, keepdim=True).clamp_min(LEAST_SCALE) / 127
    return (x / scale).round() * scale


def four_bits(x: torch.Tensor, groups: int) -> torch.Tensor:
    """x [..., dim] as four bits and back, step and low for each of `groups` parts of a head."""
    parts = x.unflatten(-1, (groups, -1))
    low = parts.amin(-1, keepdim=True).bfloat16().float()
    step = ((parts.amax(-1, keepdim=True) - low) / 15).clamp_min(LEAST_SCALE).bfloat16().float()
    codes = ((parts - low) / step).round().clamp(0, 15)
    restored: torch.Tensor = (codes * step + low).flatten(-2)
    return restored


def in_place(keys: Change, values: Change) -> Travel:
    """Blocks whose K and V are changed so."""

    def travel(storage: torch.Tensor, pages: list[int]) -> None:
        for kv, change in enumerate((keys, values)):
            storage[:, kv, pages] = change(storage[:, kv, pages].float()).to(storage.dtype)

    return travel


def rates(storage: torch.Tensor, codec: Codec, repeats: int) -> tuple[float, float]:
    """Bytes of pages a second, encoded and decoded: medians."""
    pages = list(range(0, storage.shape[2], 2))
    payloads = encode(storage, pages, codec)
    moved = storage[:, :, 0].nbytes * len(pages)

    def bytes_per_s(call: Callable[[], object]) -> float:
        call()
        seconds = []
        for _ in range(repeats):
            _wait(storage)
            started_s = time.perf_counter()
            call()
            _wait(storage)
            seconds.append(time.perf_counter() - started_s)
        return moved / statistics.median(seconds)

    return (
        bytes_per_s(lambda: encode(storage, pages, codec)),
        bytes_per_s(lambda: decode(payloads, storage, pages, codec)),
    )


def _wait(storage: torch.Tensor) -> None:
    if storage.is_cuda:
        torch.cuda.synchronize(storage.device)


def print_rates(name: str, shape: KVShape, device: str, blocks: int, repeats: int) -> None:
    storage = torch.empty(
        shape.layers, 2, 2 * blocks, shape.kv_heads, shape.tokens, shape.dim, dtype=shape.dtype, device=device
    ).normal_()
    print(f"\n{name}, {str(shape.dtype).removeprefix('torch.')}, blocks of {shape.tokens} tokens, {device}")
    print(f"{'codec':6} {'KiB a block':>11} {'bytes':>6} {'encode GB/s':>12} {'decode GB/s':>12}")
    whole = shape.payload_bytes(Codec.NONE)
    for codec in Codec:
        size = shape.payload_bytes(codec)
        encoded, decoded = rates(storage, codec, repeats)
        print(
            f"{codec:6} {size / 1024:11.0f} {size / whole:6.1%} {encoded / 1e9:12.2f} {decoded / 1e9:12.2f}",
            flush=True,
        )


def print_quality(model: LoadedModel, windows: int, formats: bool) -> None:
    texts = passages(model, windows)
    spec = model.spec
    shape = KVShape(spec.layers, spec.kv_heads, BLOCK_SIZE, spec.head_dim, torch.bfloat16)
    whole = shape.payload_bytes(Codec.NONE)
    rows = {str(codec): (shape.payload_bytes(codec) / whole, through(codec)) for codec in Codec}
    if formats:
        dim = spec.head_dim
        int8 = in_place(int8_with_fp32_scales, int8_with_fp32_scales)
        rows["int8, fp32 scales"] = (dim + 4) / (2 * dim), int8
        for groups, part in ((1, "whole"), (2, "half"), (4, "quarter")):
            size = (dim + 2 + dim // 2 + 4 * groups) / (4 * dim)
            values = partial(four_bits, groups=groups)
            rows[f"k8v4, {part} head"] = size, in_place(int8_with_fp32_scales, values)
    print(f"{model.name}, {windows} passages of {WINDOW} tokens of pydoc_data.topics")
    print(f"{'codec':18} {'bytes':>6} {'perplexity':>10} {'change':>8} {'+-':>7} {'agree':>7}")
    exact: Quality | None = None
    for name, (size, travel) in rows.items():
        found = quality(model, texts, travel)
        exact = exact or found
        change, error = found.change(exact)
        agreement = found.agreement(exact)
        print(
            f"{name:18} {size:6.1%} {found.perplexity:10.4f} {change:+8.3%} {error:7.3%} {agreement:7.2%}",
            flush=True,
        )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=DEMO_MODEL, metavar="PATH", help="(the demo model)")
    parser.add_argument("--windows", type=int, default=16, help="passages of 512 tokens (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="for encode and decode (%(default)s)")
    parser.add_argument("--repeats", type=int, default=20, help="of encode and decode (%(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--formats", action="store_true", help="compare formats that were not chosen too")
    options = parser.parse_args()
    if options.windows < 1:
        parser.error(f"--windows must be at least 1, got {options.windows}")
    model = load_model(options.model, device=options.device)
    print_quality(model, options.windows, options.formats)
    torch.set_num_threads(options.threads)
    spec = model.spec
    for dtype in (torch.float32, torch.bfloat16):
        own = KVShape(spec.layers, spec.kv_heads, BLOCK_SIZE, spec.head_dim, dtype)
        print_rates(model.name, own, "cpu", BLOCKS, options.repeats)
    if options.device != "cpu":
        llama = KVShape(layers=32, kv_heads=8, tokens=64, dim=128, dtype=torch.bfloat16)
        print_rates("Llama-3.1-8B", llama, options.device, BLOCKS, options.repeats)
    return 0


if __name__ == "__main__":
    sys.exit(main())
