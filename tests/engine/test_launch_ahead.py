"""Steps that are launched before the one in front of them is known: the same answers, and nobody waits for what could be told."""

from dataclasses import dataclass, field, replace

import pytest
from fake_device import Clock, FakeDevice, digest_of, drain, fake_engine, small_config
from tiny_models import loaded_model

from loopserve.dialogue import FinishReason, SamplingParams, SessionId, TurnEnded, TurnRequest
from loopserve.loading import LoadedModel
from loopserve.plan import PENDING_TOKEN, StepPlan, StepResult
from tests.engine.test_graphs import CONFIG, DENSE, SPARSE, answers, ask, assert_alike


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return loaded_model("llama")


MIXES = {
    "dense and sparse": [DENSE, SPARSE, DENSE, SPARSE],
    "methods that keep state": [
        replace(SPARSE, decode_method=name) for name in ("h2o", "snapkv", "quest", "first_block")
    ],
    "a promise, whose checks are waited for": [replace(SPARSE, min_coverage=0.9), SPARSE, DENSE, SPARSE],
}


@pytest.mark.parametrize("contracts", MIXES.values(), ids=MIXES)
@pytest.mark.parametrize("stops", [False, True])
def test_answers_and_accounts_are_those_of_one_step_after_the_other(loaded: LoadedModel, contracts: list, stops: bool):
    asked = [
        ask(number, length, contract, outputs=30 - 3 * number, seed=number % 3)
        for number, (length, contract) in enumerate(zip((150, 20, 90, 33), contracts, strict=True))
    ]
    if stops:  # within the answer, where the step after has been launched already
        ends = answers(loaded, replace(CONFIG, launch_ahead=False), asked, None)
        asked = [
            replace(request, sampling=replace(request.sampling, stop_token_ids=(end.token_ids[10 + number],)))
            for number, (request, end) in enumerate(zip(asked, ends, strict=True))
        ]
    ahead, after = (answers(loaded, replace(CONFIG, launch_ahead=flag), asked, None) for flag in (True, False))
    assert_alike(ahead, after)
    assert not stops or any(end.usage.completion_tokens < 20 for end in after)


@pytest.mark.parametrize(
    "penalty", [{"presence_penalty": 1.5}, {"frequency_penalty": 0.5}, {"repetition_penalty": 1.3}]
)
def test_a_turn_that_is_drawn_by_its_history_is_not_run_ahead_of(loaded: LoadedModel, penalty: dict[str, float]):
    asked = [ask(number, 40, DENSE, outputs=20, seed=number) for number in range(3)]
    asked[1] = replace(asked[1], sampling=replace(asked[1].sampling, **penalty))
    ahead, after = (answers(loaded, replace(CONFIG, launch_ahead=flag), asked, None) for flag in (True, False))
    assert_alike(ahead, after)


@dataclass
class LateDevice(FakeDevice):
    """Says in which order steps are launched and waited for."""

    log: list[tuple[str, int]] = field(default_factory=list)

    def launch(self, plan: StepPlan) -> "Late":
        self.log.append(("launched", plan.step_index))
        return Late(self, plan.step_index, self.run(plan))


@dataclass
class Late:
    device: LateDevice
    step_index: int
    step: StepResult

    def result(self) -> StepResult:
        self.device.log.append(("waited for", self.step_index))
        return self.step


def request(name: str, *, max_tokens: int) -> TurnRequest:
    return TurnRequest(SessionId(name), (1, 2, 3), SamplingParams(max_tokens=max_tokens, ignore_eos=True))


def late_engine():
    engine, _ = fake_engine(small_config(launch_ahead=True, kv_blocks=64))
    device = LateDevice()
    device.attach(engine)
    engine._runner = device
    return engine, device


def test_the_next_step_is_launched_before_this_one_is_waited_for():
    engine, device = late_engine()
    engine.submit(request("a", max_tokens=5), lambda events: None)
    drain(engine)
    order = [(what, index) for what, index in device.log]
    assert order == [
        ("launched", 1),  # the prompt: what follows it is planned when it is there
        ("waited for", 1),
        ("launched", 2),
        ("launched", 3),
        ("waited for", 2),
        ("launched", 4),
        ("waited for", 3),
        ("launched", 5),
        ("waited for", 4),
        ("waited for", 5),  # the fifth token is the last, which was known
    ]
    assert [list(plan.segments[0].token_ids) == [PENDING_TOKEN] for plan in device.plans] == [
        False,
        False,
        True,
        True,
        True,
    ]


def test_who_waits_is_admitted_after_the_step_in_flight():
    engine, device = late_engine()
    engine.submit(request("a", max_tokens=20), lambda events: None)
    for _ in range(4):
        engine.step()
    engine.submit(request("b", max_tokens=3), lambda events: None)
    in_flight = device.plans[-1].step_index
    engine.step()
    engine.step()
    assert {segment.start for segment in device.plans[-1].segments} >= {0}, "b's prompt"
    assert device.plans[-1].step_index == in_flight + 1


def test_a_turn_that_is_cancelled_in_flight_leaves_no_block_behind():
    engine, _ = late_engine()
    free = engine.occupancy().free
    (turn_id,) = engine.submit(request("a", max_tokens=40), lambda events: None)
    for _ in range(14):  # position 16 is where the next block begins
        engine.step()
    engine.cancel(turn_id)
    drain(engine)
    engine.release(SessionId("a"))
    engine.check()
    assert engine.occupancy().free == free


def test_who_has_waited_too_long_is_told_while_steps_are_launched_ahead():
    clock = Clock()
    engine, _ = fake_engine(small_config(launch_ahead=True, max_running_turns=1, max_queue_s=5.0), clock=clock)
    ended: dict = {}

    def listen(events):
        ended.update({event.turn_id: (event, clock()) for event in events if isinstance(event, TurnEnded)})

    engine.submit(request("a", max_tokens=40), listen)
    engine.step()
    (waiting,) = engine.submit(request("b", max_tokens=3), listen)
    while waiting not in ended:
        clock.now_s += 1.0
        assert engine.step()
    event, when_s = ended[waiting]
    assert event.reason is FinishReason.ERROR and when_s <= 8.0


def test_a_step_is_told_before_the_failure_of_the_one_launched_after_it():
    engine, device = late_engine()
    tokens = []
    engine.submit(request("a", max_tokens=9), lambda events: tokens.extend(events))
    for _ in range(3):
        engine.step()

    def broken(plan: StepPlan) -> None:
        raise RuntimeError("the device is gone")

    before, device.before_run = len(tokens), broken
    with pytest.raises(RuntimeError, match="the device is gone"):
        engine.step()
    assert len(tokens) == before + 1


def test_what_is_moved_while_a_step_is_in_flight_is_copied_before_its_place_is_written():
    """An idle session leaves the device between two steps; the step that is planned ahead next may get one of its blocks."""
    config = small_config(kv_blocks=10, host_blocks=20, launch_ahead=True)
    engine, device = fake_engine(config)
    idle = TurnRequest(SessionId("idle"), tuple(i % 23 for i in range(60)), SamplingParams(max_tokens=1, seed=1))
    engine.submit(idle, lambda _: None)
    drain(engine)
    busy = replace(idle, session_id=SessionId("busy"), prompt_ids=(5,) * 40)
    engine.submit(replace(busy, sampling=SamplingParams(max_tokens=80, seed=1, ignore_eos=True)), lambda _: None)
    for _ in range(12):
        engine.step()
    assert engine._in_flight is not None
    while engine._cache.pool.num_free:  # only what the idle session gives up is free then
        engine._cache.extend([], 1)
    assert engine._sessions.evict_one()
    for _ in range(40):
        engine.step()
    branch = engine._sessions.get(SessionId("idle")).branches[0]
    assert branch.table.num_host_blocks == 4
    content = device.content(branch.table.blocks, branch.table.num_tokens)
    assert content[-1].digest == digest_of(branch.token_ids[: branch.table.num_tokens], "")
