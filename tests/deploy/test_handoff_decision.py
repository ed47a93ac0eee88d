"""Which sessions change hands: to where routers will look for them, hottest first, and only where that is quicker than computing again."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.handoff.decision import Decision, HeldSession, Places, Remaining, decide, displaced, hottest_first
from deploy.handoff.records import Result
from deploy.handoff.settings import PIECE_BYTES_MAX, HandoffSettings
from deploy.settings import DeploySettings
from loopserve.dialogue import SessionId
from loopserve.errors import ConfigError
from loopserve.move_cost import MoveCost
from router.affinity import Affinity, AffinityKey, AffinitySettings, ReplicaLoad, ReplicaName, ReplicaView, rendezvous

AFFINITY = AffinitySettings()
SETTINGS = HandoffSettings()
WIDE = Remaining(seconds=100.0, num_bytes=1 << 40)
CHEAP = MoveCost(fixed_s=0.0, seconds_per_byte=1e-9)

names = st.lists(st.text("abcdef", min_size=1, max_size=4), min_size=1, max_size=6, unique=True)
loads = st.builds(
    ReplicaLoad,
    running=st.integers(0, 9),
    waiting=st.integers(0, 9),
    queue_s=st.sampled_from([0.0, 0.5, 2.0, 30.0]),
    prefill_s_per_token=st.sampled_from([0.0, 1e-4, 1e-2]),
    accepting=st.booleans(),
)


def held(name: str = "s", **fields: object) -> HeldSession:
    session = HeldSession(
        SessionId(name), key=name, home=name, num_tokens=1000, num_kv_bytes=1_000_000, idle_s=1.0, is_active=False
    )
    return replace(session, **fields)


def places(known_prefill_s: float = 0.0, **by_name: ReplicaLoad) -> Places:
    return Places(by_name, AFFINITY, known_prefill_s=known_prefill_s)


@given(names, st.data())
def test_a_session_goes_where_a_router_sends_its_next_turn_once_this_replica_is_gone(found: list[str], data):
    by_name = {name: data.draw(loads) for name in found}
    session = held(data.draw(st.text("xyz", max_size=3)), num_tokens=data.draw(st.integers(1, 100_000)))
    chosen = places(**by_name).of(session)
    router = Affinity(AFFINITY, clock=lambda: 5.0)
    router.remember(AffinityKey(home=session.home, resident=("claimed",)), ReplicaName("gone"))
    key = AffinityKey(session.home, resident=("claimed",), prompt_tokens=session.num_tokens, continues=True)
    ranking = router.rank(key, [ReplicaView(ReplicaName(name), load) for name, load in by_name.items()])
    accepting = [name for name, load in by_name.items() if load.accepting]
    assert chosen == (ranking.replicas[0] if accepting else None)


@given(names, st.text("xyz", max_size=3))
def test_where_nobody_waits_that_is_the_next_in_the_order_that_all_routers_know(found: list[str], home: str):
    by_name = {name: ReplicaLoad(accepting=number % 3 != 0) for number, name in enumerate(found)}
    order = [name for name in rendezvous(home, [ReplicaName(n) for n in found]) if by_name[name].accepting]
    assert places(**by_name).of(held(home=home)) == (order[0] if order else None)


@given(st.lists(st.tuples(st.floats(0, 100), st.integers(0, 3)), max_size=8))
def test_the_hottest_come_first_and_what_holds_no_kv_does_not_come(found: list[tuple[float, int]]):
    sessions = [held(str(n), idle_s=idle_s, num_tokens=tokens) for n, (idle_s, tokens) in enumerate(found)]
    ordered = hottest_first(sessions)
    assert [s.idle_s for s in ordered] == sorted(s.idle_s for s in sessions if s.num_tokens)


@given(
    st.integers(0, 10**6), st.integers(1, 10**10), st.floats(0, 1e-2), st.floats(0, 1), st.floats(1e-12, 1e-6),
    st.floats(-1, 20), st.integers(0, 10**11),
)  # fmt: skip
def test_what_moves_is_quicker_to_move_than_to_compute_and_within_every_limit(
    tokens: int, num_bytes: int, prefill_s: float, fixed_s: float, per_byte_s: float, seconds: float, bytes_left: int
):
    session = held(num_tokens=tokens, num_kv_bytes=num_bytes)
    cost = MoveCost(fixed_s=fixed_s, seconds_per_byte=per_byte_s)
    there = places(a=ReplicaLoad(prefill_s_per_token=prefill_s))
    decision = decide(session, there, cost, remaining=Remaining(seconds, bytes_left), settings=SETTINGS)
    move_s = cost.seconds(num_bytes)
    pays = prefill_s == 0 or move_s < tokens * prefill_s
    fits = num_bytes <= min(bytes_left, SETTINGS.session_bytes_max) and move_s <= min(seconds, SETTINGS.move_timeout_s)
    left = None if pays and fits else Result.OVER_LIMIT if pays else Result.NOT_WORTH_IT
    assert decision == Decision("a" if left is None else None, left)


def test_an_active_session_stays_and_one_without_a_place_is_told():
    there = places(a=ReplicaLoad())
    assert decide(held(is_active=True), there, CHEAP, remaining=WIDE, settings=SETTINGS).left is Result.BUSY
    full = places(a=ReplicaLoad(accepting=False))
    assert decide(held(), full, CHEAP, remaining=WIDE, settings=SETTINGS) == Decision(None, Result.REFUSED)


def test_computing_is_as_fast_as_the_target_says_then_as_the_slowest_that_is_known():
    slow = ReplicaLoad(prefill_s_per_token=1.0, accepting=False)
    assert places(a=ReplicaLoad(prefill_s_per_token=0.5), b=slow).recompute_s(held(), "a") == 500.0
    assert places(a=ReplicaLoad(), b=slow).recompute_s(held(), "a") == 1000.0
    assert places(known_prefill_s=2.0, a=ReplicaLoad()).recompute_s(held(), "a") == 2000.0
    assert places(a=ReplicaLoad()).recompute_s(held(), "a") is None


def test_the_cost_of_moves_is_learned_by_the_bytes():
    cost = MoveCost(fixed_s=0.05, seconds_per_byte=1e-6)
    for _ in range(12):
        cost.measured(256 << 20, 0.05 + (256 << 20) * 1e-9)
    assert cost.seconds(1 << 30) == pytest.approx(0.05 + (1 << 30) * 1e-9, rel=0.3)
    before = cost.seconds_per_byte
    for _ in range(50):
        cost.measured(10_000, 0.5)  # small moves tell what every move costs, nothing of bytes
    assert cost.seconds_per_byte == before
    assert cost.fixed_s == pytest.approx(0.5, rel=0.01)


@given(st.lists(st.tuples(st.integers(0, 10**10), st.floats(0, 1e4)), max_size=20))
def test_no_measurement_makes_a_move_take_less_than_nothing(measured: list[tuple[int, float]]):
    cost = MoveCost(fixed_s=0.05, seconds_per_byte=1e-9)
    for num_bytes, seconds in measured:
        cost.measured(num_bytes, seconds)
    assert cost.fixed_s >= 0 and cost.seconds_per_byte >= 0


def elsewhere(own: str, *others: str) -> HeldSession:
    """A session whose home is not `own`."""
    order = ((str(n), rendezvous(str(n), [ReplicaName(x) for x in (own, *others)])[0]) for n in range(100))
    return held(next(name for name, home in order if home != own))


def test_an_overloaded_replica_gives_back_a_few_sessions_whose_home_is_idle_and_no_others():
    crowded, idle = ReplicaLoad(queue_s=SETTINGS.rebalance_wait_s), ReplicaLoad()
    guest = elsewhere("own", "other")
    at_home = next(held(str(n)) for n in range(100) if rendezvous(str(n), ["own", "other"])[0] == "own")
    both = places(own=crowded, other=idle)
    assert displaced([at_home, guest], both, own="own", settings=SETTINGS) == [guest]
    assert displaced([replace(guest, is_active=True)], both, own="own", settings=SETTINGS) == []
    many = [replace(guest, session_id=SessionId(str(n)), idle_s=float(9 - n)) for n in range(5)]
    assert [s.session_id for s in displaced(many, both, own="own", settings=SETTINGS)] == ["4", "3"]


@pytest.mark.parametrize(
    ("own", "other"),
    [
        (ReplicaLoad(queue_s=2.9), ReplicaLoad()),  # not so long that it would pay
        (ReplicaLoad(queue_s=60.0), ReplicaLoad(queue_s=0.5)),  # the home has a queue of its own
        (ReplicaLoad(queue_s=60.0), ReplicaLoad(accepting=False)),
    ],
)
def test_nothing_is_given_back_where_that_would_not_help_for_certain(own: ReplicaLoad, other: ReplicaLoad):
    there = places(own=own, other=other)
    assert displaced([elsewhere("own", "other")], there, own="own", settings=SETTINGS) == []


@pytest.mark.parametrize(
    "wrong",
    [{"time_max_s": 0.0}, {"incoming_max": 0}, {"assumed_fixed_s": -1.0}, {"piece_bytes": PIECE_BYTES_MAX + 1},
     {"rebalance_period_s": -1.0}, {"session_bytes_max": 0}],
)  # fmt: skip
def test_limits_that_cannot_be_are_refused_by_name(wrong: dict[str, float]):
    with pytest.raises(ConfigError, match=f"handoff.{next(iter(wrong))}"):
        HandoffSettings(**wrong)


def test_a_drain_leaves_half_of_the_time_to_turns_and_the_engine():
    assert DeploySettings(stop_timeout_s=6.0).drain_s == 3.0
    assert DeploySettings(stop_timeout_s=600.0).drain_s == HandoffSettings().time_max_s
    env = {"LOOPSERVE_HANDOFF__TIME_MAX_S": "4", "LOOPSERVE_HANDOFF__ENABLED": "false"}
    settings = DeploySettings.from_env(env)
    assert (settings.drain_s, settings.handoff.enabled) == (4.0, False)
