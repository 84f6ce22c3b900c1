"""The demo model for tests that need a real one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from services.worker.load import LoadedModel, load_model


@pytest.fixture(scope="session", autouse=True)
def one_torch_thread() -> None:
    """Test workers share the cores: OpenMP threads that wait for each other made these tests 3x slower."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def demo_model(demo_model_path: Path) -> LoadedModel:
    return load_model(demo_model_path)
