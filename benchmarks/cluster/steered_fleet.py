"""A whole LoopServe in this process's own Ray, steered by a benchmark: who its replicas are, fewer of them, and what they counted."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import ray
from prometheus_client.parser import text_string_to_metric_families
from ray import serve
from ray.serve._private.common import DeploymentID

from deploy.app import APP_NAME, ENGINE_DEPLOYMENT, build_app
from deploy.local import local_cluster
from deploy.settings import DeploySettings
from loopserve.config import EngineConfig

_WAIT_S_MAX = 180.0
_POLL_S = 0.2


@contextmanager
def running_fleet(settings: DeploySettings, config: EngineConfig) -> Iterator[Fleet]:
    """The service until the block ends; replicas come and go as `Fleet.scale` says."""
    with local_cluster(settings):
        app = build_app(settings, engine_config=config)
        serve.run_many([serve.RunTarget(app, name=APP_NAME, route_prefix="/", external_scaler_enabled=True)])
        yield Fleet(settings)


class Fleet:
    """The service, as it runs."""

    def __init__(self, settings: DeploySettings) -> None:
        self._settings = settings
        self.url = f"http://127.0.0.1:{settings.port}"

    def replicas(self) -> dict[str, int]:
        """The replicas that answer, and their process ids."""
        try:
            ready = httpx.get(f"{self.url}/ready", timeout=5.0, trust_env=False)
            names = set(ready.json().get("replicas", ()))
        except (httpx.HTTPError, ValueError):
            return {}
        details = ray.get(self._controller().get_serve_instance_details.remote(), timeout=_WAIT_S_MAX)
        told = details["applications"][APP_NAME]["deployments"][ENGINE_DEPLOYMENT]["replicas"]
        return {replica["replica_id"]: replica["pid"] for replica in told if replica["replica_id"] in names}

    def wait_for(self, num_replicas: int, *, without: str = "") -> dict[str, int]:
        """Until so many answer, and one of them does not any more. Raises TimeoutError."""
        deadline_s = time.monotonic() + _WAIT_S_MAX
        while time.monotonic() < deadline_s:
            found = self.replicas()
            if len(found) == num_replicas and without not in found:
                return found
            time.sleep(_POLL_S)
        raise TimeoutError(f"not {num_replicas} replicas within {_WAIT_S_MAX:g} s: {self.replicas()}")

    def scale(self, num_replicas: int) -> None:
        """As the autopilot does it."""
        target = DeploymentID(name=ENGINE_DEPLOYMENT, app_name=APP_NAME)
        ray.get(self._controller().update_deployment_replicas.remote(target, num_replicas), timeout=_WAIT_S_MAX)

    def model(self) -> str:
        """The name under which the model is served."""
        models = httpx.get(f"{self.url}/v1/models", timeout=30.0, trust_env=False)
        return str(models.json()["data"][0]["id"])

    def wait_until_gone(self, processes: Mapping[str, int]) -> str:
        """The first of these replicas whose process ends: `/ready` leaves one out before it has given its sessions away."""
        deadline_s = time.monotonic() + _WAIT_S_MAX
        while time.monotonic() < deadline_s:
            gone = [name for name, process in processes.items() if not Path(f"/proc/{process}").exists()]
            if gone:
                return gone[0]
            time.sleep(_POLL_S)
        raise TimeoutError(f"no replica ended within {_WAIT_S_MAX:g} s")

    def counted(self, metric: str, label: str = "") -> dict[str, float]:
        """A metric of all replicas that are there, by one label; without one under the empty name."""
        found: Counter[str] = Counter()
        page = httpx.get(f"{self.url}/metrics", timeout=30.0, trust_env=False).text
        for family in text_string_to_metric_families(page):
            for sample in family.samples:
                if sample.name == metric and sample.value:
                    found[sample.labels[label] if label else ""] += sample.value
        return dict(found)

    def _controller(self) -> Any:
        return ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
