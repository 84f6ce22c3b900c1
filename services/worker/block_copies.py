"""Blocks between the pages of the device and payloads on the host, by the worker's codec.

On a GPU the codec runs there, so that the link to the host carries the small form. Blocks leave behind the
step under way: encoded on the step's stream, so before any later step may change their pages, and copied on a
stream of their own, which holds up no step. They come in on the step's stream: what is launched later reads
them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch

from kernels.kv_codec import decode, encode
from kernels.kv_payload import Codec, KVShape, are_finite
from services.worker.kv import KVCache
from services.worker.tiers import EncodedBlock

#: Of payloads that are on the device at the same time on their way into pages.
_STAGED_BYTES = 32 << 20


class Departure:
    """Blocks on their way to the host."""

    def __init__(
        self,
        codec: Codec,
        shape: KVShape,
        payloads: torch.Tensor,
        begun: torch.cuda.Event | None = None,
        done: torch.cuda.Event | None = None,
    ) -> None:
        """The events stand before and after the work on the device; None on a CPU, where all is done."""
        self._codec = codec
        self._shape = shape
        self._payloads = payloads
        self._begun = begun
        self._done = done

    def arrived(self) -> bool:
        return self._done is None or bool(self._done.query())

    def blocks(self) -> list[EncodedBlock | None]:
        """Once arrived, what was read; None for a block with NaN or infinity in it, where the codec tells."""
        finite = are_finite(self._payloads, self._shape, self._codec)
        return [
            EncodedBlock(self._codec, payload) if good else None
            for payload, good in zip(self._payloads, finite, strict=True)
        ]

    def device_s(self) -> float | None:
        """What encoding and copying took on the device, once arrived; None on a CPU."""
        if self._begun is None or self._done is None:
            return None
        return float(self._begun.elapsed_time(self._done)) * 1e-3


class BlockCopies:
    """Reads and writes whole blocks of `kv`. Used by one thread, the one that launches the steps."""

    def __init__(self, kv: KVCache, codec: Codec) -> None:
        self.codec = codec
        self.shape = KVShape.of(kv.storage)
        self._storage = kv.storage
        self.on_gpu = bool(kv.storage.is_cuda)
        self._stream = torch.cuda.Stream(kv.storage.device) if self.on_gpu else None

    def warm_up(self) -> None:
        """Have every kernel compiled that can be needed. Overwrites page 0."""
        encode(self._storage, [0], self.codec)
        for codec in self.codec.as_exact():
            payloads = torch.zeros(1, self.shape.payload_bytes(codec), dtype=torch.uint8)
            decode(payloads.to(self._storage.device), self._storage, [0], codec)

    def read(self, pages: Sequence[int]) -> Departure:
        """The blocks in `pages`, as the steps launched so far leave them. Waits for nothing."""
        if self._stream is None:
            return Departure(self.codec, self.shape, encode(self._storage, pages, self.codec))
        begun = torch.cuda.Event(enable_timing=True)
        begun.record()
        payloads = encode(self._storage, pages, self.codec)
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            on_host = torch.empty(payloads.shape, dtype=torch.uint8, pin_memory=True)
            on_host.copy_(payloads, non_blocking=True)
            done = torch.cuda.Event(enable_timing=True)
            done.record()
        payloads.record_stream(self._stream)  # its memory is not another's before the copy has run
        return Departure(self.codec, self.shape, on_host, begun, done)

    def write(self, pages: Sequence[int], blocks: Sequence[EncodedBlock]) -> torch.cuda.Event | None:
        """Put `blocks[i]` into `pages[i]`. Returns when the device has read the payloads; None on a
        CPU, which is done with them.

        Raises ValueError, with nothing written, if a payload is not of the size that its codec makes.
        """
        for block in blocks:
            size, payload = self.shape.payload_bytes(block.codec), block.payload
            if payload.shape != (size,) or payload.dtype != torch.uint8:
                raise ValueError(
                    f"a {block.codec} payload must be uint8 [{size}], "
                    f"got {payload.dtype} {list(payload.shape)}"
                )
        at = 0
        for codec, run in groupby(blocks, lambda block: block.codec):
            payloads = [block.payload for block in run]
            most = max(1, _STAGED_BYTES // len(payloads[0])) if self._stream else 1
            for start in range(0, len(payloads), most):
                part = payloads[start : start + most]
                decode(self._on_device(part), self._storage, pages[at : at + len(part)], codec)
                at += len(part)
        if self._stream is None:
            return None
        read = torch.cuda.Event()
        read.record()
        return read

    def _on_device(self, payloads: Sequence[torch.Tensor]) -> torch.Tensor:
        """[payload, byte]; on a CPU, where they come one by one, without a copy."""
        if self._stream is None:
            return payloads[0].unsqueeze(0)
        staged = torch.empty(len(payloads), len(payloads[0]), dtype=torch.uint8, device=self._storage.device)
        for line, payload in zip(staged, payloads, strict=True):
            line.copy_(payload, non_blocking=True)
        return staged
