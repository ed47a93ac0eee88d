"""A whole LoopServe on one machine: starts a Ray of its own, deploys, waits, and takes everything down again.

Binds loopback only, as far as Ray lets it: a replica's gRPC server listens on every interface, therefore token authentication is on, with a
token that lives as long as this process. Prints nothing: `on_event` learns what happens.
"""

import logging
import os
import re
import secrets
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

import httpx
import ray
from ray import serve

import loopserve.errors
from deploy.app import APP_NAME, ENGINE_DEPLOYMENT, build_app, has_autopilot, most_replicas
from deploy.backend import REAL_BACKEND, BackendFactory
from deploy.deployments import START_FAILED
from deploy.keys import load_keys
from deploy.settings import DeploySettings
from loopserve.config import EngineConfig
from loopserve.errors import ConfigError, EngineUnavailable, LoopServeError

# Streaming through two hops with these costs 277 instead of 683 us a token at 64 streams (2 cores, fake engine), and 146 with 4 tokens
# a chunk. They belong into the environment of every node of a cluster, too.
SERVE_ENV: Mapping[str, str] = {
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1000",
    "RAY_SERVE_LOG_TO_STDERR": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}

_POLL_S = 0.5
_OBJECT_STORE_BYTES = (
    200 << 20
)  # the largest that travels through it is a piece of a session that is handed over: 8 MiB


class Stage(StrEnum):
    """Where a local run stands."""

    STARTING = "starting"
    LOADING = "loading"
    READY = "ready"
    STOPPING = "stopping"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class RunEvent:
    """One thing to tell the user. `url` and `model` are set once ready."""

    stage: Stage
    message: str
    url: str = ""
    model: str = ""


OnEvent = Callable[[RunEvent], None]


def _ignore(_: RunEvent) -> None:
    """Tell nobody."""


def run(
    settings: DeploySettings,
    *,
    engine_config: EngineConfig | None = None,
    factory: str | BackendFactory = REAL_BACKEND,
    on_event: OnEvent = _ignore,
    stop: threading.Event | None = None,
) -> None:
    """Serve until SIGINT, SIGTERM or `stop`. Raises ConfigError, UnsupportedModel or EngineUnavailable where it cannot start."""
    stop = stop or threading.Event()
    check_topology(settings)
    check_port_is_free(settings.host, settings.port)
    if settings.keys_file:
        load_keys(Path(settings.keys_file))  # a mistake in it is told now, not after the model was loaded
    on_event(RunEvent(Stage.STARTING, "starting Ray"))
    with local_cluster(settings), _signals(stop):
        local = replace(settings, start_attempts=1, gpus_per_replica=_shared_gpus(settings))
        app = build_app(local, engine_config=engine_config, factory=factory)
        on_event(RunEvent(Stage.LOADING, f"loading {settings.replicas} replica(s)"))
        serve.run_many(
            [serve.RunTarget(app, name=APP_NAME, route_prefix="/", external_scaler_enabled=has_autopilot(settings))],
            wait_for_ingress_deployment_creation=False,
            wait_for_applications_running=False,
        )
        url = f"http://{settings.host}:{settings.port}"
        model = _wait_until_ready(local, url, stop)
        if model is not None:
            on_event(RunEvent(Stage.READY, f"serving {model} at {url}/v1", url=url, model=model))
            stop.wait()
        on_event(RunEvent(Stage.STOPPING, "stopping"))
    on_event(RunEvent(Stage.STOPPED, "stopped"))


def check_topology(settings: DeploySettings) -> None:
    """Raise ConfigError for the topology that would open this machine to its network, unless that is wanted."""
    if settings.topology == "direct" and not settings.local_direct:
        raise ConfigError(
            "topology 'direct' is a cluster setting: its proxy and every replica would listen on all interfaces of this machine. "
            "Leave LOOPSERVE_TOPOLOGY at two_hop, or set LOOPSERVE_LOCAL_DIRECT=true where that is wanted."
        )


def check_port_is_free(host: str, port: int) -> None:
    """Raise ConfigError where nothing can listen at the address."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise ConfigError(
            f"Cannot listen at {host}:{port} ({error.strerror}); choose another with HOST and PORT."
        ) from error


@contextmanager
def local_cluster(settings: DeploySettings) -> Iterator[None]:
    """A Ray and a Serve of one node without dashboard, gone afterwards."""
    folder = tempfile.mkdtemp(
        prefix="ls-", dir="/tmp" if Path("/tmp").is_dir() else None
    )  # sockets allow 107 characters
    # Ray turns token authentication on by itself and would write a token into the home directory; it keeps the first token it reads, so
    # this one stays for later clusters of this process.
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    logging.getLogger("ray.serve").setLevel(logging.ERROR)  # failures come back as exceptions of ours
    with _environment(SERVE_ENV):
        try:
            ray.init(
                address="local",
                include_dashboard=False,
                num_cpus=1,  # logical; our actors ask for none, and Ray starts as many idle workers
                object_store_memory=_OBJECT_STORE_BYTES,
                log_to_driver=False,
                logging_level="ERROR",
                _temp_dir=folder,
                _node_ip_address="127.0.0.1",
            )
            serve.start(proxy_location="HeadOnly", http_options={"host": settings.host, "port": settings.port})
            yield
        finally:
            with suppress(Exception):  # a half-started Serve has nothing to delete
                for name in serve.status().applications:
                    serve.delete(name)  # lets turns end; Serve's own actors go with Ray
            ray.shutdown()
            shutil.rmtree(folder, ignore_errors=True)


def _wait_until_ready(settings: DeploySettings, url: str, stop: threading.Event) -> str | None:
    """The model's name once every replica runs and the way through HTTP works; None if stopped before."""
    deadline = time.monotonic() + settings.start_timeout_s
    while not stop.wait(_POLL_S):
        progress = app_progress(APP_NAME)
        failure = start_failure(progress.message)
        if failure is not None:
            raise failure
        if progress.running >= settings.replicas:
            model = _served_model(url)
            if model is not None:
                return model
        if time.monotonic() > deadline:
            raise EngineUnavailable(
                f"{progress.running} of {settings.replicas} replicas started within {settings.start_timeout_s:g} s. "
                f"Allow more with LOOPSERVE_START_TIMEOUT_S, or ask for fewer with REPLICAS. {progress.message}".strip()
            )
    return None


@dataclass(frozen=True, slots=True)
class AppProgress:
    """How far an application is: engine replicas that run, and everything Serve says about failures."""

    running: int
    message: str  # begins with DEPLOY_FAILED where Serve has given up


def app_progress(name: str) -> AppProgress:
    """What Serve's controller knows of an application."""
    overview = serve.status().applications.get(name)
    if overview is None:
        return AppProgress(0, "")
    engines = overview.deployments.get(ENGINE_DEPLOYMENT)
    running = engines.replica_states.get("RUNNING", 0) if engines else 0
    messages = [overview.message, *(deployment.message for deployment in overview.deployments.values())]
    if overview.status == "DEPLOY_FAILED":
        messages.insert(0, "DEPLOY_FAILED")
    return AppProgress(running, "\n".join(filter(None, messages)))


def start_failure(message: str) -> LoopServeError | None:
    """The error of the tree that a replica's constructor raised, out of Serve's status message; None where nothing failed for good."""
    found = re.search(rf"{START_FAILED} \[(\w+)\] (.*?) \[end\]", message, flags=re.DOTALL)
    if found is not None:
        kind = getattr(loopserve.errors, found.group(1), LoopServeError)
        error = kind(found.group(2))
        assert isinstance(error, LoopServeError)
        return error
    if message.startswith("DEPLOY_FAILED"):
        last_line = message.strip().splitlines()[-1].strip()
        return EngineUnavailable(f"The replicas could not start: {last_line}")
    return None


def _served_model(url: str) -> str | None:
    try:
        ready = httpx.get(f"{url}/ready", timeout=5.0, trust_env=False)  # open to everybody, /v1/models may need a key
        return str(ready.json()["models"][0]) if ready.status_code == 200 else None
    except (httpx.HTTPError, LookupError):
        return None


def _shared_gpus(settings: DeploySettings) -> float | None:
    """Replicas of one machine share the GPUs that Ray found."""
    if settings.gpus_per_replica is not None or settings.device == "cpu":
        return settings.gpus_per_replica
    return min(1.0, float(ray.cluster_resources().get("GPU", 0.0)) / most_replicas(settings))


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set variables that Ray hands down to its processes; what the user has set stays."""
    missing = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(missing)
    try:
        yield
    finally:
        for name in missing:
            os.environ.pop(name, None)


@contextmanager
def _signals(stop: threading.Event) -> Iterator[None]:
    """SIGINT and SIGTERM set `stop`, where this is the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in previous:
        signal.signal(number, lambda *_: stop.set())
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
