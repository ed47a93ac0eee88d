"""The metrics of the application on a real Ray: one page whatever ingress answers, and Ray's own agent beside it."""

import time

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from topology import needs_an_ingress

pytestmark = pytest.mark.serve

LIMIT_S = 60.0


def samples(text: str) -> list:
    return [sample for family in text_string_to_metric_families(text) for sample in family.samples]


def read(url: str) -> list:
    answer = httpx.get(f"{url}/metrics", timeout=LIMIT_S, trust_env=False)
    assert answer.status_code == 200
    return samples(answer.text)


def total(found: list, name: str, **labels: str) -> float:
    return sum(s.value for s in found if s.name == name and labels.items() <= s.labels.items())


def replicas_up(found: list) -> set[str]:
    return {s.labels["replica"] for s in found if s.name == "loopserve_replica_up"}


def ask(url: str, content: str = "tokens=2") -> None:
    body = {"model": "fake-model", "messages": [{"role": "user", "content": content}]}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=LIMIT_S, trust_env=False)
    assert answer.status_code == 200


def test_any_ingress_shows_the_requests_of_all_and_every_decision(url: str):
    deadline_s = time.monotonic() + LIMIT_S  # another test may have killed a replica whose successor is still starting
    while len(replicas_up(before := read(url))) < 3 and time.monotonic() < deadline_s:
        time.sleep(0.5)
    for number in range(12):
        ask(url, f"tokens=2 {number}")
    after = read(url)
    new = {"route": "/v1/chat/completions", "status": "200"}
    assert total(after, "loopserve_requests_total", **new) - total(before, "loopserve_requests_total", **new) == 12
    decided = [total(found, "loopserve_affinity_decisions_total") for found in (before, after)]
    assert decided[1] - decided[0] >= 12
    assert len({s.labels["ingress"] for s in after if s.name == "loopserve_requests_total"}) >= 2
    assert len(replicas_up(after)) == 3


@needs_an_ingress
def test_rays_agent_exports_gauges_for_as_long_as_the_replica_lives(url: str):
    import ray

    ports = {node["MetricsExportPort"] for node in ray.nodes()}
    ask(url)

    def gauges() -> list:
        pages = [httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=LIMIT_S, trust_env=False).text for port in ports]
        return [s for page in pages for s in samples(page) if s.name == "ray_loopserve_kv_bytes"]

    deadline_s = time.monotonic() + LIMIT_S
    while not gauges() and time.monotonic() < deadline_s:
        time.sleep(1.0)
    time.sleep(25.0)  # a gauge that is not set again is gone after twice Ray's report interval of 10 s
    found = gauges()
    assert {s.labels["kind"] for s in found} == {"active", "warm", "shared", "cached", "free"}
    warm = [s for s in found if s.labels["kind"] == "warm" and s.labels["tier"] == "device"]
    assert warm and all(s.value == 2 * 1600 for s in warm)
