"""Without a GPU, Triton kernels run in Triton's interpreter and `tests/gpu` is not collected."""

from __future__ import annotations

import os

import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is decorated, so before `kernels` is imported
    collect_ignore_glob = ["gpu/*"]

settings.register_profile("reprise", deadline=None)  # machines are shared: a slow example is not a failure
settings.load_profile("reprise")
