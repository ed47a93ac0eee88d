"""Whatever clients do, in whatever order: no block is lost, no context is wrong, every turn ends once with its own answer."""

from dataclasses import dataclass, replace

import pytest
from fake_device import VOCAB, Clock, Inbox, digest_of, expected_answer, fake_engine, small_config
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from loopserve.config import BLOCK_TOKENS
from loopserve.dialogue import (
    FinishReason,
    Mode,
    QualityContract,
    SamplingParams,
    SessionId,
    TurnEnded,
    TurnId,
    TurnRequest,
)
from loopserve.errors import ContextLengthExceeded, InvalidRequest, NotFound, Overloaded
from loopserve.kv.cache import Provenance, Tier, _hash, _token_bytes
from loopserve.turn import Turn

SESSIONS = [SessionId(name) for name in ("a", "b", "c", "d", "e", "f", "g")]
SALTS = ["", "tenant"]

tokens = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=40)
contracts = st.builds(
    QualityContract,
    mode=st.sampled_from(Mode),
    min_coverage=st.sampled_from([None, 0.5]),
    budget_tokens=st.sampled_from([None, 1, 30]),
)
samplings = st.builds(
    SamplingParams,
    max_tokens=st.integers(1, 60),
    min_tokens=st.just(0),
    seed=st.sampled_from([None, 0, 7]),
    ignore_eos=st.booleans(),
)


@dataclass
class Accepted:
    """A turn that the engine took, and the most steps it can need once it is the oldest."""

    turn: Turn

    @property
    def most_steps(self) -> int:
        most_tokens = self.turn.prompt_len + self.turn.max_outputs
        return most_tokens // BLOCK_TOKENS + 1 + self.turn.max_outputs


class Dialogues(RuleBasedStateMachine):
    """Random clients against one engine with a fake device."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.inbox = Inbox()
        self.accepted: dict[TurnId, Accepted] = {}
        self.histories: dict[SessionId, list[list[int]]] = {}  # every conversation of a session, answers included
        self.openings = [[t % VOCAB for t in range(start, start + 37)] for start in (0, 5)]

    @rule(
        kv_blocks=st.integers(4, 20),
        max_running=st.integers(1, 4),
        reuse=st.sampled_from([True, True, True, False]),
        chunk_tokens=st.sampled_from([16, 24, 48]),
        launch_ahead=st.booleans(),
        host_blocks=st.sampled_from([0, 3, 12, 60]),
        compact_above_ratio=st.sampled_from([1.0, 0.5, 0.0]),
        recall=st.sampled_from(["wait", "late"]),
    )
    @precondition(lambda self: not hasattr(self, "engine"))
    def build(
        self, kv_blocks, max_running, reuse, chunk_tokens, launch_ahead, host_blocks, compact_above_ratio, recall
    ):
        config = small_config(kv_blocks=kv_blocks, max_running_turns=max_running, reuse=reuse, max_queue_s=100.0)
        config = replace(
            config, launch_ahead=launch_ahead, host_blocks=host_blocks, compact_above_ratio=compact_above_ratio
        )
        config = replace(config, decode=replace(config.decode, recall=recall))
        config = replace(config, prefill=replace(config.prefill, chunk_tokens=chunk_tokens))
        self.engine, self.device = fake_engine(config, clock=self.clock)
        self.config = config

    def ready(self) -> bool:
        return hasattr(self, "engine")

    # What clients do.

    @precondition(ready)
    @rule(
        session=st.sampled_from(SESSIONS),
        opening=st.sampled_from([None, 0, 1]),
        new=tokens,
        salt=st.sampled_from(SALTS),
        contract=contracts,
        sampling=samplings,
        branches=st.integers(1, 3),
    )
    def open_conversation(self, session, opening, new, salt, contract, sampling, branches):
        prompt = (self.openings[opening] if opening is not None else []) + new
        self.submit(session, prompt, salt, contract, sampling, branches)

    @precondition(lambda self: self.ready() and self.histories)
    @rule(
        data=st.data(),
        new=tokens,
        kept=st.sampled_from(["whole", "whole", "whole", "but one", "edited"]),
        contract=contracts,
        sampling=samplings,
        branches=st.sampled_from([1, 1, 1, 2]),
    )
    def continue_conversation(self, data, new, kept, contract, sampling, branches):
        session = data.draw(st.sampled_from(sorted(self.histories)))
        history = data.draw(st.sampled_from(self.histories[session][-4:]))
        if kept == "but one":
            history = history[:-1]
        elif kept == "edited":
            history = history[: data.draw(st.integers(0, len(history)))]
        self.submit(session, history + new, next(iter(self.salts_of(session)), ""), contract, sampling, branches)

    @precondition(lambda self: self.ready() and self.histories)
    @rule(data=st.data(), new=tokens, sampling=samplings)
    def go_on_sparsely(self, data, new, sampling):
        """The common case: the newest answer of a conversation is followed by its next prompt."""
        session = data.draw(st.sampled_from(sorted(self.histories)))
        salt = next(iter(self.salts_of(session)), "")
        self.submit(session, self.histories[session][-1] + new, salt, QualityContract(mode=Mode.SPARSE), sampling, 1)

    @precondition(lambda self: self.ready() and self.running())
    @rule(data=st.data())
    def cancel(self, data):
        turn_id = data.draw(st.sampled_from(self.running()))
        self.engine.cancel(turn_id)

    @precondition(ready)
    @rule(session=st.sampled_from(SESSIONS))
    def release(self, session):
        turns = [a for a in self.accepted.values() if a.turn.request.session_id == session]
        try:
            self.engine.release(session)
        except NotFound:
            return
        assert all(a.turn.turn_id in self.inbox.ended for a in turns)
        assert session not in [info.session_id for info in self.engine.sessions()]
        cache = self.engine._cache
        every = (*cache.pool.ids, *cache.host_pool.ids)
        in_use = {block for block in every if cache.count(block)} | set(cache._hash_of)
        assert {slot // BLOCK_TOKENS for slot in self.device.slots} <= in_use, "somebody's KV is left in a free block"

    # What time and operators do.

    @precondition(ready)
    @rule(count=st.integers(1, 30))
    def step(self, count):
        for _ in range(count):
            self.engine.step()
            self.check_state()

    @precondition(ready)
    @rule()
    def evict(self):
        if self.engine._sessions.evict_one():
            self.engine._scheduler.room_was_made()

    @precondition(ready)
    @rule()
    def become_compact(self):
        """As an autopilot or another turn may have it, at any time between two steps."""
        if self.engine._in_flight is None:
            self.engine._room._ask_to_be_compact(self.engine._scheduler._running)

    @precondition(lambda self: self.ready() and not self.running())
    @rule(lost=st.booleans())
    def hand_over(self, lost):
        """A new engine takes over all sessions, or the first of them; what it has no room for it forgets."""
        old, parcels = self.engine, self.device.parcels
        self.engine, self.device = fake_engine(self.config, clock=self.clock)
        self.device.parcels = parcels
        self.engine._turn_ids = old._turn_ids
        for info in old.sessions()[: 1 if lost else None]:
            salt = old._sessions.get(info.session_id).salt
            before = {b.table.num_tokens for b in old._sessions.get(info.session_id).branches}
            try:
                imported = self.engine.import_session(old.export_session(info.session_id))
            except Overloaded:
                continue
            session = self.engine._sessions.get(info.session_id)
            assert session.salt == salt and imported.num_tokens == max(before, default=0)
        old.check()

    @precondition(ready)
    @rule(ratio=st.sampled_from([0.0, 0.3, 1.0]))
    def set_compact_above(self, ratio):
        self.engine.set_compact_above(ratio)

    @precondition(ready)
    @rule(budget=st.none() | st.integers(2, 40))
    def set_budget(self, budget):
        self.engine.set_budget(budget)

    @precondition(ready)
    @rule(seconds=st.sampled_from([1.0, 1.0, 1.0, 60.0]))
    def wait(self, seconds):
        self.clock.now_s += seconds

    @precondition(ready)
    @rule()
    def drain(self):
        most = 1 + sum(a.most_steps for a in self.accepted.values() if a.turn.turn_id not in self.inbox.ended)
        for _ in range(most):
            if not self.engine.step():
                break
            self.check_state()
        assert not self.running(), f"turns are left after {most} steps"
        assert self.engine._scheduler.num_running == self.engine._scheduler.num_waiting == 0

    # What must hold.

    @invariant()
    def every_promise_holds(self):
        if self.ready():
            self.check_state()

    def check_state(self):
        engine = self.engine
        engine.check()
        scheduler = engine._scheduler
        assert scheduler.num_running <= self.config.max_running_turns
        assert scheduler.num_waiting <= self.config.max_waiting_turns + self.config.max_running_turns
        assert len(engine.sessions()) <= self.config.max_sessions
        live = {turn.turn_id for turn in scheduler.turns()}
        assert live == set(self.running()), "a turn is lost, or ended and still in a queue"
        self.check_sharing()
        self.check_index()
        if not engine._cache._copies:
            self.check_content()

    def check_sharing(self):
        cache = self.engine._cache
        holders: dict[int, list] = {}
        for session in self.engine._sessions:
            for branch in session.branches:
                assert len(set(branch.table.blocks)) == len(branch.table.blocks)
                assert branch.table.num_host_blocks == sum(
                    block in cache.host_pool.ids for block in branch.table.blocks
                )
                assert branch.busy is not None or not branch.places, "an idle branch has places"
                for block in branch.places:
                    assert cache.pool.count(block) == 1 and block not in cache._hash_of, (
                        "a place is somebody else's, too"
                    )
                for place, block in enumerate(branch.table.blocks):
                    is_full = (place + 1) * BLOCK_TOKENS <= branch.table.num_tokens
                    holders.setdefault(block, []).append((session, is_full))
        for block, held_by in holders.items():
            assert cache.count(block) == len(held_by), "a holder is not counted, or counted and gone"
            assert len({session.salt for session, _ in held_by}) == 1, "a block crosses salts"
            if cache.provenance(block) is not Provenance.EXACT:
                assert len({session.session_id for session, _ in held_by}) == 1, "an inexact block crosses sessions"
            if len(held_by) > 1:
                assert all(is_full for _, is_full in held_by), "a partly filled block is shared"

    def check_index(self):
        """What the index keeps, some session's history can name: else no release would ever find it."""
        cache = self.engine._cache
        named = set()
        for session in self.engine._sessions:
            for branch in session.branches:
                named |= chain_of(branch.token_ids, cache.open(session.salt).seed)
        known = cache._device.by_hash.keys() | cache._host.by_hash.keys()
        assert known <= named, "the index keeps what nobody can name any more"

    def check_content(self):
        for session in self.engine._sessions:
            for branch in session.branches:
                table = branch.table
                slots = self.device.content(table.blocks, table.num_tokens)
                assert all(slot is not None and slot.is_exact for slot in slots[: table.exact_tokens])
                if slots:
                    assert slots[-1].digest == digest_of(branch.token_ids[: table.num_tokens], session.salt)

    def teardown(self):
        if not self.ready():
            return
        self.drain()
        for turn_id, accepted in self.accepted.items():
            self.check_answer(accepted, self.inbox.ended[turn_id])
        for session in [info.session_id for info in self.engine.sessions()]:
            self.engine.release(session)
        for tier in Tier:
            occupancy = self.engine.occupancy(tier)
            assert occupancy.free + occupancy.cached == occupancy.total, "blocks are held by nobody"

    def check_answer(self, accepted, ended: TurnEnded):
        answer = list(ended.token_ids)
        turn = accepted.turn
        assert answer == expected_answer(turn, len(answer)), "the turn answered something else"
        if turn.policy.mode is Mode.EXACT:
            report = ended.usage.quality
            assert report.refreshes == 0 and report.coverage_mean is None
        match ended.reason:
            case FinishReason.STOP:
                assert answer[-1] in turn.end_ids()
            case FinishReason.LENGTH:
                assert len(answer) == turn.max_outputs
            case FinishReason.ERROR:
                assert turn.admitted_s is None and not answer, "only turns that never ran may fail here"

    # Plumbing.

    def submit(self, session, prompt, salt, contract, sampling, branches):
        request = TurnRequest(session, tuple(prompt), sampling, contract, branches, salt)
        waiting = self.engine._scheduler.num_waiting
        try:
            turn_ids = self.engine.submit(request, self.receive)
        except Overloaded:
            assert waiting + branches > self.config.max_waiting_turns
            return
        except ContextLengthExceeded:
            assert len(prompt) + sampling.max_tokens > self.engine.max_session_tokens
            return
        except InvalidRequest:
            assert {salt} != self.salts_of(session) != set(), "refused, although the salt is the session's own"
            return
        assert len(turn_ids) == branches
        by_id = {turn.turn_id: turn for turn in self.engine._scheduler.turns()}
        self.accepted.update({turn_id: Accepted(by_id[turn_id]) for turn_id in turn_ids})

    def receive(self, events):
        self.inbox(events)
        for event in events:
            if isinstance(event, TurnEnded):
                request = self.accepted[event.turn_id].turn.request
                history = [*request.prompt_ids, *event.token_ids]
                self.histories.setdefault(request.session_id, []).append(history)

    def running(self) -> list[TurnId]:
        return [turn_id for turn_id in self.accepted if turn_id not in self.inbox.ended]

    def salts_of(self, session) -> set[str]:
        live = {t.request.cache_salt for t in self.engine._scheduler.turns() if t.request.session_id == session}
        return live | {s.salt for s in self.engine._sessions if s.session_id == session}


def chain_of(token_ids, seed) -> set[bytes]:
    """The hashes of all full blocks of a sequence."""
    hashes, parent = set(), seed
    for end in range(BLOCK_TOKENS, len(token_ids) + 1, BLOCK_TOKENS):
        parent = _hash(parent, _token_bytes(token_ids[end - BLOCK_TOKENS : end]))
        hashes.add(parent)
    return hashes


NORMAL = settings(max_examples=100, stateful_step_count=30, suppress_health_check=list(HealthCheck))
LONG = settings(max_examples=1500, stateful_step_count=60, suppress_health_check=list(HealthCheck))


def test_any_dialogues_end_once_with_their_own_answers_and_lose_no_block():
    run_state_machine_as_test(Dialogues, settings=NORMAL)


@pytest.mark.slow
def test_any_dialogues_hold_in_a_long_search():
    run_state_machine_as_test(Dialogues, settings=LONG)
