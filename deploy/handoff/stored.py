"""What a replica keeps on disk beside its sessions, so that whoever finds them there knows whose they are: their papers.

A conversation that comes without a name is found by what was said in it, and only a replica that claims it gets its turns. So a session on
disk is of use after a restart, or to the others after a crash, only with its conversation. Asked and told on a thread of the engine's;
what is told waits for the event loop, and is lost where that has ended.
"""

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress

from deploy.handoff.holdings import Holdings, is_session_of, key_of
from deploy.handoff.papers import Papers, PapersRefused, decode_papers, encode_papers
from loopserve.dialogue import SessionId

_log = logging.getLogger(__name__)


class StoredPapers:
    """For `loopserve.engine.Engine.keep_notes`."""

    def __init__(
        self, holdings: Holdings, *, was_released: Callable[[str], bool], loop: asyncio.AbstractEventLoop
    ) -> None:
        """`was_released`: whether a session, named by its key, was deleted a short time ago."""
        self._holdings = holdings
        self._was_released = was_released
        self._loop = loop

    def of(self, session_id: SessionId) -> bytes:
        """A session's papers; empty for one that no conversation here is about."""
        papers = self._holdings.papers_of(session_id)
        return b"" if papers is None else encode_papers(papers)

    def found(self, session_id: SessionId, notes: bytes) -> None:
        """Have the replica know a session that lies on disk and that nobody holds, if these are its papers."""
        try:
            papers = decode_papers(notes)
        except PapersRefused as refused:
            _log.warning("the papers of a session on disk were not taken: %s", refused)
            return
        key = key_of(session_id)
        if key is None or papers.session_id != session_id or not is_session_of(papers):
            _log.warning("the papers of a session on disk are another one's")
            return
        with suppress(RuntimeError):  # the loop is closed: the replica ends
            self._loop.call_soon_threadsafe(self._know, key, papers)

    def _know(self, key: str, papers: Papers) -> None:
        if not self._was_released(key):
            self._holdings.adopt(key, papers, takes_over=False)
