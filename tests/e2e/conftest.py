from __future__ import annotations

from pathlib import Path

import pytest

from tests.cache_store.conftest import redis_server, shared_server
from tests.fakes.checkpoint import write_tiny_checkpoint
from tests.launch.started import DEMO_MODEL

__all__ = ["redis_server", "shared_server"]


@pytest.fixture
def demo_model_path() -> Path:
    assert DEMO_MODEL.exists(), "the demo model is missing: make model"
    return DEMO_MODEL


@pytest.fixture
def tiny_model_path(tmp_path: Path) -> Path:
    """A random Llama with a byte tokenizer, 1,024 tokens at most, that starts in no time."""
    return write_tiny_checkpoint(tmp_path / "tiny")
