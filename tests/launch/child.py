"""Child processes of all characters, for the supervisor's tests: `python -m tests.launch.child CHARACTER`."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from services.launch.supervisor import Supervisor


def main(character: str) -> None:
    print(f"I am {character}", flush=True)
    if character == "crashing":
        print("something is wrong", file=sys.stderr)
        sys.exit(3)
    if character == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print("ready", flush=True)
    if character == "parent":
        subprocess.Popen([sys.executable, "-m", "tests.launch.child", "stubborn"])
    if character == "supervisor":
        asyncio.run(supervise())
    time.sleep(600)


async def supervise() -> None:
    with tempfile.TemporaryDirectory() as logs:
        async with Supervisor(Path(logs)) as children:
            child = children.start("steady", "tests.launch.child", "steady", environment=os.environ)
            print(child.process.pid, flush=True)
            await children.watch(asyncio.sleep(600))


if __name__ == "__main__":
    main(sys.argv[1])
