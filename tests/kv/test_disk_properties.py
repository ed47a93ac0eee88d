"""The disk tier under anything that a fleet may do, in any order: one owner a session, and nothing but its last save."""

import contextlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from disk_fleet import LEASE_S, Fleet, assert_tidy
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from kv_images import BLOCK, conversation, same
from shaky_files import Killed, killing_at

from loopserve.dialogue import SessionId
from loopserve.kv.disk import DiskFull, DiskTier, LeasedElsewhere, LeaseLost
from loopserve.kv.image import SessionImage

QUOTA = 12_000  # a few sessions
SESSIONS = [(SessionId(name), salt) for name in "abc" for salt in ("", "x")]
ENGINES = range(3)

engines = st.sampled_from(ENGINES)
sessions = st.sampled_from(SESSIONS)
lengths = st.sampled_from([0, 3, BLOCK, 2 * BLOCK + 1, 4 * BLOCK])
seeds = st.sampled_from([0, 1])  # of equal seeds are equal blocks


@dataclass
class Known:
    """What must be true of one session."""

    image: SessionImage | None = None  # what was saved last
    owner: DiskTier | None = None  # who claimed it last and did not give it up
    epoch: int = 0


class Engines(RuleBasedStateMachine):
    """Three engines, now and then replaced, on one directory."""

    def __init__(self) -> None:
        super().__init__()
        self._directory = tempfile.TemporaryDirectory()
        self.fleet = Fleet(Path(self._directory.name), quota_bytes=QUOTA)
        self.tiers = [self.fleet.tier() for _ in ENGINES]
        self.beats = {tier.pid: self.now_s for tier in self.tiers}
        self.known = {session: Known() for session in SESSIONS}

    def teardown(self) -> None:
        for tier in self.tiers:
            tier.close()
        assert_tidy(self.fleet, self.fleet.tier())
        self._directory.cleanup()

    @property
    def now_s(self) -> float:
        return self.fleet.time.now_s

    def is_live(self, tier: DiskTier) -> bool:
        return tier in self.tiers and self.now_s - self.beats[tier.pid] < LEASE_S

    def may_own(self, tier: DiskTier, known: Known) -> bool:
        return known.owner in (None, tier) or not self.is_live(known.owner)

    def take(self, tier: DiskTier, known: Known, epoch: int) -> None:
        if known.owner is not tier:
            assert epoch > known.epoch, "who comes later has the higher epoch"
        known.owner, known.epoch = tier, epoch

    def expect_refusal(self, act: Callable[[], object]) -> None:
        try:
            act()
        except (LeasedElsewhere, LeaseLost):
            return
        raise AssertionError("a live engine's session was given away")

    @rule()
    def time_passes(self) -> None:
        self.fleet.time.advance(1)

    @rule(share=st.sampled_from([0.4, 1.0]))
    def much_time_passes(self, share: float) -> None:
        self.fleet.time.advance(LEASE_S * share)

    @rule(engine=engines)
    def heartbeat(self, engine: int) -> None:
        self.tiers[engine].heartbeat()
        self.beats[self.tiers[engine].pid] = self.now_s

    @rule(engine=engines, session=sessions)
    def claim(self, engine: int, session: tuple[SessionId, str]) -> None:
        tier, known = self.tiers[engine], self.known[session]
        self.fleet.time.advance(1)
        if not self.may_own(tier, known):
            self.expect_refusal(lambda: tier.claim(*session))
            return
        self.take(tier, known, tier.claim(*session))

    @rule(engine=engines, session=sessions, length=lengths, seed=seeds, num_turns=st.integers(0, 99))
    def save(self, engine: int, session: tuple[SessionId, str], length: int, seed: int, num_turns: int) -> None:
        tier, known = self.tiers[engine], self.known[session]
        self.fleet.time.advance(1)
        image = conversation(session[0], length, seed=seed, salt=session[1], num_turns=num_turns)
        if not self.may_own(tier, known):
            self.expect_refusal(lambda: tier.save(image))
            return
        try:
            saved = tier.save(image)
        except LeaseLost:
            assert known.owner is not tier, "who owns it has not lost it"
            return
        except DiskFull:
            self.take(tier, known, tier.claim(*session))
            return
        self.beats[tier.pid] = self.now_s
        self.take(tier, known, saved.epoch)
        known.image = image
        assert saved.num_blocks_written + saved.num_blocks_shared == image.num_blocks

    @rule(engine=engines, session=sessions)
    def load(self, engine: int, session: tuple[SessionId, str]) -> None:
        tier, known = self.tiers[engine], self.known[session]
        self.fleet.time.advance(1)
        if known.image is not None and not self.may_own(tier, known):
            self.expect_refusal(lambda: tier.load(*session))
            return
        assert same(tier.load(*session), known.image)
        if known.image is not None:
            self.take(tier, known, tier.claim(*session))

    @rule(engine=engines, session=sessions)
    def release(self, engine: int, session: tuple[SessionId, str]) -> None:
        tier, known = self.tiers[engine], self.known[session]
        tier.release(*session)
        if known.owner is tier:
            known.owner = None

    @rule(engine=engines, session=sessions)
    def drop(self, engine: int, session: tuple[SessionId, str]) -> None:
        tier, known = self.tiers[engine], self.known[session]
        self.fleet.time.advance(1)
        if not self.may_own(tier, known):
            self.expect_refusal(lambda: tier.drop(*session))
            return
        assert tier.drop(*session) == (known.image is not None)
        self.known[session] = Known()

    @rule(engine=engines, end=st.sampled_from(["close", "release_all", "kill"]))
    def engine_ends(self, engine: int, end: str) -> None:
        tier = self.tiers[engine]
        if end == "release_all":
            tier.release_all()
            self.beats[tier.pid] = self.now_s
        else:
            self.replace(engine, is_killed=end == "kill")
        for known in self.known.values():
            if known.owner is tier:
                known.owner = None

    def replace(self, engine: int, *, is_killed: bool) -> None:
        tier = self.tiers[engine]
        if is_killed:
            self.fleet.kill(tier)
        else:
            tier.close()
        self.tiers[engine] = self.fleet.tier()
        self.beats[self.tiers[engine].pid] = self.now_s

    @rule(engine=engines, session=sessions, length=lengths, number=st.integers(1, 60))
    def engine_is_killed_while_it_saves(
        self, engine: int, session: tuple[SessionId, str], length: int, number: int
    ) -> None:
        tier, known = self.tiers[engine], self.known[session]
        self.fleet.time.advance(1)
        image = conversation(session[0], length, seed=2, salt=session[1])
        might_save = self.may_own(tier, known)
        files = self.fleet.files(tier)
        files.before = killing_at(files.num_operations + number)
        with contextlib.suppress(LeasedElsewhere, LeaseLost, DiskFull, Killed):
            tier.save(image)
        for other in self.known.values():
            if other.owner is tier:
                other.owner = None
        self.replace(engine, is_killed=True)
        if might_save:
            found = self.tiers[engine].load(*session)
            assert same(found, known.image) or same(found, image)
            known.image, known.owner, known.epoch = found, None, self.tiers[engine].claim(*session)
            self.tiers[engine].release(*session)

    @rule(engine=engines, num_bytes=st.sampled_from([0, 1000, 5000, 9000]), kept=st.sets(sessions, max_size=2))
    def make_room(self, engine: int, num_bytes: int, kept: set[tuple[SessionId, str]]) -> None:
        tier = self.tiers[engine]
        before = {(stored.session_id, stored.salt): stored for stored in tier.sessions()}
        freed = tier.make_room(num_bytes, keep=kept)
        after = {(stored.session_id, stored.salt) for stored in tier.sessions()}
        assert freed.num_sessions == len(before) - len(after)
        assert freed.is_enough == (tier.used_bytes + num_bytes <= QUOTA)
        might_go = {session for session in before if session not in kept and self.may_own(tier, self.known[session])}
        gone = before.keys() - after
        assert gone <= might_go
        for session in gone:
            assert all(before[session].saved_s <= before[other].saved_s for other in might_go - gone)
            self.known[session] = Known()

    @invariant()
    def all_bytes_are_counted_and_there_are_not_too_many(self) -> None:
        assert self.tiers[0].used_bytes == sum(path.stat().st_size for path in self.fleet.paths())
        assert sum(path.stat().st_size for path in self.fleet.paths("packs")) <= QUOTA

    @invariant()
    def every_block_of_a_tenant_is_stored_once(self) -> None:
        named = {
            pack for standing in self.tiers[0]._journal.survey() if standing.content for pack in standing.content.packs
        }
        blocks = self.fleet.stored_blocks(named)
        assert len(blocks) == len(set(blocks))

    @invariant()
    def what_is_seen_is_what_is_known(self) -> None:
        seen = {(stored.session_id, stored.salt): stored for stored in self.tiers[0].sessions()}
        for session, known in self.known.items():
            stored = seen.get(session)
            assert (stored is None) == (known.image is None)
            if stored is None or known.image is None:
                continue
            assert stored.num_tokens == known.image.num_tokens
            is_owned = known.owner is not None and (known.owner is self.tiers[0] or self.is_live(known.owner))
            assert stored.owner == (f"engine {known.owner.pid}" if is_owned else None)


def test_whatever_a_fleet_does_a_session_has_one_owner_and_its_last_save() -> None:
    run_state_machine_as_test(
        Engines,
        settings=settings(
            max_examples=60,
            stateful_step_count=40,
            phases=[Phase.generate],
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )
