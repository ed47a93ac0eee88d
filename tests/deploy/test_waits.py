"""Waits that end, and the pace of pieces."""

import asyncio
from collections.abc import AsyncGenerator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.errors import TimedOut
from deploy.waits import Pace, Patience

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
