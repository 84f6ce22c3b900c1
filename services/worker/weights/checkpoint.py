"""A checkpoint as the loader sees it, and the copy of its tensors into the decoder's fused weights."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import torch

from services.wire.messages import TextAssets
from services.worker.models.config import ModelError
from services.worker.models.spec import ModelSpec
from services.worker.models.weights import Weights, allocate, named_parts

#: Tensors being read at once; each holds one unfused tensor in memory besides the weights.
MAX_READERS = 8

#: Named at most in one error message.
MAX_NAMED = 4


class Checkpoint(Protocol):
    """One model on disk. Tensor names and the config follow Hugging Face, whatever the format."""

    name: str  # the id in /v1/models unless the operator says otherwise
    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    files: list[Path]  # all weight bytes, in a fixed order
    eos_token_ids: tuple[int, ...]

    def read(self, name: str) -> torch.Tensor:
        """One tensor on the host, in whatever float dtype it is stored. Called from several threads."""

    def text(self) -> TextAssets:
        """The tokenizer and chat template."""


def load_weights(
    checkpoint: Checkpoint, spec: ModelSpec, device: torch.device | str, dtype: torch.dtype
) -> Weights:
    """The decoder's weights, every tensor read once and converted on the way.

    Raises ModelError before anything is allocated if tensors are missing, unknown or of another shape, and
    while reading if a tensor holds NaN or infinity.
    """
    expected = named_parts(spec, allocate(spec, "meta", dtype))
    _check_shapes({name: tuple(part.shape) for name, part in expected.items()}, checkpoint.shapes)
    weights = allocate(spec, device, dtype)

    def fill(item: tuple[str, torch.Tensor]) -> None:
        name, part = item
        part.copy_(checkpoint.read(name))
        # One pass, no temporary: a sum in fp32 is finite unless a value is not.
        if not part.sum(dtype=torch.float32).isfinite():
            raise ModelError(f"tensor {name} holds NaN or infinity (as {dtype})")

    with ThreadPoolExecutor(min(MAX_READERS, os.cpu_count() or 1)) as pool:
        list(pool.map(fill, named_parts(spec, weights).items()))
    return weights


def _check_shapes(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> None:
    if missing := expected.keys() - found.keys():
        raise ModelError(f"{_count(missing)} missing from the checkpoint: {_some(missing)}")
    if unknown := {name for name in found.keys() - expected.keys() if not _redundant(name)}:
        raise ModelError(
            f"{_count(unknown)} in the checkpoint that this model does not have: {_some(unknown)}"
        )
    wrong = [
        f"{name} is {list(found[name])}, must be {list(shape)}"
        for name, shape in expected.items()
        if found[name] != shape
    ]
    if wrong:
        raise ModelError(f"{_count(wrong)} of the wrong shape: {_some(wrong)}")


def _redundant(name: str) -> bool:
    """Tensors that some files carry although the config implies them: the head of a tied model (a copy of
    the embedding) and the rope frequencies that early Llama conversions stored."""
    return name == "lm_head.weight" or name.endswith(".rotary_emb.inv_freq")


def _count(names: Collection[str]) -> str:
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''}"


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    rest = len(names) - MAX_NAMED
    return ", ".join(names[:MAX_NAMED]) + (f" and {rest} more" if rest > 0 else "")
