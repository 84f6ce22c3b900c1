"""Blocks that leave a device's pages and come back from pinned host memory, while steps run."""

from __future__ import annotations

import time
from collections.abc import Hashable
from dataclasses import replace

from tests.gpu.test_engine import BLOCK, LENGTHS, agreement, requests, stepped
from tests.worker.requests import make_request, prompt


def test_blocks_come_back_from_pinned_memory_and_compile_nothing() -> None:
    one = stepped(pages=20, host_bytes=64 << 20)
    host = one.engine._host
    assert host is not None
    try:
        assert all(row.is_pinned() == one.engine.runner.on_gpu for row in host._rows)
        cold: dict[Hashable, list[int]] = {}
        for request in requests():
            cold[request.key] = one.run([request])[request.key]
            one.settle()
            deadline = time.monotonic() + 20
            while not host.idle:
                assert time.monotonic() < deadline, "a block was never copied"
                time.sleep(0.001)
        for number in range(4):
            tokens = prompt(max(LENGTHS), seed=99 + number, vocab=1000)
            one.run([make_request(f"other {number}", tokens, max_tokens=1, block_size=BLOCK)])
        warm: dict[Hashable, list[int]] = {}
        for request in requests():
            key = f"again {request.key}"
            warm[request.key] = one.run([replace(request, key=key)])[key]
            assert one.starts[key].host_tokens == len(request.tokens) // BLOCK * BLOCK
        assert agreement(warm, cold) > 0.6  # random weights are sure of little
        assert one.engine.counters.late_kernels == 0
        one.check_empty()
    finally:
        host.close()
