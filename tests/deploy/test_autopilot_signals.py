"""What the autopilot believes."""

import math
from dataclasses import replace

import pytest
from fleet_model import signals
from hypothesis import given
from hypothesis import strategies as st

from deploy.autopilot.settings import AutopilotSettings
from deploy.autopilot.signals import Cause, FleetLoad, Reading, ReplicaCounts, Snapshot, Untrusted, trusted
from deploy.calls import ReplicaSignals

SETTINGS = AutopilotSettings(max_replicas=8)
NOW = 1_000_000.0
GOOD = signals(active_tokens=10_000, unix_time=NOW)


def believe(*replicas: ReplicaSignals, counts: ReplicaCounts | None = None, **rejected: Untrusted) -> Snapshot:
    counts = counts or ReplicaCounts(len(replicas), len(replicas), 0, 0)
    return trusted(Reading(replicas, rejected), counts, SETTINGS, unix_time=NOW)


def cause_of(*replicas: ReplicaSignals, counts: ReplicaCounts | None = None) -> Cause:
    with pytest.raises(Untrusted) as untrusted:
        believe(*replicas, counts=counts)
    assert untrusted.value.detail
    return untrusted.value.cause


def test_a_plain_reading_is_believed():
    snapshot = believe(GOOD, replace(GOOD, replica="b", unix_time=NOW - 3.0))
    assert [replica.replica for replica in snapshot.replicas] == ["a", "b"]
    assert (snapshot.age_s, snapshot.num_missing, snapshot.is_whole) == (3.0, 0, True)


@pytest.mark.parametrize(
    "changes",
    [
        {"capacity_bytes": 0},
        {"capacity_bytes": math.nan},
        {"capacity_bytes": math.inf},
        {"active_bytes": -1},
        {"active_bytes": GOOD.capacity_bytes + 1},
        {"warm_bytes": GOOD.capacity_bytes},
        {"shared_bytes": math.nan},
        {"host_capacity_bytes": -1},
        {"host_live_bytes": 6, "host_capacity_bytes": 10, "host_warm_bytes": 5},
        {"compact_above_ratio": math.nan},
        {"num_running": None},
        {"num_waiting": -3},
        {"num_waiting": True},
        {"max_running": 0},
        {"unix_time": math.nan},
        {"budget_floor_tokens": 0},
        {"budget_floor_tokens": 4096},
        {"budget_max_tokens": math.nan},
        {"budget_ceiling_tokens": 0},
        {"budget_ceiling_tokens": math.nan},
        {"demand": ()},
        {"demand": ((64, 10, 0),)},
        {"demand": ((64, 10, 0), (32, 20, 0), (None, 30, 0))},
        {"demand": ((64, 20, 0), (128, 10, 0), (None, 30, 0))},
        {"demand": ((64, math.nan, 0), (None, 30, 0))},
        {"demand": ((64, 10, -1), (None, 30, 0))},
        {"demand": ((None, 5, 0), (None, 30, 0))},
        {"demand": ((64, 10, 0), (None, 10**30, 0))},
    ],
    ids=str,
)
def test_nonsense_of_the_only_replica_is_absurd(changes):
    assert cause_of(replace(GOOD, **changes)) is Cause.ABSURD


def test_old_data_are_stale_and_data_from_the_future_show_a_wrong_clock():
    assert cause_of(replace(GOOD, unix_time=NOW - SETTINGS.snapshot_age_max_s - 0.1)) is Cause.STALE
    assert cause_of(replace(GOOD, unix_time=NOW + SETTINGS.clock_skew_max_s + 0.1)) is Cause.CLOCK
    assert believe(replace(GOOD, unix_time=NOW + SETTINGS.clock_skew_max_s - 0.1)).age_s == 0.0


def test_nothing_about_running_replicas_is_missing_data_and_no_replicas_are_a_fleet_asleep():
    assert cause_of(counts=ReplicaCounts(2, 2, 0, 0)) is Cause.MISSING
    assert believe(counts=ReplicaCounts(0, 0, 0, 0)).replicas == ()
    assert believe(counts=ReplicaCounts(1, 0, 1, 0)).replicas == ()


def test_without_serve_and_without_data_nothing_is_believed():
    with pytest.raises(Untrusted) as untrusted:
        trusted(Reading(()), None, SETTINGS, unix_time=NOW)
    assert untrusted.value.cause is Cause.MISSING


def test_data_without_serve_are_believed_but_not_whole():
    snapshot = trusted(Reading((GOOD,)), None, SETTINGS, unix_time=NOW)
    assert len(snapshot.replicas) == 1 and not snapshot.is_whole


def named(count: int) -> list[ReplicaSignals]:
    return [replace(GOOD, replica=f"r{i}") for i in range(count)]


@pytest.mark.parametrize(("running", "missing", "believed"), [(3, 1, False), (4, 1, True), (4, 2, False), (8, 2, True)])
def test_a_quarter_of_the_replicas_may_be_missing(running: int, missing: int, believed: bool):
    replicas, counts = named(running)[missing:], ReplicaCounts(running, running, 0, 0)
    if believed:
        snapshot = believe(*replicas, counts=counts)
        assert (snapshot.num_missing, snapshot.is_whole) == (missing, False)
    else:
        assert cause_of(*replicas, counts=counts) is Cause.REPLICAS


def test_one_nonsensical_replica_of_four_is_left_out():
    replicas = named(4)
    replicas[2] = replace(replicas[2], active_bytes=math.nan)
    snapshot = believe(*replicas)
    assert [replica.replica for replica in snapshot.replicas] == ["r0", "r1", "r3"] and not snapshot.is_whole


def test_two_nonsensical_replicas_of_four_are_named_as_the_cause():
    replicas = [replace(one, active_bytes=math.nan) if i < 2 else one for i, one in enumerate(named(4))]
    assert cause_of(*replicas) is Cause.ABSURD


def test_more_replicas_than_serve_knows_of_are_not_believed():
    assert cause_of(*named(3), counts=ReplicaCounts(1, 1, 1, 0)) is Cause.REPLICAS
    assert not believe(*named(3), counts=ReplicaCounts(2, 2, 0, 1)).is_whole  # one is on its way out


def test_a_replica_whose_engine_is_dead_does_not_count():
    replicas = [replace(one, accepting=i > 0) for i, one in enumerate(named(4))]
    assert believe(*replicas).num_missing == 1


def test_demand_is_read_at_the_first_rung_that_is_no_smaller():
    load = FleetLoad((replace(GOOD, demand=((64, 10, 0), (256, 40, 0), (None, 90, 0))),))
    assert [load.demand_bytes(budget) for budget in (1, 64, 65, 256, 257, None)] == [10, 10, 40, 40, 90, 90]


def test_a_budget_frees_what_its_curve_falls_by_and_a_flat_curve_frees_nothing():
    load = FleetLoad((replace(GOOD, demand=((64, 10**6, 0), (1024, 40 * 10**6, 0), (None, 90 * 10**6, 0))),))
    assert load.frees(None, 1024) and load.frees(1024, 64) and not load.frees(64, 64)
    flat = FleetLoad((signals(active_tokens=90_000, is_flat=True),))
    assert not flat.frees(None, 64)
    hardly = FleetLoad((replace(GOOD, demand=((64, 40 * 10**6, 0), (None, 40 * 10**6 + 999_999, 0))),))
    assert not hardly.frees(None, 64), "less than a hundredth of the pool"


def test_idle_conversations_are_counted_and_have_room_on_both_tiers():
    one = replace(
        GOOD, warm_bytes=5, host_warm_bytes=7, host_capacity_bytes=300, host_live_bytes=40, capacity_bytes=100
    )
    one = replace(one, active_bytes=10, shared_bytes=2)
    load = FleetLoad((one, replace(one, replica="b")))
    assert load.warm_bytes == 24
    assert [load.warm_room_bytes(n) for n in (0, 1, 2)] == [-104, 400 - 104, 800 - 104]


def test_rungs_lie_between_the_floors_and_the_budget():
    load = FleetLoad((GOOD, replace(GOOD, replica="b", budget_floor_tokens=128)))
    assert load.rungs(None) == (128, 256, 512, 1024)
    assert load.rungs(300) == (300, 512, 1024)
    assert load.rungs(9999) == (1024,)


junk = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.just("many"))


@given(
    changes=st.dictionaries(
        st.sampled_from(["capacity_bytes", "active_bytes", "num_running", "max_running", "unix_time", "demand"]), junk
    )
)
def test_whatever_a_replica_says_is_believed_or_refused_with_a_cause(changes):
    try:
        changes = {**changes, **({"demand": ((changes["demand"],) * 3,)} if "demand" in changes else {})}
        snapshot = believe(replace(GOOD, **changes))
    except Untrusted as untrusted:
        assert untrusted.cause in (Cause.ABSURD, Cause.STALE, Cause.CLOCK)
    else:
        (replica,) = snapshot.replicas
        assert 0 <= replica.active_bytes <= replica.capacity_bytes < math.inf and replica.max_running > 0
