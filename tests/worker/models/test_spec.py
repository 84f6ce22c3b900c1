from __future__ import annotations

from typing import Any

import pytest

from services.worker.models.config import ModelError
from services.worker.models.random import TINY
from services.worker.models.spec import ModelSpec

QWEN2 = dict(TINY) | {"architectures": ["Qwen2ForCausalLM"]}


def test_what_an_old_config_leaves_out_gets_the_family_defaults() -> None:
    spec = ModelSpec.from_config(
        {
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": 100,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 512,
            "rope_scaling": None,
        }
    )
    assert (spec.kv_heads, spec.head_dim, spec.norm_eps, spec.tied) == (4, 16, 1e-6, False)
    assert spec.windows == (0, 0)
    assert spec.rope.inv_freq[0] == 1.0
    assert spec.rope.inv_freq[1] == pytest.approx(10_000 ** (-2 / 16))


def test_qwen3_without_head_dim_has_128() -> None:
    config = {**TINY, "architectures": ["Qwen3ForCausalLM"], "head_dim": None}
    assert ModelSpec.from_config(config).head_dim == 128


def test_mistral_has_its_window_on_every_layer() -> None:
    config = {**TINY, "architectures": ["MistralForCausalLM"], "sliding_window": 32}
    assert ModelSpec.from_config(config).windows == (32, 32, 32)


@pytest.mark.parametrize(
    ("fields", "windows"),
    [
        ({"sliding_window": 32, "max_window_layers": 0}, (0, 0, 0)),
        ({"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 2}, (0, 0, 32)),
        ({"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 0}, (32, 32, 32)),
        ({"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 28}, (0, 0, 0)),
        (
            {
                "use_sliding_window": True,
                "sliding_window": 32,
                "layer_types": ["sliding_attention", "full_attention", "full_attention"],
            },
            (32, 0, 0),
        ),
    ],
)
def test_qwen_windows_need_the_flag_and_follow_the_layers(
    fields: dict[str, Any], windows: tuple[int, ...]
) -> None:
    assert ModelSpec.from_config(QWEN2 | fields).windows == windows


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architectures": ["MixtralForCausalLM"]}, "MixtralForCausalLM is not supported; supported: Llama"),
        ({"architectures": []}, r"architecture \(none\)"),
        ({"num_hidden_layers": None}, "config.num_hidden_layers is missing"),
        ({"hidden_size": "48"}, "config.hidden_size must be a whole number from 1 to 1073741824, got '48'"),
        ({"hidden_size": True}, "config.hidden_size"),
        ({"num_hidden_layers": 10**6}, "config.num_hidden_layers must be a whole number from 1 to 1024"),
        ({"vocab_size": 0}, "config.vocab_size"),
        ({"rms_norm_eps": -1.0}, "config.rms_norm_eps must be a number > 0"),
        ({"tie_word_embeddings": "yes"}, "config.tie_word_embeddings must be true or false"),
        ({"num_key_value_heads": 4}, "must be a multiple"),
        ({"head_dim": 15}, "head_dim must be even"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu', got 'gelu'"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quant_method 'gptq' is not supported"),
        ({"rope_scaling": {"type": "longrope"}}, "rope type 'longrope' is not supported; supported: default"),
        ({"rope_scaling": {"type": "linear"}}, "config.rope_scaling.factor is missing"),
        ({"rope_scaling": "linear"}, "config.rope_scaling must be an object"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "per layer type"),
        ({"partial_rotary_factor": 0.5}, "partial rope is not supported"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        ModelSpec.from_config({**TINY, **fields})


def test_an_unknown_layer_type_is_refused_by_name() -> None:
    kinds = ["linear_attention", "full_attention", "full_attention"]
    with pytest.raises(ModelError, match="'linear_attention' is not supported"):
        ModelSpec.from_config(QWEN2 | {"use_sliding_window": True, "layer_types": kinds})
