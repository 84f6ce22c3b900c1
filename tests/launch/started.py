"""`python -m services.launch` as a process of its own, and everything that comes of it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import psutil

DEMO_MODEL = Path("models/SmolLM2-135M-Instruct.Q4_1.gguf")

PART_TIMEOUT_S = 90


class Started:
    """The launcher, running; leaving the context stops it, whatever became of the test."""

    def __init__(self, *arguments: str, environment: Mapping[str, str] | None = None) -> None:
        inherited = {key: text for key, text in os.environ.items() if not key.startswith(("RAY_", "REDIS_"))}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "services.launch", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**inherited, **(environment or {})},
            start_new_session=True,
        )
        self._seen: set[psutil.Process] = set()

    def __enter__(self) -> Started:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.terminate()
        self.process.communicate(timeout=60)

    def lines_to(self, words: str) -> str:
        """What it says up to the line that holds `words`; fails the test if it ends before."""
        assert self.process.stdout is not None
        lines = []
        for line in self.process.stdout:
            lines.append(line)
            if words in line:
                return "".join(lines)
        raise AssertionError(f"ended without {words!r}: {self.process.communicate()[1]}")

    def processes(self) -> list[psutil.Process]:
        """It, and all that it has started so far and still runs."""
        it = psutil.Process(self.process.pid)
        self._seen.update((it, *it.children(recursive=True)))
        return self.left()

    def left(self) -> list[psutil.Process]:
        """Which of the processes that were seen still run."""
        return [process for process in self._seen if _command(process)]

    def part(self, words: str) -> psutil.Process:
        """The process of it whose command line holds `words`, as soon as there is one."""
        deadline_s = time.monotonic() + PART_TIMEOUT_S
        while time.monotonic() < deadline_s:
            for process in self.processes():
                if words in _command(process):
                    return process
            time.sleep(0.1)  # a look takes some milliseconds of CPU
        raise AssertionError(f"no process with {words!r} within {PART_TIMEOUT_S} s")

    def stop(self, number: signal.Signals) -> tuple[int, str]:
        """Send it a signal; exit code and stderr."""
        self.processes()
        self.process.send_signal(number)
        return self.end()

    def end(self) -> tuple[int, str]:
        """Exit code and stderr, once it has ended."""
        _, errors = self.process.communicate(timeout=60)
        return self.process.returncode, errors


def _command(process: psutil.Process) -> str:
    """Its command line, empty when it has ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:  # a zombie's is empty
        return ""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
