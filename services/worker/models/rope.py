"""Rotary position embedding: every scaling scheme comes down to D/2 frequencies and one factor.

A token at position p turns the pair (i, i + D/2) of q and k by p * inv_freq[i]. Context-extension schemes
change the frequencies; yarn also scales the cosines and sines. So a config is resolved once, at load, and
neither the kernels nor the fingerprint need to know the schemes.

Sources: RoFormer (arXiv 2104.09864); linear: Position Interpolation (arXiv 2306.15595); yarn
(arXiv 2309.00071); llama3: the Llama 3.1 model code.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from services.worker.models.config import Config, ModelError


@dataclass(frozen=True)
class Rope:
    """`inv_freq`: D/2 angles per position, in radians, exactly representable in fp32."""

    inv_freq: tuple[float, ...]
    attention_factor: float = 1.0  # multiplies cosines and sines
    max_position: int = 0  # positions that the scaling reaches; 0 = what the config says

    def table(self, positions: int, device: torch.device | str) -> torch.Tensor:
        """cos_sin [positions, D] fp32: cosines in the first half of a row, sines in the second."""
        inv_freq = torch.tensor(self.inv_freq, dtype=torch.float32, device=device)
        angles = torch.arange(positions, dtype=torch.float32, device=device)[:, None] * inv_freq
        return torch.cat((angles.cos(), angles.sin()), dim=-1) * self.attention_factor


def rope_from_config(config: Config, head_dim: int) -> Rope:
    """Resolve `rope_parameters` (transformers 5) or `rope_theta` + `rope_scaling` (before).

    Raises ModelError for an unknown rope type, partial rotation and per-layer-type parameters.
    """
    section = config.section("rope_parameters" if config.get("rope_parameters") else "rope_scaling")
    if any(isinstance(value, dict) for value in section.fields.values()):
        raise ModelError(f"{section.where}: rope parameters per layer type are not supported")
    for source in (config, section):
        if source.number("partial_rotary_factor", 1.0) != 1.0:
            raise ModelError(f"{source.where}.partial_rotary_factor must be 1, partial rope is not supported")
    theta = section.number("rope_theta", config.number("rope_theta", 10_000.0))
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    inv_freq = 1.0 / theta**exponent

    kind = section.get("rope_type") or section.get("type") or "default"
    if kind not in _SCALINGS:
        raise ModelError(
            f"{section.where}: rope type {kind!r} is not supported; supported: {', '.join(sorted(_SCALINGS))}"
        )
    return _SCALINGS[kind](inv_freq, _Scaling(section, config, theta))


@dataclass(frozen=True)
class _Scaling:
    """What the schemes read."""

    section: Config
    config: Config
    theta: float

    def original_positions(self) -> int:
        """Context length before the extension, wherever the checkpoint says it."""
        name = "original_max_position_embeddings"
        inner = self.section.integer(name, self.config.integer("max_position_embeddings"))
        return self.config.integer(name, inner)


def _rope(inv_freq: torch.Tensor, attention_factor: float = 1.0, max_position: int = 0) -> Rope:
    return Rope(tuple(inv_freq.tolist()), attention_factor, max_position)


def _default(inv_freq: torch.Tensor, scaling: _Scaling) -> Rope:
    return _rope(inv_freq)


def _linear(inv_freq: torch.Tensor, scaling: _Scaling) -> Rope:
    return _rope(inv_freq / scaling.section.number("factor"))


def _llama3(inv_freq: torch.Tensor, scaling: _Scaling) -> Rope:
    """Slow dimensions (few turns over the original context) are stretched, fast ones kept, ramp between."""
    section = scaling.section
    low, high = section.number("low_freq_factor"), section.number("high_freq_factor")
    turns = scaling.original_positions() * inv_freq / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return _rope((1 - kept) * inv_freq / section.number("factor") + kept * inv_freq)


def _yarn(inv_freq: torch.Tensor, scaling: _Scaling) -> Rope:
    """A ramp over dimensions between those that turn `beta_fast` and `beta_slow` times."""
    section = scaling.section
    original = scaling.original_positions()
    factor = section.number("factor", scaling.config.integer("max_position_embeddings") / original)
    dim = 2 * len(inv_freq)

    def dimension(turns: float) -> float:
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(scaling.theta))

    low, high = dimension(section.number("beta_fast", 32.0)), dimension(section.number("beta_slow", 1.0))
    if section.flag("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    stretched = ((torch.arange(dim // 2) - low) / max(high - low, 0.001)).clamp(0, 1)
    scaled = inv_freq / factor * stretched + inv_freq * (1 - stretched)
    return _rope(scaled, _yarn_attention_factor(section, factor), max_position=round(original * factor))


def _yarn_attention_factor(section: Config, factor: float) -> float:
    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if section.get("attention_factor") is not None:
        return section.number("attention_factor")
    if section.get("mscale") and section.get("mscale_all_dim"):
        return mscale(section.number("mscale")) / mscale(section.number("mscale_all_dim"))
    return mscale(1.0)


def _divisors(inv_freq: torch.Tensor, scaling: _Scaling) -> Rope:
    """GGUF's form of llama3 scaling: the converter stored one divisor per frequency (`rope_freqs.weight`)."""
    divisors = scaling.section.get("divisors")
    if len(divisors) != len(inv_freq):
        raise ModelError(f"rope_freqs.weight must have {len(inv_freq)} values, got {len(divisors)}")
    return _rope(inv_freq / torch.tensor(divisors, dtype=torch.float32))


_SCALINGS: dict[str, Callable[[torch.Tensor, _Scaling], Rope]] = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "divisors": _divisors,
}
