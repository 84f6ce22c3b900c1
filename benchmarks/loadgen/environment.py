"""What a report says of its origin: the command, the versions and the machine."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from .options import Options
from .report import Environment

PACKAGES = ("reprise", "httptools", "uvloop", "msgspec", "numpy")


def environment_of(options: Options, model: str, argv: Sequence[str], started: datetime) -> Environment:
    """`started` is in UTC. No host name and no key: reports are published."""
    return Environment(
        command=["python", "benchmarks/serve.py", *argv],
        label=options.label,
        started=started.isoformat(timespec="seconds"),
        url=str(options.address),
        model=model,
        api=options.api,
        workload=options.workload_name,
        pace=options.pace_name,
        seed=options.seed,
        versions={
            "python": platform.python_version(),
            "commit": _commit(),
            **{name: _version(name) for name in PACKAGES},
        },
        machine={"system": platform.platform(), "cpu": _cpu_model(), "cpus": os.cpu_count() or 0},
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    """The commit of this repository, or empty outside one."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:
        return ""
    return done.stdout.strip()


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
