"""A request that finds no replica: it wakes one and waits, bounded; and what the ingress says of the autopilot."""

import asyncio
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_backend import MODEL
from local_fleet import LocalFleet
from test_keys import bearer, entry, write

from deploy.autopilot.settings import IDLE_TO_ZERO_MIN_S
from deploy.errors import TimedOut
from deploy.fleet import Replies
from deploy.ingress import build_api
from deploy.settings import DeploySettings
from deploy.waking import Autopilots
from monitoring.catalogue import Origin

pytestmark = pytest.mark.anyio


@dataclass
class Pilot:
    """An autopilot that brings a replica after so many wake-up calls; None: it never sleeps."""

    wakes_after: int | None = 1
    asked: list[str] = field(default_factory=list)
    is_silent: bool = False

    async def ask(self, question: str, *args: Any) -> Replies[Any]:
        self.asked.append(question)
        if self.is_silent:
            return Replies({}, ("pilot",))
        if question in ("wake", "can_wake"):
            return Replies({"pilot": self.wakes_after is not None}, ())
        return Replies({"pilot": {"object": "autopilot", "mode": "on"}}, ())

    @property
    def is_awake(self) -> bool:
        return self.wakes_after is not None and self.asked.count("wake") >= self.wakes_after


@dataclass
class Engines:
    pilot: Pilot
    num_asked: int = 0
    is_there: bool = False

    async def ask(self, question: str, *args: Any) -> Replies[Any]:
        self.num_asked += 1
        return Replies({"a": "status"} if self.is_there or self.pilot.is_awake else {}, ())


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


async def test_a_request_wakes_the_fleet_and_comes_back_when_a_replica_is_there():
    pilot = Pilot(wakes_after=2)
    await Autopilots(Engines(pilot), pilot, DeploySettings()).find_replica()
    assert pilot.asked == ["wake", "wake"]


async def test_requests_that_wait_share_one_question():
    pilot = Pilot(wakes_after=1)
    engines = Engines(pilot)
    autopilots = Autopilots(engines, pilot, DeploySettings())
    await asyncio.gather(*[autopilots.find_replica() for _ in range(50)])
    assert pilot.asked == ["wake"] and engines.num_asked == 2


async def test_a_request_that_leaves_takes_no_other_with_it():
    pilot = Pilot(wakes_after=2)
    autopilots = Autopilots(Engines(pilot), pilot, DeploySettings())
    leaving, staying = (asyncio.create_task(autopilots.find_replica()) for _ in range(2))
    await asyncio.sleep(0.01)
    leaving.cancel()
    await staying
    assert pilot.is_awake and leaving.cancelled()


async def test_the_wait_for_a_replica_ends():
    pilot = Pilot(wakes_after=1000)
    autopilots = Autopilots(Engines(pilot), pilot, replace(DeploySettings(), admission_timeout_s=0.05))
    with pytest.raises(TimedOut, match=r"within 0\.05 s"):
        await autopilots.find_replica()


async def test_a_replica_met_a_moment_ago_is_not_looked_for():
    pilot, clock = Pilot(), Clock()
    engines = Engines(pilot, is_there=True)
    autopilots = Autopilots(engines, pilot, DeploySettings(), clock=clock)
    await autopilots.find_replica()
    assert (engines.num_asked, pilot.asked) == (1, [])
    clock.now_s += IDLE_TO_ZERO_MIN_S - 0.1
    autopilots.met()
    clock.now_s += IDLE_TO_ZERO_MIN_S - 0.1
    await autopilots.find_replica()
    assert engines.num_asked == 1
    clock.now_s += 0.2
    await autopilots.find_replica()
    assert engines.num_asked == 2


@pytest.mark.parametrize("pilot", [Pilot(wakes_after=None), Pilot(is_silent=True)])
async def test_where_nothing_sleeps_or_nobody_answers_the_request_goes_on_at_once(pilot: Pilot):
    await Autopilots(Engines(pilot), pilot, DeploySettings()).find_replica()
    assert pilot.asked == ["wake"]


# ---- over HTTP ----


@asynccontextmanager
async def client(fleet: LocalFleet, pilot: Pilot | None):
    peers = [] if pilot is None else [(Origin.AUTOPILOT, pilot)]
    api = build_api(fleet, fleet.settings, peers=peers)
    transport = httpx.ASGITransport(api, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        yield http


class SleepingFleet(LocalFleet):
    """Its replicas are there once the pilot has been asked to wake them."""

    def __init__(self, pilot: Pilot) -> None:
        super().__init__()
        self.pilot = pilot

    async def ask(self, question: str, *args: Any) -> Replies[Any]:
        return await super().ask(question, *args) if self.pilot.is_awake else Replies({}, ())


async def test_a_completion_wakes_the_fleet_and_is_answered():
    pilot = Pilot(wakes_after=1)
    async with client(SleepingFleet(pilot), pilot) as http:
        ready = await http.get("/ready")
        assert (ready.status_code, ready.json()["status"]) == (200, "asleep")
        message = {"role": "user", "content": "tokens=2"}
        answer = await http.post("/v1/chat/completions", json={"model": MODEL, "messages": [message]})
        assert answer.status_code == 200 and answer.json()["choices"][0]["message"]["content"] == "word word"
        assert (await http.get("/ready")).json()["status"] == "ready"


async def test_a_fleet_that_is_not_asleep_but_gone_is_not_ready():
    pilot = Pilot(wakes_after=None)
    async with client(SleepingFleet(pilot), pilot) as http:
        assert (await http.get("/ready")).status_code == 503
        message = {"role": "user", "content": "x"}
        answer = await http.post("/v1/chat/completions", json={"model": MODEL, "messages": [message]})
        assert answer.status_code == 503 and "No replica" in answer.json()["error"]["message"]


async def test_the_autopilot_s_page_is_what_it_says_of_itself():
    async with client(LocalFleet(), Pilot()) as http:
        assert (await http.get("/v1/autopilot")).json() == {"object": "autopilot", "mode": "on"}


async def test_without_an_autopilot_its_page_says_so():
    async with client(LocalFleet(), None) as http:
        told = (await http.get("/v1/autopilot")).json()
    assert (told["mode"], told["settings"]["max_replicas"]) == ("off", 1)


async def test_an_autopilot_that_does_not_answer_is_a_503():
    async with client(LocalFleet(), Pilot(is_silent=True)) as http:
        answer = await http.get("/v1/autopilot")
    assert answer.status_code == 503 and "does not answer" in answer.json()["error"]["message"]


async def test_the_autopilot_s_page_is_for_operators(tmp_path: Path):
    path = write(tmp_path / "keys", entry("user"), entry("operator", role="operator"))
    fleet = LocalFleet(DeploySettings(keys_file=str(path)))
    async with client(fleet, Pilot()) as http:
        refused = await http.get("/v1/autopilot", headers=bearer("user"))
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "insufficient_permissions")
        assert (await http.get("/v1/autopilot", headers=bearer("operator"))).status_code == 200
