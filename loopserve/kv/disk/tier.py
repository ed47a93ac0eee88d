"""The disk tier: sessions of one KV format in a directory, which several engines may use at once. Floor 2.

Puts together who lives (`leases`), what happened (`journal`), who owns what (`owners`), where the bytes are (`packs`), how they get there
and back (`contents`), and what may go (`sweeper`). Synchronous: the engine calls it from a worker thread, and what a slow disk means to
turns is the engine's business.
"""

import contextlib
import errno
import secrets
import threading
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from loopserve.dialogue import SessionId
from loopserve.errors import ConfigError
from loopserve.kv.disk.contents import Contents, SavedSession
from loopserve.kv.disk.errors import DiskFailed, DiskFull, LeaseLost
from loopserve.kv.disk.files import Files
from loopserve.kv.disk.journal import Act, Journal, session_key
from loopserve.kv.disk.leases import Engines, Process, is_gone, temporary_name
from loopserve.kv.disk.owners import TRIES, Owners
from loopserve.kv.disk.packs import Packs
from loopserve.kv.disk.sweeper import Sweeper
from loopserve.kv.image import ImageRefused, KVFormat, Refusal, SessionImage, format_digest, image_fault
from loopserve.kv.sealed import unescaped

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True, slots=True)
class StoredSession:
    """What can be seen of a session that is saved, whoever saved it."""

    session_id: SessionId
    salt: str
    num_tokens: int  # computed, of its longest branch
    num_bytes: int  # of its blocks, those that it shares included
    saved_s: float  # by the file system's clock
    owner: str | None  # the live engine that owns it; None: anybody may claim it
    is_ours: bool


@dataclass(frozen=True, slots=True)
class Freed:
    """What `make_room` did. `is_enough`: the bytes that were asked for fit under the quota now."""

    num_sessions: int
    num_bytes: int
    is_enough: bool


class DiskTier:
    """The sessions of one format in a directory. All methods may be called from any thread, and wait for each other, but for `heartbeat`,
    which waits for none: call it every third of `lease_s` from a thread that is not the one that saves and loads.

    Every method raises DiskFailed where the operating system refuses something, DiskFull where it has no room.
    """

    def __init__(
        self,
        directory: Path,
        *,
        fmt: KVFormat,
        quota_bytes: int,
        lease_s: float,
        engine_id: str | None = None,
        files: Files | None = None,
        process: Process | None = None,
        is_gone: Callable[[Process], bool] = is_gone,
    ) -> None:
        """Use a directory, made if it is missing; files of other formats in it are left alone.

        `quota_bytes` is how much all files of this format may take, whoever wrote them; engines that save at the same moment may exceed it
        by what they are writing. `lease_s` is how long this engine's sessions stay its own after its last heartbeat. `engine_id` is what
        others call the owner; it need not be unique. `files`, `process` and `is_gone` are for tests. Raises ConfigError.
        """
        if quota_bytes <= 0 or lease_s <= 0:
            raise ConfigError(
                f"The KV directory's quota ({quota_bytes} bytes) and lease ({lease_s} s) must be positive."
            )
        self._fmt = fmt
        self._quota_bytes = quota_bytes
        self._directory = directory
        self._name = secrets.token_hex(4) if engine_id is None else engine_id
        self._files = Files() if files is None else files
        kv_format = format_digest(fmt)
        root = directory / kv_format
        engines, sessions, packs = root / "engines", root / "sessions", root / "packs"
        self._engines = Engines(
            engines,
            self._files,
            name=self._name,
            lease_s=lease_s,
            process=Process.this() if process is None else process,
            is_gone=is_gone,
        )
        self._journal = Journal(sessions, self._files, kv_format=kv_format)
        self._packs = Packs(packs, self._files, fmt)
        self._sweeper = Sweeper(root, self._files, self._engines, self._journal, self._packs)
        self._owners = Owners(self._files, self._engines, self._journal, name=self._name, lease_s=lease_s)
        self._contents = Contents(
            fmt,
            self._files,
            self._engines,
            self._journal,
            self._packs,
            self._sweeper,
            self._owners,
            quota_bytes=quota_bytes,
        )
        self._lock = threading.RLock()
        self._is_closed = False
        try:
            for path in (engines, sessions, packs):
                self._files.ensure_dir(path)
            self._engines.enter()
            self._try_out(sessions)
        except ConfigError:
            self.close()
            raise
        except OSError as error:
            self.close()
            raise ConfigError(
                f"The KV directory {directory} cannot be used: {error}. It must be writable, with some room, and have hard links."
            ) from error

    @property
    def used_bytes(self) -> int:
        """The sizes of all files of this format below the directory, half written ones included. Linear in their number."""
        with self._working("count bytes"):
            return self._sweeper.used_bytes()

    def heartbeat(self) -> None:
        """Keep this engine's sessions for another `lease_s`. Waits for no other method."""
        with self._translated("renew its leases"):
            self._engines.beat()

    def claim(self, session_id: SessionId, salt: str) -> int:
        """Become the owner of a session, saved or not; its epoch. Raises LeasedElsewhere."""
        with self._working("claim a session"):
            return self._owners.own(session_id, salt).epoch

    def release(self, session_id: SessionId, salt: str) -> None:
        """Let anybody claim the session at once. Nothing happens where it is not ours."""
        with self._working("release a session"):
            self._owners.give_up(session_key(session_id, salt))

    def release_all(self) -> None:
        """Let anybody claim every session of ours at once, however many these are."""
        with self._working("release its sessions"):
            self._owners.forget_all()
            self._engines.enter_anew()

    def close(self) -> None:
        """Release all and use the directory no more. Never raises; what cannot be released now ends with its lease."""
        with self._lock:
            self._owners.forget_all()
            self._is_closed = True
            with contextlib.suppress(OSError):
                self._engines.leave()

    def save(self, image: SessionImage, *, notes: bytes = b"") -> SavedSession:
        """Store a session, as its owner. What was saved before is there until this is, and where this fails.

        `notes` are kept beside it for whoever asks; what they mean is the caller's business.

        The image must be good (`image_fault`). Raises LeasedElsewhere; LeaseLost where the session was ours and is not any more; DiskFull,
        where `make_room` may help.
        """
        fault = image_fault(image, self._fmt)
        assert fault is None, fault
        with self._working("save a session"):
            held = self._owners.still_ours(session_key(image.session_id, image.salt))
            return self._contents.save(image, notes, held or self._owners.own(image.session_id, image.salt))

    def load(self, session_id: SessionId, salt: str) -> SessionImage | None:
        """What was saved last, and become the session's owner; None where nothing is. Reads no other blocks than its own.

        Raises ImageRefused where it is damaged (it may then be dropped, or saved anew), LeasedElsewhere, and LeaseLost where another engine
        claimed it meanwhile.
        """
        with self._working("load a session"):
            key = session_key(session_id, salt)
            newest = self._journal.newest(key)
            if newest is None or newest.saved is None:
                return None
            held = self._owners.own(session_id, salt)
            if held.saved is None:  # dropped in this moment
                self._owners.give_up(key)
                return None
            try:
                image = self._contents.load(self._journal.read(key, held.saved))
            except FileNotFoundError:
                self._owners.still_ours(key)
                raise ImageRefused(Refusal.TRUNCATED, "the manifest is gone") from None
            except ImageRefused:
                self._owners.still_ours(key)  # if not, its owner may have removed what was read
                raise
            self._owners.still_ours(key)
            return image

    def notes(self, session_id: SessionId, salt: str) -> bytes | None:
        """What was kept beside a session when it was saved last; None where nothing is saved. Claims nothing. Raises ImageRefused."""
        with self._working("read a session's notes"):
            newest = self._journal.newest(session_key(session_id, salt))
            if newest is None or newest.saved is None:
                return None
            try:
                return self._contents.notes(self._journal.read(newest.key, newest.saved))
            except FileNotFoundError:  # saved anew, or dropped, in this moment
                return None

    def drop(self, session_id: SessionId, salt: str) -> bool:
        """Forget a session, and remove what only it needs; whether there was one. Raises LeasedElsewhere, and LeaseLost."""
        with self._working("drop a session"):
            key = session_key(session_id, salt)
            packs: set[str] = set()
            was_there = False
            for _ in range(TRIES):
                base, newest = self._owners.claimable(key)
                if base is None or (newest is not None and newest.act is Act.DROP):
                    break  # never there, or somebody was quicker
                was_there = was_there or newest is None or newest.saved is not None
                packs.update(self._journal.packs_of(newest))
                if self._owners.drop(key, base, newest):
                    break
            else:
                raise LeaseLost("The session changed hands while it was dropped.")
            self._sweeper.collect(packs)
            return was_there

    def sessions(self) -> tuple[StoredSession, ...]:
        """Every saved session that can be read, of all engines, in no order. Linear in their number."""
        with self._working("list sessions"):
            is_live = self._engines.census()
            found: list[StoredSession] = []
            for standing in self._journal.survey():
                newest, content = standing.newest, standing.content
                if newest is None or content is None:
                    continue
                with contextlib.suppress(ImageRefused):
                    is_owned = newest.is_owned and is_live(newest.engine)
                    found.append(
                        StoredSession(
                            session_id=SessionId(unescaped(newest.session_id)),
                            salt=unescaped(newest.salt),
                            num_tokens=content.num_tokens,
                            num_bytes=content.num_blocks * self._fmt.block_bytes,
                            saved_s=content.saved_s,
                            owner=unescaped(newest.engine_name) if is_owned else None,
                            is_ours=is_owned and newest.engine == self._engines.token,
                        )
                    )
            return tuple(found)

    def make_room(self, num_bytes: int, *, keep: Collection[tuple[SessionId, str]] = ()) -> Freed:
        """Remove what is of no use, then drop sessions until `num_bytes` more fit under the quota and on the file system.

        The least recently saved go first, of those that no other live engine owns: our own, too, but for those in `keep` (id and salt).
        None goes where all of them would not be enough.
        """
        with self._working("make room"):
            spared = {session_key(session_id, salt) for session_id, salt in keep}
            before = self._sweeper.used_bytes()
            self._sweeper.tidy(self._owners.drop_unread)
            num_dropped = 0
            while (missing := self._missing_bytes(num_bytes)) > 0:
                victims = self._sweeper.victims(missing, spared=spared)
                if not victims:
                    break
                dropped = [victim for victim in victims if self._owners.drop(victim.key, victim.last, victim.newest)]
                self._sweeper.collect({pack for victim in dropped if victim.content for pack in victim.content.packs})
                spared.update(victim.key for victim in victims)  # one that is back already is somebody's
                num_dropped += len(dropped)
            return Freed(num_dropped, max(0, before - self._sweeper.used_bytes()), missing <= 0)

    def _missing_bytes(self, num_bytes: int) -> int:
        """What must go before `num_bytes` more can come; 0 or less: nothing."""
        free = min(self._quota_bytes - self._sweeper.used_bytes(), self._files.free_bytes(self._directory))
        return num_bytes - free

    def _try_out(self, directory: Path) -> None:
        """Whether the file system has what all of this rests on: names that one of many gets. Raises ConfigError, and OSError."""
        first, second = (directory / temporary_name(self._engines.token) for _ in range(2))
        try:
            self._files.write_file(first, [b"tried out"])
            self._files.link(first, second)
            try:
                self._files.link(first, second)
            except FileExistsError:
                return
            raise ConfigError(
                f"The file system of {self._directory} gives one name to two files: engines would overwrite each other."
            )
        finally:
            self._files.unlink(first)
            self._files.unlink(second)

    @contextlib.contextmanager
    def _working(self, what: str) -> Iterator[None]:
        """One method at a time, as an engine that others know of."""
        with self._lock, self._translated(what):
            if self._is_closed:
                raise DiskFailed(f"The KV directory {self._directory} is not used any more: this tier was closed.")
            self._engines.enter()
            yield

    @contextlib.contextmanager
    def _translated(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in _NO_ROOM:
                raise DiskFull(
                    f"The file system of {self._directory} has no room left: could not {what}. Free some, or lower the quota of the KV "
                    "directory below what it has."
                ) from error
            raise DiskFailed(f"Could not {what} in the KV directory {self._directory}: {error}.") from error
