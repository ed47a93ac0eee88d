"""Ray Serve's own router and replica objects without a cluster: everything real but the way to the replica's process."""

from typing import Any

from ray.serve._private.common import (
    DeploymentHandleSource,
    DeploymentID,
    ReplicaID,
    RequestMetadata,
    RunningReplicaInfo,
)
from ray.serve.request_router import PendingRequest, RunningReplica

from router.ray_router import AffinityRouter

DEPLOYMENT = DeploymentID("EngineReplica", "loopserve")


class QuietRouter(AffinityRouter):
    """Does not ask replicas for their queue lengths: there are none."""

    async def _probe_queue_lens(self, replicas: list[RunningReplica], backoff_index: int) -> list[Any]:
        return []


def router(**settings: Any) -> QuietRouter:
    """As Serve makes one in a process that holds a handle; needs a running event loop."""
    made = QuietRouter(DEPLOYMENT, DeploymentHandleSource.REPLICA)
    made.initialize_state(**settings)
    return made


def replica(name: str, stats: dict[str, Any]) -> RunningReplica:
    """A live replica that has published `stats`."""
    identity = ReplicaID(unique_id=name, deployment_id=DEPLOYMENT)
    made = object.__new__(RunningReplica)  # its constructor looks for the actor
    made._replica_info = RunningReplicaInfo(
        replica_id=identity,
        node_id="node",
        node_ip="127.0.0.1",
        availability_zone=None,
        actor_name=identity.to_full_id_str(),
        max_ongoing_requests=100,
        routing_stats=stats,
    )
    made._multiplexed_model_ids = set()
    return made


def request(session_id: str, *args: Any) -> PendingRequest:
    """A request that waits for its replica."""
    metadata = RequestMetadata(request_id="r", internal_request_id=f"i-{session_id}", session_id=session_id)
    return PendingRequest(args=list(args), kwargs={}, metadata=metadata)
