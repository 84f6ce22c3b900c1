"""Hugging Face model folders: config.json and one or many safetensors files, read through mmap.

Format: https://github.com/huggingface/safetensors#format; sharding: `model.safetensors.index.json`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from services.wire.messages import TextAssets
from services.worker.models.config import ModelError
from services.worker.text_assets import read_json, text_assets_from_directory

INDEX = "model.safetensors.index.json"
FLOAT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class SafetensorsCheckpoint:
    """A model folder. Raises ModelError when files are missing, malformed or disagree with the index."""

    def __init__(self, directory: Path) -> None:
        self.name = directory.resolve().name
        self.config: Mapping[str, Any] = read_json(directory / "config.json")
        self.files = _weight_files(directory)
        self._handles: dict[str, Any] = {}  # tensor name -> its open file
        shapes: dict[str, tuple[int, ...]] = {}
        for file in self.files:
            shapes |= self._open(file)
        self.shapes: Mapping[str, tuple[int, ...]] = shapes
        self.eos_token_ids = _eos_token_ids(
            read_json(directory / "generation_config.json").get("eos_token_id"),
            self.config.get("eos_token_id"),
        )
        self._directory = directory

    def _open(self, file: Path) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors in `file`."""
        shapes: dict[str, tuple[int, ...]] = {}
        try:
            handle = safe_open(file, framework="pt")
            for name in handle.keys():  # noqa: SIM118 - not a mapping
                if name in self._handles:
                    raise ModelError(f"tensor {name} is in two files")
                shapes[name] = tuple(handle.get_slice(name).get_shape())
                self._handles[name] = handle
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file.name} cannot be read: {error}") from error
        return shapes

    def read(self, name: str) -> torch.Tensor:
        """The tensor, backed by the file: nothing is copied until it is used."""
        tensor: torch.Tensor = self._handles[name].get_tensor(name)
        if tensor.dtype not in FLOAT_DTYPES:
            raise ModelError(f"tensor {name}: {tensor.dtype} is not supported")
        return tensor

    def text(self) -> TextAssets:
        """Read from the folder's tokenizer files."""
        return text_assets_from_directory(self._directory)


def _weight_files(directory: Path) -> list[Path]:
    """The safetensors files of the model, by name. Other .safetensors in the folder do not count."""
    index = read_json(directory / INDEX)
    if index:
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ModelError(f"{INDEX}: weight_map must be an object, got {weight_map!r}")
        names = sorted(map(str, set(weight_map.values())))
        outside = [name for name in names if Path(name).name != name]
        if outside:
            raise ModelError(f"{INDEX}: {outside[0]!r} is not a file name")
    else:
        names = ["model.safetensors"]
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise ModelError(f"{directory.name} has no {', '.join(missing)}")
    return [directory / name for name in names]


def _eos_token_ids(*candidates: int | list[int] | None) -> tuple[int, ...]:
    """The first that is given: generation_config.json knows the chat's end tokens, config.json may not."""
    for ids in candidates:
        if ids is not None:
            return tuple(ids) if isinstance(ids, list) else (ids,)
    return ()
