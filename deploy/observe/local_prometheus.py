"""A Prometheus of our own for as long as one run lasts: loopback only, its data in a folder that goes with it. Knows no page."""

import json
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx

from loopserve.errors import EngineUnavailable

SCRAPE_S = 1.0  # the page shows seconds
_START_S_MAX = 30.0
_STOP_S_MAX = 10.0
_POLL_S = 0.1


@contextmanager
def local_prometheus(program: Path, *, target: str, api_key: str = "") -> Iterator[str]:
    """Scrape `target` (host and port) from now on; the address to ask. Raises EngineUnavailable where the program does not start.

    A session of its own keeps Ctrl-C from it, so that it ends after those who ask it.
    """
    folder = Path(tempfile.mkdtemp(prefix="ls-prometheus-"))  # for this user only, as the key may stand in it
    try:
        (folder / "prometheus.yml").write_text(json.dumps(_config(target, api_key)))  # JSON is YAML
        address = f"127.0.0.1:{_free_port()}"
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                [
                    program,
                    f"--config.file={folder / 'prometheus.yml'}",
                    f"--storage.tsdb.path={folder / 'data'}",
                    f"--web.listen-address={address}",
                    "--storage.tsdb.retention.time=1d",
                    "--log.level=warn",
                ],
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            _wait_until_ready(f"http://{address}", process, folder / "log")
            yield f"http://{address}"
        finally:
            _end(process)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _config(target: str, api_key: str) -> dict[str, Any]:
    job: dict[str, Any] = {"job_name": "loopserve", "static_configs": [{"targets": [target]}]}
    if api_key:
        job["authorization"] = {"type": "Bearer", "credentials": api_key}
    interval = f"{SCRAPE_S:g}s"
    return {"global": {"scrape_interval": interval, "scrape_timeout": interval}, "scrape_configs": [job]}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _START_S_MAX
    while process.poll() is None and time.monotonic() < deadline:
        with suppress(httpx.HTTPError):
            if httpx.get(f"{url}/-/ready", timeout=1.0, trust_env=False).status_code == 200:
                return
        time.sleep(_POLL_S)
    last = log.read_text(errors="replace").strip().splitlines()[-1:]
    raise EngineUnavailable(f"Prometheus did not start: {last[0] if last else 'it says nothing'}")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_STOP_S_MAX)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
