"""Child processes of all characters, for the supervisor's tests: `python -m tests.launch.child CHARACTER`."""

from __future__ import annotations

import signal
import subprocess
import sys
import time


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
    time.sleep(600)


if __name__ == "__main__":
    main(sys.argv[1])
