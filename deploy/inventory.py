"""What the fleet holds: its model, who is ready, whose sessions are where. Every replica is asked, and who did not answer is named.

Knows neither routes nor turns; a caller gets only what is its tenant's.
"""

from dataclasses import asdict
from typing import Any

from deploy.calls import ReplicaStatus, SessionView
from deploy.errors import ModelNotFound
from deploy.fleet import Fleet, Replies
from deploy.waking import Autopilots
from loopserve.errors import EngineUnavailable, LoopServeError, NotFound


class Inventory:
    """Questions to all replicas; one per ingress process."""

    def __init__(self, fleet: Fleet, autopilots: Autopilots) -> None:
        self._fleet = fleet
        self._autopilots = autopilots
        self._model = ""  # asked for once: it does not change while the application lives

    async def models(self) -> list[dict[str, Any]]:
        """OpenAI's model objects: one, or none while nothing is loaded."""
        replies: Replies[ReplicaStatus] = await self._fleet.ask("status")
        by_model = {status.model: status for status in replies.by_replica.values()}
        return [
            {
                "id": name,
                "object": "model",
                "created": status.loaded_at,
                "owned_by": "loopserve",
                "max_model_len": status.max_session_tokens,
            }
            for name, status in by_model.items()
        ]

    async def ready(self) -> dict[str, Any]:
        """Which replicas can answer, and with what; a fleet asleep is ready, too. Raises EngineUnavailable where none can."""
        replies: Replies[ReplicaStatus] = await self._fleet.ask("status")
        alive = {status.replica: status.model for status in replies.by_replica.values() if status.alive}
        if not alive and await self._autopilots.is_asleep():
            return {"status": "asleep", "models": [self._model] if self._model else [], "replicas": [], "silent": []}
        if not alive:
            raise EngineUnavailable("No replica has loaded the model yet; try again shortly.")
        models = sorted(set(alive.values()))
        return {"status": "ready", "models": models, "replicas": sorted(alive), "silent": list(replies.silent)}

    async def sessions(self, tenant: str) -> dict[str, Any]:
        """Every session of a tenant on every replica that answers."""
        replies: Replies[tuple[SessionView, ...]] = await self._fleet.ask("sessions", tenant)
        found = [asdict(view) for views in replies.by_replica.values() for view in views]
        found.sort(key=lambda view: view["idle_s"])
        return {"object": "list", "data": found, "silent": list(replies.silent)}

    async def session(self, tenant: str, name: str) -> dict[str, Any]:
        """One session wherever it is; a moved one may be on several replicas, the freshest is the answer. Raises NotFound."""
        replies: Replies[SessionView | None] = await self._fleet.ask("session", tenant, name)
        found = sorted((view for view in replies.by_replica.values() if view), key=lambda view: view.idle_s)
        if not found:
            raise _absent(name, replies.silent)
        return {"object": "session", **asdict(found[0]), "silent": list(replies.silent)}

    async def release(self, tenant: str, name: str) -> dict[str, Any]:
        """Forget one session wherever it is. Raises NotFound, or EngineUnavailable where a silent replica may hold it."""
        replies: Replies[bool] = await self._fleet.ask("release", tenant, name)
        released = sorted(replica for replica, was_there in replies.by_replica.items() if was_there)
        if not released:
            raise _absent(name, replies.silent)
        silent = list(replies.silent)
        return {"id": name, "object": "session.deleted", "deleted": True, "replicas": released, "silent": silent}

    async def check_model(self, model: str) -> None:
        """Raise ModelNotFound where another model is served, EngineUnavailable where none is loaded yet."""
        if not self._model:
            self._model = next((str(found["id"]) for found in await self.models()), "")
        if not self._model:
            raise EngineUnavailable("No replica has loaded the model yet; try again shortly.")
        if model != self._model:
            raise ModelNotFound(f"The model {model!r} is not served here; {self._model!r} is.", param="model")


def _absent(name: str, silent: tuple[str, ...]) -> LoopServeError:
    if silent:
        return EngineUnavailable(
            f"The session {name!r} was not found, but {', '.join(silent)} did not answer; try again."
        )
    return NotFound(f"There is no session {name!r}.")
