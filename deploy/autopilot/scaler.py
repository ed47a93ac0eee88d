"""How many engine replicas Serve runs, read and set through its external scaler: the one place that knows how. Two ways, same contract:

    RestScaler          Serve's REST on the dashboard: public, and the way where there is one
    ControllerScaler    a call to Serve's controller: a local run has no dashboard; tried with the Ray that is pinned

Both need `external_scaler_enabled` on the application. Serve keeps the target over a restart of its controller (it is in the
checkpoint); a re-deploy that changes the engine's deployment sets it back to `num_replicas`, which the decision then takes over. Every
call ends within its limit. While one hangs no further one is made: a controller that is away would find a thousand of them when it comes
back.
"""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Generic, Protocol, TypeVar

import httpx
import ray
from ray.serve._private.common import DeploymentID
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

from deploy.autopilot.settings import AutopilotSettings
from deploy.autopilot.signals import ReplicaCounts

_T = TypeVar("_T")
_STARTING = ("STARTING", "RECOVERING", "PENDING_MIGRATION")
_RUNNING = ("RUNNING", "UPDATING")  # updating: its settings change in place


class ScalerFailed(Exception):
    """Serve did not say, or did not take, a replica count."""


class Scaler(Protocol):
    """The replica count of one deployment."""

    async def counts(self) -> ReplicaCounts:
        """As Serve sees it now. Raises ScalerFailed."""

    async def scale(self, target: int) -> None:
        """Set the target; returns when Serve has taken it. Raises ScalerFailed."""

    async def close(self) -> None:
        """Give back what is held."""


class RestScaler:
    """Serve's REST on the dashboard."""

    def __init__(
        self,
        url: str,
        *,
        app: str,
        deployment: str,
        timeout_s: float,
        token: str = "",
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._app, self._deployment, self._timeout_s = app, deployment, timeout_s
        self._client = httpx.AsyncClient(
            base_url=url,
            timeout=timeout_s,
            trust_env=False,
            headers={"authorization": f"Bearer {token}"} if token else {},
            transport=transport,
        )

    async def counts(self) -> ReplicaCounts:
        """See `Scaler`."""
        return _counts(await self._call("GET", "/api/serve/applications/"), self._app, self._deployment)

    async def scale(self, target: int) -> None:
        """See `Scaler`."""
        path = f"/api/v1/applications/{self._app}/deployments/{self._deployment}/scale"
        await self._call("POST", path, {"target_num_replicas": target})

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def _call(self, method: str, path: str, body: Mapping[str, int] | None = None) -> Any:
        try:
            async with asyncio.timeout(self._timeout_s):
                response = await self._client.request(method, path, json=body)
        except TimeoutError as error:
            raise ScalerFailed(f"the dashboard did not answer within {self._timeout_s:g} s") from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ScalerFailed(f"the dashboard cannot be asked: {type(error).__name__}: {error}") from error
        if response.status_code != 200:
            raise ScalerFailed(f"the dashboard answered {response.status_code}: {response.text[:200]}")
        try:
            return response.json()
        except ValueError as error:
            raise ScalerFailed("the dashboard's answer is no JSON") from error


class ControllerScaler:
    """Calls to Serve's controller, as Serve's own REST makes them."""

    def __init__(self, *, app: str, deployment: str, timeout_s: float) -> None:
        self._id = DeploymentID(name=deployment, app_name=app)
        self._asking = _OneAtATime[Any](timeout_s)
        self._scaling = _OneAtATime[Any](timeout_s)

    async def counts(self) -> ReplicaCounts:
        """See `Scaler`."""
        details = await self._asking.call(lambda: self._remote("get_serve_instance_details"))
        return _counts(details, self._id.app_name, self._id.name)

    async def scale(self, target: int) -> None:
        """See `Scaler`."""
        await self._scaling.call(lambda: self._remote("update_deployment_replicas", self._id, target))

    async def close(self) -> None:
        """Nothing is held."""

    async def _remote(self, method: str, *args: Any) -> Any:
        controller = await asyncio.to_thread(ray.get_actor, SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
        return await getattr(controller, method).remote(*args)


class _OneAtATime(Generic[_T]):
    """Calls of which at most one is under way; one that outlives its limit goes on, and its late result counts for nobody."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._running: asyncio.Task[_T] | None = None

    async def call(self, start: Callable[[], Awaitable[_T]]) -> _T:
        """The result of a new call. Raises ScalerFailed."""
        if self._running is not None and not self._running.done():
            raise ScalerFailed("Serve's controller still owes the last answer")
        self._running = asyncio.ensure_future(_awaited(start))
        self._running.add_done_callback(_look_at)
        done, _ = await asyncio.wait({self._running}, timeout=self._timeout_s)
        if not done:
            raise ScalerFailed(f"Serve's controller did not answer within {self._timeout_s:g} s")
        try:
            return self._running.result()
        except Exception as error:  # Ray's errors have no common root
            said = str(error).strip().splitlines()
            raise ScalerFailed(
                f"Serve's controller failed: {type(error).__name__}: {said[-1] if said else ''}"
            ) from error


async def _awaited(start: Callable[[], Awaitable[_T]]) -> _T:
    return await start()


def _look_at(task: "asyncio.Task[Any]") -> None:
    """A failure that came too late for its caller is not reported as never retrieved."""
    if not task.cancelled():
        task.exception()


def open_scaler(
    settings: AutopilotSettings, *, app: str, deployment: str, environ: Mapping[str, str]
) -> RestScaler | ControllerScaler:
    """The way that there is: a dashboard's address from the settings or from RAY_DASHBOARD_ADDRESS, else the controller."""
    url = settings.dashboard_url or environ.get("RAY_DASHBOARD_ADDRESS", "")
    if not url:
        return ControllerScaler(app=app, deployment=deployment, timeout_s=settings.act_timeout_s)
    token = environ.get(settings.dashboard_token_env, "") if settings.dashboard_token_env else ""
    return RestScaler(url, app=app, deployment=deployment, timeout_s=settings.act_timeout_s, token=token)


def _counts(details: Any, app: str, deployment: str) -> ReplicaCounts:
    """The counts in what Serve tells of itself. Raises ScalerFailed where the deployment is not in it, as while Serve restarts."""
    try:
        told = details["applications"][app]["deployments"][deployment]
        states = Counter(str(getattr(replica["state"], "value", replica["state"])) for replica in told["replicas"])
        target = int(told["target_num_replicas"])
    except (LookupError, TypeError, ValueError) as error:
        raise ScalerFailed(f"Serve does not know {app}/{deployment} now") from error
    return ReplicaCounts(
        target=target,
        running=sum(states[state] for state in _RUNNING),
        starting=sum(states[state] for state in _STARTING),
        stopping=states["STOPPING"],
    )
