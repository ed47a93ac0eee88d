"""Sessions on disk: saved behind the engine's back, there after a restart with the same tokens; whatever is wrong, the answer is right."""

import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from fake_device import Inbox
from test_tiers import DECODE, random_ids

from loopserve import archive
from loopserve.config import DiskSettings
from loopserve.dialogue import Mode, QualityContract, SamplingParams, SessionId, TurnEnded, TurnRequest
from loopserve.errors import ConfigError, NotFound
from loopserve.kv.disk import DiskFailed, DiskFull, DiskTier

PROMPT = random_ids(120, 1)
WAIT_S = 20.0


def settings(directory: Path, **overrides) -> DiskSettings:
    return DiskSettings(**({"directory": str(directory), "save_after_s": 0.0, "lease_s": 60.0} | overrides))


class Client:
    """Waits for each answer of a running engine."""

    def __init__(self, engine) -> None:
        self.engine, self.inbox, self._news = engine, Inbox(), threading.Condition()

    def __call__(self, events) -> None:
        with self._news:
            self.inbox(events)
            self._news.notify_all()

    def answer(self, prompt, *, session: str = "a", mode=Mode.SPARSE) -> TurnEnded:
        sampling = SamplingParams(max_tokens=10, temperature=0.0, ignore_eos=True)
        request = TurnRequest(SessionId(session), tuple(prompt), sampling, QualityContract(mode))
        (turn_id,) = self.engine.submit(request, self)
        with self._news:
            assert self._news.wait_for(lambda: turn_id in self.inbox.ended, timeout=WAIT_S), "a turn hangs"
        ended = self.inbox.ended[turn_id]
        assert ended.error is None
        return ended

    def wait_for(self, what, message: str) -> None:
        deadline_s = time.monotonic() + WAIT_S
        while not what(self.engine.memory()):
            assert time.monotonic() < deadline_s, message
            time.sleep(0.01)

    def wait_until_saved(self, num_sessions: int = 1) -> None:
        self.wait_for(lambda m: m.disk.num_sessions >= num_sessions, "a session is never saved")


@contextmanager
def running(engine, *, notes=None, **overrides):
    eng, _, _ = engine(decode=DECODE, **overrides)
    if notes is not None:
        eng.keep_notes(notes)
    eng.start()
    try:
        yield Client(eng)
    finally:
        eng.stop()
        assert eng._keeper is None or not any(thread.is_alive() for thread in eng._keeper._archive._threads)


@pytest.fixture
def expected(engine) -> dict[int, tuple[int, ...]]:
    """The answers of an engine that never stopped, to the first and to the second turn."""
    with running(engine) as client:
        first = client.answer(PROMPT).token_ids
        return {1: first, 2: client.answer([*PROMPT, *first, 7, 8, 9]).token_ids}


def second_turn(expected) -> list[int]:
    return [*PROMPT, *expected[1], 7, 8, 9]


@pytest.mark.parametrize("saved", ["while idle", "at the end"])
def test_a_restarted_engine_goes_on_where_the_session_was(engine, tmp_path, expected, saved):
    disk = settings(tmp_path, save_after_s=0.0 if saved == "while idle" else 3600.0)
    with running(engine, disk=disk) as client:
        assert client.answer(PROMPT).token_ids == expected[1]
        if saved == "while idle":
            client.wait_until_saved()
    with running(engine, disk=disk, host_blocks=0) as client:
        assert client.engine.sessions() == (), "nothing is read before somebody asks"
        ended = client.answer(second_turn(expected))
        assert ended.token_ids == expected[2] and ended.usage.cached_tokens == 120
        assert client.engine.memory().disk.loaded_sessions == 1


def test_what_host_memory_had_no_room_for_comes_back_from_disk(engine, tmp_path, expected):
    with running(engine, disk=settings(tmp_path), kv_blocks=12, host_blocks=0) as client:
        assert client.answer(PROMPT).token_ids == expected[1]
        client.wait_until_saved()
        client.answer(random_ids(150, 2), session="b")
        assert client.engine.session(SessionId("a")).num_cached_tokens == 0
        client.wait_until_saved(2)
        ended = client.answer(second_turn(expected))
        assert ended.token_ids == expected[2] and ended.usage.cached_tokens == 120


@pytest.mark.parametrize("damage", ["flipped", "cut", "emptied"])
def test_a_damaged_session_is_refused_counted_and_computed_again(engine, tmp_path, expected, damage):
    with running(engine, disk=settings(tmp_path)) as client:
        client.answer(PROMPT)
        client.wait_until_saved()
    (pack,) = (
        path
        for path in tmp_path.rglob("*")
        if path.is_file() and path.parent.name == "packs" and path.stat().st_size > 10_000
    )
    data = bytearray(pack.read_bytes())
    data[len(data) // 2] ^= 4
    pack.chmod(0o600)
    pack.write_bytes({"flipped": data, "cut": data[: len(data) // 2], "emptied": b""}[damage])
    with running(engine, disk=settings(tmp_path)) as client:
        ended = client.answer(second_turn(expected))
        assert ended.token_ids == expected[2] and ended.usage.cached_tokens == 0
        counts = client.engine.memory().disk
        assert sum(count for _, count in counts.refused) == 1 and counts.loaded_sessions == 0


class Notes:
    """Something to be kept beside each session, and what was found."""

    def __init__(self, *, about: bytes = b"") -> None:
        self.about, self.seen = about, dict[str, bytes]()

    def of(self, session_id) -> bytes:
        return self.about and self.about + session_id.encode()

    def found(self, session_id, notes: bytes) -> None:
        self.seen[session_id] = notes


def test_notes_beside_sessions_are_told_to_who_comes_after_and_to_nobody_while_they_are_held(engine, tmp_path):
    with running(engine, notes=Notes(about=b"about "), disk=settings(tmp_path)) as client:
        for session in ("a", "b"):
            client.answer(PROMPT, session=session)
        client.wait_until_saved(2)
        with running(engine, notes=(beside := Notes()), disk=settings(tmp_path)) as other:
            other.answer(PROMPT, session="c")
            looked = other.engine._keeper._archive
            other.wait_for(lambda _: looked._look_next_s > time.monotonic(), "it never looks")
            assert beside.seen == {}
    with running(engine, notes=(after := Notes()), disk=settings(tmp_path)) as client:
        client.wait_for(lambda _: len(after.seen) == 2, "nothing is told")
    assert after.seen == {"a": b"about a", "b": b"about b"}, "and nothing of what had none"


def test_another_models_sessions_are_not_seen(engine, tmp_path, expected):
    with running(engine, family="qwen3", disk=settings(tmp_path)) as client:
        client.answer(PROMPT)
        client.wait_until_saved()
    with running(engine, disk=settings(tmp_path, shared=True)) as client:
        ended = client.answer(PROMPT)
        assert ended.token_ids == expected[1] and ended.usage.cached_tokens == 0
        assert client.engine.memory().disk.refused == ()


def test_a_slow_disk_is_not_waited_for(engine, tmp_path, expected, monkeypatch):
    with running(engine, disk=settings(tmp_path)) as client:
        client.answer(PROMPT)
        client.wait_until_saved()
    let_go, load = threading.Event(), DiskTier.load

    def slow(*args):
        let_go.wait(WAIT_S)
        return load(*args)

    monkeypatch.setattr(DiskTier, "load", slow)
    with running(engine, disk=settings(tmp_path, wait_s=0.05)) as client:
        ended = client.answer(second_turn(expected))
        assert ended.token_ids == expected[2] and ended.usage.cached_tokens == 0
        let_go.set()
        client.wait_for(lambda m: m.disk.late == 1, "what comes late is counted")
        assert client.engine.session(SessionId("a")).num_tokens == 120 + 10 + 3 + 10


def test_a_full_disk_costs_nothing_but_the_sessions_that_do_not_fit(engine, tmp_path, expected, monkeypatch):
    def full(*_, **__):
        raise DiskFull("no room")

    monkeypatch.setattr(DiskTier, "save", full)
    with running(engine, disk=settings(tmp_path)) as client:
        assert client.answer(PROMPT).token_ids == expected[1]
        client.wait_for(lambda m: m.disk.full == 1, "a full disk is counted")
        assert client.answer(second_turn(expected)).token_ids == expected[2]


def test_an_error_that_nobody_thought_of_is_counted_and_the_disk_is_used_on(engine, tmp_path, expected, monkeypatch):
    with running(engine, disk=settings(tmp_path)) as client:
        client.answer(PROMPT)
        client.wait_until_saved()
    load = DiskTier.load
    monkeypatch.setattr(DiskTier, "load", lambda *_: 1 / 0)
    with running(engine, disk=settings(tmp_path, save_after_s=60.0)) as client:
        ended = client.answer(second_turn(expected))
        assert ended.token_ids == expected[2] and ended.usage.cached_tokens == 0
        client.wait_for(lambda m: m.disk.failed == 1, "a failure is counted")
        monkeypatch.setattr(DiskTier, "load", load)
    with running(engine, disk=settings(tmp_path)) as client:
        assert client.answer([*PROMPT, *expected[1], 3]).usage.cached_tokens > 100


def test_the_least_recently_saved_sessions_make_room_under_the_quota(engine, tmp_path):
    with running(engine, disk=settings(tmp_path, quota_bytes=400_000)) as client:
        for seed, session in enumerate("abcdef"):
            client.answer(random_ids(120, seed), session=session)
            client.wait_for(lambda m, n=seed + 1: m.disk.saved_sessions >= n, "a session is never saved")
        assert client.engine.memory().disk.full == 0
        used = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
        assert used <= 400_000


def test_two_engines_on_one_directory_never_use_one_session_at_once(engine, tmp_path, expected):
    disk = settings(tmp_path, shared=True)
    with running(engine, disk=disk) as one:
        one.answer(PROMPT)
        one.wait_until_saved()
        with running(engine, disk=disk) as other:
            ended = other.answer(second_turn(expected))
            assert ended.token_ids == expected[2] and ended.usage.cached_tokens == 0
            assert other.engine.memory().disk.leased_elsewhere >= 1
        assert one.answer(second_turn(expected)).usage.cached_tokens == 120
        one.wait_for(lambda m: m.disk.saved_sessions == 2, "and saves it again")
    with running(engine, disk=disk) as third:
        ended = third.answer([*second_turn(expected), *expected[2], 5])
        assert ended.usage.cached_tokens == 133, "it was given up at the end"


def test_a_dead_engines_sessions_can_be_had_when_its_lease_is_over(engine, tmp_path, expected):
    disk = settings(tmp_path, shared=True, lease_s=0.4)
    with running(engine, disk=disk) as dead:
        dead.answer(PROMPT)
        dead.wait_until_saved()
        dead.engine._keeper._archive._is_stopping.set()  # it beats no more, and says nothing
        time.sleep(0.6)
        with running(engine, disk=disk) as heir:
            ended = heir.answer(second_turn(expected))
            assert ended.token_ids == expected[2] and ended.usage.cached_tokens == 120


def test_a_released_session_is_gone_from_disk_too(engine, tmp_path):
    with running(engine, disk=settings(tmp_path)) as client:
        client.answer(PROMPT)
        client.wait_until_saved()
        client.engine.release(SessionId("a"))
        assert client.engine.memory().disk.num_sessions == 0
    with running(engine, disk=settings(tmp_path)) as client:
        assert client.engine.memory().disk.num_sessions == 0
        assert client.answer(PROMPT).usage.cached_tokens == 0


def test_a_directory_that_cannot_be_listed_for_a_moment_is_not_taken_for_an_empty_one(
    engine, tmp_path, expected, monkeypatch
):
    with running(engine, disk=settings(tmp_path)) as client:
        client.answer(PROMPT)
        client.wait_until_saved()
    with running(engine, disk=settings(tmp_path, save_after_s=60.0)) as client:
        disk = client.engine._keeper._archive
        client.wait_for(lambda _: disk._look_next_s > time.monotonic(), "it never looks")

        def unlisted(*_):
            raise DiskFailed("not now")

        monkeypatch.setattr(DiskTier, "sessions", unlisted)
        disk._look_next_s = 0.0
        client.wait_for(lambda _: disk._look_next_s > time.monotonic(), "it never looks again")
        assert client.answer(second_turn(expected)).usage.cached_tokens == 120


def test_a_session_that_was_never_here_is_removed_from_disk_by_its_salt(engine, tmp_path):
    with running(engine, disk=settings(tmp_path)) as other:
        with running(engine, disk=settings(tmp_path)) as client:
            client.answer(PROMPT)
            client.wait_until_saved()
        other.engine.release(SessionId("a"), cache_salt="")
        with pytest.raises(NotFound):
            other.engine.release(SessionId("a"), cache_salt="")
    with running(engine, disk=settings(tmp_path)) as client:
        assert client.answer(PROMPT).usage.cached_tokens == 0


def test_what_was_deleted_while_a_dead_engine_had_it_does_not_come_back(engine, tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "_LOOK_EVERY_S", 0.1)
    disk = settings(tmp_path, shared=True, lease_s=2.0)
    with running(engine, notes=Notes(about=b"x"), disk=disk) as dead:
        dead.answer(PROMPT)
        dead.wait_until_saved()
        with running(engine, notes=(notes := Notes()), disk=disk) as heir:
            dead.engine._keeper._archive._is_stopping.set()  # it beats no more, and says nothing
            with pytest.raises(NotFound):  # as far as anybody knows the dead one is told, too
                heir.engine.release(SessionId("a"), cache_salt="")
            assert any(tmp_path.rglob("sessions/*/*.json"))
            assert heir.answer(PROMPT, session="a").usage.cached_tokens == 0
            heir.engine.release(SessionId("a"), cache_salt="")
            heir.wait_for(lambda _: not any(tmp_path.rglob("sessions/*/*.json")), "it is never removed")
            assert notes.seen == {}


def test_idle_sessions_are_saved_one_after_the_other_without_a_pause(engine, tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "_POLL_S", WAIT_S / 4)
    with running(engine, disk=settings(tmp_path)) as client:
        for number in range(6):
            client.answer(random_ids(40, number), session=str(number))
        client.wait_until_saved(6)


def test_a_directory_that_cannot_be_used_is_a_clear_error_at_the_start(engine, tmp_path):
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(ConfigError, match="cannot be used"):
        engine(disk=settings(tmp_path / "file"))
