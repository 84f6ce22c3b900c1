"""Without a GPU, Triton kernels run in Triton's interpreter and `tests/gpu` is not collected."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is decorated, so before `kernels` is imported
    collect_ignore_glob = ["gpu/*"]

settings.register_profile("reprise", deadline=None)  # machines are shared: a slow example is not a failure
settings.load_profile("reprise")

MODELS = Path(__file__).parents[1] / "models"


@pytest.fixture(scope="session")
def demo_model_path() -> Path:
    """The GGUF file that `make model` fetches. Its absence is a failure, not a skip."""
    files = sorted(MODELS.glob("*.gguf"))
    if not files:
        pytest.fail("no models/*.gguf: run `make model` first", pytrace=False)
    return files[0]
