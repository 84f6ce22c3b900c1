"""The model families: what a checkpoint's config does not say because its model code does.

To add a family that this decoder can run, add a row; the key is the architecture's name in `config.json`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from services.worker.models.config import Config, ModelError


@dataclass(frozen=True)
class Family:
    """The rules of one architecture."""

    windows: Callable[[Config, int], tuple[int, ...]]  # (config, layers) -> see ModelSpec.windows
    qkv_bias: bool = False  # biases whatever the config says
    bias_option: bool = False  # `attention_bias: true` adds biases to q, k, v and o
    qk_norm: bool = False  # per-head RMS norm of q and k before the rotation
    head_dim: int | None = None  # when the config gives none; None = hidden_size / num_attention_heads


def _full(config: Config, layers: int) -> tuple[int, ...]:
    return (0,) * layers


def _every_layer(config: Config, layers: int) -> tuple[int, ...]:
    return (config.integer("sliding_window") if config.get("sliding_window") else 0,) * layers


def _upper_layers(config: Config, layers: int) -> tuple[int, ...]:
    """Qwen: windows only with `use_sliding_window`, on the layers of `layer_types` or from
    `max_window_layers` on."""
    if not config.flag("use_sliding_window"):
        return _full(config, layers)
    window = config.integer("sliding_window", 4096)
    kinds = config.get("layer_types")
    if kinds is None:
        first = min(config.integer("max_window_layers", 28, minimum=0), layers)
        kinds = ["full_attention"] * first + ["sliding_attention"] * (layers - first)
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise ModelError(f"config.layer_types must be a list of {layers}, got {kinds!r}")
    windows = {"full_attention": 0, "sliding_attention": window}
    unknown = sorted(set(kinds) - set(windows))
    if unknown:
        raise ModelError(f"config.layer_types: {unknown[0]!r} is not supported")
    return tuple(windows[kind] for kind in kinds)


FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family(windows=_full, bias_option=True),  # SmolLM2 too
    "MistralForCausalLM": Family(windows=_every_layer),
    "Qwen2ForCausalLM": Family(windows=_upper_layers, qkv_bias=True),  # Qwen2.5 too
    "Qwen3ForCausalLM": Family(windows=_upper_layers, bias_option=True, qk_norm=True, head_dim=128),
}
