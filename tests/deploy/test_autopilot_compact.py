"""When turns go compact at one replica: as ordered while a lease runs, as the engine has it before and after."""

import asyncio
import threading
import time

import pytest
from local_fleet import LocalFleet

from deploy.autopilot.compact_setting import CompactSetting
from deploy.autopilot.lease import BudgetLease
from deploy.calls import BudgetOrder
from loopserve.errors import ConfigError
from monitoring.catalogue import COMPACT_ABOVE, Metric

pytestmark = pytest.mark.anyio

LONG_S, SHORT_S = 60.0, 0.05
LIMIT_S = 10.0


class Gauge:
    """A sink that keeps the last share."""

    def __init__(self) -> None:
        self.shown: list[float] = []

    def set(self, metric: Metric, value: float, **labels: str) -> None:
        assert metric is COMPACT_ABOVE and not labels
        self.shown.append(value)


class Engine:
    """Takes what it is told, in a thread that is not the loop's, once at a time; says no while it is `broken`."""

    def __init__(self) -> None:
        self.told: list[float] = []
        self.broken = False
        self.loop_thread = threading.get_ident()
        self._is_busy = threading.Lock()

    def set_compact_above(self, ratio: float) -> None:
        assert threading.get_ident() != self.loop_thread
        assert self._is_busy.acquire(blocking=False), "two at once"
        time.sleep(0.002)
        self._is_busy.release()
        if self.broken:
            raise ConfigError("no")
        self.told.append(ratio)


class Desk:
    def __init__(self, own_ratio: float = 0.75) -> None:
        self.lease = BudgetLease(clock=time.monotonic)
        self.engine, self.gauge = Engine(), Gauge()
        self.setting = CompactSetting(
            self.lease, self.engine.set_compact_above, own_ratio=own_ratio, metrics=self.gauge
        )

    async def order(self, ratio: float | None, lease_s: float = LONG_S) -> None:
        assert self.lease.take(BudgetOrder("a", None, lease_s, ratio)).obeyed
        await self.setting.follow()

    async def becomes(self, ratio: float) -> None:
        async with asyncio.timeout(LIMIT_S):
            while self.setting.ratio != ratio:
                await asyncio.sleep(0.005)


async def test_an_order_is_put_into_force_once_and_shown():
    desk = Desk()
    assert desk.gauge.shown == [0.75] and not desk.engine.told
    for _ in range(3):
        await desk.order(0.0)
    assert desk.engine.told == [0.0] and desk.setting.ratio == 0.0
    assert desk.gauge.shown == [0.75, 0.0]


async def test_an_order_without_a_share_gives_the_engine_its_own_back():
    desk = Desk()
    await desk.order(0.0)
    await desk.order(None)
    assert desk.engine.told == [0.0, 0.75]


async def test_a_lease_that_nobody_renews_takes_its_order_along():
    desk = Desk()
    await desk.order(0.0, SHORT_S)
    await desk.becomes(0.75)
    assert desk.engine.told == [0.0, 0.75] and desk.gauge.shown[-1] == 0.75


async def test_a_lease_that_is_renewed_does_not():
    desk = Desk()
    await desk.order(0.0, SHORT_S)
    await desk.order(0.0, LONG_S)
    await asyncio.sleep(3 * SHORT_S)
    assert desk.engine.told == [0.0]


async def test_orders_that_cross_leave_the_last_one_in_force():
    desk = Desk()
    for ratio in (0.0, 0.5, None, 0.25):
        desk.lease.take(BudgetOrder("a", None, LONG_S, ratio))
        following = [asyncio.create_task(desk.setting.follow()) for _ in range(2)]
        await asyncio.sleep(0)
    await asyncio.gather(*following)
    await desk.setting.follow()
    assert desk.setting.ratio == desk.engine.told[-1] == 0.25


async def test_an_engine_that_refuses_is_not_said_to_have_obeyed():
    desk = Desk()
    desk.engine.broken = True
    with pytest.raises(ConfigError):
        await desk.order(0.0)
    assert desk.setting.ratio == 0.75 and desk.gauge.shown == [0.75]
    desk.engine.broken = False
    await desk.order(0.0)
    assert desk.setting.ratio == 0.0


async def test_a_replica_obeys_and_reports_it_and_keeps_the_ceiling_when_the_lease_ends():
    fleet = LocalFleet()
    reply = (await fleet.ask("set_budget", BudgetOrder("pilot", 8, SHORT_S, 0.0))).by_replica["a"]
    assert (reply.obeyed, reply.compact_above_ratio) == (True, 0.0)
    assert fleet.engines["a"].compact_above_ratio == 0.0
    async with asyncio.timeout(LIMIT_S):
        while fleet.engines["a"].compact_above_ratio != 1.0:
            await asyncio.sleep(0.005)
    signals = (await fleet.ask("signals")).by_replica["a"]
    assert (signals.compact_above_ratio, signals.budget_ceiling_tokens) == (1.0, 8)


async def test_a_replica_reports_its_host_tier():
    signals = (await LocalFleet().ask("signals")).by_replica["a"]
    assert (signals.host_capacity_bytes, signals.host_live_bytes, signals.host_warm_bytes) == (16_000, 1600, 6400)
