"""From a path to a model that is ready to run, whatever the format of the files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from services.wire.messages import ModelCard, TextAssets
from services.worker.fingerprint import files_digest, model_fingerprint
from services.worker.models.config import Config, ModelError
from services.worker.models.decoder import Decoder
from services.worker.models.spec import ModelSpec
from services.worker.text_assets import text_digest
from services.worker.weights.checkpoint import Checkpoint, load_weights
from services.worker.weights.safetensors import SafetensorsCheckpoint

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class LoadedModel:
    """A decoder and everything about it that others need to know."""

    name: str
    spec: ModelSpec
    decoder: Decoder
    fingerprint: bytes  # 16 bytes, see `fingerprint.model_fingerprint`
    kv_dtype: torch.dtype  # of the KV cache; part of the fingerprint
    max_model_len: int  # prompt + generated tokens
    eos_token_ids: tuple[int, ...]
    text: TextAssets
    text_digest: bytes  # 16 bytes

    @property
    def card(self) -> ModelCard:
        """What routers are told."""
        return ModelCard(
            name=self.name,
            fingerprint=self.fingerprint,
            text_digest=self.text_digest,
            vocab_size=self.spec.vocab_size,
            max_model_len=self.max_model_len,
            eos_token_ids=self.eos_token_ids,
        )


def load_model(
    path: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: str | None = None,
    kv_dtype: str | None = None,
    max_model_len: int | None = None,
) -> LoadedModel:
    """Load a GGUF file or a Hugging Face model folder.

    `dtype`: "float32", "bfloat16" or "float16"; by default float32 on the CPU and the checkpoint's own
    elsewhere (bfloat16 for GGUF). `kv_dtype` follows `dtype` unless given. `max_model_len` lowers the model's
    own limit in tokens, which saves the memory of the rope table. Raises ModelError if the model cannot be
    served as it stands; nothing is left half-loaded.
    """
    device = _device(device)
    checkpoint = open_checkpoint(Path(path))
    spec = ModelSpec.from_config(checkpoint.config)
    compute_dtype = _dtype("dtype", dtype or _default_dtype(checkpoint, device))
    if device.type == "cuda" and compute_dtype == torch.float32:
        raise ModelError("dtype float32 is for the CPU, got it for a GPU: take bfloat16 or float16")
    cache_dtype = _dtype("kv_dtype", kv_dtype) if kv_dtype else compute_dtype
    length = spec.max_position if max_model_len is None else max_model_len
    if not 1 <= length <= spec.max_position:
        raise ModelError(f"max_model_len must be from 1 to {spec.max_position}, got {max_model_len}")
    ends = checkpoint.eos_token_ids
    if not all(isinstance(token, int) and 0 <= token < spec.vocab_size for token in ends):
        raise ModelError(f"eos_token_id must be token ids below {spec.vocab_size}, got {list(ends)}")
    text = checkpoint.text()
    try:
        weights = load_weights(checkpoint, spec, device, compute_dtype)
    except torch.OutOfMemoryError as error:
        raise ModelError(f"the weights as {compute_dtype} do not fit into the memory of {device}") from error
    return LoadedModel(
        name=checkpoint.name,
        spec=spec,
        decoder=Decoder(spec, weights, device, length),
        fingerprint=model_fingerprint(files_digest(checkpoint.files), spec, compute_dtype, cache_dtype),
        kv_dtype=cache_dtype,
        max_model_len=length,
        eos_token_ids=ends,
        text=text,
        text_digest=text_digest(text),
    )


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at `path`: a .gguf file, a folder with config.json, or a folder with one .gguf file."""
    if not path.exists():
        raise ModelError(f"model path {path} does not exist")
    if path.is_dir() and (path / "config.json").is_file():
        return SafetensorsCheckpoint(path)
    ggufs = sorted(path.glob("*.gguf")) if path.is_dir() else [path]
    if len(ggufs) != 1 or ggufs[0].suffix != ".gguf":
        raise ModelError(f"{path} must be a .gguf file or a folder with config.json or one .gguf file")
    # Here and not above: a machine that serves safetensors needs no gguf package.
    from services.worker.weights.gguf import GGUFCheckpoint

    return GGUFCheckpoint(ggufs[0])


def _device(name: torch.device | str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ModelError(f"device must be cpu or cuda[:n], got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise ModelError(f"device must be cpu or cuda[:n], got {name!r}")
    there = torch.cuda.device_count() if device.type == "cuda" else 1
    if (device.index or 0) >= there:
        raise ModelError(f"device {device} is not there: PyTorch sees {there} CUDA devices")
    return device


def _default_dtype(checkpoint: Checkpoint, device: torch.device) -> str:
    if device.type == "cpu":
        return "float32"  # the tokens of an fp32 reference; bf16 is faster where the CPU has it
    config = Config(checkpoint.config)
    stored = config.get("dtype") or config.get("torch_dtype")
    return stored if stored in ("bfloat16", "float16") else "bfloat16"


def _dtype(field: str, name: str) -> torch.dtype:
    if name not in DTYPES:
        raise ModelError(f"{field} must be one of {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name]
