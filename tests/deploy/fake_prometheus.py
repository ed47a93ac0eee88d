"""A Prometheus on loopback that answers one kind of query, rightly or not: slow, empty, wrong, endless, or gone."""

import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs

from deploy.calls import ReplicaSignals

Series = dict[str, object]


class FakePrometheus:
    """Answers with `series`; `body`, `status`, `delay_s` and `endless` are its faults."""

    def __init__(self) -> None:
        self.series: list[Series] = []
        self.body: bytes | None = None
        self.status = 200
        self.delay_s = 0.0
        self.endless = False
        self.queries: list[str] = []
        self.headers: list[Mapping[str, str]] = []
        self.url = ""

    def answer(self) -> bytes:
        if self.body is not None:
            return self.body
        return json.dumps({"status": "success", "data": {"resultType": "matrix", "result": self.series}}).encode()


@contextmanager
def fake_prometheus() -> Iterator[FakePrometheus]:
    fake = FakePrometheus()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            length = int(self.headers.get("content-length", 0))
            fake.queries.append(parse_qs(self.rfile.read(length).decode())["query"][0])
            fake.headers.append(dict(self.headers))
            time.sleep(fake.delay_s)
            body = fake.answer()
            self.send_response(fake.status)
            if not fake.endless:
                self.send_header("content-length", str(len(body)))
            self.end_headers()
            try:
                self.wfile.write(body)
                while fake.endless:
                    self.wfile.write(b" " * 65536)
            except OSError:
                return  # the client has had enough

        def log_message(self, *_: object) -> None:
            """Silent."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    fake.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield fake
    finally:
        fake.endless = False
        server.shutdown()
        server.server_close()


def series_of(
    one: ReplicaSignals, *, instance: str = "ingress:8000", prefix: str = "", before_s: float = 5.0
) -> list[Series]:
    """One replica's page as Prometheus keeps it, with a sample before the newest."""
    ceiling = one.budget_ceiling_tokens or one.budget_max_tokens
    host_free = one.host_capacity_bytes - one.host_live_bytes - one.host_warm_bytes
    values: list[tuple[str, dict[str, str], float]] = [
        ("kv_capacity_bytes", {}, one.capacity_bytes),
        ("kv_bytes", {"tier": "device", "kind": "active"}, one.active_bytes),
        ("kv_bytes", {"tier": "device", "kind": "warm"}, one.warm_bytes),
        ("kv_bytes", {"tier": "device", "kind": "shared"}, one.shared_bytes),
        ("kv_bytes", {"tier": "device", "kind": "free"}, 5.0),
        ("kv_bytes", {"tier": "host", "kind": "active"}, one.host_live_bytes),
        ("kv_bytes", {"tier": "host", "kind": "warm"}, one.host_warm_bytes),
        ("kv_bytes", {"tier": "host", "kind": "shared"}, 0.0),
        ("kv_bytes", {"tier": "host", "kind": "cached"}, 0.0),
        ("kv_bytes", {"tier": "host", "kind": "free"}, host_free),
        ("compact_above_ratio", {}, one.compact_above_ratio),
        ("turns_running", {}, one.num_running),
        ("turns_waiting", {}, one.num_waiting),
        ("turns_max", {}, one.max_running),
        ("budget_ceiling_tokens", {}, ceiling),
        ("budget_floor_tokens", {}, one.budget_floor_tokens),
        ("budget_max_tokens", {}, one.budget_max_tokens),
        ("replica_up", {}, float(one.accepting)),
    ]
    for budget, active, warm in one.demand:
        label = "full" if budget is None else str(budget)
        values.append(("kv_demand_bytes", {"state": "active", "budget_tokens": label}, active))
        values.append(("kv_demand_bytes", {"state": "warm", "budget_tokens": label}, warm))
    origin = {"job": "loopserve", "instance": instance, "replica": one.replica}
    return [
        {
            "metric": {"__name__": f"{prefix}loopserve_{name}", **origin, **labels},
            "values": [[one.unix_time - before_s, "1"], [one.unix_time, str(value)]],
        }
        for name, labels, value in values
    ]
