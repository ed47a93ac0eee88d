"""From the engine's records to numbers: nothing is invented, nothing is lost."""

from collections import Counter

import pytest

from loopserve.dialogue import FinishReason, Mode, QualityReport, SessionId, TurnUsage
from loopserve.stats import BudgetDemand, MemoryStats, Occupancy, StepStats, TokenGap, TurnStats
from monitoring import catalogue as c
from monitoring.catalogue import CATALOGUE, Kind, Metric, Origin, turn_bucket
from monitoring.exposition import Part, PrometheusSink, page
from monitoring.ray_metrics import RaySink
from monitoring.recorder import Recorder, record_memory


class Log:
    """A sink that keeps everything, and refuses what the catalogue does not allow."""

    def __init__(self):
        self.counts, self.gauges, self.seen = Counter(), {}, []

    def inc(self, metric: Metric, value=1.0, **labels):
        assert metric.kind is Kind.COUNTER and set(labels) == set(metric.labels)
        self.counts[metric.name, *labels.values()] += value

    def set(self, metric, value, **labels):
        assert metric.kind is Kind.GAUGE and set(labels) == set(metric.labels)
        self.gauges[metric.name, *labels.values()] = value

    def observe(self, metric, value, **labels):
        assert metric.kind is Kind.HISTOGRAM and set(labels) == set(metric.labels)
        self.seen.append((metric.name, *labels.values(), value))


def turn(**changes) -> TurnStats:
    quality = QualityReport(
        Mode.SPARSE,
        coverage_mean=0.9,
        coverage_worst_head=0.5,
        kept_tokens=25.0,
        context_tokens=100.0,
        refreshes=3,
        dense_fallbacks=1,
    )
    given = {
        "session_id": SessionId("s"),
        "turn_number": 6,
        "reason": FinishReason.STOP,
        "usage": TurnUsage(100, 80, 7, quality),
        "queue_s": 0.5,
        "first_token_s": 2.0,
        "total_s": 5.0,
        "num_preemptions": 0,
    }
    return TurnStats(**(given | changes))


def test_turn_is_counted_with_its_phases_and_its_place_in_the_conversation():
    log = Log()
    Recorder(log).on_turn(turn())
    assert {entry for entry in log.seen if entry[0].endswith("_seconds")} == {
        ("loopserve_queue_time_seconds", "5-8", 0.5),
        ("loopserve_prefill_time_seconds", "5-8", 1.5),
        ("loopserve_decode_time_seconds", "5-8", 3.0),
        ("loopserve_turn_duration_seconds", "5-8", 5.0),
    }
    assert log.counts["loopserve_turns_total", "stop"] == 1
    assert log.counts["loopserve_reused_tokens_total", "device"] == 80
    assert log.counts["loopserve_refreshes_total",] == 3
    assert ("loopserve_kept_tokens_ratio", 0.25) in log.seen


def test_turn_that_never_got_a_place_is_counted_as_ended_only():
    log = Log()
    recorder = Recorder(log)
    before = Counter(log.counts)
    recorder.on_turn(turn(queue_s=None, first_token_s=None, reason=FinishReason.ERROR))
    assert log.counts - before == {("loopserve_turns_total", "error"): 1}
    assert log.seen == []


def test_dense_turn_leaves_no_coverage():
    log = Log()
    Recorder(log).on_turn(turn(usage=TurnUsage(10, 0, 1, QualityReport(Mode.EXACT))))
    assert not [entry for entry in log.seen if "coverage" in entry[0] or "kept" in entry[0]]


def test_step_is_counted_by_phase_and_every_gap_by_its_turn():
    log = Log()
    Recorder(log).on_step(
        StepStats(1, 0.02, 30, 4, 4, 0, 2, 100, (TokenGap(3, 0.5),), (TokenGap(1, 0.01), TokenGap(40, 0.03)))
    )
    assert log.counts["loopserve_step_tokens_total", "prefill"] == 30
    assert log.counts["loopserve_preemptions_total",] == 2
    gaps = [entry[1:] for entry in log.seen if entry[0] == "loopserve_inter_token_latency_seconds"]
    assert gaps == [("1", 0.01), ("33+", 0.03)]
    assert ("loopserve_time_to_first_token_seconds", "3-4", 0.5) in log.seen


def memory(**changes) -> MemoryStats:
    given = {
        "num_running_turns": 2, "num_waiting_turns": 1, "max_running_turns": 4, "block_bytes": 10,
        "blocks": Occupancy(100, 20, 30, 5, 15, 30), "num_active_sessions": 2, "num_warm_sessions": 3,
        "active_tokens": 400, "warm_tokens": 500,
        "demand": (BudgetDemand(8, 60, 70), BudgetDemand(16, 100, 110), BudgetDemand(None, 250, 300)),
        "budget_tokens": 8, "budget_ceiling_tokens": 8, "budget_max_tokens": 16, "budget_floor_tokens": 8,
    }  # fmt: skip
    return MemoryStats(**(given | changes))


def test_memory_becomes_bytes_by_kind_and_the_whole_demand_curve():
    log = Log()
    record_memory(log, memory())
    kinds = {key[1]: value for key, value in log.gauges.items() if key[0] == "loopserve_kv_bytes"}
    assert kinds == {"active": 200, "warm": 300, "shared": 50, "cached": 150, "free": 300}
    assert sum(kinds.values()) == log.gauges["loopserve_kv_capacity_bytes",] == 1000
    assert log.gauges["loopserve_kv_demand_bytes", "active", "full"] == 250
    assert log.gauges["loopserve_kv_working_set_bytes", "active"] == 60
    assert log.gauges["loopserve_compression_ratio",] == pytest.approx(60 / 250)
    record_memory(log, memory(budget_tokens=16, budget_ceiling_tokens=None))
    assert log.gauges["loopserve_kv_working_set_bytes", "active"] == 100
    assert log.gauges["loopserve_budget_ceiling_tokens",] == 16


def test_turn_buckets_cover_every_turn_once():
    buckets = [turn_bucket(number) for number in range(1, 200)]
    assert list(dict.fromkeys(buckets)) == ["1", "2", "3-4", "5-8", "9-16", "17-32", "33+"]


def test_names_in_the_catalogue_are_unique_and_without_colons():
    names = [metric.name for metric in CATALOGUE]
    assert len(set(names)) == len(names) and not any(":" in name for name in names)
    assert all(metric.help.endswith(".") and metric.source for metric in CATALOGUE)


def test_parts_of_several_processes_become_one_page():
    sinks = {name: PrometheusSink([c.TURNS, c.TTFT]) for name in ("a", "b")}
    for name, sink in sinks.items():
        sink.inc(c.TURNS, 2.0 if name == "a" else 3.0, reason="stop")
    sinks["b"].observe(c.TTFT, 0.3, turn="2")
    text = page([Part(Origin.ENGINE, name, sink.families()) for name, sink in sinks.items()]).decode()
    assert text.count("# TYPE loopserve_turns_total counter") == 1
    assert 'loopserve_turns_total{reason="stop",replica="a"} 2.0' in text
    assert 'loopserve_turns_total{reason="stop",replica="b"} 3.0' in text
    assert 'loopserve_time_to_first_token_seconds_bucket{le="0.5",replica="b",turn="2"} 1.0' in text
    assert "_created" not in text


class RayApi:
    """What the exporter needs of `ray.util.metrics`, keeping what it was told."""

    def __init__(self):
        self.told = []

    def Counter(self, name, description, tag_keys):
        return self._handle(name)

    Gauge = Counter

    def Histogram(self, name, description, boundaries, tag_keys):
        return self._handle(name)

    def _handle(self, name):
        told = self.told

        class Handle:
            def inc(self, value, tags):
                assert value > 0, "Ray refuses others"
                told.append((name, value, tags))

            def set(self, value, tags):
                told.append((name, value, tags))

            observe = set

        return Handle()


def test_rays_gauges_are_set_again_at_every_refresh_and_counters_are_not():
    api = RayApi()
    sink = RaySink([c.TURNS, c.KV_BYTES], api=api, origin=Origin.ENGINE, name="a")
    sink.inc(c.TURNS, 0.0, reason="stop")
    sink.inc(c.TURNS, reason="stop")
    sink.set(c.KV_BYTES, 5.0, kind="warm")
    told = [("loopserve_turns", 1.0, {"replica": "a", "reason": "stop"})]
    gauge = ("loopserve_kv_bytes", 5.0, {"replica": "a", "kind": "warm"})
    assert api.told == [*told, gauge]
    sink.refresh()
    assert api.told == [*told, gauge, gauge]
