"""From the engine's records to numbers: nothing is invented, nothing is lost."""

from collections import Counter

import pytest

from deploy.handoff.records import Result
from loopserve.dialogue import FinishReason, Mode, QualityReport, SessionId, TurnUsage
from loopserve.stats import (
    BudgetDemand,
    DiskCounts,
    MemoryStats,
    Occupancy,
    PressureCounts,
    StepStats,
    TokenGap,
    TurnStats,
)
from monitoring import catalogue as c
from monitoring.catalogue import CATALOGUE, Kind, Metric, Origin, turn_bucket
from monitoring.exposition import Part, PrometheusSink, page
from monitoring.ray_metrics import RaySink
from monitoring.recorder import MemoryRecorder, Recorder


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
        "num_running_turns": 2, "num_waiting_turns": 1, "max_running_turns": 4, "num_compact_turns": 1,
        "block_bytes": 10, "device_bytes": 1234,
        "blocks": Occupancy(100, 20, 30, 5, 15, 30, shared_active=2), "host_blocks": Occupancy(60, 40, 8, 2, 3, 7),
        "num_active_sessions": 2, "num_warm_sessions": 3,
        "active_tokens": 400, "warm_tokens": 500, "computed_tokens": 1056,
        "demand": (BudgetDemand(8, 60, 70), BudgetDemand(16, 100, 110), BudgetDemand(None, 250, 300)),
        "budget_tokens": 16, "compact_budget_tokens": 8, "budget_ceiling_tokens": 8, "budget_max_tokens": 16, "budget_floor_tokens": 8,
    }  # fmt: skip
    return MemoryStats(**(given | changes))


def test_memory_becomes_bytes_by_tier_and_kind_and_the_whole_demand_curve():
    log = Log()
    recorder = MemoryRecorder(log)
    recorder.record(memory())
    bytes_ = {key[1:]: value for key, value in log.gauges.items() if key[0] == "loopserve_kv_bytes"}
    device, host = ({kind: n for (tier, kind), n in bytes_.items() if tier == of} for of in ("device", "host"))
    assert device == {"active": 200, "warm": 300, "shared": 50, "cached": 150, "free": 300}
    assert host == {"active": 400, "warm": 80, "shared": 20, "cached": 30, "free": 70}
    assert sum(device.values()) == log.gauges["loopserve_kv_capacity_bytes",] == 1000
    assert log.gauges["loopserve_kv_device_bytes",] == 1234
    assert log.gauges["loopserve_kv_demand_bytes", "active", "full"] == 250
    assert log.gauges["loopserve_budget_ceiling_tokens",] == 8
    recorder.record(memory(budget_ceiling_tokens=None))
    assert log.gauges["loopserve_budget_ceiling_tokens",] == 16


def test_the_working_set_is_that_of_the_budget_which_compact_turns_have():
    log = Log()
    MemoryRecorder(log).record(memory())
    assert (log.gauges["loopserve_budget_tokens",], log.gauges["loopserve_compact_budget_tokens",]) == (16, 8)
    assert log.gauges["loopserve_kv_working_set_bytes", "active"] == 60
    assert log.gauges["loopserve_kv_working_set_bytes", "warm"] == 70
    MemoryRecorder(log).record(memory(compact_budget_tokens=16))
    assert log.gauges["loopserve_kv_working_set_bytes", "active"] == 100


def test_tokens_are_logical_physical_by_tier_and_compressed():
    log = Log()
    MemoryRecorder(log).record(memory())
    assert log.gauges["loopserve_logical_tokens", "active"] == 400
    assert log.gauges["loopserve_physical_tokens", "device"] == 55 * 16
    assert log.gauges["loopserve_physical_tokens", "host"] == 50 * 16
    assert log.gauges["loopserve_compression_ratio",] == pytest.approx(1056 / (22 * 16))  # of active turns alone
    assert (log.gauges["loopserve_turns_compact",], log.gauges["loopserve_turns_running",]) == (1, 2)


def steps(log: Log) -> dict[str, float]:
    return {key[1]: value for key, value in log.counts.items() if key[0] == "loopserve_pressure_steps_total"}


def test_pressure_steps_are_there_from_the_start_and_counted_by_what_was_added_since_the_last_look():
    log = Log()
    recorder = MemoryRecorder(log)
    names = ["reclaimed_prefix_blocks", "offloaded_session", "dropped_session", "compacted_turn", "lowered_budget"]
    assert steps(log) == dict.fromkeys(names, 0)
    for totals in ((7, 2, 1, 0, 0), (7, 2, 1, 0, 0), (9, 3, 1, 4, 5)):
        recorder.record(memory(pressure=PressureCounts(*totals)))
        assert steps(log) == dict(zip(names, totals, strict=True))


def test_the_disk_is_counted_where_there_is_one_and_its_counters_are_there_from_the_start():
    log = Log()
    recorder = MemoryRecorder(log)
    recorder.record(memory())
    assert not [key for key in log.gauges if "disk" in key[0]]
    zeros = {key: count for key, count in log.counts.items() if "disk" in key[0]}
    assert len(zeros) == 10 and not any(zeros.values())
    disk = DiskCounts(saved_sessions=3, saved_bytes=300, loaded_sessions=1, loaded_bytes=90, late=2, num_sessions=2)
    for told in (disk, disk.with_refused("corrupt").with_refused("version").plus(full=1)):
        recorder.record(memory(disk=told))
    counted = {key[1]: n for key, n in log.counts.items() if key[0] == "loopserve_disk_outcomes_total" and n}
    assert counted == {"saved": 3, "loaded": 1, "late": 2, "refused": 2, "full": 1}
    assert log.counts["loopserve_disk_moved_bytes_total", "loaded"] == 90
    assert log.gauges["loopserve_disk_sessions",] == 2


def test_of_two_who_look_at_once_the_one_that_comes_late_takes_nothing_back():
    log = Log()
    recorder = MemoryRecorder(log)
    for total in (3, 8, 5, 9):
        recorder.record(memory(pressure=PressureCounts(compacted_turns=total)))
    assert steps(log)["compacted_turn"] == 9


def test_hand_offs_are_there_from_the_start_by_every_result():
    log = Log()
    Recorder(log)
    assert {key[1] for key in log.counts if key[0] == "loopserve_handoffs_total"} == set(Result)


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
    sink.set(c.KV_BYTES, 5.0, tier="host", kind="warm")
    told = [("loopserve_turns", 1.0, {"replica": "a", "reason": "stop"})]
    gauge = ("loopserve_kv_bytes", 5.0, {"replica": "a", "tier": "host", "kind": "warm"})
    assert api.told == [*told, gauge]
    sink.refresh()
    assert api.told == [*told, gauge, gauge]
