"""Workers that Ray Serve runs: the replicas of one deployment.

Serve places, restarts, scales and updates the replicas; each opens its own token channel and publishes where.
No token passes through Ray (relaying one costs 1 to 2.5 ms of CPU there).
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from services.fleet.base import Address, OnChange
from services.fleet.replica_feed import FEED

RETRY_S = 0.5

logger = logging.getLogger(__name__)


class RayServeFleet:
    """The replicas of `deployment` in the Serve application `app`, which need not exist yet.

    Connects this process to the Ray cluster at `RAY_ADDRESS`, or the one of this machine, unless it is
    connected already. The deployment's request router must be `replica_observer.ReplicaObserver`.
    """

    def __init__(self, app: str, deployment: str) -> None:
        self.app = app
        self.deployment = deployment
        self._handle: Any = None  # Serve polls for as long as somebody holds it
        self._problem = ""

    async def run(self, on_change: OnChange) -> None:
        loop = asyncio.get_running_loop()

        def report(addresses: frozenset[Address]) -> None:
            loop.call_soon_threadsafe(on_change, addresses)

        key = (self.app, self.deployment)
        FEED.subscribe(key, report)
        try:
            while not await asyncio.to_thread(self._connect):  # noqa: ASYNC110  nobody tells us: poll
                await asyncio.sleep(RETRY_S)
            await asyncio.Event().wait()
        finally:
            FEED.unsubscribe(key, report)

    def _connect(self) -> bool:
        """Start Serve's long poll, whose news the observer publishes. False: Ray or the deployment is not
        there yet."""
        try:
            if not ray.is_initialized():
                ray.init(address="auto", log_to_driver=False, logging_level=logging.WARNING)
            # Serve builds the request router, and begins to poll, when options are first asked for.
            self._handle = serve.get_deployment_handle(self.deployment, self.app).options()
        except (ConnectionError, RayError, RayServeException, KeyError) as error:
            if str(error) != self._problem:
                self._problem = str(error)
                logger.info("no Serve deployment %s/%s yet: %s", self.app, self.deployment, error)
            return False
        return True
