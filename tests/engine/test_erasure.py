"""A released session leaves nothing behind: no prefix to find, no bytes on the device. What others hold stays."""

import threading

import pytest
from fake_device import Inbox, drain, fake_engine, small_config

from loopserve.config import BLOCK_TOKENS
from loopserve.dialogue import SamplingParams, SessionId, TurnRequest
from loopserve.errors import EngineUnavailable

PROMPT = tuple(range(10, 10 + 3 * BLOCK_TOKENS + 5))


def answer(engine, session: str, prompt, *, salt: str = "", **sampling):
    params = SamplingParams(**({"max_tokens": 4, "temperature": 0, "ignore_eos": True} | sampling))
    inbox = Inbox()
    (turn_id,) = engine.submit(TurnRequest(SessionId(session), tuple(prompt), params, cache_salt=salt), inbox)
    drain(engine)
    return inbox.ended[turn_id]


def blocks_with_bytes(engine) -> set[int]:
    """The blocks of the real pool that hold anything but zeros, in any layer."""
    store, found = engine._runner.store, set()
    for pool in (*store.keys, *store.values):
        by_block = pool.view(-1, BLOCK_TOKENS * pool.shape[1] * pool.shape[2])
        found |= set(by_block.ne(0).any(dim=1).nonzero().flatten().tolist())
    return found


def test_a_released_session_leaves_only_zeros_and_no_prefix(engine):
    built, _, _ = engine()
    assert blocks_with_bytes(built) == set()
    first = answer(built, "s", PROMPT)
    assert len(blocks_with_bytes(built)) == 4
    built.release(SessionId("s"))
    assert blocks_with_bytes(built) == set()
    assert built.occupancy().cached == 0
    again = answer(built, "s", PROMPT)
    assert again.usage.cached_tokens == 0
    assert again.token_ids == first.token_ids


def test_blocks_that_another_session_holds_stay_and_its_answers_too(engine):
    built, _, _ = engine()
    answer(built, "mine", PROMPT)
    theirs = answer(built, "theirs", (*PROMPT[: 2 * BLOCK_TOKENS], 7, 8, 9))
    assert theirs.usage.cached_tokens == 2 * BLOCK_TOKENS
    built.release(SessionId("mine"))
    table = built._sessions.get(SessionId("theirs")).branches[0].table
    assert blocks_with_bytes(built) == set(table.blocks)
    history = (*PROMPT[: 2 * BLOCK_TOKENS], 7, 8, 9, *theirs.token_ids, 1)
    assert answer(built, "theirs", history).usage.cached_tokens == len(history) - 2
    assert answer(built, "new", PROMPT).usage.cached_tokens == 2 * BLOCK_TOKENS


def test_what_was_evicted_edited_away_or_dropped_with_a_branch_is_erased_as_well(engine):
    built, _, _ = engine(max_branches=2)
    for start in (0, 60, 120):  # three branches, of which two are kept
        answer(built, "s", range(start, start + 40))
    edited = answer(built, "s", (*range(120, 120 + 40), 5)).usage.cached_tokens
    assert edited > 0
    assert built._sessions.evict_one()
    assert built.occupancy().cached > 0
    assert len(blocks_with_bytes(built)) > 4
    built.release(SessionId("s"))
    assert blocks_with_bytes(built) == set()
    assert built.occupancy().free == built.occupancy().total


def test_the_same_words_of_another_salt_are_not_touched(engine):
    built, _, _ = engine()
    answer(built, "a", PROMPT, salt="a")
    answer(built, "b", PROMPT, salt="b")
    built.release(SessionId("a"))
    assert answer(built, "b", (*PROMPT, 1), salt="b").usage.cached_tokens == len(PROMPT)
    assert answer(built, "c", PROMPT, salt="a").usage.cached_tokens == 0


def test_a_session_pushed_out_by_newer_ones_leaves_nothing_to_find():
    engine, _ = fake_engine(small_config(kv_blocks=64, max_sessions=5))
    for number in range(6):
        answer(engine, f"s{number}", [number] * 20)
    assert len(engine.sessions()) == 5
    assert answer(engine, "again", [0] * 20).usage.cached_tokens == 0
    engine.check()


def test_release_answers_only_after_the_device_has_erased():
    engine, device = fake_engine()
    erasing, opened = threading.Event(), threading.Event()
    erase = device.erase

    def slow(blocks):
        erasing.set()
        assert opened.wait(30)
        erase(blocks)

    device.erase = slow
    answer(engine, "s", range(20))
    engine.start()
    released = threading.Thread(target=engine.release, args=(SessionId("s"),))
    released.start()
    assert erasing.wait(30)
    released.join(0.05)
    assert released.is_alive() and device.slots
    assert engine.sessions() == ()  # nobody waits for the device but who asked
    opened.set()
    released.join(30)
    assert not released.is_alive() and not device.slots
    engine.stop()


def test_an_erasure_that_fails_is_told_and_ends_the_engine():
    engine, device = fake_engine()

    def broken(blocks):
        raise RuntimeError("the device is lost")

    device.erase = broken
    answer(engine, "s", range(20))
    engine.start()
    with pytest.raises(EngineUnavailable, match="erased"):
        engine.release(SessionId("s"))
    engine._thread.join(30)
    assert not engine.is_alive()
