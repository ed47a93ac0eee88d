"""The disk tier when things go wrong: an engine is killed, the disk fails or is full, a file is damaged, another engine comes between."""

import contextlib
import itertools
import json
import os
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import pytest
from disk_fleet import LEASE_S, QUOTA, Fleet, S, T, U, assert_tidy, load
from kv_images import BLOCK, conversation, same
from shaky_files import (
    CHANGES,
    LOOKS,
    NEED_ROOM,
    OPERATIONS,
    Killed,
    ShakyFiles,
    failing_at,
    full_from,
    killing_at,
    once_at,
)

from loopserve.kv.disk import DiskFailed, DiskFull, DiskTier, LeasedElsewhere, LeaseLost, TierError
from loopserve.kv.image import ImageRefused, Refusal, SessionImage
from loopserve.kv.sealed import checked_line, make_seal, text_of

V1, V2 = conversation("s", 2 * BLOCK + 3), conversation("s", 3 * BLOCK, num_turns=2)
TAKEN = conversation("s", 4 * BLOCK, num_turns=9)
OTHER = conversation("t", BLOCK)  # shares its block with both
ACTS: dict[str, Callable[[DiskTier], object]] = {
    "save": lambda tier: tier.save(V2),
    "load": lambda tier: tier.load(S, ""),
    "claim a new one": lambda tier: tier.claim(U, ""),
    "save a new one": lambda tier: tier.save(conversation("u", 2 * BLOCK)),
    "release": lambda tier: tier.release(S, ""),
    "drop": lambda tier: tier.drop(S, ""),
    "make room": lambda tier: tier.make_room(QUOTA - tier.used_bytes + 3000),
    "release all": lambda tier: tier.release_all(),
    "heartbeat": lambda tier: tier.heartbeat(),
    "list": lambda tier: tier.sessions(),
    "close": lambda tier: tier.close(),
}
MAY_DROP = ("drop", "make room")


def prepared(directory: Path) -> tuple[Fleet, DiskTier]:
    """An engine that owns a saved session `s`, and one that nobody owns, `t`."""
    fleet = Fleet(directory)
    tier = fleet.tier()
    tier.save(OTHER)
    tier.release(T, "")
    fleet.time.advance(1)
    tier.save(V1)
    return fleet, tier


def allowed(act: str) -> list[SessionImage | None]:
    return [V1, *([V2] if act == "save" else []), *([None] if act in MAY_DROP else [])]


def at_every_operation(
    act: str, tmp_path: Path, counted: Collection[str], shake: Callable[[Fleet, int], Callable[[str, int], None]]
) -> Iterator[tuple[Fleet, DiskTier, BaseException | None]]:
    """The act on a new directory each time, shaken at its first, second, ... counted operation, until it has fewer."""
    for number in itertools.count(1):
        fleet, tier = prepared(tmp_path / str(number))
        files = fleet.files(tier)
        files.num_operations, files.counted, files.before = 0, counted, shake(fleet, number)
        error = None
        try:
            ACTS[act](tier)
        except (TierError, Killed) as raised:
            error = raised
        num_operations, files.counted = files.num_operations, ()
        yield fleet, tier, error
        if num_operations < number:
            assert error is None
            return


@pytest.mark.parametrize("act", [act for act in ACTS if act != "list"])  # which changes nothing
def test_engine_may_be_killed_before_anything_it_changes(act, tmp_path):
    for fleet, tier, _ in at_every_operation(act, tmp_path, CHANGES, lambda _, number: killing_at(number)):
        fleet.kill(tier)
        survivor = fleet.tier()
        survivor.sessions()
        assert any(same(load(survivor, S), image) for image in allowed(act))
        assert act == "make room" or same(load(survivor, T), OTHER)
        assert_tidy(fleet, survivor)
        survivor.save(TAKEN)
        assert same(survivor.load(S, ""), TAKEN)


def test_engine_may_be_killed_while_it_starts(tmp_path):
    for number in range(1, 30):
        fleet, tier = prepared(tmp_path / str(number))
        files = ShakyFiles(fleet.time)
        files.before = killing_at(number)
        with contextlib.suppress(Killed):
            fleet.tier(files=files)
        fleet.gone.update(range(2, 100))
        fleet.time.advance(2 * LEASE_S)
        tier.heartbeat()
        assert_tidy(fleet, tier)
        assert len(fleet.paths("engines")) <= 3, (
            "what was half written is gone; who was killed is remembered for a while"
        )


@pytest.mark.parametrize("act", ACTS)
def test_any_operation_may_fail(act, tmp_path):
    for fleet, tier, error in at_every_operation(act, tmp_path, OPERATIONS, lambda _, number: failing_at(number)):
        assert error is None or isinstance(error, DiskFailed), "what the system refuses is told as such"
        if act == "close":
            fleet.time.advance(LEASE_S)
            tier = fleet.tier()
        assert any(same(tier.load(S, ""), image) for image in allowed(act))
        ACTS[act](tier)
        tier.close()
        other = fleet.tier()
        assert any(same(load(other, S), image) for image in allowed(act))
        assert act == "make room" or same(load(other, T), OTHER)
        assert_tidy(fleet, other)


@pytest.mark.parametrize("act", ["save", "save a new one", "claim a new one", "load", "drop", "make room"])
def test_disk_may_be_full_at_any_operation(act, tmp_path):
    for fleet, tier, error in at_every_operation(act, tmp_path, NEED_ROOM, lambda _, number: full_from(number)):
        assert error is None or isinstance(error, DiskFull)
        if error is not None and act.startswith("save"):
            assert not [path for path in fleet.paths("sessions", "packs") if path.suffix in (".tmp", ".doomed")]
            is_there = any(stored.session_id == U or stored.num_tokens == V2.num_tokens for stored in tier.sessions())
            assert is_there or len(fleet.paths("packs")) == 3, "what was written for nothing is gone"
        tier.close()
        other = fleet.tier()
        assert any(same(load(other, S), image) for image in allowed(act))
        assert_tidy(fleet, other)


OTHERS_ACTS: dict[str, Callable[[DiskTier], object]] = {
    "saves what it shares": lambda tier: tier.save(conversation("u", 4 * BLOCK)),
    "drops what it shares": lambda tier: tier.drop(T, ""),
    "makes room": lambda tier: tier.make_room(0),
    "makes all room": lambda tier: tier.make_room(QUOTA - tier.used_bytes + 3000),
    "claims": lambda tier: tier.claim(S, ""),
    "takes over and saves": lambda tier: tier.save(TAKEN),
    "takes over, saves, tidies up and gives back": lambda tier: (
        tier.save(TAKEN),
        tier.make_room(0),
        tier.release(S, ""),
    ),
    "takes over and gives back": lambda tier: (tier.claim(S, ""), tier.release(S, "")),
}


@pytest.mark.parametrize(
    ("act", "others_act", "is_late"),
    [
        ("save", "saves what it shares", False),
        ("save", "drops what it shares", False),
        ("save", "makes all room", False),
        ("save", "makes all room", True),
        ("save", "takes over and saves", True),
        ("save", "takes over, saves, tidies up and gives back", True),
        ("save", "takes over and gives back", True),
        ("load", "takes over and saves", False),
        ("load", "takes over and saves", True),
        ("drop", "claims", False),
        ("drop", "claims", True),
        ("drop", "makes room", True),
        ("make room", "saves what it shares", False),
        ("make room", "takes over and saves", True),
        ("release", "takes over and saves", False),
    ],
)
def test_another_engine_may_come_between_any_two_operations(act, others_act, is_late, tmp_path):
    """`is_late`: the first engine has not been heard of for as long as its lease lasts, and goes on all the same."""
    others: list[DiskTier] = []
    answers: list[LeasedElsewhere | None] = []

    def shake(fleet: Fleet, number: int) -> Callable[[str, int], None]:
        def come_between() -> None:
            if is_late:
                fleet.time.advance(LEASE_S)
                others[-1].heartbeat()
            try:
                OTHERS_ACTS[others_act](others[-1])
                answers.append(None)
            except LeasedElsewhere as error:
                answers.append(error)

        others.append(fleet.tier())
        answers.clear()
        return once_at(number, come_between)

    for fleet, tier, error in at_every_operation(act, tmp_path, (*CHANGES, *LOOKS), shake):
        other, has_acted = others[-1], answers == [None]
        assert error is None or isinstance(error, LeaseLost | LeasedElsewhere)
        tier.heartbeat()
        found = []
        for engine in (tier, other):
            with contextlib.suppress(LeasedElsewhere):
                found.append(engine.load(S, ""))
        assert len(found) == 1 or found == [None, None], "one of them owns it, or there is none"
        if has_acted and others_act.startswith("takes over") and act == "load":
            assert error is not None, "what was loaded is not the last save any more"
        if has_acted and others_act.startswith("takes over") and "saves" in others_act and act != "make room":
            assert same(found[0], TAKEN)
        elif act in MAY_DROP or others_act == "makes all room":
            assert any(same(found[0], image) for image in (None, V1, V2, TAKEN))
        else:
            assert same(found[0], V2 if act == "save" and error is None else V1)
        if has_acted and others_act == "saves what it shares" and act != "make room":
            assert same(other.load(U, ""), conversation("u", 4 * BLOCK))
        for engine in (tier, other):
            engine.release(S, "")
            engine.release(T, "")
        assert_tidy(fleet, other, num_twice=1)  # which both of them stored at the same time


def damages(data: bytes, donors: list[bytes]) -> Iterator[bytes]:
    """What may become of a file."""
    yield b""
    yield data[:-1]
    yield data[: len(data) // 2]
    yield data + b"\n"
    is_text = data.isascii()  # where a digit may become another one
    for place in range(0, len(data), max(1, len(data) // (30 if is_text else 12))):
        yield data[:place] + bytes([data[place] ^ (1 if is_text else 1 << place % 8)]) + data[place + 1 :]
    yield from donors


def test_damaged_file_is_refused_and_never_misread(tmp_path):
    fleet, tier = prepared(tmp_path / "kv")
    tier.save(conversation("s", BLOCK, salt="another tenant"))
    tier.close()
    whole = {path: path.read_bytes() for path in fleet.paths()}
    refused = 0
    for path, data in whole.items():
        donors = [other for donor, other in whole.items() if donor.suffix == path.suffix and donor != path]
        for damage in damages(data, donors):
            path.write_bytes(damage)
            reader = fleet.tier()
            for image in (V1, OTHER):
                try:
                    assert same(load(reader, image.session_id), image)
                except ImageRefused as error:
                    refused += 1
                    assert error.reason in (Refusal.CORRUPT, Refusal.TRUNCATED, Refusal.FOREIGN)
                except LeasedElsewhere as error:
                    assert error.owner == "unknown"
            reader.close()
            for lost in set(fleet.paths()) - whole.keys():
                lost.unlink()
            for kept, content in whole.items():
                kept.parent.mkdir(exist_ok=True)
                kept.write_bytes(content)
    assert refused > 100


@pytest.mark.parametrize("kind", ["sessions", "packs"])
def test_damaged_session_can_be_saved_anew_or_dropped(kind, tmp_path):
    fleet, tier = prepared(tmp_path / "kv")
    tier.close()
    for path in fleet.paths(kind):
        data = path.read_bytes()
        path.write_bytes(data[:40] + b"?" + data[41:])
        os.utime(path, (fleet.time.now_s, fleet.time.now_s))
    tier = fleet.tier()
    with pytest.raises(ImageRefused):
        tier.load(S, "")
    if kind == "sessions":
        with pytest.raises(LeasedElsewhere, match="cannot be read"):
            tier.save(V2)
    fleet.time.advance(LEASE_S)
    tier.heartbeat()
    tier.save(V2)
    tier.drop(T, "")
    tier.close()
    other = fleet.tier()
    assert same(other.load(S, ""), V2) and other.load(T, "") is None
    assert_tidy(fleet, other)


def test_save_that_is_missing_behind_its_claim_is_refused_and_cleared_up(tmp_path):
    fleet, tier = prepared(tmp_path / "kv")
    tier.close()
    tier = fleet.tier()
    tier.claim(S, "")
    next(path for path in fleet.paths("sessions") if path.stem.endswith("1001")).unlink()
    with pytest.raises(ImageRefused, match="manifest is gone"):
        tier.load(S, "")
    assert [stored.session_id for stored in tier.sessions()] == [T]
    tier.release(S, "")
    assert_tidy(fleet, tier)
    assert tier.load(S, "") is None and same(tier.load(T, ""), OTHER)


@pytest.mark.parametrize("kind", ["sessions", "packs"])
def test_missing_file_is_refused(kind, tmp_path):
    fleet, tier = prepared(tmp_path / "kv")
    max(fleet.paths(kind), key=lambda path: path.stat().st_mtime_ns).unlink()
    if kind == "sessions":
        assert tier.load(S, "") is None
        return
    with pytest.raises(ImageRefused) as refused:
        tier.load(S, "")
    assert refused.value.reason is Refusal.TRUNCATED


def test_pack_of_another_format_or_version_is_refused_with_its_reason(tmp_path):
    fleet, tier = prepared(tmp_path / "kv")
    path = max(fleet.paths("packs"), key=lambda path: path.stat().st_size)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    for old, new, reason in (
        (b'"version":"1"', b'"version":"2"', Refusal.VERSION),
        (b"tiny", b"tuny", Refusal.FOREIGN),
        (b"loopserve.kv_pack", b"loopserve.kv_peck", Refusal.FOREIGN),
    ):
        head = data[: 8 + length].replace(old, new)
        path.write_bytes(head + data[8 + length : -16] + make_seal(head))
        with pytest.raises(ImageRefused) as refused:
            fleet.tier()
            tier.load(S, "")
        assert refused.value.reason is reason


def test_manifest_of_another_format_or_version_is_refused_with_its_reason(tmp_path):
    fleet, tier = prepared(tmp_path / "kv")
    path = next(path for path in fleet.paths("sessions") if path.stem.endswith("1001"))
    line, _, table = path.read_bytes().partition(b"\n")
    about = json.loads(text_of(line))
    for change, reason in (
        ({"version": 1}, Refusal.VERSION),
        ({"kv_format": "0" * 32}, Refusal.FOREIGN),
        ({"entry": {}}, Refusal.CORRUPT),
    ):
        path.write_bytes(checked_line(json.dumps(about | change)) + table)
        with pytest.raises(ImageRefused) as refused:
            tier.load(S, "")
        assert refused.value.reason is reason
