"""The one query against a real Prometheus that scrapes real pages: values, times, a replica that goes, a page that stops."""

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from fake_backend import FakeEngine

from deploy.autopilot.settings import AutopilotSettings
from deploy.autopilot.signals import Cause, Reading, ReplicaCounts, Untrusted, trusted
from deploy.autopilot.sources import PrometheusSource
from deploy.observe.local_prometheus import local_prometheus
from monitoring.catalogue import CATALOGUE, COMPACT_ABOVE, REPLICA_UP, Origin
from monitoring.exposition import Part, PrometheusSink, page
from monitoring.recorder import MemoryRecorder
from monitoring.tools import find_tool

PROMETHEUS = find_tool("prometheus")

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(PROMETHEUS is None, reason="there is no prometheus; `make tools` fetches it"),
]

LIMIT_S = 30.0
SETTINGS = AutopilotSettings(snapshot_age_max_s=3.0, source_timeout_s=10.0, max_replicas=4)


class Pages:
    """The application's page with these replicas on it; None: an error."""

    def __init__(self) -> None:
        self.engines: dict[str, FakeEngine] | None = {"a": FakeEngine(), "b": FakeEngine()}

    def text(self) -> bytes:
        parts = []
        for name, engine in (self.engines or {}).items():
            sink = PrometheusSink([metric for metric in CATALOGUE if metric.origin is Origin.ENGINE])
            MemoryRecorder(sink).record(engine.memory())
            sink.set(REPLICA_UP, 1.0)
            sink.set(COMPACT_ABOVE, 0.25)
            parts.append(Part(Origin.ENGINE, name, sink.families()))
        return page(parts)


@pytest.fixture
def pages() -> Iterator[tuple[Pages, str]]:
    pages = Pages()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = pages.text()
            self.send_response(500 if pages.engines is None else 200)
            self.send_header("content-type", "text/plain; version=0.0.4")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Silent."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    assert PROMETHEUS is not None
    try:
        with local_prometheus(PROMETHEUS, target=f"127.0.0.1:{server.server_address[1]}") as url:
            yield pages, url
    finally:
        server.shutdown()
        server.server_close()


async def read_until(source: PrometheusSource, *names: str) -> Reading:
    """The first reading of just these replicas."""
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        reading = await source.read()
        if sorted(one.replica for one in reading.replicas) == sorted(names):
            return reading
        time.sleep(0.2)
    raise AssertionError(reading)


async def test_a_fleet_is_read_from_a_real_prometheus(pages: tuple[Pages, str]):
    shown, url = pages
    source = PrometheusSource(replace(SETTINGS, prometheus_url=url))
    try:
        reading = await read_until(source, "a", "b")
        assert not reading.rejected
        one = reading.replicas[0]
        assert (one.capacity_bytes, one.active_bytes, one.warm_bytes, one.shared_bytes) == (16_000, 1600, 3200, 1600)
        assert (one.host_capacity_bytes, one.host_live_bytes, one.host_warm_bytes) == (16_000, 1600, 6400)
        assert one.compact_above_ratio == 0.25
        assert one.demand == ((8, 1000, 1200), (16, 1800, 2000), (None, 3000, 4000))
        assert (one.num_running, one.max_running, one.budget_ceiling_tokens) == (1, 4, None)
        assert len({one.unix_time for one in reading.replicas}) == 1, "one page, one moment"
        snapshot = trusted(reading, ReplicaCounts(2, 2, 0, 0), SETTINGS, unix_time=time.time())
        assert snapshot.is_whole and snapshot.age_s <= SETTINGS.snapshot_age_max_s

        assert shown.engines is not None
        shown.engines["a"].set_budget(8)
        del shown.engines["b"]
        (left,) = (await read_until(source, "a")).replicas
        assert left.budget_ceiling_tokens == 8, "the page without b is the newest"

        shown.engines = None
        deadline = time.monotonic() + LIMIT_S
        with pytest.raises(Untrusted) as untrusted:
            while time.monotonic() < deadline:
                trusted(await source.read(), ReplicaCounts(1, 1, 0, 0), SETTINGS, unix_time=time.time())
                time.sleep(0.2)
        assert untrusted.value.cause in (Cause.STALE, Cause.MISSING)
    finally:
        await source.close()
