"""The HTTP surface: which routes there are, who may use them, and how errors leave. Hop 1 and 12; what routes do is done elsewhere.

/v1/chat/completions, /v1/completions     deploy.gateway
/v1/models, /v1/sessions, /ready          deploy.inventory
/metrics, /v1/autopilot, /observe         deploy.metrics_page, deploy.waking, deploy.observe
"""

from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from deploy.doors import Doors
from deploy.errors import ErrorAnswer, MethodNotAllowed, ModelNotFound, error_answer
from deploy.fleet import Fleet
from deploy.gateway import Gateway, Refused
from deploy.identity import in_tenant
from deploy.inventory import Inventory
from deploy.keys import Caller
from deploy.metrics_page import IngressMetrics, MetricsPage, RequestCounter
from deploy.observe.page import observe_router, sources_of
from deploy.protocol import Endpoint
from deploy.settings import DeploySettings
from deploy.tracing import TracedFleet, TracedRequests
from deploy.waking import Autopilots
from loopserve.errors import LoopServeError, NotFound
from monitoring.catalogue import KEYS_RELOAD_FAILED, Origin
from monitoring.exposition import CONTENT_TYPE
from monitoring.tracing import Tracing


def build_api(
    fleet: Fleet,
    settings: DeploySettings,
    *,
    routed_headers: frozenset[str] | None = None,
    metrics: IngressMetrics | None = None,
    peers: Sequence[tuple[Origin, Fleet]] = (),
    tracing: Tracing | None = None,
) -> FastAPI:
    """The routes over one fleet.

    `routed_headers`: lower-case names of the headers that routers see of a request; None: all. `metrics`: this process's count. `peers`:
    whom to ask for the rest of the metrics page, the other ingresses and the autopilot.
    """
    doors = Doors(settings)
    metrics = metrics or IngressMetrics()
    if tracing is not None:
        fleet = TracedFleet(fleet, tracing, routes=routed_headers is None)
    pilots = next((peer for origin, peer in peers if origin is Origin.AUTOPILOT), None)
    autopilots = Autopilots(fleet, pilots, settings)
    inventory = Inventory(fleet, autopilots)
    gateway = Gateway(
        fleet,
        settings,
        metrics=metrics,
        routed_headers=routed_headers,
        inventory=inventory,
        autopilots=autopilots,
        tracing=tracing,
    )
    metrics_page = MetricsPage(metrics, [(Origin.ENGINE, fleet), *peers])
    api = FastAPI(
        title="LoopServe", docs_url=None, redoc_url=None, openapi_url=None if settings.keys_file else "/openapi.json"
    )
    api.state.doors = doors
    api.state.metrics_page = metrics_page
    api.add_middleware(RequestCounter, metrics=metrics)
    if tracing is not None:
        api.add_middleware(TracedRequests, tracing=tracing)
    _add_errors(api, metrics)
    _add_completions(api, gateway, doors)
    _add_inventory(api, inventory, doors)

    @api.get("/metrics", dependencies=[Depends(doors.metrics)])
    async def metrics_text() -> Response:
        metrics.sink.set(KEYS_RELOAD_FAILED, float(doors.keys_reload_failed))
        return Response(await metrics_page.render(), media_type=CONTENT_TYPE)

    @api.get("/v1/autopilot", dependencies=[Depends(doors.operator)])
    async def autopilot() -> dict[str, Any]:
        return await autopilots.overview()

    if settings.observe:
        sources = sources_of(settings, metrics_page.parts, inventory.sessions, pilots)
        api.include_router(observe_router(sources, doors.operator))
    return api


def _add_completions(api: FastAPI, gateway: Gateway, doors: Doors) -> None:
    User = Annotated[Caller, Depends(doors.user)]  # noqa: N806, a type

    @api.post("/v1/chat/completions")
    async def chat_completions(request: Request, caller: User) -> Response:
        return await gateway.complete(request, Endpoint.CHAT, caller)

    @api.post("/v1/completions")
    async def completions(request: Request, caller: User) -> Response:
        return await gateway.complete(request, Endpoint.TEXT, caller)


def _add_inventory(api: FastAPI, inventory: Inventory, doors: Doors) -> None:
    User = Annotated[Caller, Depends(doors.user)]  # noqa: N806, a type

    @api.get("/v1/models", dependencies=[Depends(doors.user)])
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": await inventory.models()}

    @api.get("/v1/models/{name:path}", dependencies=[Depends(doors.user)])
    async def model(name: str) -> dict[str, Any]:
        for found in await inventory.models():
            if found["id"] == name:
                return found
        raise ModelNotFound(f"The model {name!r} is not served here.", param="model")

    @api.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "alive"}

    @api.get("/ready")
    async def ready() -> dict[str, Any]:
        return await inventory.ready()

    @api.get("/v1/sessions")
    async def sessions(caller: User, cache_salt: str = "") -> dict[str, Any]:
        return await inventory.sessions(in_tenant(caller.tenant, cache_salt))

    @api.get("/v1/sessions/{name:path}")
    async def session(caller: User, name: str, cache_salt: str = "") -> dict[str, Any]:
        return await inventory.session(in_tenant(caller.tenant, cache_salt), name)

    @api.delete("/v1/sessions/{name:path}")
    async def release(caller: User, name: str, cache_salt: str = "") -> dict[str, Any]:
        return await inventory.release(in_tenant(caller.tenant, cache_salt), name)


def _add_errors(api: FastAPI, metrics: IngressMetrics) -> None:
    """Every error leaves in OpenAI's shape, those of the framework included, and is counted."""

    def answered(answer: ErrorAnswer) -> Response:
        metrics.failed(answer.code)
        return Response(answer.body, status_code=answer.status, media_type="application/json", headers=answer.headers)

    async def ours(_: Request, error: Exception) -> Response:
        return answered(error_answer(error))

    async def refused(_: Request, error: Exception) -> Response:
        assert isinstance(error, Refused)
        return answered(error.refusal.answer)

    async def framework(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        if error.status_code == 405:
            return answered(error_answer(MethodNotAllowed(f"{request.method} is not served at {request.url.path}.")))
        return answered(error_answer(NotFound(f"There is nothing at {request.url.path}.")))

    api.add_exception_handler(LoopServeError, ours)
    api.add_exception_handler(Refused, refused)
    api.add_exception_handler(HTTPException, framework)
    api.add_exception_handler(Exception, ours)
