"""Fake workers and routers as processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager


def start(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    """`python -m …`, with its output piped."""
    return subprocess.Popen(
        [sys.executable, "-m", *arguments],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def first_line(process: subprocess.Popen[str]) -> str:
    """What it prints when it is ready; fails with its errors when it ends instead."""
    assert process.stdout
    line = process.stdout.readline()
    assert line, process.communicate()[1]
    return line.strip()


@contextmanager
def fake_worker(*options: str) -> Iterator[str]:
    """The address of a fake worker's token channel."""
    process = start("tests.fakes.worker", *options)
    try:
        yield first_line(process).partition("channel=")[2]
    finally:
        process.terminate()
        process.communicate(timeout=20)


@contextmanager
def router(*options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A router on a free port: (its process, its URL)."""
    process = start("services.router", "--port", "0", *options)
    try:
        yield process, first_line(process).removeprefix("ready ")
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate(timeout=20)
