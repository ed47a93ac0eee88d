"""What the live page is told: samples to numbers, the last minutes, Prometheus' memory of them, and the routes."""

import http.server
import itertools
import json
import math
import queue
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from local_fleet import LocalFleet, client_of

from deploy.autopilot.settings import AutopilotSettings
from deploy.fleet import Replies
from deploy.keys import hash_key, new_key
from deploy.metrics_page import IngressMetrics, MetricsPage
from deploy.observe import watcher as watching
from deploy.observe.counting import CountKey, Odometer, Sample, difference, quantile
from deploy.observe.demo import TALK, demo_settings
from deploy.observe.history import PrometheusHistory, by_time
from deploy.observe.local_prometheus import local_prometheus
from deploy.observe.page import DECISIONS_MAX, samples_of, sources_of
from deploy.observe.state import KINDS, TURN_LABELS, WATCHED_SERIES, first_token_times, now, point, read_moment
from deploy.observe.watcher import Watcher
from deploy.settings import DeploySettings
from loopserve.config import BLOCK_TOKENS
from loopserve.errors import EngineUnavailable
from monitoring import catalogue as c
from monitoring.catalogue import Origin
from monitoring.exposition import Part, PrometheusSink
from monitoring.tools import find_tool

pytestmark = pytest.mark.anyio
EACH = "replica"
STATIC = Path(__file__).parents[2] / "deploy" / "observe" / "static"


def tokens(replica: str, value: float, phase: str = "decode") -> Sample:
    return Sample(c.STEP_TOKENS.name, {EACH: replica, "phase": phase}, value)


def total(odometer: Odometer, *samples: Sample) -> float:
    return sum(odometer.read(samples, source_label=EACH).values())


class TestOdometer:
    def test_counting_begins_where_watching_begins(self):
        odometer = Odometer()
        assert total(odometer, tokens("a", 40)) == 0
        assert total(odometer, tokens("a", 42)) == 2

    def test_a_process_that_starts_again_counts_from_zero(self):
        odometer = Odometer()
        total(odometer, tokens("a", 40))
        assert total(odometer, tokens("a", 3)) == 3

    def test_what_a_vanished_process_counted_stays_and_its_return_counts_on(self):
        odometer = Odometer()
        total(odometer, tokens("a", 10), tokens("b", 7))
        assert total(odometer, tokens("a", 12), tokens("b", 10)) == 5
        assert total(odometer, tokens("a", 13)) == 6
        assert total(odometer, tokens("a", 13), tokens("b", 11)) == 7

    def test_a_series_that_appears_later_began_at_zero(self):
        odometer = Odometer()
        total(odometer, tokens("a", 10))
        assert total(odometer, tokens("a", 10), tokens("a", 4, "prefill")) == 4

    def test_the_longest_unseen_process_is_forgotten_first(self):
        odometer = Odometer(sources_max=2)
        total(odometer, tokens("a", 10))
        total(odometer, tokens("b", 10))
        total(odometer, tokens("c", 10))
        assert total(odometer, tokens("a", 15)) == 0
        assert total(odometer, tokens("c", 15)) == 5

    @given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 50), st.booleans()), max_size=40))
    def test_the_fleet_total_is_what_was_counted_since_each_was_first_seen(self, moves):
        """Whatever processes count, and however often they start again between two looks."""
        odometer, values, expected = Odometer(), {}, 0
        for name, amount, restarts in moves:
            known = name in values
            if restarts and known and amount < values[name]:
                values[name] = amount
                expected += amount
            else:
                values[name] = values.get(name, 0) + amount
                expected += amount if known else 0
            assert total(odometer, *(tokens(each, value) for each, value in values.items())) == expected


class TestQuantile:
    def test_it_lies_evenly_inside_its_bucket(self):
        buckets = [(1.0, 0.0), (2.0, 10.0), (math.inf, 10.0)]
        assert quantile(0.5, buckets) == pytest.approx(1.5)
        assert quantile(0.95, buckets) == pytest.approx(1.95)

    def test_above_the_last_bound_it_is_that_bound(self):
        assert quantile(0.9, [(1.0, 1.0), (math.inf, 10.0)]) == 1.0

    def test_of_nothing_there_is_none(self):
        assert quantile(0.5, []) is None
        assert quantile(0.5, [(1.0, 0.0), (math.inf, 0.0)]) is None

    @given(st.lists(st.floats(0.001, 9.9), min_size=1, max_size=50), st.floats(0.01, 0.99))
    def test_it_is_never_further_from_the_true_one_than_its_bucket(self, values, share):
        bounds = (0.01, 0.1, 1.0, 5.0, 10.0, math.inf)
        found = quantile(share, [(bound, float(sum(v <= bound for v in values))) for bound in bounds])
        true = sorted(values)[math.ceil(share * len(values)) - 1]
        upper = next(bound for bound in bounds if true <= bound)
        lower = max((bound for bound in bounds if bound < true), default=0.0)
        assert found is not None and lower <= found <= upper


class Fleet:
    """Replicas that count as ours do, read as the ingress reads them."""

    def __init__(self, *names: str) -> None:
        self.sinks = {name: self._replica() for name in names}
        self.autopilot = PrometheusSink([metric for metric in c.CATALOGUE if metric.origin is Origin.AUTOPILOT])

    def _replica(self) -> PrometheusSink:
        sink = PrometheusSink([metric for metric in c.CATALOGUE if metric.origin is Origin.ENGINE])
        sink.set(c.KV_CAPACITY, 1000)
        for kind, size in zip(KINDS, (300, 100, 200, 50, 350), strict=True):
            sink.set(c.KV_BYTES, size, tier="device", kind=kind)
            sink.set(c.KV_BYTES, 7000, tier="host", kind=kind)  # is not shown among the pool's
        sink.set(c.REPLICA_UP, 1)
        sink.set(c.BUDGET_IN_FORCE, 128)
        sink.set(c.BUDGET_CEILING, 128)
        sink.set(c.BUILD_INFO, 1, version="1", model_name="m")
        sink.inc(c.STEP_TOKENS, 0, phase="decode")
        return sink

    def samples(self) -> list[Sample]:
        parts = [Part(Origin.ENGINE, name, sink.families()) for name, sink in self.sinks.items()]
        return samples_of([*parts, Part(Origin.AUTOPILOT, "p", self.autopilot.families())])

    async def read(self) -> list[Sample]:
        return self.samples()


def test_a_moment_holds_each_replicas_pool_and_budget():
    fleet = Fleet("b", "a")
    moment = read_moment(10.0, fleet.samples(), Odometer())
    assert [replica.name for replica in moment.replicas] == ["a", "b"]
    assert moment.replicas[0].kv_shares() == (0.3, 0.1, 0.2, 0.05, 0.35)
    assert (moment.model, moment.replicas[0].budget_tokens, moment.replicas_wanted) == ("m", 128, None)


def test_an_autopilot_that_has_decided_shows_what_it_wants():
    fleet = Fleet("a")
    fleet.autopilot.inc(c.AUTOPILOT_DECISIONS, action="add")
    fleet.autopilot.set(c.AUTOPILOT_REPLICAS_WANTED, 3)
    moment = read_moment(10.0, fleet.samples(), Odometer())
    assert point(moment, previous=None, rate_base=None)["wanted"] == 3


def test_rates_and_failures_are_differences_of_two_moments():
    fleet, odometer = Fleet("a", "b"), Odometer()
    earlier = read_moment(10.0, fleet.samples(), odometer)
    for sink in fleet.sinks.values():
        sink.inc(c.STEP_TOKENS, 20, phase="decode")
        sink.inc(c.TURNS, 1, reason="error")
        sink.inc(c.TURNS, 4, reason="stop")
        sink.inc(c.PROMPT_TOKENS, 100)
        sink.inc(c.REUSED_TOKENS, 75, source="device")
    later = read_moment(14.0, fleet.samples(), odometer)
    drawn = point(later, previous=earlier, rate_base=earlier)
    assert (drawn["tokens_per_s"], drawn["failed"]) == ({"prefill": 0.0, "decode": 10.0}, 2)
    told = now(later, earlier)
    assert (told["turns"], told["failed"], told["reused_share"], told["window_s"]) == (10, 2, 0.75, 4.0)


def test_the_first_point_has_no_rate():
    moment = read_moment(10.0, Fleet("a").samples(), Odometer())
    assert point(moment, previous=None, rate_base=None)["tokens_per_s"] == {"prefill": None, "decode": None}


def test_time_to_first_token_counts_only_what_came_since_and_by_turn():
    fleet, odometer = Fleet("a", "b"), Odometer()
    for _ in range(50):
        fleet.sinks["a"].observe(c.TTFT, 20.0, turn=c.turn_bucket(1))  # before anybody looked
    earlier = read_moment(10.0, fleet.samples(), odometer)
    for sink in fleet.sinks.values():
        sink.observe(c.TTFT, 0.07, turn=c.turn_bucket(1))
        sink.observe(c.TTFT, 0.02, turn=c.turn_bucket(7))
    later = read_moment(20.0, fleet.samples(), odometer)
    times = first_token_times(difference(later.counts, earlier.counts))
    by_turn = {row["turn"]: row for row in times["by_turn"]}
    assert tuple(by_turn) == TURN_LABELS
    assert by_turn["1"]["num"] == 2 and 0.05 < by_turn["1"]["p50"] <= 0.1
    assert by_turn["5-8"]["num"] == 2 and 0.01 < by_turn["5-8"]["p95"] <= 0.025
    assert by_turn["2"] == {"turn": "2", "num": 0.0, "p50": None, "p95": None}
    assert times["all"]["num"] == 4


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


async def test_however_many_watch_the_fleet_is_asked_once_a_second():
    fleet, clock, asked = Fleet("a"), Clock(), 0

    async def read() -> list[Sample]:
        nonlocal asked
        asked += 1
        return fleet.samples()

    watcher = Watcher(read, unix_time=clock)
    for _ in range(3):
        for _ in range(5):
            await watcher.state(0.0)
        clock.now += 1.0
    assert asked == 3


async def test_a_page_gets_the_points_it_does_not_have_yet():
    watcher = Watcher(Fleet("a").read, unix_time=(clock := Clock()))
    for _ in range(4):
        await watcher.state(0.0)
        clock.now += 1.0
    assert [p["t"] for p in (await watcher.state(0.0))["points"]] == [1000, 1001, 1002, 1003, 1004]
    assert [p["t"] for p in (await watcher.state(1002.0))["points"]] == [1003, 1004]


async def test_a_replica_that_vanishes_leaves_the_present_and_stays_in_the_past():
    fleet = Fleet("a", "b")
    watcher = Watcher(fleet.read, unix_time=(clock := Clock()))
    await watcher.state(0.0)
    fleet.sinks["b"].inc(c.STEP_TOKENS, 60, phase="decode")
    clock.now += 1.0
    await watcher.state(0.0)
    del fleet.sinks["b"]
    clock.now += 1.0
    state = await watcher.state(0.0)
    assert [replica["name"] for replica in state["replicas"]] == ["a"]
    assert [sorted(p["kv"]) for p in state["points"]] == [["a", "b"], ["a", "b"], ["a"]]
    assert state["points"][-1]["tokens_per_s"]["decode"] == 30.0  # what it counted was counted


async def test_only_the_last_minutes_are_kept():
    watcher = Watcher(Fleet("a").read, unix_time=(clock := Clock()))
    for _ in range(400):
        await watcher.state(0.0)
        clock.now += 1.0
    points = (await watcher.state(0.0))["points"]
    assert points[0]["t"] >= clock.now - watching.KEPT_S
    assert len(points) <= watching.KEPT_S + 1


async def test_a_clock_that_is_set_back_breaks_nothing():
    watcher = Watcher(Fleet("a").read, unix_time=(clock := Clock()))
    await watcher.state(0.0)
    clock.now -= 100.0
    assert (await watcher.state(0.0))["at"] == 1000.0
    clock.now += 200.0
    assert (await watcher.state(0.0))["at"] == 1100.0


class Past:
    """A Prometheus that knows one thing."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.asked: list[tuple[float, float]] = []

    async def between(self, start_s: float, end_s: float) -> Sequence[tuple[float, Sequence[Sample]]]:
        self.asked.append((start_s, end_s))
        earlier = self.fleet.samples()
        self.fleet.sinks["a"].inc(c.STEP_TOKENS, 50, phase="decode")
        return [(start_s, earlier), (end_s, self.fleet.samples())]


async def test_a_page_that_is_opened_now_shows_what_prometheus_saw():
    past = Past(fleet := Fleet("a"))
    watcher = Watcher(fleet.read, past, unix_time=(clock := Clock()))
    state = await watcher.state(0.0)
    assert [p["t"] for p in state["points"]] == [1000 - watching.KEPT_S, 999, 1000]
    assert past.asked == [(1000 - watching.KEPT_S, 999)]
    clock.now += 1.0
    await watcher.state(0.0)
    assert len(past.asked) == 1
    clock.now += 60.0  # nobody watched
    await watcher.state(0.0)
    assert past.asked[1:] == [(1002.0, 1060.0)]


class TestPrometheusHistory:
    ANSWER: dict[str, Any] = {  # noqa: RUF012
        "data": {
            "result": [
                {
                    "metric": {
                        "__name__": c.KV_BYTES.name,
                        "replica": "a",
                        "kind": "active",
                        "instance": "x",
                        "job": "j",
                    },
                    "values": [[100, "5"], [102, "7"]],
                },
                {
                    "metric": {"__name__": c.KV_BYTES.name, "replica": "a", "kind": "active", "instance": "y"},
                    "values": [[102, "8"]],
                },
            ]
        }
    }

    def test_series_become_samples_by_time_without_the_labels_of_scraping(self):
        (first, samples), (second, more) = by_time(self.ANSWER)
        assert (first, second) == (100, 102)
        assert samples == [Sample(c.KV_BYTES.name, {"replica": "a", "kind": "active"}, 5.0)]
        assert [sample.value for sample in more] == [8.0]  # two targets that tell the same are one

    async def test_it_asks_for_the_watched_series_in_one_query(self):
        seen: list[httpx.Request] = []

        def answer(request: httpx.Request) -> httpx.Response:
            seen.append(request)
            return httpx.Response(200, json=self.ANSWER)

        history = PrometheusHistory(
            "http://prom:9090/", matchers='namespace="a"', token=lambda: "t", transport=httpx.MockTransport(answer)
        )
        assert len(await history.between(100, 110)) == 2
        form = dict(httpx.QueryParams(seen[0].content.decode()))
        assert seen[0].url == "http://prom:9090/api/v1/query_range"
        assert seen[0].headers["authorization"] == "Bearer t"
        assert form["query"].endswith('"' + ',namespace="a"}') and all(name in form["query"] for name in WATCHED_SERIES)

    @pytest.mark.parametrize("body", [b"nonsense", b'{"data": null}', b'{"data": {"result": [{"metric": {}}]}}'])
    async def test_an_answer_that_is_none_is_an_empty_past(self, body: bytes):
        transport = httpx.MockTransport(lambda _: httpx.Response(200, content=body))
        assert await PrometheusHistory("http://prom", transport=transport).between(1, 2) == []

    async def test_a_prometheus_that_is_away_is_an_empty_past_and_said_once(self, caplog: pytest.LogCaptureFixture):
        def refuse(_: httpx.Request) -> httpx.Response:
            raise httpx.ConnectError("nobody there")

        history = PrometheusHistory("http://prom", transport=httpx.MockTransport(refuse))
        assert await history.between(1, 2) == [] == await history.between(1, 3)
        assert len([record for record in caplog.records if "nobody there" in record.message]) == 1

    async def test_an_answer_without_end_is_not_read(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr("deploy.observe.history.ANSWER_BYTES_MAX", 10)
        transport = httpx.MockTransport(lambda _: httpx.Response(200, json=self.ANSWER))
        assert await PrometheusHistory("http://prom", transport=transport).between(1, 2) == []

    def test_it_is_the_autopilots_prometheus(self):
        assert PrometheusHistory.of(AutopilotSettings()) is None
        assert PrometheusHistory.of(AutopilotSettings(prometheus_url="http://prom")) is not None
        assert PrometheusHistory.of(AutopilotSettings(prometheus_url="http://prom", prometheus_prefix="ray_")) is None


def observed(**more: Any) -> LocalFleet:
    return LocalFleet(DeploySettings(observe=True, **more), names=("a", "b"))


def chat(text: str) -> dict[str, Any]:
    return {"model": "fake-model", "messages": [{"role": "user", "content": text}]}


async def test_the_page_is_there_only_where_it_was_asked_for():
    async with client_of(LocalFleet()) as client:
        assert [(await client.get(path)).status_code for path in ("/observe", "/observe/state")] == [404, 404]
    async with client_of(observed()) as client:
        assert (await client.get("/observe")).headers["content-type"] == "text/html; charset=utf-8"


async def test_every_answer_of_the_page_forbids_what_it_does_not_need():
    async with client_of(observed()) as client:
        for path in ("/observe", "/observe/static/main.js", "/observe/static/observe.css", "/observe/state"):
            response = await client.get(path)
            assert response.status_code == 200, path
            policy = dict(part.split(" ", 1) for part in response.headers["content-security-policy"].split("; "))
            assert policy["default-src"] == policy["frame-ancestors"] == "'none'"
            assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
            assert response.headers["x-content-type-options"] == "nosniff"
            assert response.headers["referrer-policy"] == "no-referrer"
            assert response.headers["cache-control"] == ("no-store" if path.endswith("state") else "no-cache")


async def test_every_file_that_the_page_names_is_served_and_nothing_else():
    async with client_of(observed()) as client:
        page = (await client.get("/observe")).text
        for file in STATIC.iterdir():
            assert file.suffix == ".html" or f"/static/{file.name}" in page or f'"./{file.name}"' in _all_text()
            assert (await client.get(f"/observe/static/{file.name}")).content == file.read_bytes()
        for name in ("nothing.js", "..%2Fpage.py", "%2e%2e/page.py"):
            response = await client.get(f"/observe/static/{name}")
            assert response.status_code == 404 and "message" in response.json()["error"]


def _all_text() -> str:
    return "".join(file.read_text(encoding="utf-8") for file in sorted(STATIC.iterdir()))


def test_the_page_asks_nobody_but_its_server():
    text = _all_text().replace("http://www.w3.org/2000/svg", "")  # a namespace, not an address
    assert "://" not in text
    assert "innerHTML" not in text and " style=" not in text


async def test_the_state_shows_who_lives_where():
    fleet = observed()
    async with client_of(fleet) as client:
        for number in range(3):
            assert (await client.post("/v1/chat/completions", json=chat(f"hello {number}"))).status_code == 200
        state = (await client.get("/observe/state")).json()
    shown = {name: home["shown"] for name, home in state["conversations"].items()}
    assert sum(home["num"] for home in state["conversations"].values()) == 3
    assert set(shown) <= {"a", "b"}
    assert all(
        set(view) == {"id", "num_tokens", "num_cached_tokens", "num_turns", "is_active", "idle_s"}
        for home in shown.values()
        for view in home
    )
    assert [replica["name"] for replica in state["replicas"]] == ["a", "b"]
    assert state["autopilot"] is None and state["silent"] == []


class Pilots:
    """An autopilot that has decided more than a page shows."""

    async def ask(self, question: str, *args: Any) -> Replies[Any]:
        assert (question, args) == ("overview", ())
        decisions = [{"unix_time": float(number), "actions": ["tighten"], "reason": "full"} for number in range(50)]
        told = {"mode": "on", "holding": None, "last": decisions[0], "decisions": decisions, "settings": {"secret": 1}}
        return Replies({"p": told}, ())


async def test_the_autopilots_last_decisions_come_with_the_state():
    fleet = observed()
    page = MetricsPage(IngressMetrics(), {Origin.ENGINE: fleet})

    async def nobody(_: str) -> dict[str, Any]:
        return {"data": [], "silent": []}

    told = await sources_of(fleet.settings, page.parts, nobody, Pilots()).autopilot()
    assert told is not None and set(told) == {"mode", "holding", "last", "decisions"}
    assert [decision["unix_time"] for decision in told["decisions"]] == [float(n) for n in range(DECISIONS_MAX)]


async def test_a_silent_replica_is_named():
    fleet = observed()
    fleet.silent.add("b")
    async with client_of(fleet) as client:
        state = (await client.get("/observe/state")).json()
    assert state["silent"] == ["b"] and [replica["name"] for replica in state["replicas"]] == ["a"]


async def test_the_state_is_json_whatever_is_measured():
    async with client_of(observed()) as client:
        text = (await client.get("/observe/state")).text
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


@pytest.mark.parametrize("since", ["yesterday", "nan", "inf"])
async def test_a_time_that_is_none_is_refused_in_openais_shape(since: str):
    async with client_of(observed()) as client:
        response = await client.get("/observe/state", params={"since": since})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "since" and "unix seconds" in response.json()["error"]["message"]


async def test_with_keys_the_files_are_open_and_the_state_is_for_operators(tmp_path: Path):
    user, operator = new_key(), new_key()
    entries = [
        {"sha256": hash_key(user), "tenant": "acme", "role": "user"},
        {"sha256": hash_key(operator), "tenant": "acme", "role": "operator"},
    ]
    (tmp_path / "keys.json").write_text(json.dumps({"keys": entries}))
    async with client_of(observed(keys_file=str(tmp_path / "keys.json"))) as client:
        assert (await client.get("/observe")).status_code == 200
        assert (await client.get("/observe/state")).status_code == 401
        for key, status in ((user, 403), (operator, 200)):
            answer = await client.get("/observe/state", headers={"authorization": f"Bearer {key}"})
            assert answer.status_code == status


def test_counts_of_the_fleet_carry_no_process():
    samples = [tokens("a", 3), tokens("b", 4)]
    counts = Odometer().read(samples, source_label=EACH)
    assert list(counts) == [CountKey(c.STEP_TOKENS.name, (("phase", "decode"),))]


class TestDemo:
    def test_its_settings_lie_under_the_environment_and_the_options_above(self):
        settings, engine = demo_settings({}, {})
        assert (settings.observe, settings.replicas, settings.autopilot.mode) == (True, 2, "on")
        assert (settings.autopilot.min_replicas, settings.autopilot.max_replicas) == (2, 3)
        assert (engine.kv_blocks, engine.decode.budget_floor_tokens) == (385, 32)
        env = {
            "LOOPSERVE_ENGINE_KV_BLOCKS": "2000",
            "REPLICAS": "4",
            "LOOPSERVE_AUTOPILOT__MODE": "dry-run",
            "LOOPSERVE_AUTOPILOT__MAX_REPLICAS": "9",
        }
        settings, engine = demo_settings(env, {"port": 9000, "model": "some/model"})
        assert (engine.kv_blocks, settings.replicas, settings.autopilot.mode) == (2000, 4, "dry-run")
        assert (settings.autopilot.min_replicas, settings.autopilot.max_replicas) == (4, 9)
        assert (settings.port, settings.model, engine.model) == (9000, "some/model", "some/model")
        assert demo_settings(env, {"replicas": 1})[0].replicas == 1

    def test_the_longest_dialogue_fits_the_demos_pool(self):
        _, engine = demo_settings({}, {})
        longest = TALK.system_tokens.high + TALK.turns.high * (TALK.input_tokens.high + TALK.output_tokens.high + 16)
        assert engine.kv_blocks is not None and longest < (engine.kv_blocks - 1) * BLOCK_TOKENS

    def test_prometheus_scrapes_with_the_key_and_leaves_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ):
        program = find_tool("prometheus")
        if program is None:
            pytest.skip("Prometheus is not here; `make tools` fetches it")
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        with scraped() as (target, keys), local_prometheus(program, target=target, api_key="ls-secret") as url:
            assert keys.get(timeout=30) == "Bearer ls-secret"
            assert httpx.get(f"{url}/api/v1/targets", trust_env=False).status_code == 200
            assert "ls-secret" not in httpx.get(f"{url}/api/v1/status/config", trust_env=False).text
        assert list(tmp_path.iterdir()) == []
        with pytest.raises(httpx.ConnectError):
            httpx.get(url, trust_env=False)

    def test_a_prometheus_that_does_not_start_says_why_and_leaves_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        program = tmp_path / "prometheus"
        program.write_text("#!/bin/sh\necho no such luck\nexit 1\n")
        program.chmod(0o755)
        (tmp_path / "temporary").mkdir()
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
        with pytest.raises(EngineUnavailable, match="no such luck"), local_prometheus(program, target="127.0.0.1:1"):
            pass
        assert list((tmp_path / "temporary").iterdir()) == []


@contextmanager
def scraped() -> Iterator[tuple[str, "queue.Queue[str]"]]:
    """A target for a scraper, and the keys it comes with."""
    keys: queue.Queue[str] = queue.Queue()

    class Target(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            keys.put(self.headers["authorization"])
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Target) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}", keys
        server.shutdown()


# Colours: relative luminance and contrast after WCAG 2.2, vision after Machado et al. (2009) at full severity, distance in CIE Lab.
VISIONS = {
    "all": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "no red cones": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    "no green cones": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.01182, 0.04294, 0.968881)),
    "no blue cones": ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.3039)),
}
THEMES = [
    dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))
    for block in re.findall(r":root \{(.*?)\}", (STATIC / "observe.css").read_text(encoding="utf-8"), re.DOTALL)
]


def linear(colour: str) -> list[float]:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]


def contrast(one: str, other: str) -> float:
    low, high = sorted(
        sum(w * v for w, v in zip((0.2126, 0.7152, 0.0722), linear(c), strict=True)) for c in (one, other)
    )
    return (high + 0.05) / (low + 0.05)


def seen(colour: str, vision: str) -> tuple[float, float, float]:
    rgb = [min(max(sum(w * v for w, v in zip(row, linear(colour), strict=True)), 0), 1) for row in VISIONS[vision]]
    to_xyz = ((0.4339, 0.3762, 0.1899), (0.2126, 0.7152, 0.0722), (0.0177, 0.1095, 0.8729))  # over the white of D65
    x, y, z = (sum(w * v for w, v in zip(row, rgb, strict=True)) for row in to_xyz)
    x, y, z = (v ** (1 / 3) if v > 0.008856 else 7.787 * v + 16 / 116 for v in (x, y, z))
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


@pytest.mark.parametrize("theme", THEMES, ids=("light", "dark"))
def test_text_and_marks_stand_out_from_what_is_behind_them(theme: dict[str, str]):
    for name, behind in itertools.product(("ink", "soft", "bad", "accent"), ("panel", "page")):
        assert contrast(theme[name], theme[behind]) >= 4.5, (name, behind)
    assert contrast(theme["on-accent"], theme["accent"]) >= 4.5
    assert contrast(theme["ink"], theme["wash"]) >= 4.5
    for name in ("active", "shared", "warm", "cached", "first", "second", "good"):
        assert contrast(theme[name], theme["panel"]) >= 3.0, name


@pytest.mark.parametrize("vision", VISIONS)
@pytest.mark.parametrize("theme", THEMES, ids=("light", "dark"))
def test_colours_of_one_chart_stay_apart_for_every_colour_vision(theme: dict[str, str], vision: str):
    pairs = [*itertools.combinations(KINDS[:-1], 2), ("first", "second"), ("first", "bad")]
    for one, other in pairs:
        assert math.dist(seen(theme[one], vision), seen(theme[other], vision)) >= 18, (one, other)
