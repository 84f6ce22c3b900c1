"""Everything on one machine: `python -m services.launch --model PATH`, which is what `make run` calls.

Exit code 0 after SIGINT or SIGTERM, 1 when something could not be started or ended by itself, 2 for bad
options. In every case nothing that was started runs any more.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path

from services.launch.checks import StartError
from services.launch.stack import Options, run
from services.launch.supervisor import ChildExited, StopRequested
from services.options import between


def main() -> int:
    options = _parser().parse_args()
    try:
        asyncio.run(run(Options(options.model, options.workers, options.port)))
    except (StartError, ChildExited) as error:
        print(f"reprise: {error}", file=sys.stderr)
        return 1
    except (StopRequested, KeyboardInterrupt):  # the latter before there was anything to stop
        print("stopped")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m services.launch",
        usage=argparse.SUPPRESS,  # an error is one line
        description="Serve a model on this machine: python -m services.launch --model PATH",
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, metavar="PATH", help="a .gguf file or a Hugging Face folder")
    add("--workers", type=between(1, 64), default=2, metavar="N", help="(default %(default)s)")
    add("--port", type=between(1, 65535), default=8000, metavar="N", help="(default %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
