"""The metrics page: every process on it, labelled, counted where it happens, and clean by Prometheus' own lint."""

import subprocess

import pytest
from local_fleet import LocalFleet, client_of
from prometheus_client.parser import text_string_to_metric_families

from deploy.calls import BudgetOrder
from deploy.metrics_page import IngressMetrics
from deploy.settings import DeploySettings
from monitoring.catalogue import CATALOGUE, Origin
from monitoring.settings import MetricsSettings
from monitoring.tools import find_tool

pytestmark = pytest.mark.anyio


def samples(text: str) -> dict[tuple[str, frozenset], float]:
    families = text_string_to_metric_families(text)
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


def value(text: str, name: str, **labels: str) -> float:
    """The one sample with these labels among others."""
    found = [v for (n, pairs), v in samples(text).items() if n == name and labels.items() <= dict(pairs).items()]
    assert len(found) == 1, (name, labels, found)
    return found[0]


def body(*contents: str, **more) -> dict:
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]
    return {"model": "fake-model", "messages": messages, **more}


async def page_after(fleet: LocalFleet, *bodies: dict) -> str:
    async with client_of(fleet) as client:
        for sent in bodies:
            await client.post("/v1/chat/completions", json=sent)
        answer = await client.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    return answer.text


async def test_every_replica_is_on_the_page_with_its_own_numbers():
    text = await page_after(LocalFleet(names=("a", "b")), body("tokens=3"))
    for replica in ("a", "b"):
        assert value(text, "loopserve_kv_bytes", replica=replica, tier="device", kind="warm") == 2 * 1600
        assert value(text, "loopserve_kv_demand_bytes", replica=replica, state="active", budget_tokens="full") == 3000
        assert value(text, "loopserve_replica_up", replica=replica) == 1
    assert value(text, "loopserve_requests_total", route="/v1/chat/completions", status="200") == 1
    assert value(text, "loopserve_request_first_byte_seconds_count") == 1


async def test_every_exported_series_is_in_the_catalogue_with_its_labels():
    known = {name: metric for metric in CATALOGUE for name in metric.series}
    text = await page_after(LocalFleet(), body("tokens=3"), body("refuse=Overloaded"), {"model": "none"})
    for name, pairs in samples(text):
        assert set(dict(pairs)) - {"le"} == set(known[name].all_labels), name


async def test_turns_are_counted_by_what_the_replica_knew_of_the_conversation():
    fleet = LocalFleet()
    text = await page_after(
        fleet, body("tokens=2"), body("tokens=2", "word word", "tokens=1"), body("x", "never said here", "tokens=1")
    )
    outcomes = {o: value(text, "loopserve_affinity_turns_total", outcome=o) for o in ("first", "hit", "miss")}
    assert outcomes == {"first": 1, "hit": 1, "miss": 1}


async def test_refusals_are_counted_where_they_arise_and_where_they_leave():
    text = await page_after(
        LocalFleet(), body("refuse=Overloaded"), body("hi", max_tokens=-1), body("hi", model="other")
    )
    assert value(text, "loopserve_rejections_total", reason="overloaded") == 1
    assert value(text, "loopserve_request_errors_total", code="overloaded") == 1
    assert value(text, "loopserve_request_errors_total", code="invalid_request") == 1
    assert value(text, "loopserve_request_errors_total", code="model_not_found") == 1
    assert value(text, "loopserve_requests_total", route="/v1/chat/completions", status="429") == 1


async def test_stream_that_fails_is_counted_though_its_status_was_200():
    text = await page_after(LocalFleet(), body("tokens=3 fail=1", stream=True))
    assert value(text, "loopserve_requests_total", route="/v1/chat/completions", status="200") == 1
    assert value(text, "loopserve_requests_in_flight") == 0


async def test_silent_replica_is_told_and_the_others_are_shown():
    fleet = LocalFleet(names=("a", "b"))
    fleet.silent.add("b")
    text = await page_after(fleet)
    assert value(text, "loopserve_replicas_silent") == 1
    assert value(text, "loopserve_replica_up", replica="a") == 1
    assert 'replica="b"' not in text


async def test_names_in_paths_make_no_series():
    fleet = LocalFleet()
    async with client_of(fleet) as client:
        for name in ("one", "two"):
            await client.get(f"/v1/sessions/{name}")
            await client.get(f"/nowhere/{name}")
        text = (await client.get("/metrics")).text
    assert value(text, "loopserve_requests_total", route="/v1/sessions/{name:path}", status="404") == 2
    assert value(text, "loopserve_requests_total", route="other", status="404") == 2


async def test_vllms_names_carry_the_same_values_when_wanted():
    plain = await page_after(LocalFleet())
    assert "vllm:" not in plain
    text = await page_after(LocalFleet(DeploySettings(metrics=MetricsSettings(vllm_names=True))), body("tokens=3"))
    labels = {"engine": "a", "model_name": "fake-model"}
    assert value(text, "vllm:num_requests_running", **labels) == value(text, "loopserve_turns_running", replica="a")
    assert value(text, "vllm:kv_cache_usage_perc", **labels) == pytest.approx(0.2)
    assert value(text, "vllm:request_success_total", finished_reason="stop", **labels) == 0


async def test_page_passes_prometheus_own_lint():
    promtool = find_tool("promtool")
    if promtool is None:
        pytest.skip("promtool is not here; fetch it with `make tools`")
    text = await page_after(LocalFleet(names=("a", "b")), body("tokens=3"), body("refuse=Overloaded"))
    result = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, text=True, timeout=30)
    assert (result.returncode, result.stdout + result.stderr) == (0, "")


async def test_replica_obeys_an_order_and_reports_what_is_in_force():
    fleet = LocalFleet()
    reply = (await fleet.ask("set_budget", BudgetOrder("pilot", 8, 5.0))).by_replica["a"]
    assert (reply.obeyed, reply.ceiling_tokens, reply.holder) == (True, 8, "pilot")
    signals = (await fleet.ask("signals")).by_replica["a"]
    assert (signals.budget_ceiling_tokens, signals.active_bytes, signals.demand[0]) == (8, 1600, (8, 1000, 1200))
    below_floor = (await fleet.ask("set_budget", BudgetOrder("pilot", 4, 5.0))).by_replica["a"]
    assert not below_floor.obeyed
    assert fleet.engines["a"].ceiling_tokens == 8


def test_count_of_an_ingress_has_the_routers_decisions():
    metrics = IngressMetrics("i")
    metrics.decided("owner", 0.00002)
    names = {sample.name for family in metrics.families() for sample in family.samples}
    assert {"loopserve_affinity_decisions_total", "loopserve_affinity_decision_seconds_bucket"} <= names
    assert all(metric.origin is Origin.INGRESS for metric in CATALOGUE if metric.name in names)
