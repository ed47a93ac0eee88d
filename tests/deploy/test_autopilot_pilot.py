"""The autopilot's rounds over fakes: what is ordered, in what sequence, and what happens when something around it fails."""

import asyncio
import logging
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from fleet_model import signals

from deploy.autopilot.explain import Teller
from deploy.autopilot.lease import BudgetLease
from deploy.autopilot.pilot import Instruments, Pilot
from deploy.autopilot.scaler import ScalerFailed
from deploy.autopilot.settings import AutopilotSettings
from deploy.autopilot.signals import Cause, Reading, ReplicaCounts, Untrusted
from deploy.autopilot.sources import ReplicaSource
from deploy.calls import BudgetOrder, BudgetReply, ReplicaSignals
from deploy.fleet import Replies
from monitoring import catalogue as c
from monitoring.catalogue import Metric

pytestmark = pytest.mark.anyio

ON = AutopilotSettings(mode="on", max_replicas=4)


@dataclass
class World:
    """Replicas with their leases, Serve's count of them, and clocks. `broken` names what does not work now."""

    now_s: float = 1000.0
    load: float = 0.3  # of one pool, at every replica, by ten resident turns; above 0.85 others wait
    target: int = 1
    running: int = 1
    in_flight: int = 0
    ask_error: Exception | None = None
    serve_error: bool = False
    scale_error: bool = False
    deaf: bool = False
    nonsense: dict[str, Any] = field(default_factory=dict)
    leases: dict[str, BudgetLease] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)

    def clock(self) -> float:
        return self.now_s

    def lease(self, name: str) -> BudgetLease:
        return self.leases.setdefault(name, BudgetLease(clock=self.clock))

    @property
    def names(self) -> list[str]:
        return [f"r{i}" for i in range(self.running)]

    @property
    def ceilings(self) -> set[int | None]:
        return {self.lease(name).ceiling_tokens for name in self.names}

    @property
    def forms(self) -> set[float | None]:
        return {self.lease(name).compact_above_ratio for name in self.names}

    def signals(self, name: str) -> ReplicaSignals:
        waiting = 16 if self.load > 0.85 else 0
        one = signals(name, active_tokens=int(self.load * 100_000), turns=10, waiting=waiting, unix_time=self.now_s)
        ordered = self.lease(name).compact_above_ratio
        one = replace(one, compact_above_ratio=1.0 if ordered is None else ordered)
        return replace(one, budget_ceiling_tokens=self.lease(name).ceiling_tokens, **self.nonsense)

    async def ask(self, question: str, *args: Any) -> Replies[Any]:
        """As `Fleet.ask`, of engines and ingresses alike."""
        if question == "in_flight":
            return Replies({"ingress": self.in_flight}, ())
        if self.ask_error is not None:
            raise self.ask_error
        if question == "signals":
            return Replies({name: self.signals(name) for name in self.names}, ())
        (order,) = args
        assert question == "set_budget" and isinstance(order, BudgetOrder)
        self.log.append(f"{order.autopilot} orders {order.ceiling_tokens}")
        if self.deaf:
            return Replies({}, tuple(self.names))
        return Replies({name: self.lease(name).take(order) for name in self.names}, ())

    async def counts(self) -> ReplicaCounts:
        if self.serve_error:
            raise ScalerFailed("Serve's controller is away")
        return ReplicaCounts(self.target, self.running, max(0, self.target - self.running), 0)

    async def scale(self, target: int) -> None:
        if self.scale_error or self.serve_error:
            raise ScalerFailed("not now")
        self.log.append(f"scale {target}")
        self.target = target

    async def close(self) -> None:
        pass


class Sums:
    """A sink that adds up."""

    def __init__(self) -> None:
        self.counters: Counter[tuple[str, ...]] = Counter()
        self.gauges: dict[tuple[str, ...], float] = {}

    def inc(self, metric: Metric, value: float = 1.0, **labels: str) -> None:
        assert set(labels) == set(metric.labels)
        self.counters[metric.name, *labels.values()] += value  # type: ignore[assignment]

    def set(self, metric: Metric, value: float, **labels: str) -> None:
        assert set(labels) == set(metric.labels)
        self.gauges[metric.name, *labels.values()] = value

    def observe(self, metric: Metric, value: float, **labels: str) -> None:
        self.counters[metric.name] += 1


@dataclass
class Flight:
    world: World
    pilot: Pilot
    sums: Sums
    teller: Teller

    async def rounds(self, count: int) -> None:
        for _ in range(count):
            self.world.now_s += self.pilot.settings.interval_s
            await self.pilot.round()

    def overview(self) -> dict[str, Any]:
        return self.teller.overview(self.pilot.settings, settings_error="")

    @property
    def cause(self) -> str | None:
        holding = self.overview()["holding"]
        return holding["cause"] if holding else None


def take_off(
    world: World | None = None, settings: AutopilotSettings = ON, *, name: str = "m", source: Any = None
) -> Flight:
    world = world or World()
    sums, log = Sums(), logging.getLogger("test.autopilot")
    log.setLevel(logging.INFO)
    teller = Teller(name, sink=sums, log=log)
    pilot = Pilot(
        name,
        settings,
        engines=world,
        ingresses=world,
        instruments=lambda _: Instruments(source or ReplicaSource(world), world),
        teller=teller,
        clock=world.clock,
        unix_time=world.clock,
        log=log,
    )
    return Flight(world, pilot, sums, teller)


# ---- the plain way ----


async def test_pressure_reaches_every_replica_and_then_serve():
    flight = take_off(World(running=2, target=2))
    await flight.rounds(31)  # the cooldowns with which it starts
    flight.world.load = 0.9
    await flight.rounds(1)
    assert flight.world.ceilings == {512} and flight.world.forms == {0.0}
    assert flight.world.log[-2:] == ["m orders 512", "scale 3"]


async def test_orders_are_renewed_every_round_and_a_new_replica_gets_them():
    flight = take_off()
    flight.world.lease("r0").take(BudgetOrder("gone", 128, 0.1))
    await flight.rounds(2)
    flight.world.running = flight.world.target = 2
    await flight.rounds(1)
    assert flight.world.ceilings == {128}
    assert flight.world.log == ["m orders 128"] * 3


async def test_a_restarted_autopilot_takes_over_what_is_in_force():
    world = World(load=0.68, running=2, target=2)
    for name in world.names:
        world.lease(name).take(BudgetOrder("old", 256, 20.0, 0.0))
    flight = take_off(world)
    await flight.rounds(3)
    assert world.ceilings == {256} and world.forms == {0.0} and world.target == 2
    wanted = {"budget_ceiling_tokens": 256, "compact_above_ratio": 0.0, "replicas": 2}
    assert flight.overview()["wanted"] == wanted
    assert flight.overview()["actual"]["compact_above_ratio"] == [0.0]


async def test_turns_go_compact_by_order_and_the_order_is_explained_and_taken_back():
    flight = take_off(World(load=0.8))
    await flight.rounds(5)
    assert flight.world.forms == {None}, "the cooldown with which it starts"
    await flight.rounds(1)
    assert flight.world.forms == {0.0} and flight.world.ceilings == {None}
    told = flight.overview()["decisions"][0]
    assert told["actions"] == ["compact"] and told["compact_above_ratio"] == 0.0
    assert told["reason"].startswith("turns go compact: all tokens are 80%") and told["pressures"]["whole_ratio"] == 0.8
    assert flight.sums.gauges[c.AUTOPILOT_COMPACT.name,] == 1.0
    assert flight.sums.gauges[c.AUTOPILOT_PRESSURE.name, "whole"] == 0.8
    flight.world.load = 0.5
    await flight.rounds(31)
    assert flight.world.forms == {None} and flight.sums.gauges[c.AUTOPILOT_COMPACT.name,] == 0.0
    assert flight.sums.counters[c.AUTOPILOT_DECISIONS.name, "resident"] == 1


async def test_off_reads_nothing_and_orders_nothing():
    flight = take_off(settings=replace(ON, mode="off"))
    flight.world.ask_error = AssertionError("asked though off")
    await flight.rounds(5)
    assert not flight.world.log and flight.sums.gauges[c.AUTOPILOT_MODE.name, "off"] == 1.0


async def test_dry_run_says_what_it_would_do_and_does_nothing():
    flight = take_off(World(load=0.95), replace(ON, mode="dry-run"))
    await flight.rounds(40)
    assert not flight.world.log and flight.world.target == 1
    actions = {action for done in flight.overview()["decisions"] for action in done["actions"]}
    assert {"compact", "tighten", "add"} <= actions
    assert len(flight.overview()["decisions"]) < 10, "the same advice is said once"


async def test_switching_off_lifts_the_ceiling_it_has_set():
    flight = take_off()
    await flight.rounds(31)
    flight.world.load = 0.95
    await flight.rounds(1)
    assert flight.world.ceilings == {512}
    flight.pilot.set(replace(ON, mode="off"))
    await flight.rounds(3)
    assert flight.world.ceilings == {None} and flight.world.forms == {None}
    assert flight.sums.gauges[c.AUTOPILOT_COMPACT.name,] == 0.0
    assert flight.world.log[-1] == "m orders None" and flight.world.log.count("m orders None") >= 1


async def test_new_bounds_count_from_the_next_round_on():
    flight = take_off()
    await flight.rounds(1)
    flight.pilot.set(replace(ON, min_replicas=3))
    await flight.rounds(1)
    assert flight.world.target == 3


# ---- faults ----


def rounds_of(flight: Flight) -> list[str]:
    return [line for line in flight.world.log if line.startswith("scale")]


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        ({"nonsense": {"active_bytes": float("nan")}}, Cause.ABSURD),
        ({"nonsense": {"capacity_bytes": 0}}, Cause.ABSURD),
        ({"nonsense": {"unix_time": 0.0}}, Cause.STALE),
        ({"nonsense": {"unix_time": 9e9}}, Cause.CLOCK),
        ({"ask_error": RuntimeError("no router")}, Cause.SOURCE),
        ({"serve_error": True}, Cause.SERVE),
        ({"target": 5, "running": 1}, None),  # replicas that start are no fault
    ],
    ids=str,
)
async def test_a_fault_holds_with_its_cause_and_nothing_flaps(
    fault: dict[str, Any], cause: Cause | None, caplog: pytest.LogCaptureFixture
):
    flight = take_off(World(load=0.6))
    await flight.rounds(60)
    before, healthy = len(rounds_of(flight)), {name: getattr(flight.world, name) for name in fault}
    caplog.clear()
    for name, value in fault.items():
        setattr(flight.world, name, value)
    await flight.rounds(50)
    assert flight.cause == (None if cause is None else str(cause))
    assert flight.world.ceilings == {None}
    if cause is not None:
        assert len(rounds_of(flight)) == before
        assert flight.sums.counters[c.AUTOPILOT_HOLDS.name, str(cause)] == 50
        assert flight.sums.gauges[c.AUTOPILOT_HOLDING.name,] == 1.0
        assert 1 <= len(caplog.records) <= 3, [record.getMessage() for record in caplog.records]
        for name, value in healthy.items():
            setattr(flight.world, name, value)
        await flight.rounds(1)
        assert flight.cause is None and flight.sums.gauges[c.AUTOPILOT_HOLDING.name,] == 0.0
        assert "holds no more" in caplog.text or "works again" in caplog.text


async def test_a_fault_that_comes_and_goes_moves_nothing_and_does_not_fill_the_log(caplog: pytest.LogCaptureFixture):
    flight = take_off(World(load=0.6, running=2, target=2))
    for number in range(300):
        flight.world.nonsense = {"active_bytes": -1} if number % 2 else {}
        await flight.rounds(1)
    assert flight.world.target == 2 and flight.world.ceilings == {None}
    assert not rounds_of(flight)
    assert len(caplog.records) <= 25, "two lines in half a minute"


async def test_a_tight_budget_stays_tight_while_the_data_are_bad():
    flight = take_off(World(load=0.95))
    await flight.rounds(60)
    tight = flight.world.ceilings
    assert tight == {64}
    flight.world.load, flight.world.nonsense = 0.1, {"num_running": None}
    await flight.rounds(600)
    assert flight.world.ceilings == tight
    flight.world.nonsense = {}
    await flight.rounds(29)
    assert flight.world.ceilings == tight, "calm is counted from when it can be seen"
    await flight.rounds(2)
    assert flight.world.ceilings == {128}


async def test_while_serve_is_away_the_budget_still_answers_and_the_count_follows_later():
    flight = take_off(World(load=0.3))
    await flight.rounds(60)
    flight.world.serve_error, flight.world.load = True, 0.95
    await flight.rounds(10)
    assert flight.world.ceilings == {256} and flight.world.target == 1
    assert flight.cause == "serve"
    flight.world.serve_error = False
    await flight.rounds(1)
    assert flight.world.target == 2 and flight.cause is None


async def test_a_count_that_serve_does_not_take_is_tried_again_every_round_and_counted():
    flight = take_off(World(load=0.95, scale_error=True))
    await flight.rounds(40)
    failures = flight.sums.counters[c.AUTOPILOT_FAILURES.name, "replicas"]
    assert failures >= 9 and flight.world.target == 1 and "replicas" in flight.overview()["troubles"]
    flight.world.scale_error = False
    await flight.rounds(2)
    assert rounds_of(flight) == ["scale 2"] and flight.overview()["troubles"] == {}


async def test_replicas_that_do_not_obey_are_counted():
    flight = take_off(World(deaf=True))
    await flight.rounds(5)
    assert flight.sums.counters[c.AUTOPILOT_FAILURES.name, "budget"] == 5
    assert flight.overview()["troubles"]["budget"] == "not obeyed by r0"


# ---- two by mistake ----


async def test_of_two_autopilots_the_smaller_id_acts_and_the_other_holds_and_does_not_scale():
    world = World(load=0.3, running=2, target=2)
    first, second = take_off(world, name="a"), take_off(world, name="b")
    for _ in range(40):
        await first.rounds(1)
        await second.rounds(1)
    world.load = 0.95
    for _ in range(20):
        await first.rounds(1)
        world.now_s -= 1.0
        await second.rounds(1)
    assert world.ceilings == {64} and rounds_of(first) == ["scale 3"]
    assert second.cause == "other_autopilot" and first.cause is None
    assert second.sums.counters[c.AUTOPILOT_DECISIONS.name, "tighten"] == 0
    assert second.overview()["wanted"] == {"budget_ceiling_tokens": 64, "compact_above_ratio": 0.0, "replicas": 3}


async def test_the_second_takes_over_when_the_first_is_gone_without_a_jump():
    world = World(load=0.75)
    world.lease("r0").take(BudgetOrder("a", 128, 20.0))
    second = take_off(world, name="b", settings=replace(ON, max_replicas=1))
    await second.rounds(19)
    assert second.cause == "other_autopilot"
    await second.rounds(5)
    assert second.cause is None and world.ceilings == {128}


async def test_an_order_below_the_engine_s_floor_is_a_failure_and_no_other_autopilot():
    flight = take_off()

    async def refuse(question: str, *args: Any) -> Replies[Any]:
        if question == "set_budget":
            return Replies({"r0": BudgetReply(False, None, "m")}, ())
        return Replies({"r0": flight.world.signals("r0")}, ())

    flight.world.ask = refuse  # type: ignore[method-assign]
    await flight.rounds(3)
    assert flight.cause is None and flight.sums.counters[c.AUTOPILOT_FAILURES.name, "budget"] == 3


# ---- to zero and back ----

TO_ZERO = replace(ON, min_replicas=0, idle_to_zero_s=20.0, scale_down_cooldown_s=0.0)


async def asleep() -> Flight:
    flight = take_off(World(load=0.0), TO_ZERO)
    await flight.rounds(30)
    flight.world.running = 0
    await flight.rounds(3)
    assert flight.world.target == 0
    return flight


async def test_a_wake_up_brings_one_replica():
    flight = await asleep()
    assert flight.pilot.wake()
    await flight.rounds(1)
    assert flight.world.target == 1
    flight.world.running = 1
    await flight.rounds(3)
    assert rounds_of(flight) == ["scale 0", "scale 1"]


async def test_a_request_that_came_just_when_the_last_replica_went_wakes_it_again():
    flight = await asleep()
    flight.world.in_flight = 1
    await flight.rounds(1)
    assert flight.world.target == 1


async def test_a_wake_up_outlives_a_serve_that_is_away():
    flight = await asleep()
    flight.world.serve_error = True
    assert flight.pilot.wake()
    await flight.rounds(5)
    assert flight.world.target == 0
    flight.world.serve_error = False
    await flight.rounds(1)
    assert flight.world.target == 1


async def test_a_fleet_asleep_can_be_woken_by_an_autopilot_that_has_just_started_and_reads_nothing():
    class Broken:
        async def read(self) -> Reading:
            raise Untrusted(Cause.SOURCE, "Prometheus is away")

        async def close(self) -> None:
            pass

    flight = take_off(World(running=0, target=0), TO_ZERO, source=Broken())
    await flight.rounds(2)
    assert flight.pilot.wake()
    await flight.rounds(1)
    assert flight.world.target == 1 and flight.cause == "source"


@pytest.mark.parametrize("settings", [ON, replace(TO_ZERO, mode="dry-run"), replace(TO_ZERO, mode="off")])
async def test_nothing_can_be_woken_where_nothing_sleeps(settings: AutopilotSettings):
    assert not take_off(settings=settings).pilot.wake()


# ---- the loop ----


async def test_a_mistake_in_one_round_is_logged_and_the_next_round_comes(caplog: pytest.LogCaptureFixture):
    flight = take_off(settings=replace(ON, interval_s=0.01))

    async def wrong(_: int) -> None:
        raise ZeroDivisionError

    flight.world.counts = wrong  # type: ignore[method-assign, assignment]
    loop = asyncio.create_task(flight.pilot.run())
    while "round" not in flight.overview()["troubles"]:
        await asyncio.sleep(0.01)
    del flight.world.counts
    while flight.overview()["last"] is None:
        await asyncio.sleep(0.01)
    assert "the autopilot's round failed" in caplog.text and not flight.overview()["troubles"]
    loop.cancel()


async def test_a_wake_up_does_not_wait_for_the_next_round():
    flight = take_off(World(load=0.0, running=0, target=0), replace(TO_ZERO, interval_s=3600.0))
    loop = asyncio.create_task(flight.pilot.run())
    while flight.overview()["last"] is None:
        await asyncio.sleep(0.01)
    flight.pilot.wake()
    async with asyncio.timeout(10.0):
        while flight.world.target == 0:
            await asyncio.sleep(0.01)
    loop.cancel()


async def test_the_history_is_bounded_and_newest_first():
    flight = take_off(settings=replace(ON, history_max=3))
    for number in range(40):
        flight.world.now_s += 60.0
        flight.world.nonsense = {"active_bytes": -1} if number % 2 else {}
        await flight.rounds(1)
    decisions = flight.overview()["decisions"]
    assert len(decisions) == 3
    assert [done["unix_time"] for done in decisions] == sorted((done["unix_time"] for done in decisions), reverse=True)
    assert all(done["reason"] for done in decisions)
