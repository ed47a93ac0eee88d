"""The disk tier: one owner a session, the last save or nothing, whatever fails, whoever dies, and whoever comes in between."""

import contextlib
import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from disk_fleet import LEASE_S, QUOTA, Fleet, S, T, U, assert_tidy
from kv_images import BLOCK, FORMAT, bits, conversation, same
from safetensors.torch import load_file
from shaky_files import Killed, ShakyFiles, killing_at, once_at

from loopserve.dialogue import SessionId
from loopserve.errors import ConfigError
from loopserve.kv.disk import (
    DiskFailed,
    DiskFull,
    DiskTier,
    LeasedElsewhere,
    LeaseLost,
    packs,
)
from loopserve.kv.disk.leases import Process, is_gone
from loopserve.kv.image import BranchImage, SessionImage


@pytest.fixture
def fleet(tmp_path) -> Fleet:
    return Fleet(tmp_path / "kv")


def test_what_is_saved_is_loaded_by_another_engine(fleet):
    image = conversation("s", 3 * BLOCK + 5, num_turns=7)
    writer, reader = fleet.tier(), fleet.tier()
    writer.save(image)
    writer.release(S, "")
    assert same(reader.load(S, ""), image)
    assert reader.load(T, "") is None and reader.load(S, "other") is None


def test_notes_lie_beside_a_session_for_whoever_asks_and_claim_nothing(fleet):
    owner, other = fleet.tier(), fleet.tier()
    owner.save(conversation("s", 5), notes=bytes(range(256)))
    owner.save(conversation("t", 5))
    assert other.notes(S, "") == bytes(range(256)) and other.notes(T, "") == b"" and other.notes(S, "other") is None
    owner.save(conversation("s", 6), notes=b"newer")
    assert other.notes(S, "") == b"newer"
    owner.drop(S, "")
    assert other.notes(S, "") is None


def test_last_save_counts(fleet):
    tier = fleet.tier()
    for num_tokens in (5, 40, 20, 0, 33):
        tier.save(conversation("s", num_tokens))
        assert same(tier.load(S, ""), conversation("s", num_tokens))
    assert_tidy(fleet, tier)


def test_branches_share_their_blocks_and_sessions_of_a_tenant_do(fleet):
    tier = fleet.tier()
    long = conversation("s", 4 * BLOCK)
    fork = replace(
        long.branches[0],
        token_ids=long.branches[0].token_ids[:BLOCK],
        num_tokens=BLOCK,
        exact_tokens=BLOCK,
        blocks=(0,),
    )
    assert tier.save(replace(long, branches=(*long.branches, fork))).num_blocks_written == 4
    shared = tier.save(conversation("t", 6 * BLOCK))
    assert (shared.num_blocks_written, shared.num_blocks_shared) == (2, 4)
    assert len(fleet.stored_blocks()) == len(set(fleet.stored_blocks())) == 6
    assert same(tier.load(T, ""), conversation("t", 6 * BLOCK))


def test_another_engine_shares_what_the_first_one_stored(fleet):
    first, second = fleet.tier(), fleet.tier()
    second.save(conversation("u", BLOCK, seed=9))  # it has looked at the packs before
    first.save(conversation("s", 2 * BLOCK))
    assert second.save(conversation("t", 2 * BLOCK)).num_blocks_shared == 2


def test_block_that_lies_twice_in_an_image_is_stored_once(fleet):
    tier = fleet.tier()
    image = conversation("s", 2 * BLOCK)
    keys, values = (torch.cat([pool[:, :1]] * 2, dim=1) for pool in (image.keys, image.values))
    saved = tier.save(replace(image, keys=keys, values=values))
    assert (saved.num_blocks_written, saved.num_blocks_shared) == (1, 1)
    assert same(tier.load(S, ""), replace(image, keys=keys, values=values))


def test_block_that_two_engines_stored_at_the_same_time_is_shared_and_forgotten_like_any(fleet):
    tier, other, third = fleet.tier(), fleet.tier(), fleet.tier()
    files = fleet.files(tier)
    tier.claim(S, "")
    files.counted, files.num_operations = ("touch",), 0
    files.before = once_at(1, lambda: other.save(conversation("t", BLOCK)))  # it has just looked what is there
    tier.save(conversation("s", BLOCK))
    assert len(fleet.stored_blocks()) == 2
    assert third.save(conversation("u", BLOCK)).num_blocks_shared == 1
    for engine, name in ((tier, S), (other, T), (third, U)):
        engine.drop(name, "")
    assert third.save(conversation("u", BLOCK)).num_blocks_written == 1
    assert same(third.load(U, ""), conversation("u", BLOCK))


def test_tenants_share_nothing(fleet):
    tier = fleet.tier()
    one = tier.save(conversation("s", 2 * BLOCK, salt="a"))
    other = tier.save(conversation("s", 2 * BLOCK, salt="b"))
    assert other == replace(one, epoch=other.epoch)
    assert len(fleet.stored_blocks()) == 4
    tier.drop(S, "a")
    assert same(tier.load(S, "b"), conversation("s", 2 * BLOCK, salt="b"))


def test_growing_session_writes_only_what_it_added(fleet):
    tier = fleet.tier()
    tier.save(conversation("s", 10 * BLOCK + 1))
    assert tier.save(conversation("s", 11 * BLOCK + 1)).num_blocks_written == 2  # one full, one partly filled
    tier.make_room(0)
    assert len(fleet.stored_blocks()) == 12, "a partly filled block goes when it is superseded"


def test_image_of_many_packs_and_runs_comes_back(fleet, monkeypatch):
    monkeypatch.setattr(packs, "_PACK_BLOCKS_MAX", 3)
    monkeypatch.setattr(packs, "_SCRATCH_BYTES", 2 * FORMAT.block_bytes)
    tier = fleet.tier()
    image = conversation("s", 11 * BLOCK + 3)
    tier.save(image)
    assert len(fleet.paths("packs")) == 5
    order = (7, 2, 3, 4, 0, 11)
    some = BranchImage(image.branches[0].token_ids, 5 * BLOCK + 3, 0, 1, tuple(range(6)))
    picked = SessionImage(T, "", 1, (some,), image.keys[:, order].clone(), image.values[:, order].clone())
    assert tier.save(picked).num_blocks_written == 0
    assert same(tier.load(S, ""), image) and same(tier.load(T, ""), picked)


def test_loading_reads_no_block_of_another_session(fleet):
    tier = fleet.tier()
    tier.save(conversation("s", 200 * BLOCK))
    tier.save(conversation("t", BLOCK))
    tier.load(T, "")
    before = fleet.files(tier).num_bytes_read
    tier.load(T, "")
    header = max(path.stat().st_size for path in fleet.paths("packs")) - 200 * FORMAT.block_bytes
    assert fleet.files(tier).num_bytes_read - before < header + FORMAT.block_bytes + 3000


def test_packs_are_safetensors_files_and_names_tell_nothing(fleet):
    tier = fleet.tier()
    name, salt = SessionId("../secret/\ud800\n" + "x" * 300), "tenant/../\x00"
    image = replace(conversation("s", BLOCK, salt=salt), session_id=name)
    tier.save(image)
    assert same(tier.load(name, salt), image)
    (stored,) = tier.sessions()
    assert (stored.session_id, stored.salt) == (name, salt)
    (pack,) = fleet.paths("packs")
    assert torch.equal(bits(load_file(pack)["blocks"][0, 0]), bits(image.keys[:, 0]))
    for path in fleet.paths():
        relative = str(path.relative_to(fleet.directory))
        assert relative.isascii() and len(path.name) < 100
        assert not any(word in relative for word in ("secret", "tenant", "engine 1"))


def test_files_are_their_owners_alone(fleet):
    fleet.tier().save(conversation("s", BLOCK))
    assert all(path.stat().st_mode & 0o077 == 0 for path in fleet.directory.rglob("*"))


def test_sessions_tell_what_is_stored_and_whose_it_is(fleet):
    one, other = fleet.tier(), fleet.tier()
    one.save(conversation("s", 40))
    fleet.time.advance(1)
    other.save(conversation("t", 20))
    other.save(conversation("u", 20))
    other.release(U, "")
    other.claim(SessionId("empty"), "")
    seen = {stored.session_id: stored for stored in one.sessions()}
    assert seen.keys() == {S, T, U}
    assert (seen[S].num_tokens, seen[S].num_bytes) == (40, 3 * FORMAT.block_bytes)
    assert seen[T].saved_s - seen[S].saved_s == 1
    assert [(seen[name].owner, seen[name].is_ours) for name in (S, T, U)] == [
        ("engine 1", True),
        ("engine 2", False),
        (None, False),
    ]


def test_formats_do_not_see_each_other(fleet):
    one, other = fleet.tier(), fleet.tier(fmt=replace(FORMAT, fingerprint="another"))
    one.save(conversation("s", BLOCK))
    before = fleet.contents()
    assert other.load(S, "") is None and other.sessions() == () and other.make_room(QUOTA // 2).num_sessions == 0
    other.save(conversation("s", BLOCK, seed=1))
    assert fleet.contents() == before


@pytest.mark.parametrize("options", [{"quota_bytes": 0}, {"lease_s": 0.0}])
def test_senseless_limits_are_config_errors(fleet, options):
    with pytest.raises(ConfigError, match="must be positive"):
        fleet.tier(**options)


def test_directory_that_cannot_be_used_is_a_config_error(fleet, tmp_path):
    fleet.directory = tmp_path / "file"
    fleet.directory.write_text("")
    with pytest.raises(ConfigError, match="cannot be used"):
        fleet.tier()


@pytest.mark.parametrize("fault", [PermissionError("no hard links here"), None])
def test_file_system_without_exclusive_names_is_a_config_error(fleet, fault, monkeypatch):
    def link(self, source, target):
        if fault:
            raise fault
        target.unlink(missing_ok=True)
        os.link(source, target)

    monkeypatch.setattr(ShakyFiles, "link", link)
    with pytest.raises(ConfigError):
        fleet.tier()
    assert fleet.paths() == []


def test_session_of_a_live_engine_is_refused_and_of_a_silent_one_is_not(fleet):
    owner, other = fleet.tier(), fleet.tier()
    owner.save(conversation("s", BLOCK))
    fleet.time.advance(LEASE_S - 1)
    for act in (
        lambda: other.load(S, ""),
        lambda: other.save(conversation("s", 5)),
        lambda: other.claim(S, ""),
        lambda: other.drop(S, ""),
    ):
        with pytest.raises(LeasedElsewhere, match="engine 1"):
            act()
    owner.heartbeat()
    fleet.time.advance(LEASE_S - 1)
    with pytest.raises(LeasedElsewhere):
        other.claim(S, "")
    fleet.time.advance(1)
    assert same(other.load(S, ""), conversation("s", BLOCK))


def test_lease_is_as_long_as_its_owner_said(fleet):
    patient, hasty = fleet.tier(lease_s=1000.0), fleet.tier(lease_s=1.0)
    patient.claim(S, "")
    hasty.claim(T, "")
    fleet.time.advance(999)
    with pytest.raises(LeasedElsewhere):
        hasty.claim(S, "")
    patient.claim(T, "")


def test_session_of_a_process_that_is_gone_is_claimed_at_once(fleet):
    owner, other = fleet.tier(), fleet.tier()
    owner.save(conversation("s", BLOCK))
    fleet.kill(owner)
    assert same(other.load(S, ""), conversation("s", BLOCK))


def test_each_claim_has_a_higher_epoch_and_owning_has_none(fleet):
    engines = [fleet.tier() for _ in range(3)]
    epochs = []
    for engine in itertools.islice(itertools.cycle(engines), 7):
        epochs.append(engine.claim(S, ""))
        assert engine.claim(S, "") == epochs[-1] == engine.save(conversation("s", 5)).epoch
        engine.release(S, "")
    assert epochs == sorted(set(epochs))


def test_session_that_was_released_is_anybodys(fleet):
    one, other = fleet.tier(), fleet.tier()
    one.save(conversation("s", BLOCK))
    one.release(S, "")
    other.claim(S, "")
    one.release(S, "")  # not its own any more
    with pytest.raises(LeasedElsewhere):
        one.claim(S, "")
    other.release(T, "")


@pytest.mark.parametrize("end", ["release_all", "close"])
def test_engine_gives_all_up_at_once(fleet, end):
    one, other = fleet.tier(), fleet.tier()
    for name in (S, T):
        one.save(conversation(name, BLOCK))
    getattr(one, end)()
    assert same(other.load(S, ""), conversation("s", BLOCK)) and same(other.load(T, ""), conversation("t", BLOCK))
    if end == "release_all":
        with pytest.raises(LeasedElsewhere):
            one.load(S, "")
        one.save(conversation("u", BLOCK))


def test_closed_tier_does_nothing_more(fleet):
    tier = fleet.tier()
    tier.save(conversation("s", BLOCK))
    tier.close()
    tier.close()
    tier.heartbeat()
    assert fleet.paths("engines") == []
    with pytest.raises(DiskFailed, match="closed"):
        tier.load(S, "")


def test_claim_of_nothing_leaves_nothing_when_it_is_released(fleet):
    tier = fleet.tier()
    tier.claim(S, "")
    tier.release(S, "")
    assert fleet.paths("sessions") == [] and tier.sessions() == ()


def test_heartbeat_comes_back_after_others_have_tidied_up(fleet):
    sleeper, other = fleet.tier(), fleet.tier()
    sleeper.save(conversation("s", BLOCK))
    fleet.time.advance(200 * LEASE_S)
    other.heartbeat()
    other.make_room(0)
    assert len(fleet.paths("engines")) == 2, "the sleeper is forgotten"
    sleeper.heartbeat()
    sleeper.claim(T, "")
    with pytest.raises(LeasedElsewhere):
        other.claim(T, "")


def test_engine_that_only_missed_heartbeats_keeps_what_nobody_claimed(fleet):
    owner = fleet.tier()
    owner.save(conversation("s", 5))
    fleet.time.advance(10 * LEASE_S)
    owner.save(conversation("s", 6))
    assert same(owner.load(S, ""), conversation("s", 6))


def test_late_writer_is_refused_and_leaves_no_trace(fleet):
    late, other = fleet.tier(), fleet.tier()
    late.save(conversation("s", BLOCK))
    fleet.time.advance(LEASE_S)
    other.save(conversation("s", 2 * BLOCK, seed=5))
    before = fleet.contents("sessions", "packs")
    with pytest.raises(LeaseLost):
        late.save(conversation("s", 3 * BLOCK, seed=6))
    late.heartbeat()
    with pytest.raises(LeasedElsewhere):
        late.save(conversation("s", 3 * BLOCK, seed=6))
    assert fleet.contents("sessions", "packs") == before


def clock_goes_back(tier: DiskTier) -> None:
    """The file system's clock is set right: what begins now has lower numbers than what was dropped before."""
    tier._files.time.advance(-3600)


def just_before_link(files: ShakyFiles, act: Callable[[], None]) -> None:
    """Something happens when the next manifest has been written and does not have its name yet."""

    def before(name: str, number: int) -> None:
        if name == "link":
            files.before = lambda name, number: None
            act()

    files.before = before


@pytest.mark.parametrize(
    "meanwhile",
    [
        lambda other: other.claim(S, ""),
        lambda other: (
            other.save(conversation("s", 5, seed=8)),
            other.save(conversation("s", 6, seed=8)),
        ),  # its number is free again
        lambda other: (
            other.claim(S, ""),
            other.release(S, ""),
            other.claim(S, ""),
            other.release(S, ""),
        ),  # and its base still there
        lambda other: other.drop(S, ""),
        lambda other: (other.drop(S, ""), other.save(conversation("s", 5, seed=8))),
        lambda other: (other.drop(S, ""), clock_goes_back(other), other.save(conversation("s", 5, seed=8))),
    ],
)
def test_writer_that_stops_before_its_last_step_has_written_nothing(fleet, meanwhile):
    late, other = fleet.tier(), fleet.tier()
    late.save(conversation("s", BLOCK))

    def others_turn() -> None:
        fleet.time.advance(LEASE_S)
        meanwhile(other)
        seen.update(fleet.contents("sessions"))

    seen: dict[str, bytes] = {}
    just_before_link(fleet.files(late), others_turn)
    with pytest.raises(LeaseLost):
        late.save(conversation("s", 3 * BLOCK, seed=6))
    after = fleet.contents("sessions")
    assert after == {name: data for name, data in seen.items() if not name.endswith(".tmp")}
    other.heartbeat()
    expected = other.load(S, "")
    assert expected is None or expected.num_tokens in (5, 6, BLOCK)
    assert_tidy(fleet, other)


def test_one_of_two_that_claim_a_new_session_gets_it(fleet):
    one, other = fleet.tier(), fleet.tier()
    winners = set()

    def claim(tier: DiskTier, name: SessionId) -> None:
        with contextlib.suppress(LeasedElsewhere):
            tier.claim(name, "")
            got.append(tier)

    for number in range(1, 16):
        name, got = SessionId(f"new {number}"), []
        files = fleet.files(one)
        files.before = once_at(files.num_operations + number, lambda name=name: claim(other, name))
        claim(one, name)
        assert len(got) == 1
        got[0].save(conversation(name, 5))
        winners.add(got[0].pid)
    assert winners == {one.pid, other.pid}


def test_answer_that_was_lost_is_found_again(fleet):
    tier = fleet.tier()
    tier.save(conversation("s", 5))
    files = fleet.files(tier)
    real = files.link

    def link(source: Path, target: Path) -> None:
        real(source, target)
        real(source, target)  # as a network file system does when the first answer is lost

    files.link = link
    tier.save(conversation("s", 6))
    assert same(tier.load(S, ""), conversation("s", 6))


def test_process_that_runs_is_not_gone_and_one_that_ended_is():
    sleeper = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        started = Path(f"/proc/{sleeper.pid}/stat")
        there = replace(Process.this(), pid=sleeper.pid, started=started.read_text().rpartition(")")[2].split()[19])
        assert not is_gone(Process.this()) and not is_gone(there)
        assert is_gone(replace(there, started="1")), "its id was given to another process"
        for elsewhere in ({"host": "another"}, {"boot": "another"}, {"namespace": "another"}):
            assert not is_gone(replace(there, started="1", **elsewhere)), "it cannot be seen from here"
    finally:
        sleeper.kill()
    os.waitid(os.P_PID, sleeper.pid, os.WEXITED | os.WNOWAIT)
    assert is_gone(there), "it has ended, though its parent has not noticed"
    sleeper.wait()
    assert is_gone(there)


def test_session_that_does_not_fit_is_refused_before_anything_is_written(fleet):
    fleet.quota_bytes = 8000
    tier = fleet.tier()
    tier.save(conversation("s", 5 * BLOCK))
    before = fleet.contents("sessions", "packs")
    with pytest.raises(DiskFull, match="may hold 8000 bytes"):
        tier.save(conversation("s", 40 * BLOCK))
    assert fleet.contents("sessions", "packs") == before
    assert same(tier.load(S, ""), conversation("s", 5 * BLOCK))


def test_least_recently_saved_sessions_make_room(fleet):
    fleet.quota_bytes = 60_000
    tier, other = fleet.tier(), fleet.tier()
    names = [SessionId(f"s{number}") for number in range(8)]
    for number in (5, 1, 3, 7, 0, 4, 2, 6):
        (other if number == 3 else tier).save(conversation(names[number], 8 * BLOCK, seed=number))
        fleet.time.advance(1)
    other.heartbeat()
    tier.save(conversation(names[5], 8 * BLOCK, seed=5, num_turns=2))  # now the most recently saved
    wanted = fleet.quota_bytes - tier.used_bytes + 8000
    freed = tier.make_room(wanted, keep=[(names[7], "")])
    assert freed.is_enough and freed.num_sessions == 2 and freed.num_bytes >= 8000
    assert {stored.session_id for stored in tier.sessions()} == set(names) - {names[1], names[0]}
    assert tier.used_bytes + wanted <= fleet.quota_bytes
    assert_tidy(fleet, tier)


def test_only_what_no_other_session_needs_counts_as_room(fleet):
    fleet.quota_bytes = 20_000
    tier = fleet.tier()
    for name, num_turns in ((S, 1), (T, 2)):
        tier.save(conversation(name, 12 * BLOCK, num_turns=num_turns))
        fleet.time.advance(1)
    wanted = fleet.quota_bytes - tier.used_bytes + 3000
    assert tier.make_room(wanted, keep=[(T, "")]).num_sessions == 0, (
        "the older one alone would free no more than its manifest"
    )
    assert tier.make_room(wanted).num_sessions == 2


def test_no_session_goes_where_all_would_not_be_enough(fleet):
    tier = fleet.tier()
    tier.save(conversation("s", BLOCK))
    assert not tier.make_room(QUOTA).is_enough
    assert same(tier.load(S, ""), conversation("s", BLOCK))


def test_sessions_go_where_the_file_system_is_nearly_full(fleet):
    tier = fleet.tier()
    tier.save(conversation("s", 20 * BLOCK))
    files = fleet.files(tier)
    full_at = sum(path.stat().st_size for path in fleet.paths()) + 1000
    files.free_bytes = lambda path: full_at - sum(p.stat().st_size for p in fleet.paths())
    assert tier.make_room(500) == type(tier.make_room(500))(0, 0, True)
    freed = tier.make_room(5000)
    assert freed.is_enough and freed.num_sessions == 1


def test_what_a_save_is_about_to_name_is_not_removed_by_others(fleet):
    tier, other = fleet.tier(), fleet.tier()
    other.save(conversation("t", BLOCK))
    other.release(T, "")
    there: list[int] = []

    def others_turn() -> None:
        other.drop(T, "")
        other.make_room(0)
        there.append(len(fleet.paths("packs")))

    just_before_link(fleet.files(tier), others_turn)
    tier.claim(S, "")
    just_before_link(fleet.files(tier), others_turn)
    tier.save(conversation("s", 2 * BLOCK))
    assert there == [2], "one that is shared, and one that was just written"
    assert same(tier.load(S, ""), conversation("s", 2 * BLOCK))


def test_pack_that_somebody_is_about_to_remove_is_found_all_the_same(fleet):
    tier, other = fleet.tier(), fleet.tier()
    tier.save(conversation("s", BLOCK))
    (pack,) = fleet.paths("packs")
    doomed = pack.with_name(f"{pack.name.removesuffix('.safetensors')}.{other._engines.token}.doomed")
    pack.rename(doomed)
    assert same(tier.load(S, ""), conversation("s", BLOCK))
    assert fleet.paths("packs") == [pack]


def test_reader_looks_again_where_the_newest_entry_is_no_longer_it(fleet):
    tier, reader = fleet.tier(), fleet.tier()
    tier.save(conversation("s", BLOCK))
    files = fleet.files(reader)
    files.counted, files.num_operations = ("open",), 0
    files.before = once_at(1, lambda: tier.release(S, ""))  # what was listed before is still there, but not the newest
    key = reader._journal.keys()[0]
    assert reader._journal.newest(key).act == "release"


def test_shared_pack_stays_until_its_last_session_goes(fleet):
    tier = fleet.tier()
    tier.save(conversation("s", 4 * BLOCK))
    tier.save(conversation("t", 4 * BLOCK))
    assert tier.drop(S, "")
    assert len(fleet.paths("packs")) == 1 and same(tier.load(T, ""), conversation("t", 4 * BLOCK))
    assert tier.drop(T, "") and not tier.drop(T, "")
    assert fleet.paths("packs", "sessions") == []


def test_dropped_session_can_be_saved_again(fleet):
    tier = fleet.tier()
    first = tier.save(conversation("s", BLOCK)).epoch
    tier.drop(S, "")
    fleet.time.advance(1)
    assert tier.save(conversation("s", 2 * BLOCK)).epoch > first
    assert same(tier.load(S, ""), conversation("s", 2 * BLOCK))


def test_what_dead_engines_left_is_cleared_up(fleet):
    fleet.tier().save(conversation("s", 3 * BLOCK))
    fleet.time.advance(LEASE_S)
    for number in range(1, 80, 3):
        engine = fleet.tier()
        fleet.files(engine).before = killing_at(fleet.files(engine).num_operations + number)
        with contextlib.suppress(Killed):
            engine.save(conversation("t", 3 * BLOCK, seed=number))
        fleet.kill(engine)
    assert [path for path in fleet.paths() if path.suffix == ".tmp"], "the test has left half written files"
    survivor = fleet.tier()
    assert_tidy(fleet, survivor)
    assert same(survivor.load(S, ""), conversation("s", 3 * BLOCK))
    fleet.time.advance(200 * LEASE_S)
    survivor.heartbeat()
    survivor.make_room(0)
    assert len(fleet.paths("engines")) == 2
