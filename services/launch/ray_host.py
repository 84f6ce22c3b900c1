"""A private Ray with the workers on it, as a process: `python -m services.launch.ray_host DIRECTORY ARGS`.

DIRECTORY takes Ray's files, ARGS is `services.worker.deployment.AppArgs` as JSON. Tells its parent on stdout,
one JSON object a line: first the address of the Ray (routers connect to it while the workers still load),
then the addresses of the workers' metrics once all are ready. SIGTERM ends it, and with it Ray and workers.
"""

from __future__ import annotations

import json
import logging
import re
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from services.launch.local_ray import local_ray

RAY_ADDRESS, METRICS = "ray_address", "metrics"


def main() -> int:
    directory, args = Path(sys.argv[1]), json.loads(sys.argv[2])
    with local_ray(directory) as address:
        # Only now: Ray sets a handler of its own. Before, the default one ends us, and Ray with us.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        _tell({RAY_ADDRESS: address})
        try:
            metrics = _deploy(args)
        except RuntimeError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        _tell({METRICS: metrics})
        threading.Event().wait()
    return 0


def _deploy(args: dict[str, Any]) -> list[str]:
    """Start the workers, wait until all are ready; their metrics' addresses. Raises RuntimeError."""
    from ray import serve

    from services.worker import deployment

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(proxy_location="Disabled")  # nobody asks Serve over HTTP, and its port 8000 is the router's
    app = deployment.app(deployment.AppArgs(**args))
    try:
        handle = serve.run(app, name=deployment.APP, route_prefix=None)
    except RuntimeError as error:
        status = serve.status().applications[deployment.APP].deployments[deployment.DEPLOYMENT]
        raise RuntimeError(_cause(status.message)) from error
    urls: list[str] = handle.broadcast("metrics_url").results(timeout_s=10)
    return urls


def _cause(message: str) -> str:
    """The exception that a replica's constructor raised, out of Serve's message around its traceback."""
    lines = message.strip().splitlines()
    return re.sub(r"^(\w+\.)+", "", lines[-1].strip()) if lines else "the workers could not be started"


def _tell(news: dict[str, Any]) -> None:
    print(json.dumps(news), flush=True)


if __name__ == "__main__":
    sys.exit(main())
