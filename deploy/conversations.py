"""Which conversations this replica holds, by the names under which they come back. Hop 3 of a turn; event loop only.

    header-less   continuation key of (messages + answer)  ->  session name
    any           session name  ->  time of last use, published as claims

A claim is the key under which routers look for a conversation: that of the table, unless routers know less of a request than the replica.

Bounded: the least recently used conversation is forgotten first, its client is then met as a new one and only computes again.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

KEYS_PER_CONVERSATION = 8  # branches a client can come back to; as many as the engine keeps of a session


@dataclass(slots=True)
class _Conversation:
    name: str
    claim: str  # for its session key
    last_used_s: float
    continuations: OrderedDict[str, str] = field(default_factory=OrderedDict)  # continuation key -> its claim


class Conversations:
    """The table. Keys are those of `router.identity`; the clock is unix time, because claims of several replicas are compared."""

    def __init__(self, *, limit: int, clock: Callable[[], float]) -> None:
        assert limit >= 1
        self._limit = limit
        self._clock = clock
        self._by_session: OrderedDict[str, _Conversation] = (
            OrderedDict()
        )  # session key -> conversation, least recent first
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

    def use(self, session_key: str, name: str, *, claim: str | None = None) -> None:
        """Note a turn of a session; pushes out the least recently used one beyond the limit. `claim` None: the key itself."""
        conversation = self._by_session.setdefault(session_key, _Conversation(name, claim or session_key, 0.0))
        conversation.last_used_s = self._clock()
        self._by_session.move_to_end(session_key)
        if len(self._by_session) > self._limit:
            self.forget(next(iter(self._by_session)))

    def learn(self, session_key: str, continuation: str, *, claim: str | None = None) -> None:
        """An answer was given: its conversation comes back under `continuation`. Ignored for a session that was forgotten meanwhile."""
        conversation = self._by_session.get(session_key)
        if conversation is None:
            return
        previous = self._by_continuation.get(continuation)
        if (
            previous is not None and previous != session_key
        ):  # two users said and heard the same: the newest session goes on
            self._by_session[previous].continuations.pop(continuation, None)
        self._by_continuation[continuation] = session_key
        conversation.continuations[continuation] = claim or continuation
        conversation.continuations.move_to_end(continuation)
        if len(conversation.continuations) > KEYS_PER_CONVERSATION:
            oldest, _ = conversation.continuations.popitem(last=False)
            del self._by_continuation[oldest]

    def forget(self, session_key: str) -> None:
        """Drop a session and every key of it; an unknown one is ignored."""
        conversation = self._by_session.pop(session_key, None)
        for continuation in conversation.continuations if conversation else ():
            del self._by_continuation[continuation]

    def claims(self, limit: int) -> list[tuple[str, float]]:
        """(key, last use) of what this replica holds, at most `limit` keys: what it publishes.

        First every conversation with its newest answer, most recently used first; then, as room is left, the branches beside these.
        """
        newest: list[tuple[str, float]] = []
        beside: list[tuple[str, float]] = []
        for conversation in reversed(self._by_session.values()):
            keys = [conversation.claim, *reversed(conversation.continuations.values())]
            if len(newest) + len(keys[:2]) > limit:
                break
            newest += [(key, conversation.last_used_s) for key in keys[:2]]
            beside += [(key, conversation.last_used_s) for key in keys[2:]]
        return (newest + beside)[:limit]
