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
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from enum import Enum

from loopserve.config import DiskSettings
from loopserve.dialogue import SessionId
from loopserve.errors import EngineUnavailable, LoopServeError
from loopserve.kv.disk import DiskFull, DiskTier, LeasedElsewhere, LeaseLost, TierError
from loopserve.kv.image import ImageRefused, SessionImage
from loopserve.move_cost import MoveCost
from loopserve.notes import SessionNotes
from loopserve.stats import DiskCounts

_log = logging.getLogger(__name__)
_POLL_S = 0.5  # how often an idle thread asks whether something is to be saved
_BACK_OFF_S = 30.0  # without saving after a save that failed
_LOOK_EVERY_S = 15.0  # or every lease, where that is longer: the disk is looked through

Unsaved = Callable[[], SessionId | None]


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
    done: Future[None]


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
        self._known = {(found.session_id, found.salt): found.num_bytes for found in disk.sessions()}
        self._look_next_s = clock()
        self._untold: deque[tuple[SessionId, str]] = deque()
        self._told: dict[tuple[SessionId, str], float] = {}  # or about to be: when it had been saved

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
        known = self._known.get((session_id, salt))
        return 0 if known is None and self._settings.shared else known

    @property
    def is_running(self) -> bool:
        """Between `start` and `stop`."""
        return bool(self._threads) and not self._is_stopping.is_set()

    def fetch(self, session_id: SessionId, salt: str) -> None:
        """Bring a session; an `Arrival` follows in any case."""
        self._add(_Job(_Act.FETCH, session_id, salt, Future()))

    def drop(self, session_id: SessionId, salt: str) -> Future[None]:
        """Forget a session; done when it is gone from the disk, or cannot be removed."""
        self._known.pop((session_id, salt), None)
        job = _Job(_Act.DROP, session_id, salt, Future())
        if self.is_running:
            self._add(job)
        else:
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
            if job.act is _Act.FETCH:
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
        """Wait for something to do, not for long, and do it."""
        with self._work:
            if not self._jobs and not self._untold and self._clock() < self._look_next_s:
                self._work.wait(_POLL_S)
            job = self._jobs.popleft() if self._jobs else None
        if job is not None:
            self._carry_out(job)
        elif self._untold:
            self._tell(self._untold.popleft())
        elif self._clock() >= self._look_next_s:
            self._look()
        elif not self._is_stopping.is_set() and self._clock() >= self._quiet_until_s:
            session_id = self._unsaved()
            if session_id is not None:
                self._save(session_id)

    def _look(self) -> None:
        """Learn what lies there, and what of it nobody holds."""
        self._look_next_s = self._clock() + max(self._settings.lease_s, _LOOK_EVERY_S)
        try:
            stored = sorted(self._disk.sessions(), key=lambda found: found.saved_s)
        except TierError as error:
            _log.warning("the sessions on disk could not be listed: %s", error)
            return
        self._known = {(found.session_id, found.salt): found.num_bytes for found in stored}
        free = {(found.session_id, found.salt): found.saved_s for found in stored if found.owner is None}
        self._untold.extend(name for name, saved_s in free.items() if self._told.get(name) != saved_s)
        self._told = free

    def _tell(self, name: tuple[SessionId, str]) -> None:
        """Tell of a session that nobody holds."""
        if self.notes is None:
            return
        try:
            notes = self._disk.notes(*name)
        except (ImageRefused, TierError) as error:
            _log.warning("the notes on session %s are not read: %s", name[0], error)
            return
        if notes:
            self.notes.found(name[0], notes)

    def _beat(self) -> None:
        while not self._is_stopping.wait(self._settings.lease_s / 3):
            try:
                self._disk.heartbeat()
            except TierError as error:
                _log.warning("the leases on disk could not be renewed: %s", error)

    def _carry_out(self, job: _Job) -> None:
        image = None
        try:
            if job.act is _Act.FETCH:
                image = self._load(job.session_id, job.salt)
            else:
                self._remove(job.session_id, job.salt)
        except Exception as error:
            job.done.set_exception(error)
            raise
        else:
            job.done.set_result(None)
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
        try:
            snapshot = self._snapshot(session_id)
            if snapshot is None:
                return
            try:
                self._write(snapshot.image, b"" if self.notes is None else self.notes.of(session_id))
            except (LeasedElsewhere, LeaseLost):  # as another engine has it; ours is not written
                self.count(leased_elsewhere=1)
            snapshot.is_saved()
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
        self.count(saved_sessions=1, saved_bytes=saved.num_bytes_written)

    def _remove(self, session_id: SessionId, salt: str) -> None:
        self._known.pop((session_id, salt), None)
        try:
            self._disk.drop(session_id, salt)
        except TierError as error:
            _log.warning("session %s could not be removed from disk: %s", session_id, error)
            self.count(failed=1)

    def _postpone(self, why: str, error: Exception) -> None:
        _log.warning("a session is not saved, %s; next try in %.0f s: %s", why, _BACK_OFF_S, error)
        self._quiet_until_s = self._clock() + _BACK_OFF_S


def _about_bytes(image: SessionImage, notes: bytes) -> int:
    """What a saved session takes beside its KV, at most: headers, checksums, and the histories and notes in the manifest's text."""
    num_ids = sum(len(branch.token_ids) for branch in image.branches)
    return 4096 + 300 * image.num_blocks + 12 * num_ids + 2 * len(notes)
