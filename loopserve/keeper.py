"""What an engine keeps on disk: which session is saved when, which one is brought for a turn, and whether that is worth it.

Floor 6 beside the engine, which calls it under its lock or between two steps, as each method says. The disk itself is the business of
`archive.py`'s thread; what that asks for is read between steps, a piece at a time, so that none of them waits long.
"""

import functools
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from loopserve.archive import Archive, Snapshot
from loopserve.config import BLOCK_TOKENS, DiskSettings
from loopserve.dialogue import SessionId
from loopserve.errors import Overloaded
from loopserve.handoff import Outline, Piece, Porter
from loopserve.kv.disk import DiskTier
from loopserve.kv.image import SessionImage
from loopserve.notes import SessionNotes
from loopserve.scheduler import Scheduler
from loopserve.sessions import SessionTable
from loopserve.stats import DiskCounts, StepStats
from loopserve.turn import Turn

BetweenSteps = Callable[[Callable[[], Any]], Any]  # have the engine thread do something, and wait for its answer
_WEIGHT = 0.2  # of the newest step in the measured speed of prefill


class Keeper:
    """One engine's sessions on disk."""

    def __init__(
        self,
        settings: DiskSettings,
        porter: Porter,
        scheduler: Scheduler,
        sessions: SessionTable,
        lock: threading.Condition,
        *,
        between_steps: BetweenSteps,
        clock: Callable[[], float],
    ) -> None:
        """Opens the directory. Raises ConfigError where it cannot be used."""
        self._settings = settings
        self._porter = porter
        self._scheduler = scheduler
        self._sessions = sessions
        self._lock = lock
        self._between_steps = between_steps
        self._clock = clock
        self._is_closing = False
        self._prefill_s_per_token = 0.0  # measured; 0: not yet
        self.has_arrivals = False
        disk = DiskTier(
            Path(settings.directory), fmt=porter.fmt, quota_bytes=settings.quota_bytes, lease_s=settings.lease_s
        )
        self._archive = Archive(
            disk, settings, unsaved=self._unsaved, snapshot=self._snapshot, on_arrival=self._note_arrival
        )

    def keep_notes(self, notes: SessionNotes) -> None:
        """Keep these beside the sessions. Before `start`."""
        self._archive.notes = notes

    def start(self) -> None:
        """Begin to save and to bring."""
        self._archive.start()

    def stop(self, *, is_sound: bool) -> None:
        """Save what is unsaved, if the engine is sound, for as long as the settings allow. The engine thread must have ended."""
        self._is_closing = True
        self._archive.stop(flush_s=self._settings.flush_s if is_sound else 0.0)

    def counts(self) -> DiskCounts:
        """What was done since the start."""
        return self._archive.counts()

    def note_step(self, stats: StepStats) -> None:
        """Learn how fast prefill is."""
        if stats.num_prefill_tokens > 4 * stats.num_decode_tokens:
            measured = stats.duration_s / stats.num_prefill_tokens
            before = self._prefill_s_per_token or measured
            self._prefill_s_per_token = before + _WEIGHT * (measured - before)

    def salt_of(self, session_id: SessionId) -> str | None:
        """The salt under which a session lies on disk; None where it does not."""
        return self._archive.salt_of(session_id)

    def drop(self, session_id: SessionId, salt: str, *, timeout_s: float) -> bool:
        """Remove a session from disk; whether it was there. The lock is not held. Raises TimeoutError."""
        return self._archive.drop(session_id, salt).result(timeout=timeout_s)

    def fetch_for(self, turns: Sequence[Turn]) -> None:
        """Begin to bring the session of one request's turns, where that is quicker than computing it; they wait. The lock is held."""
        request = turns[0].request
        num_bytes = self._archive.num_bytes(request.session_id, request.cache_salt)
        session = self._sessions.find(request.session_id)
        if num_bytes is None or not self._archive.is_running or (session is not None and session.is_active):
            return
        here = 0 if session is None else session.kv_tokens
        wanted = len(request.prompt_ids)
        if num_bytes > 0:
            wanted = min(wanted, num_bytes * BLOCK_TOKENS // self._porter.fmt.block_bytes)
        if wanted <= here:
            return
        recompute_s = (wanted - here) * self._prefill_s_per_token
        if 0.0 < recompute_s <= self._archive.loading.seconds(num_bytes):  # 0: nobody has measured it yet
            self._archive.count(not_worth_it=1)
            return
        for turn in turns:
            turn.fetch_until_s = self._clock() + self._settings.wait_s
        self._archive.fetch(request.session_id, request.cache_salt)

    def take_arrivals(self) -> None:
        """Let in what came, and have the turns go on that waited for it. Between steps; the lock is not held."""
        with self._lock:
            self.has_arrivals = False
        for arrival in self._archive.take_arrivals():
            with self._lock:
                now_s = self._clock()
                waiting = [
                    turn
                    for turn in self._scheduler.turns()
                    if turn.fetch_until_s is not None and turn.request.session_id == arrival.session_id
                ]
                is_awaited = any(turn.is_fetching(now_s) for turn in waiting)
                for turn in waiting:
                    turn.fetch_until_s = None
            if arrival.image is not None and is_awaited:
                self._let_in(arrival.image)
            elif arrival.image is not None:
                self._archive.count(late=1)

    def _let_in(self, image: SessionImage) -> None:
        """Adopt what came, if it is more than what is here."""
        with self._lock:
            session = self._sessions.find(image.session_id)
            if session is not None and (session.is_active or session.kv_tokens >= image.num_tokens):
                return
        try:
            self._porter.let_in(image)
        except Overloaded:  # then it is computed again
            return
        with self._lock:
            session = self._sessions.get(image.session_id)
            session.num_changes_saved = session.num_changes

    # For the archive's thread.

    def _note_arrival(self) -> None:
        with self._lock:
            self.has_arrivals = True
            self._lock.notify_all()

    def _unsaved(self) -> SessionId | None:
        """The session that has been idle longest of those that are not on disk as they are; at the end, the one that was used last."""
        with self._lock:
            latest_s = self._clock() - (0.0 if self._is_closing else self._settings.save_after_s)
            unsaved = [
                session
                for session in self._sessions
                if session.num_changes != session.num_changes_saved
                and not session.is_active
                and session.kv_tokens >= BLOCK_TOKENS
                and session.last_used_s <= latest_s
            ]
            if not unsaved:
                return None
            choose = max if self._is_closing else min
            return choose(unsaved, key=lambda session: session.last_used_s).session_id

    def _snapshot(self, session_id: SessionId) -> Snapshot | None:
        """A session as it is, or None where it changed while it was read, is busy, or is gone."""
        outline: Outline | None = self._between_steps(lambda: self._porter.outline_of(session_id))
        if outline is None:
            return None
        pieces: list[Piece] = []
        for blocks in self._porter.pieces(outline):
            piece: Piece | None = self._between_steps(functools.partial(self._porter.piece_of, outline, blocks))
            if piece is None:
                return None
            pieces.append(piece)
        return Snapshot(outline.put_together(pieces), lambda: self._note_saved(outline))

    def _note_saved(self, outline: Outline) -> None:
        with self._lock:
            session = self._sessions.find(outline.session_id)
            if session is not None:
                session.num_changes_saved = outline.num_changes
