"""GGUF checkpoints: llama.cpp's names and conventions turned into Hugging Face's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from services.wire.messages import TextAssets
from services.worker.models.config import Config, ModelError
from services.worker.weights.gguf_file import GGUFFile
from services.worker.weights.gguf_tokenizer import text_assets_from_metadata

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}

#: config.json field -> metadata key after the architecture's name.
FIELDS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "max_position_embeddings": "context_length",
    "sliding_window": "attention.sliding_window",
}

MODEL_TENSORS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

#: Not a weight: llama3 rope scaling, stored as a divisor per frequency.
ROPE_DIVISORS = "rope_freqs.weight"


class GGUFCheckpoint:
    """One GGUF file. Raises ModelError if it is damaged, split, or of an architecture not supported."""

    def __init__(self, path: Path) -> None:
        self.name = path.stem
        self.files = [path]
        self._file = GGUFFile(path)
        metadata = self._file.metadata
        if metadata.get("split.count", 1) > 1:
            raise ModelError(f"{path.name} is one part of a split GGUF; merge it with llama-gguf-split first")
        self._gguf_names = {
            _checkpoint_name(name): name for name in self._file.tensors if name != ROPE_DIVISORS
        }
        self.shapes: Mapping[str, tuple[int, ...]] = {
            ours: self._file.tensors[theirs].shape for ours, theirs in self._gguf_names.items()
        }
        self.config: Mapping[str, Any] = self._config()
        # eot ends a turn, eom a turn that expects a tool's answer: generation stops at each.
        ends = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
        self.eos_token_ids = tuple(dict.fromkeys(end for end in ends if end is not None))

    def read(self, name: str) -> torch.Tensor:
        """One tensor, dequantised to fp32 unless it is stored as floats."""
        tensor = self._file.read(self._gguf_names[name])
        if self._permuted and name.split(".")[-2] in ("q_proj", "k_proj"):
            heads = self.config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
            tensor = _halves(tensor, heads)
        return tensor

    def text(self) -> TextAssets:
        """Built from the tokenizer and chat template inside the file."""
        return text_assets_from_metadata(self._file.metadata)

    @property
    def _permuted(self) -> bool:
        """llama.cpp rotates neighbouring pairs for its "llama" architecture, and its converter reordered
        the rows of q and k to suit."""
        return bool(self._file.metadata["general.architecture"] == "llama")

    def _config(self) -> dict[str, Any]:
        metadata = self._file.metadata
        architecture = metadata.get("general.architecture")
        if architecture not in ARCHITECTURES:
            raise ModelError(
                f"GGUF architecture {architecture!r} is not supported; supported: {', '.join(ARCHITECTURES)}"
            )
        if metadata.get(f"{architecture}.expert_count"):
            raise ModelError(f"{architecture}.expert_count: mixture of experts is not supported")
        config = {field: metadata.get(f"{architecture}.{key}") for field, key in FIELDS.items()}
        fields = Config(config, architecture)
        heads, hidden_size = fields.integer("num_attention_heads"), fields.integer("hidden_size")
        head_dim = fields.integer("head_dim", hidden_size // heads)
        config["num_key_value_heads"] = fields.integer("num_key_value_heads", heads)
        embedding = self.shapes.get("model.embed_tokens.weight")
        return config | {
            "architectures": [
                # Files of both are "llama"; only Mistral's models have windows.
                "MistralForCausalLM"
                if architecture == "llama" and config["sliding_window"]
                else ARCHITECTURES[architecture]
            ],
            "head_dim": head_dim,
            "vocab_size": embedding[0] if embedding else None,
            "tie_word_embeddings": "lm_head.weight" not in self.shapes,
            "attention_bias": "model.layers.0.self_attn.q_proj.bias" in self.shapes,
            "use_sliding_window": config["sliding_window"] is not None,
            "rope_parameters": self._rope(architecture, head_dim),
        }

    def _rope(self, architecture: str, head_dim: int) -> dict[str, Any]:
        metadata, prefix = self._file.metadata, f"{architecture}.rope."
        rope: dict[str, Any] = {
            "rope_theta": metadata.get(prefix + "freq_base", 10_000.0),
            "partial_rotary_factor": metadata.get(prefix + "dimension_count", head_dim) / head_dim,
        }
        if ROPE_DIVISORS in self._file.tensors:
            return rope | {"rope_type": "divisors", "divisors": self._file.read(ROPE_DIVISORS).tolist()}
        kind = metadata.get(prefix + "scaling.type", "none")
        if kind == "none":
            return rope
        if metadata.get(prefix + "scaling.attn_factor", 1.0) != 1.0:
            raise ModelError(f"{prefix}scaling.attn_factor is not supported")
        return rope | {
            "rope_type": kind,
            "factor": metadata.get(prefix + "scaling.factor"),
            "original_max_position_embeddings": metadata.get(prefix + "scaling.original_context_length"),
            "attention_factor": metadata.get(prefix + "scaling.yarn_attn_factor"),
            "beta_fast": metadata.get(prefix + "scaling.yarn_beta_fast"),
            "beta_slow": metadata.get(prefix + "scaling.yarn_beta_slow"),
        }


def _checkpoint_name(name: str) -> str:
    """Hugging Face's name of a GGUF tensor; names unknown here stay as they are and are refused later."""
    stem, _, kind = name.rpartition(".")
    if stem in MODEL_TENSORS:
        return f"{MODEL_TENSORS[stem]}.{kind}"
    parts = stem.split(".")
    if len(parts) == 3 and parts[0] == "blk" and parts[2] in LAYER_TENSORS:
        return f"model.layers.{parts[1]}.{LAYER_TENSORS[parts[2]]}.{kind}"
    return name


def _halves(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of each head from interleaved pairs (0, D/2, 1, D/2+1, …) back to halves (0, 1, …, D-1)."""
    rows, rest = tensor.shape[0], tensor.shape[1:]
    return tensor.view(heads, rows // heads // 2, 2, *rest).transpose(1, 2).reshape(rows, *rest)
