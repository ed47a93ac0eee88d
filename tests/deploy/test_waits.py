"""Waits that end, and the pace of pieces."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator

import pytest
from fake_backend import FakeEngine
from hypothesis import given
from hypothesis import strategies as st

from deploy.calls import TurnCall
from deploy.errors import TimedOut
from deploy.load import LoadMeter
from deploy.protocol import parse_chat
from deploy.replica import Backend, Replica
from deploy.settings import DeploySettings
from deploy.waits import Pace, Patience
from loopserve.chat import AnswerDelta, AnswerEnded, AnswerStarted, ChatEvent, ChatRequest
from loopserve.dialogue import FinishReason, Mode, QualityReport, SessionId, TurnUsage

pytestmark = pytest.mark.anyio


async def after(*waits_s: float) -> AsyncGenerator[int, None]:
    for number, wait_s in enumerate(waits_s):
        await asyncio.sleep(wait_s)
        yield number


async def test_all_items_come_and_then_the_end():
    items = Patience(after(0, 0.01, 0), 1.0, "Nothing came")
    assert [await items.next() for _ in range(5)] == [0, 1, 2, None, None]
    items.close()


async def test_a_wait_over_the_limit_ends_with_an_error_that_names_it():
    items = Patience(after(0.01, 60.0), 0.1, "No further part came")
    assert await items.next() == 0
    with pytest.raises(TimedOut, match=r"No further part came within 0\.1 s"):
        await items.next()
    await asyncio.sleep(0.01)  # this task was not cancelled


async def test_the_limit_is_for_one_wait_and_not_for_all_of_them():
    items = Patience(after(*[0.06] * 5), 0.15, "Nothing came")
    assert [await items.next() for _ in range(5)] == [0, 1, 2, 3, 4]


async def test_a_reader_that_takes_its_time_is_no_wait():
    items = Patience(after(0, 0, 0), 0.05, "Nothing came")
    assert await items.next() == 0
    await asyncio.sleep(0.2)
    assert await items.next() == 1


async def test_a_closed_stream_leaves_no_timer_behind():
    items = Patience(after(0), 30.0, "Nothing came")
    await items.next()
    assert items._timer is not None and not items._timer.cancelled()
    items.close()
    assert items._timer.cancelled()


async def test_a_cancelled_reader_is_cancelled_and_not_timed_out():
    items = Patience(after(60.0), 30.0, "Nothing came")
    reader = asyncio.create_task(items.next())
    await asyncio.sleep(0.01)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_pieces_below_the_pace_never_wait():
    clock = Clock()
    pace = Pace(100.0, burst_s=0.0, clock=clock)
    for _ in range(50):
        assert pace.wait_s() == 0.0
        clock.now_s += 0.0101


def test_a_burst_passes_and_what_comes_behind_it_waits():
    pace = Pace(100.0, burst_s=0.05, clock=Clock())
    waits_s = [pace.wait_s() for _ in range(8)]
    assert waits_s == pytest.approx([0.0] * 6 + [0.01, 0.02], abs=1e-9)


@given(st.lists(st.floats(0.0, 0.05), min_size=1, max_size=200))
def test_no_more_pieces_than_the_pace_allows_whenever_they_come(gaps_s: list[float]):
    clock, per_s, burst_s = Clock(), 100.0, 0.05
    pace = Pace(per_s, burst_s=burst_s, clock=clock)
    sent_s = []
    for gap_s in gaps_s:
        clock.now_s += gap_s
        sent_s.append(clock.now_s + pace.wait_s())
    for begin, first_s in enumerate(sent_s):
        for end in range(begin, len(sent_s)):
            within_s = max(sent_s[begin : end + 1]) - first_s
            assert end - begin <= per_s * (within_s + burst_s) + 1.001


async def test_a_replica_over_its_pace_sends_several_tokens_in_one_piece_and_loses_none():
    engine, settings = FakeEngine(), DeploySettings(pieces_per_s=100)
    chat = Talkative(num_tokens=100, step_s=0.001)
    load = LoadMeter(max_running_turns=32)
    engine.start()
    replica = Replica(Backend(engine, chat), settings, name="a", load=load)
    pieces = [item async for item in replica.chat(streamed_call()) if isinstance(item, bytes)]
    events = b"".join(pieces).split(b"\n\n")
    said = [
        json.loads(event.removeprefix(b"data: "))["choices"][0]["delta"].get("content", "") for event in events[:-2]
    ]
    assert "".join(said) == "".join(map(str, range(100)))
    assert len(pieces) < 60 < len(said)


@pytest.mark.parametrize(
    ("topology", "replicas", "per_s"), [("two_hop", 1, 200), ("two_hop", 4, 50), ("direct", 1, None)]
)
async def test_replicas_share_the_pace_of_the_ingresses_and_those_without_have_none(
    topology: str, replicas: int, per_s: float | None
):
    settings = DeploySettings(pieces_per_s=100, ingress_replicas=2, replicas=replicas, topology=topology)
    chat = Talkative(num_tokens=1, step_s=0.0)
    replica = Replica(Backend(FakeEngine(), chat), settings, name="a", load=LoadMeter(max_running_turns=32))
    assert (replica._pace and 1 / replica._pace._slot_s) == (None if per_s is None else pytest.approx(per_s))


def streamed_call() -> TurnCall:
    talk = {"model": "m", "messages": [{"role": "user", "content": "x"}], "stream": True}
    return TurnCall(parse_chat(json.dumps(talk).encode(), branches_max=1), "", None, "0" * 32, None, "id", 0)


class Talkative:
    """A chat service whose engine does not wait for its reader: an item holds all that was said meanwhile."""

    def __init__(self, *, num_tokens: int, step_s: float) -> None:
        self.num_tokens, self.step_s = num_tokens, step_s

    def forget(self, session_id: SessionId) -> None:
        pass

    async def stream(self, request: ChatRequest) -> AsyncIterator[tuple[ChatEvent, ...]]:
        yield (AnswerStarted(0, 1, 0, 0),)
        began_s, num_said = time.monotonic(), 0
        while num_said < self.num_tokens:
            await asyncio.sleep(self.step_s)
            due = int((time.monotonic() - began_s) / self.step_s) if self.step_s else num_said + 1
            words = range(num_said, min(due, self.num_tokens))
            if words:
                yield tuple(AnswerDelta(0, str(word), 1, ()) for word in words)
            num_said += len(words)
        yield (AnswerEnded(0, FinishReason.STOP, TurnUsage(1, 0, num_said, QualityReport(Mode.SPARSE))),)
