"""A whole LoopServe as a child process, started and ended by a benchmark: its own port, its own process group, loopback only.

Knows the command line, the environment's names and `/ready`; knows nothing about what is asked of the service.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parents[2]
SERVE = (sys.executable, "-m", "loopserve", "serve")
START_S_MAX, STOP_S_MAX = 300.0, 60.0
_POLL_S = 0.5
_LOG_TAIL_CHARS = 4000


class ServiceFailed(Exception):
    """The service did not start, or ended by itself; holds the end of its log."""


@dataclass(frozen=True, slots=True)
class Service:
    """A service that answers."""

    url: str
    model: str
    max_session_tokens: int
    replicas: tuple[str, ...]


@contextmanager
def running_service(
    settings: Mapping[str, str],
    *,
    num_replicas: int,
    log: Path,
    command: Sequence[str] = SERVE,
    port: int | None = None,
) -> Iterator[Service]:
    """`command` with these variables over this process's environment, until the block ends; at a free port if none is given.

    Writes what the service prints to `log`. Raises ServiceFailed where not all replicas answer within START_S_MAX.
    """
    port = free_port() if port is None else port
    wanted = {"HOST": "127.0.0.1", "PORT": str(port), "REPLICAS": str(num_replicas)}
    with log.open("wb") as output:
        process = subprocess.Popen(
            list(command),
            cwd=ROOT,
            env={**os.environ, **settings, **wanted},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            yield _wait_until_ready(process, f"http://127.0.0.1:{port}", num_replicas=num_replicas, log=log)
        finally:
            _end(process)


def free_port() -> int:
    """A loopback port on which nobody listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_ready(process: subprocess.Popen[bytes], url: str, *, num_replicas: int, log: Path) -> Service:
    deadline_s = time.monotonic() + START_S_MAX
    with httpx.Client(base_url=url, timeout=5.0, trust_env=False) as http:
        while time.monotonic() < deadline_s:
            if process.poll() is not None:
                raise ServiceFailed(f"the service ended by itself ({process.returncode}):\n{_tail(log)}")
            found = _answering(http)
            if found is not None and len(found.replicas) == num_replicas:
                return found
            time.sleep(_POLL_S)
    raise ServiceFailed(f"not all {num_replicas} replicas answered within {START_S_MAX:g} s:\n{_tail(log)}")


def _answering(http: httpx.Client) -> Service | None:
    """The service as it stands, or None while it does not answer."""
    try:
        ready = http.get("/ready")
        models = http.get("/v1/models")
        if ready.status_code != httpx.codes.OK or models.status_code != httpx.codes.OK:
            return None
        model = models.json()["data"][0]
        return Service(
            url=str(http.base_url).rstrip("/"),
            model=str(model["id"]),
            max_session_tokens=int(model["max_model_len"]),
            replicas=tuple(ready.json()["replicas"]),
        )
    except (httpx.HTTPError, LookupError):
        return None


def _end(process: subprocess.Popen[bytes]) -> None:
    """As a service manager ends it; what has not gone in time is killed with its process group."""
    process.send_signal(signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(STOP_S_MAX)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(STOP_S_MAX)


def _tail(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")[-_LOG_TAIL_CHARS:]
