"""Every family and rope scheme against transformers, through checkpoints that transformers saved."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from services.worker.load import load_model
from tests.worker.driver import Driver
from tests.worker.models.tiny import LLAMA3_ROPE, YARN_ROPE, logits_of, save, tiny_model

LOGIT_TOLERANCE = 1e-3
TOKENS = random.Random(1).choices(range(300), k=150)

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {}),
    "llama tied": ("LlamaForCausalLM", {"tie_word_embeddings": True}),
    "llama with biases": ("LlamaForCausalLM", {"attention_bias": True}),
    "llama with explicit head_dim": ("LlamaForCausalLM", {"head_dim": 16}),
    "llama 3 rope": ("LlamaForCausalLM", {"rope_parameters": LLAMA3_ROPE}),
    "llama linear rope": (
        "LlamaForCausalLM",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}},
    ),
    "mistral without window": ("MistralForCausalLM", {"sliding_window": None}),
    "mistral with window": ("MistralForCausalLM", {"sliding_window": 24}),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "qwen2 with yarn": ("Qwen2ForCausalLM", {"rope_parameters": YARN_ROPE}),
    "qwen2 with yarn options": (
        "Qwen2ForCausalLM",
        {"rope_parameters": YARN_ROPE | {"attention_factor": 1.3, "beta_fast": 16.0, "truncate": False}},
    ),
    "qwen2 with window on upper layers": (
        "Qwen2ForCausalLM",
        {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 16}),
    "qwen3 tied": ("Qwen3ForCausalLM", {"head_dim": 128, "tie_word_embeddings": True}),
}


@pytest.mark.parametrize("name", MODELS)
def test_logits_match_transformers(name: str, tmp_path: Path) -> None:
    architecture, config = MODELS[name]
    model = tiny_model(architecture, **config)
    driver = Driver(load_model(save(model, tmp_path)))
    expected = logits_of(model, TOKENS)
    assert (driver.logits(TOKENS, chunk=64) - expected).abs().max() <= LOGIT_TOLERANCE


@pytest.mark.parametrize("name", MODELS)
def test_64_greedy_tokens_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    architecture, config = MODELS[name]
    model = tiny_model(architecture, **config)
    generated = Driver(load_model(save(model, tmp_path))).greedy(TOKENS[:20], 64)
    # One pass instead of 64: by induction, each token is its greedy choice after the ones before it.
    logits = logits_of(model, TOKENS[:20] + generated[:-1])
    assert logits[19:].argmax(-1).tolist() == generated


def test_a_sharded_checkpoint_gives_the_same_logits_as_one_file(tmp_path: Path) -> None:
    model = tiny_model("LlamaForCausalLM")
    whole = load_model(save(model, tmp_path / "whole"))
    sharded = load_model(save(model, tmp_path / "sharded", max_shard_size="100KB"))
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert torch.equal(Driver(whole).logits(TOKENS), Driver(sharded).logits(TOKENS))


def test_a_config_in_the_form_before_transformers_5_gives_the_same_rope(tmp_path: Path) -> None:
    folder = save(tiny_model("LlamaForCausalLM", rope_parameters=LLAMA3_ROPE), tmp_path)
    new = load_model(folder).spec
    config = json.loads((folder / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope
    (folder / "config.json").write_text(json.dumps(config))
    assert load_model(folder).spec == new


def test_yarn_reaches_factor_times_the_original_context(tmp_path: Path) -> None:
    model = tiny_model("Qwen2ForCausalLM", rope_parameters=YARN_ROPE | {"factor": 16.0})
    assert load_model(save(model, tmp_path)).max_model_len == 16 * 64


def test_rows_of_a_mixed_batch_get_the_logits_they_get_alone(tmp_path: Path) -> None:
    model = load_model(save(tiny_model("Qwen3ForCausalLM", head_dim=16), tmp_path))
    alone = [Driver(model).logits(TOKENS[:length]) for length in (100, 37, 16, 1)]
    driver = Driver(model)
    lengths = {"a": 100, "b": 37, "c": 16, "d": 1}
    driver.step([(key, TOKENS[: length // 2]) for key, length in lengths.items() if length > 1])
    # Prefill chunks, a decode-sized row and a new sequence in one step.
    mixed = driver.step([(key, TOKENS[length // 2 : length]) for key, length in lengths.items()])
    for logits, expected in zip(mixed, alone, strict=True):
        torch.testing.assert_close(logits, expected[-len(logits) :], atol=1e-4, rtol=0)


def test_bfloat16_follows_float32(tmp_path: Path) -> None:
    folder = save(tiny_model("LlamaForCausalLM"), tmp_path)
    exact = Driver(load_model(folder)).logits(TOKENS)
    model = load_model(folder, dtype="bfloat16")
    assert model.decoder.dtype == model.kv_dtype == torch.bfloat16
    rounded = Driver(model).logits(TOKENS).float()
    assert torch.nn.functional.cosine_similarity(rounded, exact).min() > 0.99
