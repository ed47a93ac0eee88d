"""A device that breaks between any two orders: every turn is told so, no block is lost, and whoever comes up on the same directory goes on.

An order is one block copied, erased, read or written, or one step computed. What the engine's memory held is gone then; what lies on disk
is what was saved last, or nothing.
"""

import threading

import pytest
from test_keeper import Client, settings
from test_tiers import DECODE, random_ids

from loopserve.dialogue import Mode, QualityContract, SamplingParams, SessionId, TurnEnded, TurnRequest
from loopserve.errors import EngineUnavailable

WAIT_S = 20.0
NUM_POINTS = 10
DIALOGUES = {"a": 100, "b": 130, "c": 160}  # tokens of the first prompt
FORMS = {  # two of the three dialogues fit on the device
    "resident": (Mode.EXACT, {"kv_blocks": 24, "host_blocks": 60}),
    "compact": (Mode.SPARSE, {"kv_blocks": 24, "host_blocks": 60, "compact_above_ratio": 0.0}),
}


class Broken(Exception):
    """The device is gone."""


class Orders:
    """Stands between an engine and its device: counts orders, and lets only the first `most` through."""

    def __init__(self, runner, *, most: int | None = None) -> None:
        self.count, self._most = 0, most
        self._lock = threading.Lock()
        store = runner.store
        for name in ("copy_blocks", "erase_blocks", "read_blocks", "write_blocks"):
            setattr(store, name, self._watched(getattr(store, name)))
        launch = runner.launch
        runner.launch = lambda plan: launch(self._passed([plan])[0])

    def _watched(self, carry_out):
        def some(orders, *rest):
            passed = self._passed(orders)
            told = carry_out(passed, *(pool[:, : len(passed)] for pool in rest))  # keys and values, by block
            if len(passed) < len(orders):
                raise Broken
            return told

        return some

    def _passed(self, orders):
        """Those of some orders that reach the device. Raises Broken where there are none."""
        with self._lock:
            before, self.count = self.count, self.count + len(orders)
        left = len(orders) if self._most is None else self._most - before
        if orders and left <= 0:
            raise Broken
        return orders[:left]


def ask(client: Client, session: str, prompt, mode: Mode) -> TurnEnded | None:
    """One turn, to its end; None where the engine takes none any more."""
    sampling = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    request = TurnRequest(SessionId(session), tuple(prompt), sampling, QualityContract(mode))
    try:
        (turn_id,) = client.engine.submit(request, client)
    except EngineUnavailable:
        return None
    with client._news:
        assert client._news.wait_for(lambda: turn_id in client.inbox.ended, timeout=WAIT_S), "a turn hangs"
    return client.inbox.ended[turn_id]


def hold(client: Client, mode: Mode, *, num_turns: int) -> dict[str, list[list[int]]]:
    """Dialogues in turns: of each its prompts with what was answered, as far as the engine went."""
    told: dict[str, list[list[int]]] = {session: [] for session in DIALOGUES}
    for number in range(num_turns):
        for seed, (session, length) in enumerate(DIALOGUES.items()):
            if len(told[session]) < number:
                continue
            new = random_ids(3 if number else length, 10 * number + seed)
            prompt = [*(told[session][-1] if number else ()), *new]
            ended = ask(client, session, prompt, mode)
            if ended is not None and ended.error is None:
                told[session].append([*prompt, *ended.token_ids])
    return told


def started(engine, directory, **overrides):
    eng, _, _ = engine(decode=DECODE, disk=settings(directory, lease_s=60.0), **overrides)
    return eng


@pytest.mark.parametrize("form", FORMS)
def test_a_device_that_breaks_anywhere_loses_no_turn_and_the_next_engine_goes_on(engine, tmp_path, form: str):
    mode, sizes = FORMS[form]
    whole = started(engine, tmp_path / "whole", **sizes)
    orders = Orders(whole._runner)
    whole.start()
    client = Client(whole)
    expected = hold(client, mode, num_turns=3)
    client.wait_until_saved(len(DIALOGUES))
    counts = whole.memory().pressure
    whole.stop()
    assert counts.offloaded_sessions > 0 if form == "resident" else counts.compacted_turns == 9
    total = orders.count
    for point in range(NUM_POINTS):
        directory = tmp_path / str(point)
        breaking = started(engine, directory, **sizes)
        Orders(breaking._runner, most=total * point // NUM_POINTS)
        breaking.start()
        told = hold(Client(breaking), mode, num_turns=3)
        assert all(turns == expected[session][: len(turns)] for session, turns in told.items())
        assert any(len(turns) < 3 for turns in told.values()) or point == NUM_POINTS - 1
        breaking.stop()
        breaking.check()
        heir = started(engine, directory, **sizes)
        heir.start()
        for session, turns in told.items():
            prompt = expected[session][len(turns)][:-8] if len(turns) < 3 else [*turns[-1], 1, 2]
            ended = ask(Client(heir), session, prompt, mode)
            assert ended is not None and ended.error is None and len(ended.token_ids) == 8
            if mode is Mode.EXACT and len(turns) < 3:
                assert list(ended.token_ids) == expected[session][len(turns)][-8:]
        heir.stop()
