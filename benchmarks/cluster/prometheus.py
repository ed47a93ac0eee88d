"""A Prometheus of a benchmark's own: started and ended by it, on loopback, with its data in a folder; and questions to it.

Knows the program's command line and its HTTP API; knows nothing of what is measured.
"""

import math
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from benchmarks.cluster.service import free_port
from monitoring.tools import find_tool

_START_S_MAX, _STOP_S_MAX = 30.0, 30.0
_POLL_S = 0.05


class PrometheusFailed(Exception):
    """It is not there, did not start, or did not understand."""


@dataclass(frozen=True, slots=True)
class Series:
    """One answer of a range query; a moment without a sample is NaN."""

    labels: Mapping[str, str]
    values: tuple[float, ...]


class Prometheus:
    """One server. It may be stopped and started again: port and data stay. Usable with `with`."""

    def __init__(self, folder: Path, *, targets: Sequence[str], scrape_s: float = 1.0) -> None:
        """`targets` are HOST:PORT whose `/metrics` is read. Raises PrometheusFailed where the program is not found."""
        program = find_tool("prometheus")
        if program is None:
            raise PrometheusFailed("There is no prometheus here; `make tools` fetches it, or name it with $PROMETHEUS.")
        self._program = program
        self._folder = folder
        self._port = free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self.url = f"http://127.0.0.1:{self._port}"
        named = ", ".join(f"'{target}'" for target in targets)
        every = f"{round(scrape_s * 1000)}ms"
        self._config = folder / "prometheus.yml"
        self._config.write_text(
            f"global: {{scrape_interval: {every}, scrape_timeout: {every}}}\n"
            f"scrape_configs: [{{job_name: loopserve, static_configs: [{{targets: [{named}]}}]}}]\n",
            encoding="utf-8",
        )

    def start(self) -> None:
        """Start it and wait until it answers. Raises PrometheusFailed."""
        assert self._process is None, "it runs"
        with (self._folder / "prometheus.log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    str(self._program),
                    f"--config.file={self._config}",
                    f"--storage.tsdb.path={self._folder / 'data'}",
                    f"--web.listen-address=127.0.0.1:{self._port}",
                ],
                env={**os.environ, "GOMAXPROCS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        deadline_s = time.monotonic() + _START_S_MAX
        while time.monotonic() < deadline_s and self._process.poll() is None:
            with suppress(httpx.HTTPError):
                if httpx.get(f"{self.url}/-/ready", timeout=1.0, trust_env=False).status_code == httpx.codes.OK:
                    return
            time.sleep(_POLL_S)
        tail = (self._folder / "prometheus.log").read_text(errors="replace")[-2000:]
        self.stop()
        raise PrometheusFailed(f"Prometheus did not start:\n{tail}")

    def stop(self) -> None:
        """End it; what it has stored stays."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_S_MAX)
        process.kill()
        process.wait()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def range(self, query: str, *, start: float, num_steps: int, step_s: float = 1.0) -> tuple[Series, ...]:
        """Every series of a query at `num_steps` moments from the unix time `start` on. Raises PrometheusFailed."""
        end = start + (num_steps - 1) * step_s
        found = self._ask("query_range", query=query, start=start, end=end, step=step_s)
        return tuple(_series(result, start=start, num_steps=num_steps, step_s=step_s) for result in found)

    def one(self, query: str, *, start: float, num_steps: int, step_s: float = 1.0) -> tuple[float, ...]:
        """The same for a query with at most one series; all NaN where there is none."""
        found = self.range(query, start=start, num_steps=num_steps, step_s=step_s)
        if len(found) > 1:
            raise PrometheusFailed(f"{query} has {len(found)} series, one was expected")
        return found[0].values if found else (math.nan,) * num_steps

    def _ask(self, what: str, **parameters: Any) -> list[dict[str, Any]]:
        try:
            answer = httpx.get(f"{self.url}/api/v1/{what}", params=parameters, timeout=30.0, trust_env=False)
            body = answer.json()
        except (httpx.HTTPError, ValueError) as error:
            raise PrometheusFailed(f"Prometheus does not answer: {error}") from error
        if body.get("status") != "success":
            raise PrometheusFailed(f"{parameters.get('query')}: {body.get('error')}")
        found: list[dict[str, Any]] = body["data"]["result"]
        return found


def _series(result: Mapping[str, Any], *, start: float, num_steps: int, step_s: float) -> Series:
    values = [math.nan] * num_steps
    for at, text in result["values"]:
        index = round((float(at) - start) / step_s)
        if 0 <= index < num_steps:
            values[index] = float(text)
    return Series(result["metric"], tuple(values))
