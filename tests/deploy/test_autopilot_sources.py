"""How readings are read, from a Prometheus on loopback with every fault it may have, and from replicas."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from fake_prometheus import FakePrometheus, fake_prometheus, series_of
from fleet_model import signals

from deploy.autopilot.settings import AutopilotSettings
from deploy.autopilot.signals import Cause, Reading, Untrusted
from deploy.autopilot.sources import PrometheusSource, ReplicaSource
from deploy.fleet import Replies

pytestmark = pytest.mark.anyio

NOW = 1_000_000.0
ONE = signals(
    "a",
    active_tokens=10_000,
    waiting=3,
    warm_bytes=7_000_000,
    shared_bytes=1_000_000,
    unix_time=NOW,
    compact_above_ratio=0.25,
    host_capacity_bytes=90_000_000,
    host_live_bytes=20_000_000,
    host_warm_bytes=30_000_000,
)


@pytest.fixture
def prometheus() -> Iterator[FakePrometheus]:
    with fake_prometheus() as fake:
        fake.series = series_of(ONE)
        yield fake


async def read(
    prometheus: FakePrometheus | None, *, environ: dict[str, str] | None = None, **changes: object
) -> Reading:
    url = "http://127.0.0.1:9" if prometheus is None else prometheus.url
    settings = replace(AutopilotSettings(prometheus_url=url, source_timeout_s=1.0), **changes)
    source = PrometheusSource(settings, environ=environ or {})
    try:
        return await source.read()
    finally:
        await source.close()


async def refusal(prometheus: FakePrometheus | None, **changes: object) -> Untrusted:
    with pytest.raises(Untrusted) as untrusted:
        await read(prometheus, **changes)
    return untrusted.value


async def test_a_replica_comes_out_as_it_went_in(prometheus: FakePrometheus):
    assert await read(prometheus) == Reading((ONE,), {})


async def test_one_query_asks_for_everything_with_the_times_of_the_samples(prometheus: FakePrometheus):
    await read(prometheus, prometheus_matchers='namespace="a"', snapshot_age_max_s=14.2)
    (query,) = prometheus.queries
    assert query.startswith('{__name__=~"loopserve_kv_capacity_bytes|') and query.endswith(',namespace="a"}[15s]')
    assert "loopserve_kv_demand_bytes" in query


async def test_a_ceiling_below_the_budget_is_a_ceiling(prometheus: FakePrometheus):
    tight = replace(ONE, budget_ceiling_tokens=256)
    prometheus.series = series_of(tight)
    assert (await read(prometheus)).replicas == (tight,)


async def test_ray_s_exporter_is_read_under_its_prefix(prometheus: FakePrometheus):
    prometheus.series = series_of(ONE, prefix="ray_")
    assert (await read(prometheus, prometheus_prefix="ray_")).replicas == (ONE,)


async def test_a_replica_that_is_missing_in_the_newest_page_is_gone(prometheus: FakePrometheus):
    gone = replace(ONE, replica="gone", unix_time=NOW - 5.0)
    prometheus.series = [*series_of(ONE), *series_of(gone)]
    assert (await read(prometheus)).replicas == (ONE,)


async def test_a_replica_shown_by_two_ingresses_counts_once_as_it_was_last(prometheus: FakePrometheus):
    older = replace(ONE, num_waiting=9, unix_time=NOW - 2.0)
    prometheus.series = [*series_of(older, instance="second:8000"), *series_of(ONE)]
    assert (await read(prometheus)).replicas == (ONE,)


@pytest.mark.parametrize("text", ["NaN", "+Inf", "-Inf"])
async def test_a_value_that_is_no_number_rejects_its_replica_alone(prometheus: FakePrometheus, text: str):
    bad = series_of(replace(ONE, replica="b"))
    bad[0]["values"][-1][1] = text
    prometheus.series = [*series_of(ONE), *bad]
    reading = await read(prometheus)
    assert reading.replicas == (ONE,) and reading.rejected["b"].cause is Cause.ABSURD


async def test_every_series_is_needed(prometheus: FakePrometheus):
    whole = series_of(ONE)
    for number, series in enumerate(whole):
        if (series["metric"].get("tier"), series["metric"].get("kind")) == ("device", "free"):
            continue
        prometheus.series = whole[:number] + whole[number + 1 :]
        reading = await read(prometheus)
        assert not reading.replicas and reading.rejected["a"].cause is Cause.MISSING, series["metric"]


async def test_an_empty_answer_is_an_empty_reading(prometheus: FakePrometheus):
    prometheus.series = []
    assert await read(prometheus) == Reading((), {})


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>a proxy's page</html>",
        b"[]",
        b"null",
        b'{"status": "error", "errorType": "bad_data"}',
        b'{"status": "success", "data": {"resultType": "vector", "result": []}}',
        b'{"status": "success", "data": {"resultType": "matrix", "result": [{"metric": {}, "values": [[1, "2"]]}]}}',
        b'{"status": "success", "data": {"resultType": "matrix", "result": [{"metric": {"__name__": "x"}, "values": []}]}}',
        b'{"status": "success", "data": {"resultType": "matrix", "result": [{"metric": {"__name__": "x"}, "values": [["a", "b"]]}]}}',
        b'{"status": "success", "data": {"resultType": "matrix", "result": 7}}',
    ],
)
async def test_a_wrong_answer_cannot_be_trusted(prometheus: FakePrometheus, body: bytes):
    prometheus.body = body
    assert (await refusal(prometheus)).cause is Cause.SOURCE


async def test_an_error_says_what_prometheus_said(prometheus: FakePrometheus):
    prometheus.status, prometheus.body = 422, b"query needs too much"
    untrusted = await refusal(prometheus)
    assert untrusted.cause is Cause.SOURCE and "422: query needs too much" in untrusted.detail


async def test_a_slow_prometheus_is_not_waited_for(prometheus: FakePrometheus):
    prometheus.delay_s = 1.0
    untrusted = await refusal(prometheus, source_timeout_s=0.1)
    assert untrusted.cause is Cause.SOURCE and "within 0.1 s" in untrusted.detail


async def test_an_endless_answer_is_cut(prometheus: FakePrometheus):
    prometheus.endless = True
    assert (await refusal(prometheus, source_timeout_s=30.0)).detail.startswith("Prometheus' answer is longer than")


async def test_nobody_at_the_address_is_a_cause_too():
    assert (await refusal(None)).cause is Cause.SOURCE


async def test_the_token_is_read_anew_for_every_query(prometheus: FakePrometheus, tmp_path: Path):
    token = tmp_path / "token"
    settings = AutopilotSettings(prometheus_url=prometheus.url, prometheus_token_file=str(token))
    source = PrometheusSource(settings, environ={})
    for text in ("first", "second"):
        token.write_text(f"{text}\n")
        await source.read()
    token.unlink()
    with pytest.raises(Untrusted, match="prometheus_token_file"):
        await source.read()
    await source.close()
    assert [headers["authorization"] for headers in prometheus.headers] == ["Bearer first", "Bearer second"]


async def test_the_token_may_come_from_the_environment(prometheus: FakePrometheus):
    await read(prometheus, environ={"TOKEN": "secret"}, prometheus_token_env="TOKEN")
    assert prometheus.headers[0]["authorization"] == "Bearer secret"


class Answers:
    def __init__(self, replies: Replies[object] | Exception) -> None:
        self.replies = replies

    async def ask(self, question: str, *args: object) -> Replies[object]:
        assert question == "signals"
        if isinstance(self.replies, Exception):
            raise self.replies
        return self.replies


async def test_replicas_are_asked_and_what_is_no_answer_is_rejected():
    reading = await ReplicaSource(Answers(Replies({"a": ONE, "b": None, "c": {"x": 1}}, ("d",)))).read()
    assert reading.replicas == (ONE,)
    assert {name: fault.cause for name, fault in reading.rejected.items()} == {"b": Cause.ABSURD, "c": Cause.ABSURD}


async def test_replicas_that_cannot_be_asked_are_a_cause():
    with pytest.raises(Untrusted) as untrusted:
        await ReplicaSource(Answers(RuntimeError("the router is gone"))).read()
    assert untrusted.value.cause is Cause.SOURCE and "the router is gone" in untrusted.value.detail
