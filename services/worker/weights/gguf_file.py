"""The GGUF container: metadata and a table of tensors in front of their (quantised) bytes.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little endian. The header
is parsed here because the gguf package's reader makes two NumPy arrays a string: 3.3 s for the demo model's
98,000 tokens and merges against 0.1 s. Quantised data goes through that package's dequantiser.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from services.worker.models.config import ModelError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_DIMENSIONS = 4

#: Metadata value types by number: struct format, or the two of variable length.
STRING, ARRAY = 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}

#: Types that torch reads as they are.
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class GGUFTensor:
    """Where a tensor lies. `shape` is in torch's order, last dimension contiguous."""

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    start: int  # byte offset in the file
    size: int  # bytes


class GGUFFile:
    """An open GGUF file. Raises ModelError if it is truncated, malformed or of another version."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, GGUFTensor] = {}
        try:
            with path.open("rb") as handle:
                # Copy on write: never written, but tensors over a read-only buffer draw warnings.
                self._data = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_COPY)
            self._parse()
        except (ValueError, OSError, struct.error, OverflowError) as error:
            raise ModelError(f"{path.name} is not a readable GGUF file: {error}") from error

    def read(self, name: str) -> torch.Tensor:
        """The tensor on the host: F32, F16 and BF16 as they are (backed by the file), others as fp32."""
        tensor = self.tensors[name]
        if tensor.kind.name in PLAIN:
            dtype = PLAIN[tensor.kind.name]
            flat = torch.frombuffer(self._data, dtype=dtype, count=prod(tensor.shape), offset=tensor.start)
            return flat.view(tensor.shape)
        data = np.frombuffer(self._data, dtype=np.uint8, count=tensor.size, offset=tensor.start)
        try:
            values = dequantize(data.reshape(*tensor.shape[:-1], -1), tensor.kind)
        except NotImplementedError as error:
            raise ModelError(f"tensor {name}: type {tensor.kind.name} is not supported") from error
        return torch.from_numpy(values)

    def _parse(self) -> None:
        cursor = _Cursor(self._data)
        if cursor.take(4) != MAGIC:
            raise ValueError("it does not start with 'GGUF'")
        (version,) = cursor.unpack("I")
        if version not in VERSIONS:
            raise ValueError(f"version {version} is not supported, only {VERSIONS}")
        tensor_count, field_count = cursor.unpack("QQ")
        for _ in range(field_count):
            key = cursor.string()
            self.metadata[key] = cursor.value(*cursor.unpack("I"))
        entries = [self._entry(cursor) for _ in range(tensor_count)]
        alignment = self.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"general.alignment must be a whole number >= 1, got {alignment!r}")
        data_start = -(-cursor.at // alignment) * alignment
        for name, shape, kind, offset in entries:
            self.tensors[name] = self._place(name, shape, kind, data_start + offset)

    @staticmethod
    def _entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
        name = cursor.string()
        (dimensions,) = cursor.unpack("I")
        if dimensions > MAX_DIMENSIONS:
            raise ValueError(
                f"tensor {name} has {dimensions} dimensions, at most {MAX_DIMENSIONS} are allowed"
            )
        shape = cursor.unpack(f"{dimensions}Q")[::-1]
        kind, offset = cursor.unpack("IQ")
        return name, shape, kind, offset

    def _place(self, name: str, shape: tuple[int, ...], number: int, start: int) -> GGUFTensor:
        kind = GGMLQuantizationType(number)  # ValueError names an unknown number
        values, size = GGML_QUANT_SIZES[kind]
        if not shape or min(shape) < 1 or shape[-1] % values:
            raise ValueError(f"tensor {name}: {shape} is no shape of {kind.name}, in blocks of {values}")
        tensor = GGUFTensor(shape, kind, start, prod(shape) // values * size)
        if start + tensor.size > len(self._data):
            raise ValueError(f"it ends inside tensor {name}; the file is truncated")
        return tensor


class _Cursor:
    """Sequential reads from the header; raises ValueError at the end of the data."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self.at = 0

    def take(self, count: int) -> bytes:
        end = self.at + count
        if end > len(self._data):
            raise ValueError(f"it ends at byte {len(self._data)} inside the header; the file is truncated")
        taken = self._data[self.at : end]
        self.at = end
        return taken

    def unpack(self, form: str) -> tuple[Any, ...]:
        form = "<" + form
        return struct.unpack(form, self.take(struct.calcsize(form)))

    def string(self) -> str:
        (length,) = self.unpack("Q")
        return self.take(length).decode()

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            return self._array()
        if kind not in SCALARS:
            raise ValueError(f"metadata type {kind} is unknown")
        return self.unpack(SCALARS[kind])[0]

    def _array(self) -> list[Any]:
        kind, count = self.unpack("IQ")
        if kind == STRING:
            return [self.string() for _ in range(count)]
        if kind not in SCALARS:
            raise ValueError(f"arrays of metadata type {kind} are not supported")
        return list(self.unpack(f"{count}{SCALARS[kind]}"))
