"""Serve's replica count over its REST, and calls to a controller that hangs, fails or comes back."""

import asyncio
import json
from typing import Any

import httpx
import pytest

from deploy.autopilot.scaler import ControllerScaler, RestScaler, ScalerFailed, open_scaler
from deploy.autopilot.settings import AutopilotSettings
from deploy.autopilot.signals import ReplicaCounts

pytestmark = pytest.mark.anyio

STATES = ["RUNNING", "RUNNING", "UPDATING", "STARTING", "RECOVERING", "STOPPING"]
DETAILS = {
    "applications": {
        "app": {
            "deployments": {
                "Engine": {"target_num_replicas": 5, "replicas": [{"state": state} for state in STATES]},
            }
        }
    }
}


class Dashboard:
    def __init__(self, *, status: int = 200, content: bytes | None = None) -> None:
        self.status, self.content = status, content
        self.requests: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        return httpx.Response(self.status, content=json.dumps(DETAILS) if self.content is None else self.content)

    def scaler(self, **options: Any) -> RestScaler:
        options = {"app": "app", "deployment": "Engine", "timeout_s": 1.0, **options}
        return RestScaler("http://dashboard:8265", transport=httpx.MockTransport(self), **options)


async def test_replicas_are_counted_by_what_they_are_doing():
    assert await Dashboard().scaler().counts() == ReplicaCounts(target=5, running=3, starting=2, stopping=1)


async def test_a_target_goes_to_the_public_address_with_the_token():
    dashboard = Dashboard()
    await dashboard.scaler(token="secret").scale(3)
    (request,) = dashboard.requests
    assert (request.method, request.url.path) == ("POST", "/api/v1/applications/app/deployments/Engine/scale")
    assert json.loads(request.content) == {"target_num_replicas": 3}
    assert request.headers["authorization"] == "Bearer secret"


@pytest.mark.parametrize(
    ("dashboard", "said"),
    [
        (Dashboard(status=412, content=b"external_scaler_enabled=false"), "412: external_scaler_enabled"),
        (Dashboard(status=503), "503"),
        (Dashboard(content=b"<html>"), "no JSON"),
        (Dashboard(content=b"[]"), "does not know app/Engine"),
        (Dashboard(content=b'{"applications": {}}'), "does not know app/Engine"),
        (
            Dashboard(content=b'{"applications": {"app": {"deployments": {"Engine": {"replicas": [7]}}}}}'),
            "does not know app/Engine",
        ),
    ],
)
async def test_whatever_else_a_dashboard_answers_is_a_failure_that_says_so(dashboard: Dashboard, said: str):
    with pytest.raises(ScalerFailed, match=said):
        await dashboard.scaler().counts()


async def test_a_dashboard_that_nobody_answers_at_is_a_failure():
    scaler = RestScaler("http://127.0.0.1:9", app="app", deployment="Engine", timeout_s=1.0)
    with pytest.raises(ScalerFailed, match="cannot be asked"):
        await scaler.counts()
    await scaler.close()


def test_the_way_is_the_dashboard_where_one_is_named_and_else_the_controller():
    def opened(environ: dict[str, str], **changes: Any) -> object:
        return open_scaler(AutopilotSettings(**changes), app="app", deployment="Engine", environ=environ)

    assert isinstance(opened({}), ControllerScaler)
    assert isinstance(opened({}, dashboard_url="http://head:8265"), RestScaler)
    assert isinstance(opened({"RAY_DASHBOARD_ADDRESS": "http://head:8265"}), RestScaler)


class Controller(ControllerScaler):
    """As the real one, but for the call itself."""

    def __init__(self) -> None:
        super().__init__(app="app", deployment="Engine", timeout_s=0.05)
        self.calls = 0
        self.answer = asyncio.Event()
        self.error: Exception | None = None

    async def _remote(self, method: str, *args: Any) -> Any:
        self.calls += 1
        await self.answer.wait()
        if self.error is not None:
            raise self.error
        return DETAILS


async def test_a_controller_that_hangs_is_not_waited_for_and_gets_one_call_only():
    controller = Controller()
    with pytest.raises(ScalerFailed, match=r"within 0\.05 s"):
        await controller.counts()
    for _ in range(5):
        with pytest.raises(ScalerFailed, match="still owes"):
            await controller.counts()
    assert controller.calls == 1
    controller.answer.set()
    await asyncio.sleep(0.01)
    assert (await controller.counts()).target == 5 and controller.calls == 2


async def test_a_controller_that_fails_is_asked_again():
    controller = Controller()
    controller.answer.set()
    controller.error = RuntimeError("the actor died\nreason: killed")
    with pytest.raises(ScalerFailed, match="RuntimeError: reason: killed"):
        await controller.scale(3)
    controller.error = None
    await controller.scale(3)
    assert controller.calls == 2
