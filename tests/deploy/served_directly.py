"""The application in topology `direct`, deployed as a cluster does it: from YAML, by the call that Serve's REST handler makes."""

import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import httpx
import yaml
from fake_backend import MODEL
from ray import serve
from ray.serve._private.api import _get_global_client
from ray.serve.schema import ServeDeploySchema

from deploy.app import build_app
from deploy.settings import DeploySettings
from loopserve.config import EngineConfig

START_LIMIT_S = 120.0
PASSED_ON = (
    "topology",
    "replicas",
    "health_check_period_s",
    "routing_stats_period_s",
    "stop_timeout_s",
    "start_attempts",
)


def application(args: Mapping[str, Any]) -> serve.Application:
    """`deploy.app.application` with the fake engine."""
    settings = DeploySettings.from_env(**args)
    return build_app(settings, engine_config=EngineConfig(), factory="fake_backend:fake_backend")


def deploy_from_yaml(settings: DeploySettings) -> str:
    """Deploy, wait until HAProxy knows all replicas and asks the session router, and give its address."""
    args = {name: value for name, value in asdict(settings).items() if name in PASSED_ON}
    args["autopilot"] = {"mode": "dry-run"}
    app = {"name": "loopserve", "route_prefix": "/", "import_path": "served_directly:application", "args": args}
    text = yaml.safe_dump({"applications": [app]})
    _get_global_client().deploy_apps(ServeDeploySchema.model_validate(yaml.safe_load(text)), _blocking=False)
    url = f"http://127.0.0.1:{settings.port}"
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline:
        status = serve.status().applications["loopserve"]
        assert status.status != "DEPLOY_FAILED", status
        with httpx.Client(base_url=url, trust_env=False, timeout=START_LIMIT_S) as client:
            ready = client.get("/ready")
            is_ready = ready.status_code == 200 and len(ready.json()["replicas"]) == settings.replicas
            if is_ready and _is_placed(client, settings.replicas):
                return url
        time.sleep(0.5)
    raise AssertionError(f"not all replicas came: {serve.status()}")


def _is_placed(client: httpx.Client, num_replicas: int) -> bool:
    """Whether requests go where the session router says, and HAProxy knows every replica.

    Until the router runs, HAProxy spreads requests evenly; and one replica alone would answer them all too.
    """
    body = {"model": MODEL, "messages": [{"role": "user", "content": "tokens=1"}]}
    homes = set()
    for _ in range(4 * num_replicas):
        headers = {"x-session-id": f"probe-{uuid.uuid4()}"}
        said = [client.post("/v1/chat/completions", json=body, headers=headers) for _ in range(3)]
        found = {answer.headers.get("x-loopserve-replica") for answer in said}
        if len(found) > 1:
            return False
        homes |= found
    return len(homes) == num_replicas
