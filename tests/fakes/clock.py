"""Tokens that tell when they were made, so that whoever receives one knows how long it took.

A token is a word " 00000" to " 32767": the monotonic clock, which all processes of a machine share, in units
of CLOCK_S. Delays up to 3.2 s can be told.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from services.worker.request import Request
from tests.fakes.text import FAKE_VOCAB

CLOCK_S = 1e-4
CLOCK_TOKENS = 1 << 15
CLOCK_WORDS = [f" {n:05}" for n in range(CLOCK_TOKENS)]  # for FakeWorker(words=…)


def clock_reply(request: Request) -> Iterator[int]:
    """An endless reply for FakeEngine; each token tells when the engine took it."""
    while True:
        yield FAKE_VOCAB + int(time.monotonic() / CLOCK_S) % CLOCK_TOKENS
