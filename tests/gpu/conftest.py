"""`cases.poisoned_memory` asks for deterministic algorithms, which cuBLAS has only with a fixed workspace."""

from __future__ import annotations

import os

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
