"""What a step sends to the device: a few int32 arrays, packed into one copy from pinned memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

#: Parts begin at multiples of so many elements: kernels are compiled for pointers aligned to 16 bytes, and a
#: part that began elsewhere would compile them anew.
_ALIGNMENT = 16

#: Sends that may be under way. Two steps are, each with one send or two.
_SLOTS = 4


class Staging:
    """Sends int32 arrays to `device` without waiting for it. On the CPU arrays become tensors as they are."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pinned = [torch.empty(0, dtype=torch.int32)] * _SLOTS
        self._sent: list[torch.cuda.Event | None] = [None] * _SLOTS
        self._next = 0

    def send(self, parts: Sequence[np.ndarray], into: torch.Tensor | None = None) -> list[torch.Tensor]:
        """One tensor on the device for each of `parts` (int32, any shape), views of `into` if given.

        Returns before the copy has run; what is launched later on the current stream sees it.
        """
        if self._device.type == "cpu" and into is None:
            return [torch.from_numpy(part) for part in parts]
        offsets = layout([part.size for part in parts])
        target = torch.empty(offsets[-1], dtype=torch.int32, device=self._device) if into is None else into
        if self._device.type == "cpu":
            _pack(parts, offsets, target.numpy())
        else:
            pinned, host = self._slot(offsets[-1])
            _pack(parts, offsets, host)
            target[: offsets[-1]].copy_(pinned[: offsets[-1]], non_blocking=True)
            sent = self._sent[self._next]
            assert sent is not None
            sent.record()
            self._next = (self._next + 1) % _SLOTS
        return [
            target[offset : offset + part.size].view(part.shape)
            for part, offset in zip(parts, offsets, strict=False)
        ]

    def _slot(self, size: int) -> tuple[torch.Tensor, np.ndarray]:
        """The next pinned buffer, once its last copy has run: tensor and array over the same memory."""
        sent = self._sent[self._next]
        if sent is None:
            self._sent[self._next] = torch.cuda.Event()
        else:
            sent.synchronize()
        if len(self._pinned[self._next]) < size:
            self._pinned[self._next] = torch.empty(2 * size, dtype=torch.int32, pin_memory=True)
        pinned = self._pinned[self._next]
        return pinned, pinned.numpy()


def _pack(parts: Sequence[np.ndarray], offsets: Sequence[int], host: np.ndarray) -> None:
    for part, offset in zip(parts, offsets, strict=False):
        host[offset : offset + part.size] = part.ravel()


def layout(sizes: Sequence[int]) -> list[int]:
    """Where parts of these sizes begin in one buffer, and after them its length; in elements."""
    offsets = [0]
    for size in sizes:
        offsets.append(offsets[-1] + -(-size // _ALIGNMENT) * _ALIGNMENT)
    return offsets
