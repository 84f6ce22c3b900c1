"""Small GGUF files, written by the gguf package from transformers models and tokenizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

#: transformers' tensor names -> GGUF's, by the gguf package's own table.
NAMES = {
    architecture: gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, architecture.upper()), 64)
    for architecture in ("llama", "qwen2", "qwen3")
}


def interleave(tensor: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to the rows of q and k for its "llama" architecture."""
    halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return halves.swapaxes(1, 2).reshape(tensor.shape)


def write_model(
    path: Path,
    model: Any,
    architecture: str,
    *,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    extra_tensors: dict[str, np.ndarray] | None = None,
    **metadata: Any,
) -> Path:
    """`model` (transformers) as a GGUF file: matrices as `kind`, vectors as F32; `metadata` keys with two
    underscores for a dot, in the architecture's section."""
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
    for key, value in metadata.items():
        add(writer, f"{architecture}.{key.replace('__', '.')}", value)
    add_tokenizer(writer, ["a", "b", "<s>", "</s>"], types=[1, 1, 3, 3], bos_token_id=2, eos_token_id=3)
    for name, parameter in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = parameter.float().numpy()
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            values = interleave(values, heads)
        stem, _, suffix = name.rpartition(".")
        add_tensor(writer, f"{NAMES[architecture].get_name(stem)}.{suffix}", values, kind)
    for name, values in (extra_tensors or {}).items():
        writer.add_tensor(name, values)
    return close(writer, path)


def write_tokenizer(path: Path, tokens: list[str], **fields: Any) -> Path:
    """A file with nothing but a tokenizer."""
    writer = gguf.GGUFWriter(path, "llama")
    add_tokenizer(writer, tokens, **fields)
    return close(writer, path)


def add_tokenizer(
    writer: gguf.GGUFWriter, tokens: list[str], *, types: list[int], model: str = "gpt2", **fields: Any
) -> None:
    """`fields` are tokenizer.ggml.* keys."""
    writer.add_tokenizer_model(model)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    for key, value in fields.items():
        add(writer, f"tokenizer.ggml.{key}", value)


def add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """One metadata field of the type that Python's value has."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def add_tensor(
    writer: gguf.GGUFWriter, name: str, values: np.ndarray, kind: gguf.GGMLQuantizationType
) -> None:
    if values.ndim == 1:
        writer.add_tensor(name, values.astype(np.float32))
    else:
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)


def close(writer: gguf.GGUFWriter, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def rounded(model: Any, kind: gguf.GGMLQuantizationType) -> Any:
    """`model` with its matrices as they come back from `kind`, in place."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                data = gguf.quants.quantize(parameter.numpy(), kind)
                parameter.copy_(torch.from_numpy(gguf.quants.dequantize(data, kind)))
    return model
