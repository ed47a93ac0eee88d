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

_NEWER_BY_S = 1.0  # claims are whole seconds, and for a moment routers see those of both replicas


@dataclass(frozen=True, slots=True)
class ConversationRecord:
    """What one replica knows of a conversation, in its table, on its way to another, and on disk. Replaced, never changed."""

    name: str
    claim: str
    home: str  # key by which routers place it where nobody claims it; empty: its session key
    last_used_s: float  # unix time
    continuations: tuple[tuple[str, str], ...]  # continuation key and its claim, oldest first

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
        """Whether the session has had a turn here."""
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

    def adopt(self, session_key: str, record: ConversationRecord, *, takes_over: bool) -> None:
        """Hold a session that was held elsewhere; what was said here counts as newer.

        `takes_over`: it is claimed over whoever held it, else as that one claimed it.
        """
        known = self._by_session.get(session_key)
        base = known or replace(record, last_used_s=0.0, continuations=())
        used_s = record.last_used_s + (_NEWER_BY_S if takes_over else 0.0)
        self._by_session[session_key] = replace(base, last_used_s=max(base.last_used_s, used_s))
        for continuation, claim in (*record.continuations, *base.continuations):
            if self._by_continuation.get(continuation, session_key) == session_key:  # else a newer session's here
                self.learn(session_key, continuation, claim=claim)
        self._note_use(session_key)

    def learn(self, session_key: str, continuation: str, *, claim: str | None = None) -> None:
        """An answer was given: its conversation comes back under `continuation`. Ignored for a session that was forgotten meanwhile."""
        if session_key not in self._by_session:
            return
        previous = self._by_continuation.get(continuation)
        if previous is not None:  # of two users who said and heard the same, the newest session goes on
            self._drop_continuation(previous, continuation)
        self._by_continuation[continuation] = session_key
        conversation = self._by_session[session_key]
        continuations = (*conversation.continuations, (continuation, claim or continuation))
        self._by_session[session_key] = replace(conversation, continuations=continuations)
        if len(continuations) > KEYS_PER_CONVERSATION:
            self._drop_continuation(session_key, continuations[0][0])

    def _drop_continuation(self, session_key: str, continuation: str) -> None:
        del self._by_continuation[continuation]
        conversation = self._by_session[session_key]
        kept = tuple(pair for pair in conversation.continuations if pair[0] != continuation)
        self._by_session[session_key] = replace(conversation, continuations=kept)

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
