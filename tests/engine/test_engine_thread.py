"""The engine's thread: turns from many threads, and what everybody is told when something breaks."""

import threading
import time
from dataclasses import replace

import pytest
from fake_device import (
    Clock,
    FakeDevice,
    Inbox,
    StatsLog,
    drain,
    expected_answer,
    fake_engine,
    fake_loaded,
    small_config,
)

from loopserve.dialogue import FinishReason, SamplingParams, SessionId, TokensGenerated, TurnEnded, TurnRequest
from loopserve.engine import Engine
from loopserve.errors import ConfigError, EngineUnavailable, NotFound, Overloaded

WAIT_S = 30.0  # for what happens at once; only a failing test waits this long


class Listener:
    """An inbox that can be waited for."""

    def __init__(self, num_turns: int = 1) -> None:
        self.inbox = Inbox()
        self._missing = num_turns
        self.done = threading.Event()

    def put(self, events):
        self.inbox(events)
        self._missing -= sum(isinstance(event, TurnEnded) for event in events)
        if self._missing == 0:
            self.done.set()

    def ends(self) -> list[TurnEnded]:
        assert self.done.wait(WAIT_S), "the turns did not end"
        return list(self.inbox.ended.values())


class Gate:
    """Holds the device in a step until the test opens it."""

    def __init__(self) -> None:
        self.entered, self.opened = threading.Event(), threading.Event()

    def __call__(self, plan):
        self.entered.set()
        assert self.opened.wait(WAIT_S)


def request(name: str = "s", *, prompt=(1, 2, 3), max_tokens: int = 5, num_branches: int = 1) -> TurnRequest:
    sampling = SamplingParams(max_tokens=max_tokens, seed=3, ignore_eos=True)
    return TurnRequest(SessionId(name), tuple(prompt), sampling, num_branches=num_branches)


@pytest.fixture
def running():
    """A started engine with its device; stopped afterwards."""
    started: list[Engine] = []

    def start(config=None, **kwargs) -> tuple[Engine, FakeDevice]:
        engine, device = fake_engine(config, **kwargs)
        engine.start()
        started.append(engine)
        return engine, device

    yield start
    for engine in started:
        engine.stop()


def test_turns_submitted_from_many_threads_all_get_their_own_answers(running):
    engine, _ = running(small_config(max_waiting_turns=64, kv_blocks=64, max_sessions=64))
    listeners = [Listener() for _ in range(24)]

    def submit(index):
        engine.submit(request(f"s{index}", prompt=(index % 20, 1, 2), max_tokens=5 + index % 3), listeners[index].put)

    threads = [threading.Thread(target=submit, args=(index,)) for index in range(len(listeners))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, listener in enumerate(listeners):
        (end,) = listener.ends()
        assert end.reason is FinishReason.LENGTH
        assert len(end.token_ids) == 5 + index % 3
    assert engine.is_alive()
    engine.check()


def test_engine_is_alive_from_start_to_stop_only():
    engine, _ = fake_engine()
    assert not engine.is_alive()
    engine.start()
    assert engine.is_alive()
    engine.stop()
    assert not engine.is_alive()
    engine.stop()  # again, to no effect


def test_stop_ends_running_and_waiting_turns_once_and_refuses_new_ones(running):
    engine, device = running(small_config(max_running_turns=1))
    gate = device.before_run = Gate()
    listener = Listener(num_turns=2)
    engine.submit(request("first", max_tokens=50), listener.put)
    engine.submit(request("second"), listener.put)
    assert gate.entered.wait(WAIT_S)
    stopping = threading.Thread(target=engine.stop)
    stopping.start()
    gate.opened.set()
    ends = listener.ends()
    stopping.join(WAIT_S)
    assert [end.reason for end in ends] == [FinishReason.ERROR] * 2
    assert all(end.error for end in ends)
    with pytest.raises(EngineUnavailable):
        engine.submit(request("third"), listener.put)
    with pytest.raises(EngineUnavailable):
        engine.release(SessionId("first"))


def test_step_that_raises_ends_every_turn_with_one_error_and_the_engine_for_good(running):
    engine, device = running(small_config(max_running_turns=1))

    def fail_at_third(plan):
        if plan.step_index == 3:
            raise RuntimeError("out of memory")

    device.before_run = fail_at_third
    listener = Listener(num_turns=4)
    engine.submit(request("first"), listener.put)
    engine.submit(request("second", num_branches=3), listener.put)
    ends = listener.ends()
    assert [end.reason for end in ends] == [FinishReason.ERROR] * 4
    assert all("out of memory" in end.error for end in ends)
    assert len(ends[0].token_ids) == 2  # what it had said by then
    engine._thread.join(WAIT_S)
    assert not engine.is_alive()
    with pytest.raises(EngineUnavailable, match="out of memory"):
        engine.submit(request("third"), listener.put)
    with pytest.raises(EngineUnavailable, match="out of memory"):
        engine.release(SessionId("first"))


def test_turn_that_ended_in_the_step_that_broke_is_told_its_end(running):
    engine, device = running()
    compute = device.run

    def lose_the_second_answer(plan):
        result = compute(plan)
        return replace(result, tokens=result.tokens[:1]) if len(result.tokens) == 2 else result

    device.run = lose_the_second_answer
    gate = device.before_run = Gate()
    waiting, listener = Listener(), Listener(num_turns=2)
    engine.submit(request("before"), waiting.put)  # so that the two below begin in one step
    assert gate.entered.wait(WAIT_S)
    engine.cancel(1)
    engine.submit(request("first", max_tokens=1), listener.put)
    engine.submit(request("second", max_tokens=5), listener.put)
    gate.opened.set()
    first, second = sorted(listener.ends(), key=lambda end: end.turn_id)
    assert first.reason is FinishReason.LENGTH
    assert len(first.token_ids) == 1
    assert second.reason is FinishReason.ERROR
    assert second.error


def test_listener_that_raises_loses_its_own_turns_only(running):
    stats = StatsLog()
    engine, _ = running(small_config(), stats=stats)
    told = []

    def broken(events):
        told.extend(events)
        if any(isinstance(event, TokensGenerated) for event in events):
            raise OSError("the client is gone")

    listener = Listener(num_turns=2)
    lost = engine.submit(request("lost", max_tokens=60), broken)
    kept = engine.submit(request("kept", max_tokens=60, num_branches=2), listener.put)
    assert {end.turn_id for end in listener.ends()} == set(kept)
    assert all(end.reason is FinishReason.LENGTH for end in listener.ends())
    (end,) = [event for event in told if isinstance(event, TurnEnded)]
    assert end.turn_id in lost
    assert end.reason is FinishReason.CANCELLED
    assert end is told[-1]
    assert engine.is_alive()


def test_release_while_its_turn_runs_cancels_the_turn_and_forgets_the_session(running):
    engine, device = running()
    gate = device.before_run = Gate()
    listener = Listener()
    engine.submit(request("s", max_tokens=60), listener.put)
    assert gate.entered.wait(WAIT_S)
    releasing = threading.Thread(target=engine.release, args=(SessionId("s"),))
    releasing.start()
    gate.opened.set()
    releasing.join(WAIT_S)
    (end,) = listener.ends()
    assert end.reason is FinishReason.CANCELLED
    with pytest.raises(NotFound):
        engine.session(SessionId("s"))
    assert engine.occupancy().active == engine.occupancy().warm == 0
    engine.check()


def test_release_of_an_unknown_session_is_not_found(running):
    engine, _ = running()
    with pytest.raises(NotFound):
        engine.release(SessionId("nobody"))


def test_step_that_takes_too_long_makes_the_engine_not_alive_and_release_unavailable(running):
    clock = Clock()
    engine, device = running(small_config(max_step_s=0.05), clock=clock)
    gate = device.before_run = Gate()
    listener = Listener()
    engine.submit(request("s"), listener.put)
    assert gate.entered.wait(WAIT_S)
    assert engine.is_alive()
    clock.now_s += 1.0
    assert not engine.is_alive()
    with pytest.raises(EngineUnavailable):
        engine.release(SessionId("s"))
    gate.opened.set()
    listener.ends()
    _until(engine.is_alive)


def test_cancel_from_another_thread_ends_the_turn_before_its_answer_is_over(running):
    engine, device = running()
    gate = device.before_run = Gate()
    listener = Listener()
    (turn_id,) = engine.submit(request(max_tokens=60), listener.put)
    assert gate.entered.wait(WAIT_S)
    engine.cancel(turn_id, reason=FinishReason.STOP)
    engine.cancel(turn_id)  # the first reason stays
    engine.cancel(turn_id + 1)  # nobody's
    gate.opened.set()
    (end,) = listener.ends()
    assert end.reason is FinishReason.STOP
    assert len(end.token_ids) == 1


def test_waiting_turn_expires_on_an_engine_that_is_busy_with_another():
    clock = Clock()
    engine, _ = fake_engine(small_config(max_running_turns=1, max_queue_s=10.0), clock=clock)
    listener = Listener(num_turns=2)
    running_id, waiting_id = (engine.submit(request(name, max_tokens=30), listener.put)[0] for name in ("a", "b"))
    engine.step()
    clock.now_s = 11.0
    drain(engine)
    ended = listener.inbox.ended
    assert ended[running_id].reason is FinishReason.LENGTH
    assert ended[waiting_id].reason is FinishReason.ERROR
    assert "10 s" in ended[waiting_id].error
    assert waiting_id not in listener.inbox.started


def test_submit_beyond_the_queue_is_refused_whole():
    engine, _ = fake_engine(small_config(max_waiting_turns=3))
    listener = Listener()
    engine.submit(request("a", num_branches=2), listener.put)
    with pytest.raises(Overloaded, match="takes 3"):
        engine.submit(request("b", num_branches=2), listener.put)
    assert engine._scheduler.num_waiting == 2
    engine.submit(request("c"), listener.put)


def test_same_seed_says_the_same_and_its_branches_differ():
    engine, _ = fake_engine(small_config(kv_blocks=64))
    inbox = Inbox()
    first = engine.submit(request("a", max_tokens=30, num_branches=3), inbox)
    by_id = {turn.turn_id: turn for turn in engine._scheduler.turns()}
    second = engine.submit(request("b", max_tokens=30, num_branches=3), inbox)
    drain(engine)
    answers = [inbox.ended[turn_id].token_ids for turn_id in (*first, *second)]
    assert answers[:3] == answers[3:]
    assert len(set(answers)) == 3
    assert list(answers[0]) == expected_answer(by_id[first[0]], 30)


def test_unknown_methods_are_refused_at_start():
    config = small_config()
    with pytest.raises(ConfigError, match=r"decode\.method is 'magic'; known are .*progressive"):
        Engine(replace(config, decode=replace(config.decode, method="magic")), loaded=fake_loaded())


def test_budget_below_the_floor_is_refused():
    engine, _ = fake_engine()
    with pytest.raises(ConfigError, match="floor is 2"):
        engine.set_budget(1)


def _until(condition) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.001)
