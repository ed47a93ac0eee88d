"""Topology `direct`: HAProxy asks a session router for the replica, then streams from it; the replica is the HTTP server itself.

    HAProxy --POST /internal/route--> SessionRouter        names the request, ranks the replicas, answers one
       '--------------------------> DirectReplica          the same routes as the ingress, over the engine in this very process

Built from the parts of `two_hop`: one `build_api`, one `identify`, one affinity decision. A setting for clusters: HAProxy, its statistics
and the replicas listen on every interface. Rests on a private hook of Serve (`_with_ingress_request_router`, `choose_replica(_reserve=
False)`), tried with the version that is pinned; nothing outside this file knows of it.

What differs from `two_hop`: a replica that dies takes its running answers with it, so a client may see a cut connection in place of a last
error event. And of a request's headers HAProxy shows the router only the session's (`ROUTED_HEADERS`): a tenant, a key or a user in
another header does not take part in the placement, only in everything else.
"""

import asyncio
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from ray import serve
from ray.serve._private.constants import (
    RAY_SERVE_ENABLE_HA_PROXY,
    RAY_SERVE_INGRESS_REQUEST_ROUTER_FORWARD_BODY,
    SERVE_SESSION_ID,
)
from ray.serve.handle import DeploymentHandle

from deploy.backend import BackendFactory
from deploy.calls import Item, TurnCall
from deploy.deployments import EngineReplica
from deploy.fleet import Fleet, RayFleet, Replies
from deploy.identity import affinity_key, identify, in_tenant
from deploy.ingress import build_api
from deploy.metrics_page import IngressMetrics
from deploy.protocol import parse_chat, parse_text
from deploy.replica import Replica
from deploy.settings import DeploySettings
from loopserve.config import EngineConfig
from loopserve.errors import ConfigError, InvalidRequest
from monitoring.catalogue import Origin
from monitoring.exposition import Families
from router.affinity import AffinityKey, encode_affinity
from router.decisions import Decisions
from router.ray_router import CHOICE_ONLY

ROUTER_DEPLOYMENT = "SessionRouter"
ROUTED_HEADERS = frozenset({SERVE_SESSION_ID.lower()})

# Belongs into the environment of every node, head and workers alike, before Serve starts, beside `deploy.local.SERVE_ENV`.
DIRECT_ENV: Mapping[str, str] = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_INGRESS_REQUEST_ROUTER_FORWARD_BODY": "1",
}


def check_environment() -> None:
    """Raise ConfigError where Serve was started without what this topology needs."""
    if not (RAY_SERVE_ENABLE_HA_PROXY and RAY_SERVE_INGRESS_REQUEST_ROUTER_FORWARD_BODY):
        wanted = ", ".join(f"{name}={value}" for name, value in DIRECT_ENV.items())
        raise ConfigError(
            f"topology 'direct' needs {wanted} in the environment of all nodes, head and workers; set them or take topology 'two_hop'"
        )


def direct_app(
    settings: DeploySettings,
    config: EngineConfig,
    factory: str | BackendFactory,
    *,
    engine_options: Mapping[str, Any],
    router_options: Mapping[str, Any],
    autopilot: serve.Application | None = None,
) -> serve.Application:
    """The application, not yet deployed; the options are those of its two deployments. Raises ConfigError."""
    check_environment()
    engines = serve.deployment(DirectReplica).options(**engine_options).bind(settings, config, factory, autopilot)
    router = serve.deployment(SessionRouter).options(name=ROUTER_DEPLOYMENT, **router_options)
    application: serve.Application = engines._with_ingress_request_router(router.bind(engines, settings))
    return application


@serve.ingress()
class DirectReplica(EngineReplica):
    """One engine with the HTTP surface of the whole application. A subclass, because Serve broadcasts to methods by name."""

    def __init__(
        self,
        settings: DeploySettings,
        config: EngineConfig,
        factory: str | BackendFactory,
        autopilot: DeploymentHandle | None = None,
    ) -> None:
        super().__init__(settings, config, factory)
        self._settings, self._autopilot = settings, autopilot
        self._ingress_metrics = IngressMetrics(self._name)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Serve after the constructor."""
        replicas = self._all_of(serve.get_replica_context().deployment)
        peers = [(Origin.INGRESS, replicas), (Origin.INGRESS, self._all_of(ROUTER_DEPLOYMENT))]
        if self._autopilot is not None:
            peers.append((Origin.AUTOPILOT, RayFleet(self._autopilot, ask_timeout_s=self._settings.ask_timeout_s)))
        return build_api(
            OwnFleet(self._name, self._replica, replicas),
            self._settings,
            routed_headers=ROUTED_HEADERS,
            metrics=self._ingress_metrics,
            peers=peers,
            tracing=self._tracing,
        )

    async def ingress_metrics(self) -> tuple[str, Families]:
        """What this process counted as an HTTP server, for a page that another one makes."""
        return self._name, self._ingress_metrics.families()

    def _all_of(self, deployment: str) -> RayFleet:
        handle = serve.get_deployment_handle(deployment, app_name=serve.get_replica_context().app_name)
        return RayFleet(handle, ask_timeout_s=self._settings.ask_timeout_s)


class OwnFleet:
    """All replicas as one of them sees them: turns are answered here, questions go to all."""

    def __init__(self, name: str, replica: Replica, fleet: Fleet) -> None:
        self._name, self._replica, self._fleet = name, replica, fleet

    def open(self, call: TurnCall, key: AffinityKey) -> AsyncGenerator[Item, None]:
        """Here, whatever `key` says: it was placed before it came. But another replica's where this one has just failed it."""
        if key.avoid == self._name:
            return self._fleet.open(call, key)
        return self._replica.chat(call)

    async def ask(self, question: str, *args: Any) -> Replies[Any]:
        """See `Fleet.ask`."""
        return await self._fleet.ask(question, *args)


@serve.ingress()
class SessionRouter:
    """Tells HAProxy which replica a request belongs to. Only ever chooses: it sees no answer."""

    def __init__(self, engines: DeploymentHandle, settings: DeploySettings) -> None:
        self._engines, self._settings = engines, settings
        self._metrics = IngressMetrics(serve.get_replica_context().replica_id.unique_id)
        Decisions.listener = self._metrics.decided

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Serve after the constructor."""
        api = FastAPI(title="LoopServe session router", docs_url=None, redoc_url=None, openapi_url=None)

        @api.post("/internal/route")
        async def route(request: Request) -> Response:
            announced = request.headers.get("content-length", "")
            is_readable = announced.isdigit() and int(announced) <= self._settings.body_bytes_max
            body = await request.body() if is_readable else b""  # a replica refuses what is too long, and says so
            key = placement_key(body, request.headers, branches_max=self._settings.branches_max)
            try:
                async with asyncio.timeout(self._settings.ask_timeout_s):
                    return JSONResponse({"replica_id": await self._choose(key)})
            except TimeoutError:  # HAProxy makes a 503 of it
                return Response("no replica is there", status_code=503, media_type="text/plain")

        return api

    async def ingress_metrics(self) -> tuple[str, Families]:
        """Everything counted here: the decisions."""
        return self._metrics.name, self._metrics.families()

    async def _choose(self, key: AffinityKey | None) -> str:
        handle = self._engines if key is None else self._engines.options(session_id=encode_affinity(key))
        async with handle.choose_replica(CHOICE_ONLY, _reserve=False) as selection:
            return str(selection._replica.replica_id.to_full_id_str())


def placement_key(body: bytes, headers: Mapping[str, str], *, branches_max: int) -> AffinityKey | None:
    """What places a request; None where it is none that can be answered: any replica may tell the client why.

    The path does not travel, so the body says which of the two endpoints it is for.
    """
    for parse in (parse_chat, parse_text):
        try:
            parsed = parse(body, branches_max=branches_max)
            seen = {name: text for name, text in headers.items() if name in ROUTED_HEADERS}
            return affinity_key(parsed, identify(parsed, seen, in_tenant("", parsed.cache_salt)))
        except InvalidRequest:
            continue
    return None
