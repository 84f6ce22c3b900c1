"""GGUF files of every supported type and architecture, and damaged ones."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.worker.load import load_model
from services.worker.models.config import ModelError
from services.worker.models.spec import ModelSpec
from services.worker.weights.gguf import GGUFCheckpoint
from services.worker.weights.gguf_file import GGUFFile
from tests.worker.driver import Driver
from tests.worker.models.tiny import LLAMA3_ROPE, YARN_ROPE, logits_of, tiny_model
from tests.worker.weights.gguf_files import add_tokenizer, close, rounded, write_model

LOGIT_TOLERANCE = 1e-3
TOKENS = random.Random(1).choices(range(300), k=100)


def quantised(kind: Kind, rows: int, columns: int) -> np.ndarray:
    """Random bytes of `kind` [rows, bytes], fp16 scales kept small and finite."""
    values, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = np.random.default_rng(0).integers(0, 256, (rows * columns // values, size), dtype=np.uint8)
    scale = np.frombuffer(np.float16(0.01).tobytes(), dtype=np.uint8)
    for at in {Kind.Q4_K: (0, 2), Kind.Q6_K: (208,)}[kind]:
        blocks[:, at : at + 2] = scale
    return blocks.reshape(rows, -1)


@pytest.mark.parametrize(
    "kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q4_0, Kind.Q4_1, Kind.Q8_0, Kind.Q4_K, Kind.Q6_K]
)
def test_every_type_reads_as_the_gguf_package_dequantises_it(tmp_path: Path, kind: Kind) -> None:
    path = tmp_path / "types.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("before", np.arange(7, dtype=np.float32))
    if kind in (Kind.Q4_K, Kind.Q6_K):
        data = quantised(kind, 3, 512)
    else:
        data = gguf.quants.quantize(np.random.default_rng(0).normal(size=(3, 512)).astype(np.float32), kind)
    writer.add_tensor("weight", data, raw_dtype=kind)
    close(writer, path)
    file = GGUFFile(path)
    expected = torch.from_numpy(gguf.quants.dequantize(data, kind))
    assert expected.count_nonzero() > 1000
    assert file.tensors["weight"].shape == (3, 512)
    assert torch.equal(file.read("weight").float(), expected)
    assert torch.equal(file.read("before"), torch.arange(7.0))


MODELS: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {}, "llama", {}),
    "llama tied": ("LlamaForCausalLM", {"tie_word_embeddings": True}, "llama", {}),
    "llama with biases": ("LlamaForCausalLM", {"attention_bias": True}, "llama", {}),
    "llama linear rope": (
        "LlamaForCausalLM",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}},
        "llama",
        {"rope__scaling__type": "linear", "rope__scaling__factor": 4.0},
    ),
    "mistral with window": (
        "MistralForCausalLM",
        {"sliding_window": 24},
        "llama",
        {"attention__sliding_window": 24},
    ),
    "qwen2": ("Qwen2ForCausalLM", {}, "qwen2", {}),
    "qwen2 with yarn": (
        "Qwen2ForCausalLM",
        {"rope_parameters": YARN_ROPE},
        "qwen2",
        {
            "rope__scaling__type": "yarn",
            "rope__scaling__factor": 4.0,
            "rope__scaling__original_context_length": 64,
        },
    ),
    "qwen2 with yarn options": (
        "Qwen2ForCausalLM",
        {"rope_parameters": YARN_ROPE | {"attention_factor": 1.3, "beta_fast": 16.0}},
        "qwen2",
        {
            "rope__scaling__type": "yarn",
            "rope__scaling__factor": 4.0,
            "rope__scaling__original_context_length": 64,
            "rope__scaling__yarn_attn_factor": 1.3,
            "rope__scaling__yarn_beta_fast": 16.0,
        },
    ),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 16}, "qwen3", {}),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_in_gguf_has_the_logits_of_transformers(tmp_path: Path, name: str) -> None:
    architecture, config, ours, metadata = MODELS[name]
    model = tiny_model(architecture, **config)
    loaded = load_model(write_model(tmp_path / "model.gguf", model, ours, **metadata))
    assert loaded.spec.tied == model.config.tie_word_embeddings
    assert (Driver(loaded).logits(TOKENS) - logits_of(model, TOKENS)).abs().max() <= LOGIT_TOLERANCE


def test_a_quantised_model_has_the_logits_of_its_dequantised_weights(tmp_path: Path) -> None:
    shape = {"hidden_size": 96, "intermediate_size": 128, "head_dim": 16}
    model = tiny_model("LlamaForCausalLM", **shape)
    loaded = load_model(write_model(tmp_path / "model.gguf", model, "llama", kind=Kind.Q4_0))
    expected = logits_of(rounded(model, Kind.Q4_0), TOKENS)
    assert (Driver(loaded).logits(TOKENS) - expected).abs().max() <= LOGIT_TOLERANCE


def test_llama3_rope_comes_from_the_stored_divisors(tmp_path: Path) -> None:
    model = tiny_model("LlamaForCausalLM", rope_parameters=LLAMA3_ROPE)
    plain = 1.0 / 10_000.0 ** (torch.arange(0, 8, 2) / 8)
    divisors = (plain / model.model.rotary_emb.inv_freq).numpy()
    assert divisors.max() > 1
    path = write_model(tmp_path / "model.gguf", model, "llama", extra_tensors={"rope_freqs.weight": divisors})
    assert (Driver(load_model(path)).logits(TOKENS) - logits_of(model, TOKENS)).abs().max() <= LOGIT_TOLERANCE


def test_one_changed_weight_byte_is_another_fingerprint(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model.gguf", tiny_model("LlamaForCausalLM"), "llama")
    before = load_model(path).fingerprint
    data = bytearray(path.read_bytes())
    data[-1000] ^= 1
    path.write_bytes(data)
    assert load_model(path).fingerprint != before


def test_the_ends_of_turns_and_messages_stop_generation_too(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "qwen2")
    for key in ("embedding_length", "attention.head_count"):
        writer.add_uint32(f"qwen2.{key}", 4)
    add_tokenizer(writer, ["a"] * 9, types=[1] * 9, eos_token_id=7, eot_token_id=8, eom_token_id=7)
    assert GGUFCheckpoint(close(writer, path)).eos_token_ids == (7, 8)


@pytest.mark.parametrize(
    ("architecture", "metadata", "message"),
    [
        ("gemma", {}, "GGUF architecture 'gemma' is not supported; supported: llama, qwen2, qwen3"),
        ("llama", {"expert_count": 8}, "llama.expert_count: mixture of experts is not supported"),
        ("llama", {}, "llama.num_attention_heads is missing"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    tmp_path: Path, architecture: str, metadata: dict[str, int], message: str
) -> None:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        writer.add_uint32(f"{architecture}.{key}", value)
    with pytest.raises(ModelError, match=message):
        load_model(close(writer, path))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"rope__scaling__type": "longrope"}, "rope type 'longrope' is not supported"),
        (
            {"rope__scaling__type": "linear", "rope__scaling__attn_factor": 2.0},
            "attn_factor is not supported",
        ),
        ({"rope__dimension_count": 4}, "partial rope is not supported"),
    ],
)
def test_rope_that_is_not_supported_is_refused_by_name(
    tmp_path: Path, metadata: dict[str, Any], message: str
) -> None:
    path = write_model(tmp_path / "model.gguf", tiny_model("LlamaForCausalLM"), "llama", **metadata)
    with pytest.raises(ModelError, match=message):
        load_model(path)


def test_one_part_of_a_split_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model-00001-of-00002.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint16("split.count", 2)
    with pytest.raises(ModelError, match="one part of a split GGUF"):
        load_model(close(writer, path))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is not a readable GGUF file"),
        (b"PK\x03\x04" + bytes(100), "does not start with 'GGUF'"),
        (b"GGUF\x01\x00\x00\x00" + bytes(16), r"version 1 is not supported, only \(2, 3\)"),
        (b"GGUF\x03\x00\x00\x00" + b"\xff" * 16, "truncated"),
    ],
)
def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    with pytest.raises(ModelError, match=message):
        load_model(path)


def test_a_truncated_file_is_refused_naming_the_tensor(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model.gguf", tiny_model("LlamaForCausalLM"), "llama")
    data = path.read_bytes()
    path.write_bytes(data[: len(data) - 1000])
    with pytest.raises(ModelError, match=r"ends inside tensor .*truncated"):
        load_model(path)


@pytest.fixture(scope="module")
def small_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_model("LlamaForCausalLM", num_hidden_layers=1)
    return write_model(tmp_path_factory.mktemp("fuzz") / "model.gguf", model, "llama")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_header_is_refused_or_harmless(
    small_file: Path, tmp_path: Path, data: st.DataObject
) -> None:
    original = small_file.read_bytes()
    header = 2000  # metadata and tensor table
    damaged = bytearray(original)
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(4, header))] = data.draw(st.integers(0, 255))
    path = tmp_path / "damaged.gguf"
    path.write_bytes(damaged)
    try:
        checkpoint = GGUFCheckpoint(path)
        ModelSpec.from_config(checkpoint.config)
        checkpoint.text()
    except ModelError:
        pass
