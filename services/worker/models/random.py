"""Models without files: seeded random weights of any shape, for tests and benchmarks."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import msgspec
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from services.wire.messages import TextAssets
from services.worker.fingerprint import model_fingerprint
from services.worker.load import LoadedModel
from services.worker.models.config import ModelError
from services.worker.models.decoder import Decoder
from services.worker.models.spec import ModelSpec
from services.worker.models.weights import allocate, named_parts
from services.worker.text_assets import plain_tokenizer, text_digest

#: A model of a few hundred thousand weights in which every feature of the decoder's shape is odd.
TINY: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 320,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
}


def random_model(
    config: Mapping[str, Any] = TINY,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    name: str = "random",
    max_model_len: int | None = None,
) -> LoadedModel:
    """A model of the shape in `config` (Hugging Face style), created on `device` in `dtype`.

    Same config, seed, device type and dtype: same weights and fingerprint. Every matrix keeps the scale of
    its input (standard deviation 1/sqrt(inputs)), so that logits depend on the whole context: a wrong KV
    block changes the text. The tokenizer has one token a byte, so at least 256 tokens.
    """
    spec = ModelSpec.from_config(config)
    generator = torch.Generator(device).manual_seed(seed)
    weights = allocate(spec, device, dtype)
    for part in named_parts(spec, weights).values():
        if part.dim() == 1:  # norms and biases
            part.uniform_(0.5, 1.5, generator=generator)
        else:
            part.normal_(0, part.shape[1] ** -0.5, generator=generator)
    eos = config.get("eos_token_id", [])
    text = _byte_text(spec.vocab_size)
    made_from = msgspec.json.encode([dict(config), seed, torch.device(device).type])
    length = max_model_len or spec.max_position
    return LoadedModel(
        name=name,
        spec=spec,
        decoder=Decoder(spec, weights, device, length),
        fingerprint=model_fingerprint(hashlib.sha256(made_from).digest(), spec, dtype, dtype),
        kv_dtype=dtype,
        max_model_len=length,
        eos_token_ids=tuple(eos) if isinstance(eos, list) else (eos,),
        text=text,
        text_digest=text_digest(text),
    )


def _byte_text(vocab_size: int) -> TextAssets:
    """One token a byte; the tokens above have names that no text produces."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < len(alphabet):
        raise ModelError(f"config.vocab_size must be >= {len(alphabet)} for a random model, got {vocab_size}")
    names = alphabet + [f"<|{i}|>" for i in range(len(alphabet), vocab_size)]
    tokenizer = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return TextAssets(tokenizer=plain_tokenizer(msgspec.json.decode(tokenizer.to_str())), chat_template=None)
