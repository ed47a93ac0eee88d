"""Every panel and every rule on a real service under a real Prometheus: the names are exported, the queries find data, the rules evaluate.

One service for all of them: two replicas of the shipped model, the autopilot on, small limits so that refusals can be provoked.
"""

import json
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import promql_parser as promql
import pytest
from expressions import BY_SERIES, read, substituted
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.cluster.service import Service, running_service
from deploy.observe.local_prometheus import local_prometheus
from monitoring.alerts import GROUPS
from monitoring.dashboards import BOARDS
from monitoring.tools import find_tool

PROMETHEUS, PROMTOOL = find_tool("prometheus"), find_tool("promtool")

pytestmark = [
    pytest.mark.serve,
    pytest.mark.skipif(PROMETHEUS is None, reason="there is no prometheus; `make tools` fetches it"),
]

SETTINGS = {
    "LOOPSERVE_AUTOPILOT__MODE": "on",
    "LOOPSERVE_AUTOPILOT__MIN_REPLICAS": "2",
    "LOOPSERVE_AUTOPILOT__MAX_REPLICAS": "2",
    "LOOPSERVE_AUTOPILOT__INTERVAL_S": "0.5",
    "LOOPSERVE_ENGINE_DEFAULT_MODE": "sparse",  # short conversations, and yet coverage, refreshes and a budget
    "LOOPSERVE_ENGINE_DECODE__BUDGET_TOKENS": "64",
    "LOOPSERVE_ENGINE_DECODE__BUDGET_FLOOR_TOKENS": "16",
    "LOOPSERVE_ENGINE_MAX_RUNNING_TURNS": "2",
    "LOOPSERVE_ENGINE_MAX_WAITING_TURNS": "2",
    "LOOPSERVE_ENGINE_KV_BYTES_MAX": str(64 << 20),
}
NUM_DIALOGUES, NUM_TURNS, NUM_TOKENS = 4, 3, 24
SCRAPES_S = 2.5  # more than two of them

# What no healthy service without a GPU shows; checked to be just that.
GPU_PANELS = {"GPU utilisation", "GPU memory", "GPU power", "GPU temperature", "GPU errors"}
EVENT_PANELS = {"Time of a hand-off"}  # no replica leaves, so no session changes hands
EVENTS = {"loopserve_gpu_xid_errors_total"}  # alerts read it, and only a broken device counts it


@dataclass(frozen=True)
class Live:
    """A service that has done some work, and the Prometheus that watched it."""

    service: Service
    prometheus: httpx.Client
    page: str

    def instant(self, expression: str) -> list[dict[str, Any]]:
        """The series of an expression, now. Fails with Prometheus' own words where it is wrong."""
        answer = self.prometheus.get("/api/v1/query", params={"query": expression}).json()
        assert answer["status"] == "success", f"{expression}: {answer.get('error')}"
        found: list[dict[str, Any]] = answer["data"]["result"]
        return found


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    assert PROMETHEUS is not None
    log = tmp_path_factory.mktemp("live") / "service.log"
    with (
        running_service(SETTINGS, num_replicas=2, log=log) as service,
        local_prometheus(PROMETHEUS, target=service.url.removeprefix("http://")) as address,
        httpx.Client(base_url=address, timeout=30.0, trust_env=False) as prometheus,
    ):
        for _ in range(2):  # what an event creates has a rate from the second event on
            time.sleep(SCRAPES_S)
            work(service)
        time.sleep(SCRAPES_S)
        page = httpx.get(f"{service.url}/metrics", timeout=30.0, trust_env=False)
        page.raise_for_status()
        yield Live(service, prometheus, page.text)


def work(service: Service) -> None:
    """Dialogues of several turns, streamed and side by side, and every refusal that a client can provoke."""
    with httpx.Client(base_url=service.url, timeout=120.0, trust_env=False) as http:
        dialogues = [threading.Thread(target=converse, args=(http, service.model, i)) for i in range(NUM_DIALOGUES)]
        for dialogue in dialogues:
            dialogue.start()
        for dialogue in dialogues:
            dialogue.join()
        assert ask(http, service.model, [user("far too long " * service.max_session_tokens)]).status_code == 400
        assert ask(http, "no-such-model", [user("hello")]).status_code == 404
        assert 429 in burst(http, service.model)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def ask(http: httpx.Client, model: str, messages: list[dict[str, str]]) -> httpx.Response:
    """One turn, streamed as chat clients do."""
    body = {"model": model, "messages": messages, "max_tokens": NUM_TOKENS, "stream": True, "temperature": 0}
    return http.post("/v1/chat/completions", json=body)


def converse(http: httpx.Client, model: str, number: int) -> None:
    """One dialogue; a full queue is waited out."""
    messages = []
    for turn in range(NUM_TURNS):
        messages.append(
            user(f"Dialogue {number}, message {turn}: " + "the locker of the red house is number 4417. " * 6)
        )
        while (answer := ask(http, model, messages)).status_code == 429:
            time.sleep(0.2)
        assert answer.status_code == 200, answer.text
        events = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: {")]
        deltas = [choice["delta"] for event in events for choice in json.loads(event)["choices"]]
        messages.append({"role": "assistant", "content": "".join(delta.get("content") or "" for delta in deltas)})


def burst(http: httpx.Client, model: str) -> set[int]:
    """More requests at once than all replicas take; the statuses."""
    statuses: list[int] = []
    threads = [
        threading.Thread(target=lambda: statuses.append(ask(http, model, [user("hello " * 60)]).status_code))
        for _ in range(24)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return set(statuses)


def is_finite(series: dict[str, Any]) -> bool:
    return series["value"][1] not in ("NaN", "+Inf", "-Inf")


def has_gpu(live: Live) -> bool:
    return any(float(series["value"][1]) > 0 for series in live.instant("loopserve_gpu_available"))


def test_every_panels_queries_find_data(live: Live) -> None:
    excepted = EVENT_PANELS | ({"GPU errors"} if has_gpu(live) else GPU_PANELS)
    empty = [
        f"{board.name}: {panel.title}: {query.legend}"
        for board in BOARDS
        for row in board.rows
        for panel in row.panels
        if panel.title not in excepted
        for query in panel.queries
        if not any(map(is_finite, live.instant(substituted(query.expression))))
    ]
    assert empty == []


def test_the_panels_that_may_be_empty_are_those_of_gpus() -> None:
    of_gpus = {
        panel.title
        for board in BOARDS
        for row in board.rows
        for panel in row.panels
        for query in panel.queries
        if all(
            selector.name.startswith("loopserve_gpu_") and selector.name != "loopserve_gpu_available"
            for selector in read(substituted(query.expression)).selectors
        )
    }
    assert of_gpus == GPU_PANELS


def test_the_variables_of_a_dashboard_find_the_job_and_both_replicas(live: Live) -> None:
    up = live.instant('loopserve_replica_up{job=~".+", replica=~".+"}')
    assert {series["metric"]["replica"] for series in up} == set(live.service.replicas)
    assert {series["metric"]["job"] for series in live.instant("loopserve_build_info")} == {"loopserve"}
    (one,) = live.instant(f'loopserve_replica_up{{replica=~"{live.service.replicas[0]}"}}')
    assert one["value"][1] == "1"


def test_every_rule_evaluates_and_reads_series_that_are_there(live: Live) -> None:
    missing = []
    for rule in (rule for group in GROUPS for rule in group.rules):
        live.instant(rule.expression)
        for selector in read(rule.expression).selectors:
            if selector.name not in EVENTS and not live.instant(selector.name):
                missing.append(f"{rule.name}: {selector.name}")
    assert missing == []


def test_a_service_that_works_is_neither_absent_nor_without_replicas(live: Live) -> None:
    by_name = {rule.name: rule for group in GROUPS for rule in group.rules}
    for name in ("LoopServeNoReplicas", "LoopServeMetricsAbsent", "LoopServeReplicaSilent", "LoopServeAutopilotFails"):
        assert live.instant(by_name[name].expression) == [], name


@pytest.mark.skipif(PROMTOOL is None, reason="there is no promtool; `make tools` fetches it")
def test_the_page_passes_promtools_lint(live: Live) -> None:
    done = subprocess.run(
        [str(PROMTOOL), "check", "metrics"], input=live.page, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert not (done.stdout + done.stderr).strip()


def test_every_sample_of_the_page_is_in_the_catalogue_with_exactly_its_labels(live: Live) -> None:
    wrong = set()
    for family in text_string_to_metric_families(live.page):
        for sample in family.samples:
            metric = BY_SERIES.get(sample.name)
            labels = set(sample.labels) - {"le"}
            if metric is None or labels != set(metric.all_labels):
                wrong.add(f"{sample.name}{sorted(labels)}")
    assert wrong == set()


def test_every_metric_of_the_catalogue_is_exported_but_those_of_gpus(live: Live) -> None:
    exported = {sample.name for family in text_string_to_metric_families(live.page) for sample in family.samples}
    absent = {metric.name for name, metric in BY_SERIES.items() if name not in exported}
    assert {name for name in absent if not name.startswith("loopserve_gpu_")} == set()


def test_prometheus_parses_what_our_own_parser_does(live: Live) -> None:
    """The tests of dashboards and rules rest on promql-parser: it reads every expression as Prometheus writes it back."""
    for board in BOARDS:
        for query in (query for row in board.rows for panel in row.panels for query in panel.queries):
            expression = substituted(query.expression)
            formatted = live.prometheus.get("/api/v1/format_query", params={"query": expression}).json()["data"]
            names = {selector.name for selector in read(formatted).selectors}
            assert names == {selector.name for selector in read(expression).selectors}
            assert promql.parse(formatted)
