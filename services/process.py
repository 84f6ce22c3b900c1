"""What a child process does before it becomes the program that its parent wants."""

from __future__ import annotations

import ctypes
import signal

_PR_SET_PDEATHSIG = 1
_prctl = ctypes.CDLL(None).prctl


def die_with_parent() -> None:
    """For `Popen`'s preexec_fn: SIGTERM when the thread that started the child ends, however it ends."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
