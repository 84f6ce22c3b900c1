"""A Ray Serve request router that routes nothing: it is how Serve tells this process of its replicas.

Serve's controller pushes the replicas of a deployment, with what each said in `record_replica_metadata`, to
every process that holds a handle, and hands them to the deployment's request router there: 0.3 to 1.1 s after
a replica appears, dies or is told to stop, without polling. Name the class in the deployment's
`RequestRouterConfig`.

Both `RequestRouter` (alpha) and `record_replica_metadata` may change with any Ray release: Ray is pinned and
tests/fleet/test_ray_contract.py holds it to what is used here.
"""

from __future__ import annotations

from typing import Any

from ray.serve.request_router import FIFOMixin, PendingRequest, RequestRouter, RunningReplica

# Serve pickles what this module holds by value, but modules by name: `replica_feed` is the one that everybody
# else in the process imports. Importing `FEED` itself would give Serve's copy of us a feed of its own.
from services.fleet import replica_feed


class ReplicaObserver(FIFOMixin, RequestRouter):
    """Publishes every change of the deployment's replicas to `replica_feed.FEED`."""

    def __init__(self, deployment_id: Any, *args: Any, **kwargs: Any) -> None:
        self._deployment = (deployment_id.app_name, deployment_id.name)
        super().__init__(deployment_id, *args, **kwargs)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        replica_feed.FEED.publish(self._deployment, [replica.replica_metadata for replica in replicas])

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Any replica will do for the few control calls that go through a handle."""
        return [candidate_replicas]
