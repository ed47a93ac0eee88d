"""The engine's disk tier at work: saves idle sessions behind its back, and brings one when a turn comes for it. Threads of its own.

    engine thread                      this thread                                 that of the heartbeat
    submit --- fetch ---------------->  load ---- Arrival ---> engine thread        every third of a lease
    step  <--- "which is unsaved?" ---  save
    release -- drop ----------------->  drop

One thing at a time, a turn's first. Now and then the disk is looked through for sessions that nobody holds. Nothing that goes wrong here
ends a turn: what is not kept or brought is computed again, and counted.
Floor 6 beside the engine, which it knows by three callables. Knows nothing about schedules or devices.
"""

import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from enum import Enum

from loopserve.config import DiskSettings
from loopserve.dialogue import SessionId
from loopserve.errors import EngineUnavailable, LoopServeError
from loopserve.kv.disk import DiskFull, DiskTier, LeasedElsewhere, LeaseLost, StoredSession, TierError
from loopserve.kv.image import ImageRefused, SessionImage
from loopserve.move_cost import MoveCost
from loopserve.notes import SessionNotes
from loopserve.stats import DiskCounts

_log = logging.getLogger(__name__)
_POLL_S = 0.5  # how often an idle thread asks whether something is to be saved
_BACK_OFF_S = 30.0  # without saving after a save that failed
_LOOK_EVERY_S = 15.0  # or every lease, where that is longer: the disk is looked through
_LOOK_REST = 20.0  # times as long as a look took, the next one waits at least
_DOOMED_LOOKS = 4  # so long a deletion is remembered that could not be carried out
_DOOMED_MAX = 4096

Unsaved = Callable[[], SessionId | None]
_Name = tuple[SessionId, str]  # id and salt


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A session as it was, and what is called when it lies on disk like that."""

    image: SessionImage
    is_saved: Callable[[], None]


TakeSnapshot = Callable[[SessionId], Snapshot | None]  # None: it changed meanwhile, or is gone


@dataclass(frozen=True, slots=True)
class Arrival:
    """What came of a fetch; `image` None: nothing that could be used."""

    session_id: SessionId
    salt: str
    image: SessionImage | None


class _Act(Enum):
    FETCH = "fetch"
    DROP = "drop"


@dataclass(frozen=True, slots=True)
class _Job:
    act: _Act
    session_id: SessionId
    salt: str
    done: Future[bool]  # of a drop: whether something was there


class Archive:
    """One engine's use of a disk tier. `fetch`, `drop`, `count` and `take_arrivals` may be called from any thread and never wait."""

    def __init__(
        self,
        disk: DiskTier,
        settings: DiskSettings,
        *,
        unsaved: Unsaved,
        snapshot: TakeSnapshot,
        on_arrival: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Reads which sessions are there; begins nothing before `start`."""
        self.notes: SessionNotes | None = None  # whose; set before `start`
        self._disk = disk
        self._settings = settings
        self._unsaved, self._snapshot = unsaved, snapshot
        self._on_arrival = on_arrival
        self._clock = clock
        self._work = threading.Condition()
        self._jobs: deque[_Job] = deque()
        self._arrivals: list[Arrival] = []
        self._is_stopping = threading.Event()
        self._quiet_until_s = 0.0
        self._threads: list[threading.Thread] = []
        self._counts = DiskCounts()
        self.loading = MoveCost(fixed_s=0.01, seconds_per_byte=1 / 500e6)  # until loads were measured: a slow disk
        self._known = _usable(disk.sessions())
        self._look_next_s = clock()
        self._untold: deque[_Name] = deque()
        self._told: dict[_Name, float] = {}  # or about to be: when it had been saved
        # Deleted, but somebody else's; until when that is remembered.
        self._doomed: OrderedDict[_Name, float] = OrderedDict()
        self._saving = threading.Lock()

    def start(self) -> None:
        """Run until `stop`."""
        for target in (self._run, self._beat):
            self._threads.append(threading.Thread(target=target, name="loopserve-disk", daemon=True))
            self._threads[-1].start()

    def stop(self, *, flush_s: float) -> None:
        """Save what is unsaved for at most so long, and let others have all sessions. The engine thread must have ended."""
        self._is_stopping.set()
        with self._work:
            self._work.notify_all()
        for thread in self._threads:
            thread.join(flush_s)
        try:
            if not any(thread.is_alive() for thread in self._threads):
                self._save_all(self._clock() + flush_s)
        except Exception:  # the device breaks while it is read: what is saved is saved
            _log.exception("what is unsaved stays so")
            self.count(failed=1)
        with self._work:
            jobs, self._jobs = list(self._jobs), deque()
        for job in jobs:
            job.done.set_exception(EngineUnavailable("The engine is shutting down."))
        self._disk.close()

    def _save_all(self, deadline_s: float) -> None:
        """Save until nothing is unsaved, no time is left, or a save fails."""
        while self._quiet_until_s <= self._clock() < deadline_s:
            session_id = self._unsaved()
            if session_id is None:
                return
            self._save(session_id)

    def salt_of(self, session_id: SessionId) -> str | None:
        """The salt under which a session lies on disk, as far as it is known."""
        return next((salt for known, salt in list(self._known) if known == session_id), None)

    def num_bytes(self, session_id: SessionId, salt: str) -> int | None:
        """Bytes of a session's KV on disk; 0 where only a look would tell; None where there is none."""
        if self._is_doomed((session_id, salt)):
            return None
        known = self._known.get((session_id, salt))
        return 0 if known is None and self._settings.shared else known

    @property
    def is_running(self) -> bool:
        """Between `start` and `stop`."""
        return bool(self._threads) and not self._is_stopping.is_set()

    def fetch(self, session_id: SessionId, salt: str) -> None:
        """Bring a session; an `Arrival` follows in any case."""
        self._add(_Job(_Act.FETCH, session_id, salt, Future()))

    def drop(self, session_id: SessionId, salt: str) -> Future[bool]:
        """Forget a session; done when it is gone from the disk, with whether it was there.

        What is another engine's is left to that one, which is told to forget it, too. Where that one is gone, it is removed when its
        lease is over, and until then neither brought nor told of.
        """
        self._known.pop((session_id, salt), None)
        job = _Job(_Act.DROP, session_id, salt, Future())
        if self.is_running:
            self._add(job)
        else:
            with self._saving:  # or the last save would come after it
                self._carry_out(job)
        return job.done

    def take_arrivals(self) -> list[Arrival]:
        """What came since the last call."""
        with self._work:
            arrivals, self._arrivals = self._arrivals, []
        return arrivals

    def counts(self) -> DiskCounts:
        """What was done since the start, and what lies there of what this engine knows."""
        known = list(self._known.values())
        return self._counts.with_content(num_sessions=len(known), num_bytes=sum(known))

    def count(self, **more: int) -> None:
        """Add to the counts."""
        with self._work:
            self._counts = self._counts.plus(**more)

    def _add(self, job: _Job) -> None:
        with self._work:
            is_dropped = any((other.session_id, other.salt) == (job.session_id, job.salt) for other in self._jobs)
            if job.act is _Act.FETCH and not is_dropped:
                self._jobs.appendleft(job)
            else:
                self._jobs.append(job)
            self._work.notify_all()

    def _run(self) -> None:
        while not self._is_stopping.is_set():
            try:
                self._do_next()
            except Exception:  # a defect: who waits for a session must not wait for ever because of it
                _log.exception("the disk's thread goes on after an error")
                self.count(failed=1)
                self._quiet_until_s = self._clock() + _BACK_OFF_S

    def _do_next(self) -> None:
        """Do what is to be done next, or wait for it, not for long."""
        with self._work:
            job = self._jobs.popleft() if self._jobs else None
        if job is not None:
            self._carry_out(job)
        elif not (self._save_next() or self._tell_next() or self._look()):
            with self._work:
                if not self._jobs and not self._is_stopping.is_set():
                    self._work.wait(_POLL_S)

    def _save_next(self) -> bool:
        if self._clock() < self._quiet_until_s:
            return False
        session_id = self._unsaved()
        if session_id is None:
            return False
        try:
            self._save(session_id)
        except EngineUnavailable:  # what is unsaved is saved at its end, if it is sound
            self._is_stopping.wait(_POLL_S)
        return True

    def _tell_next(self) -> bool:
        """Tell of a session that nobody holds."""
        if self._is_stopping.is_set() or not self._untold:
            return False
        name = self._untold.popleft()
        if self.notes is None or self._is_doomed(name):
            return True
        try:
            notes = self._disk.notes(*name)
        except (ImageRefused, TierError) as error:
            _log.warning("the notes on session %s are not read: %s", name[0], error)
            if isinstance(error, TierError):
                self._told.pop(name, None)  # tried again after the next look
            return True
        if notes:
            self.notes.found(name[0], notes)
        return True

    def _look(self) -> bool:
        """Learn what lies there, and what of it nobody holds, now and then; newest first."""
        began_s = self._clock()
        if self._is_stopping.is_set() or began_s < self._look_next_s:
            return False
        try:
            stored = sorted(self._disk.sessions(), key=lambda found: found.saved_s, reverse=True)
        except TierError as error:  # what was known is still the best guess
            _log.warning("the sessions on disk could not be listed: %s", error)
            return True
        finally:
            ended_s = self._clock()
            self._look_next_s = ended_s + max(self._look_every_s, _LOOK_REST * (ended_s - began_s))
        self._known = _usable(stored)
        free = {(found.session_id, found.salt): found.saved_s for found in stored if found.owner is None}
        for name in [name for name in free if self._is_doomed(name)]:
            self._remove(*name)
            del free[name]
        self._untold.extend(name for name, saved_s in free.items() if self._told.get(name) != saved_s)
        self._told = free
        return True

    @property
    def _look_every_s(self) -> float:
        return max(self._settings.lease_s, _LOOK_EVERY_S)

    def _is_doomed(self, name: _Name) -> bool:
        return self._clock() < self._doomed.get(name, 0.0)

    def _beat(self) -> None:
        while not self._is_stopping.wait(self._settings.lease_s / 3):
            try:
                self._disk.heartbeat()
            except TierError as error:
                _log.warning("the leases on disk could not be renewed: %s", error)

    def _carry_out(self, job: _Job) -> None:
        image, was_there = None, False
        try:
            if job.act is _Act.FETCH:
                image = None if self._is_doomed((job.session_id, job.salt)) else self._load(job.session_id, job.salt)
            else:
                was_there = self._remove(job.session_id, job.salt)
        except Exception as error:
            job.done.set_exception(error)
            raise
        else:
            job.done.set_result(was_there)
        finally:
            if job.act is _Act.FETCH:
                with self._work:
                    self._arrivals.append(Arrival(job.session_id, job.salt, image))
                self._on_arrival()

    def _load(self, session_id: SessionId, salt: str) -> SessionImage | None:
        began_s = self._clock()
        try:
            image = self._disk.load(session_id, salt)
        except ImageRefused as error:
            _log.warning("session %s on disk is refused: %s", session_id, error)
            with self._work:
                self._counts = self._counts.with_refused(error.reason.value)
            self._remove(session_id, salt)
            return None
        except (LeasedElsewhere, LeaseLost):
            self.count(leased_elsewhere=1)
            return None
        except TierError as error:
            _log.warning("session %s could not be read from disk: %s", session_id, error)
            self.count(failed=1)
            return None
        if image is None:
            self._known.pop((session_id, salt), None)
            return None
        num_bytes = image.keys.nbytes + image.values.nbytes
        self.loading.measured(num_bytes, self._clock() - began_s)
        self.count(loaded_sessions=1, loaded_bytes=num_bytes)
        return image

    def _save(self, session_id: SessionId) -> None:
        """Raises EngineUnavailable where the engine ends, or has failed."""
        try:
            with self._saving:
                snapshot = self._snapshot(session_id)
                if snapshot is None:
                    return
                try:
                    self._write(snapshot.image, self._notes_of(session_id))
                except (LeasedElsewhere, LeaseLost):  # as another engine has it; ours is not written
                    self.count(leased_elsewhere=1)
                snapshot.is_saved()
        except EngineUnavailable:
            raise
        except DiskFull as error:
            self._postpone("there is no room on disk", error)
            self.count(full=1)
        except (TierError, LoopServeError) as error:
            self._postpone("it failed", error)
            self.count(failed=1)

    def _write(self, image: SessionImage, notes: bytes) -> None:
        num_bytes = image.keys.nbytes + image.values.nbytes
        try:
            saved = self._disk.save(image, notes=notes)
        except DiskFull:
            wanted = num_bytes + _about_bytes(image, notes)
            if not self._disk.make_room(wanted, keep=[(image.session_id, image.salt)]).is_enough:
                raise
            saved = self._disk.save(image, notes=notes)
        self._known[image.session_id, image.salt] = num_bytes
        self._doomed.pop((image.session_id, image.salt), None)  # it was begun anew
        self.count(saved_sessions=1, saved_bytes=saved.num_bytes_written)

    def _notes_of(self, session_id: SessionId) -> bytes:
        try:
            return b"" if self.notes is None else self.notes.of(session_id)
        except Exception:  # whoever wrote them: the KV is worth saving without
            _log.exception("session %s is saved without notes", session_id)
            return b""

    def _remove(self, session_id: SessionId, salt: str) -> bool:
        """Whether something was there, and is gone."""
        name = (session_id, salt)
        self._known.pop(name, None)
        try:
            was_there = self._disk.drop(session_id, salt)
        except TierError as error:
            if not isinstance(error, LeasedElsewhere | LeaseLost):
                _log.warning("session %s could not be removed from disk: %s", session_id, error)
                self.count(failed=1)
            self._doomed[name] = self._clock() + _DOOMED_LOOKS * self._look_every_s
            self._doomed.move_to_end(name)
            if len(self._doomed) > _DOOMED_MAX:
                self._doomed.popitem(last=False)
            return False
        self._doomed.pop(name, None)
        return was_there

    def _postpone(self, why: str, error: Exception) -> None:
        _log.warning("a session is not saved, %s; next try in %.0f s: %s", why, _BACK_OFF_S, error)
        self._quiet_until_s = self._clock() + _BACK_OFF_S


def _usable(stored: Iterable[StoredSession]) -> dict[_Name, int]:
    """Bytes of KV of the sessions that nobody else holds."""
    return {(found.session_id, found.salt): found.num_bytes for found in stored if found.owner is None or found.is_ours}


def _about_bytes(image: SessionImage, notes: bytes) -> int:
    """What a saved session takes beside its KV, at most: headers, checksums, and the histories and notes in the manifest's text."""
    num_ids = sum(len(branch.token_ids) for branch in image.branches)
    return 4096 + 300 * image.num_blocks + 12 * num_ids + 2 * len(notes)
