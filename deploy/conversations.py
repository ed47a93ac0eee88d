"""Which conversations this replica holds, by the names under which they come back. Hop 3 of a turn; event loop only.

    header-less   continuation key of (messages + answer)  ->  session name
    any           session name  ->  time of last use, published as claims

A claim is the key under which routers look for a conversation: that of the table, unless routers know less of a request than the replica.
A conversation moves to another replica as a `ConversationRecord` (`deploy.handoff`).

Bounded: the least recently used conversation is forgotten first, its client is then met as a new one and only computes again.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace

KEYS_PER_CONVERSATION = 8  # branches a client can come back to; as many as the engine keeps of a session

_Continuations = tuple[tuple[str, str], ...]  # continuation key and its claim
_NEWER_BY_S = 1.0  # claims are whole seconds, and for a moment routers see those of both replicas


@dataclass(frozen=True, slots=True)
class ConversationRecord:
    """What one replica knows of a conversation, in its table, on its way to another, and on disk. Replaced, never changed."""

    name: str
    claim: str
    home: str  # key by which routers place it where nobody claims it; empty: its session key
    last_used_s: float  # unix time
    continuations: _Continuations  # oldest first

    @property
    def keys(self) -> tuple[str, ...]:
        """The continuation keys alone."""
        return tuple(key for key, _ in self.continuations)


class Conversations:
    """The table. Keys are those of `router.identity`; the clock is unix time, because claims of several replicas are compared."""

    def __init__(self, *, limit: int, clock: Callable[[], float]) -> None:
        assert limit >= 1
        self._limit = limit
        self._clock = clock
        self._by_session: OrderedDict[str, ConversationRecord] = OrderedDict()  # by session key, least recent first
        self._by_continuation: dict[str, str] = {}  # continuation key -> session key

    def __len__(self) -> int:
        return len(self._by_session)

    def holds(self, session_key: str) -> bool:
        """Whether the session has had a turn here, or came from elsewhere."""
        return session_key in self._by_session

    def name_of(self, continuation: str | None) -> str | None:
        """The session that gave the answer a request continues, or None."""
        found = self._by_continuation.get(continuation or "")
        return None if found is None else self._by_session[found].name

    def use(self, session_key: str, name: str, *, claim: str | None = None, home: str = "") -> None:
        """Note a turn of a session; pushes out the least recently used one beyond the limit.

        `claim` None: the key itself. `home`: of this turn; a client may have changed what it is made of.
        """
        known = self._by_session.get(session_key) or ConversationRecord(name, claim or session_key, "", 0.0, ())
        self._by_session[session_key] = replace(known, home=home or known.home, last_used_s=self._clock())
        self._note_use(session_key)

    def export(self, session_key: str) -> ConversationRecord | None:
        """A session as it is now, or None; it stays here. Equal to an earlier one while no turn of it was accepted or has ended.

        May be called from any thread.
        """
        return self._by_session.get(session_key)

    def adopt(self, session_key: str, record: ConversationRecord, *, takes_over: bool) -> bool:
        """Hold a session that was held elsewhere, or lies on disk; whether it is held now. Of here and there the newer counts.

        `takes_over`: it is claimed over whoever held it, and what is least recently used makes room. Else it is claimed as it was, and
        nobody goes for it.
        """
        known = self._by_session.get(session_key)
        if known is None and not takes_over and len(self) >= self._limit:
            return False
        # What a newer session here goes by stays that one's.
        own = (pair for pair in record.continuations if self._by_continuation.get(pair[0], session_key) == session_key)
        used_s = record.last_used_s + (_NEWER_BY_S if takes_over else 0.0)
        theirs = replace(record, last_used_s=used_s, continuations=tuple(own))
        older, newer = theirs, known or theirs
        if known is not None and known.last_used_s < theirs.last_used_s:
            older, newer = known, theirs
        self._put(session_key, replace(newer, continuations=_joined(older.continuations, newer.continuations)))
        if takes_over:
            self._note_use(session_key)
        elif known is None:
            self._by_session.move_to_end(session_key, last=False)
        return True

    def learn(self, session_key: str, continuation: str, *, claim: str | None = None) -> None:
        """An answer was given: its conversation comes back under `continuation`. Ignored for a session that was forgotten meanwhile."""
        conversation = self._by_session.get(session_key)
        if conversation is None:
            return
        previous = self._by_continuation.get(continuation)
        if previous is not None and previous != session_key:
            # Two users said and heard the same: the newest session goes on.
            other = self._by_session[previous]
            kept = tuple(pair for pair in other.continuations if pair[0] != continuation)
            self._put(previous, replace(other, continuations=kept))
        joined = _joined(conversation.continuations, ((continuation, claim or continuation),))
        self._put(session_key, replace(conversation, continuations=joined))

    def _put(self, session_key: str, record: ConversationRecord) -> None:
        """A session's record from now on; it is found by the keys of this one alone."""
        before = self._by_session.get(session_key)
        self._by_session[session_key] = record
        for key in before.keys if before is not None else ():
            del self._by_continuation[key]
        self._by_continuation.update(dict.fromkeys(record.keys, session_key))

    def _note_use(self, session_key: str) -> None:
        self._by_session.move_to_end(session_key)
        if len(self._by_session) > self._limit:
            self.forget(next(iter(self._by_session)))

    def forget(self, session_key: str) -> None:
        """Drop a session and every key of it; an unknown one is ignored."""
        conversation = self._by_session.pop(session_key, None)
        for continuation in conversation.keys if conversation else ():
            del self._by_continuation[continuation]

    def claims(self, limit: int) -> list[tuple[str, float]]:
        """(key, last use) of what this replica holds, at most `limit` keys: what it publishes.

        First every conversation with its newest answer, most recently used first; then, as room is left, the branches beside these.
        """
        newest: list[tuple[str, float]] = []
        beside: list[tuple[str, float]] = []
        for conversation in reversed(self._by_session.values()):
            keys = [conversation.claim, *(claim for _, claim in reversed(conversation.continuations))]
            if len(newest) + len(keys[:2]) > limit:
                break
            newest += [(key, conversation.last_used_s) for key in keys[:2]]
            beside += [(key, conversation.last_used_s) for key in keys[2:]]
        return (newest + beside)[:limit]


def _joined(older: _Continuations, newer: _Continuations) -> _Continuations:
    """Both, newest last and each key once, as many as a conversation keeps."""
    claims = dict(older)
    for key, claim in newer:
        claims.pop(key, None)
        claims[key] = claim
    return tuple(claims.items())[-KEYS_PER_CONVERSATION:]
