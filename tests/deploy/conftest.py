"""What the deployment's tests share: one Ray with one application, three replicas of a fake engine and two ingresses.

In topology `direct` the same application without ingresses; test_direct.py runs these tests so, in a network of their own.
"""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from topology import TOPOLOGY

from deploy.settings import DeploySettings
from monitoring.settings import MetricsSettings

HERE = Path(__file__).parent


@pytest.fixture
def anyio_backend() -> str:
    """Async tests run on asyncio, as Serve does."""
    return "asyncio"


@pytest.fixture(scope="session")
def cluster() -> Iterator[DeploySettings]:
    """A Ray on loopback, without applications, whose processes find this checkout and the fakes."""
    from deploy.local import local_cluster

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = DeploySettings(
        port=port,
        replicas=3,
        ingress_replicas=2,
        topology=TOPOLOGY,
        local_direct=True,
        health_check_period_s=0.5,
        routing_stats_period_s=0.2,
        stop_timeout_s=5.0,
        start_attempts=1,
        metrics=MetricsSettings(ray_export=True, refresh_s=1.0),
    )
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(HERE.parents[1]), str(HERE), before)))
    try:
        with local_cluster(settings):
            yield settings
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before


@pytest.fixture(scope="session")
def url(cluster: DeploySettings) -> str:
    """Address of the running application."""
    from ray import serve

    from deploy.app import APP_NAME, build_app
    from loopserve.config import EngineConfig

    if TOPOLOGY == "direct":
        from served_directly import deploy_from_yaml

        return deploy_from_yaml(cluster)
    app = build_app(cluster, engine_config=EngineConfig(), factory="fake_backend:fake_backend")
    serve.run_many([serve.RunTarget(app, name=APP_NAME, route_prefix="/")])
    return f"http://127.0.0.1:{cluster.port}"
