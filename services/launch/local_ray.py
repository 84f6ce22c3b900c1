"""A private one-node Ray on loopback, which lives and dies with the process that started it.

It shares nothing with another Ray on the machine: own temporary directory, own ports, own token, and it is
never found through /tmp/ray by others. Stopping it therefore cannot stop somebody else's.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def ray_environment() -> dict[str, str]:
    """Environment for every process of the cluster, set before ray is first imported there."""
    return {
        # Ray's name for "one node, loopback only": without it 127.0.0.1 becomes the machine's address.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        # Serve's replicas open a port on all interfaces whatever we say; the token keeps strangers out of it.
        # Given here, Ray writes none to the home directory.
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_worker_niceness": "0",  # 15 by default: the engine would starve beside the router
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_SERVE_MAX_PER_REPLICA_RETRY_COUNT": "1",  # a model that cannot be served is said so at once
    }


@contextmanager
def local_ray(directory: Path) -> Iterator[str]:
    """Start Ray with its files in `directory`; yields its address; stops it on the way out.

    `directory` must have a short path (Ray's socket paths in it must stay below 108 bytes). `ray_environment`
    must be in force.
    """
    import ray

    context = ray.init(
        address="local",
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.WARNING,
        object_store_memory=80 * 2**20,  # Ray's minimum is 75 MiB; nothing of ours passes through it
        _temp_dir=str(directory),
        _node_ip_address="127.0.0.1",
    )
    try:
        yield context.address_info["address"]
    finally:
        ray.shutdown()
