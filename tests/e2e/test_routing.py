"""Conversations over two real engines: what prefix-aware routing finds again, and what round robin does."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from benchmarks.routing import SESSIONS, TURNS, converse
from services.router.routing import PredictedSeconds, RoundRobin

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

TURN_TOKENS = 150


async def test_conversations_find_their_history_and_share_the_load(tiny_model_path: Path) -> None:
    aware = await converse(tiny_model_path, PredictedSeconds(Random(1)), TURN_TOKENS)
    blind = await converse(tiny_model_path, RoundRobin(), TURN_TOKENS)
    assert aware.hit_share >= 0.8
    assert blind.hit_share < aware.hit_share - 0.1
    assert aware.requests.total() == blind.requests.total() == SESSIONS * TURNS
    assert aware.imbalance <= 2
