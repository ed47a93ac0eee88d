"""One server of the streaming benchmark, in a network and a process table of its own: starts it, and measures it when told.

    python -m benchmarks.cluster.own_network python -m benchmarks.cluster.streaming_arm ARM

Reads one JSON request a line (`streams`, `warm_up_s`, `window_s`), answers one JSON line; ends with its input. In its own process table the
server is every process but this one and the client, so its CPU time is all of theirs.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from benchmarks.cluster.own_network import ROOT

PORT = 18080
START_S_MAX, STOP_S_MAX = 180.0, 30.0
_TICKS_PER_S = 100  # of /proc, on every Linux of today
ARMS = ("two_hop", "direct", "bare")


@contextmanager
def served(arm: str) -> Iterator[None]:
    """The arm's server, answering at PORT."""
    with _bare() if arm == "bare" else _loopserve(arm):
        _wait_until_ready()
        yield


@contextmanager
def _bare() -> Iterator[None]:
    command = [
        sys.executable,
        "-m",
        "uvicorn",
        "--factory",
        "benchmarks.cluster.fake_engine:bare_api",
        "--no-access-log",
    ]
    with subprocess.Popen([*command, "--port", str(PORT), "--log-level", "warning"], cwd=ROOT) as server:
        try:
            yield
        finally:
            server.terminate()
            server.wait(STOP_S_MAX)


@contextmanager
def _loopserve(topology: str) -> Iterator[None]:
    from ray import serve

    from deploy.app import APP_NAME, build_app
    from deploy.local import local_cluster
    from deploy.settings import DeploySettings
    from loopserve.config import EngineConfig

    settings = DeploySettings.from_env(
        port=PORT, topology=topology, replicas=1, local_direct=True, stop_timeout_s=2.0, start_attempts=1
    )
    with local_cluster(settings):
        app = build_app(settings, engine_config=EngineConfig(), factory="benchmarks.cluster.fake_engine:step_backend")
        serve.run_many([serve.RunTarget(app, name=APP_NAME, route_prefix="/")])
        yield


def _wait_until_ready() -> None:
    deadline_s = time.monotonic() + START_S_MAX
    while time.monotonic() < deadline_s:
        try:
            if httpx.get(f"http://127.0.0.1:{PORT}/ready", timeout=5.0, trust_env=False).json()["replicas"]:
                return
        except (httpx.HTTPError, ValueError, LookupError):
            pass
        time.sleep(0.2)
    sys.exit(f"the server did not answer within {START_S_MAX:g} s")


def measure(num_streams: int, *, warm_up_s: float, window_s: float) -> dict[str, float]:
    """Read so many streams, and account for the server's CPU time in the window."""
    arguments = [str(PORT), str(num_streams), str(warm_up_s), str(window_s)]
    command = [sys.executable, "-m", "benchmarks.cluster.stream_client", *arguments]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as client:
        assert client.stdout is not None
        cpu_s = {}
        for line in client.stdout:
            if line.strip() not in ("begin", "end"):
                return {**json.loads(line), "server_cpu_s": cpu_s["end"] - cpu_s["begin"]}
            cpu_s[line.strip()] = server_cpu_s(client.pid)
    raise RuntimeError("The client ended without a result.")


def server_cpu_s(client: int, *, proc: Path = Path("/proc")) -> float:
    """CPU seconds of all processes here but this one and the client, their ended children included."""
    total = 0
    own = {client, os.getpid()}
    for stat in proc.glob("[0-9]*/stat"):
        if int(stat.parent.name) in own:
            continue
        try:
            after_name = stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        except OSError:  # it has ended meanwhile
            continue
        total += sum(int(ticks) for ticks in after_name[11:15])
    return total / _TICKS_PER_S


def main(arm: str) -> None:
    """Serve requests from standard input."""
    with served(arm):
        print("ready", flush=True)
        for line in sys.stdin:
            wanted = json.loads(line)
            found = measure(wanted["streams"], warm_up_s=wanted["warm_up_s"], window_s=wanted["window_s"])
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
