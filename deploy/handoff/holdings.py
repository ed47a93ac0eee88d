"""What a replica holds of its sessions, in three places that change hands together: engine, chat service, table of conversations.

Event loop only. Doors keep order where it matters: while the engine takes a session in or lets it go, a turn of it waits for that moment.
While a session is only read and sent, turns go first: `is_same` then says that what was sent is old.
"""

import asyncio
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Protocol

from deploy.calls import engine_session_id, parts_of_session_id
from deploy.conversations import ConversationRecord, Conversations
from deploy.handoff.decision import HeldSession
from deploy.handoff.papers import Papers
from loopserve.dialogue import SessionId
from loopserve.errors import LoopServeError
from loopserve.sessions import SessionInfo
from loopserve.transcripts import Transcript
from router.identity import session_key


class Imported(Protocol):
    """What an engine says of a session that it took over."""

    @property
    def session_id(self) -> SessionId:
        """Whose image it was."""


class HandoffEngine(Protocol):
    """What a hand-off needs of `loopserve.engine.Engine`. All of it waits for the step in flight."""

    def sessions(self) -> tuple[SessionInfo, ...]:
        """Every session."""

    def release(self, session_id: SessionId) -> None:
        """Forget a session. Raises NotFound."""

    def export_session(self, session_id: SessionId) -> bytes:
        """The image of an idle session. Raises NotFound, Overloaded while a turn of it is there, EngineUnavailable."""

    def import_session(self, data: bytes) -> Imported:
        """Take a session over in place of what is known of it. Raises where the image is refused or has no room."""


class HandoffChat(Protocol):
    """What a hand-off needs of `loopserve.chat.ChatService`."""

    def forget(self, session_id: SessionId) -> None:
        """Drop what is kept of a session."""

    def export(self, session_id: SessionId) -> tuple[Transcript, ...]:
        """The token history of a session."""

    def adopt(self, session_id: SessionId, transcripts: Sequence[Transcript]) -> None:
        """Take over a token history."""


class Doors:
    """Closed while a session is taken in or let go, by every key under which a turn may come for it."""

    def __init__(self, *, wait_s: float) -> None:
        """Nobody waits longer than `wait_s`: a turn is then answered from what is there."""
        self._wait_s = wait_s
        self._closed: dict[str, asyncio.Event] = {}

    @contextmanager
    def closed(self, keys: Iterable[str]) -> Iterator[None]:
        """Keep turns waiting that come under any of these keys; at most one holder a key."""
        event = asyncio.Event()
        taken = [key for key in keys if key not in self._closed]
        self._closed |= dict.fromkeys(taken, event)
        try:
            yield
        finally:
            for key in taken:
                del self._closed[key]
            event.set()

    async def passed(self, *keys: str | None) -> None:
        """Return when no door of these keys is closed, or the wait is over."""
        if not self._closed:
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(self._wait_s):
                while (event := next((self._closed[key] for key in keys if key in self._closed), None)) is not None:
                    await event.wait()


@dataclass(frozen=True, slots=True)
class Packed:
    """A session ready to be sent, and as it was when it was read."""

    papers: Papers
    image: bytes


class Holdings:
    """All that one replica holds."""

    def __init__(
        self,
        engine: HandoffEngine,
        chat: HandoffChat,
        conversations: Conversations,
        *,
        has_turns: Callable[[str], bool],
        doors: Doors,
    ) -> None:
        """`has_turns`: whether a turn of a session, named by its key, is on its way through this replica."""
        self._engine, self._chat = engine, chat
        self._conversations = conversations
        self._has_turns = has_turns
        self.doors = doors

    def __len__(self) -> int:
        return len(self._conversations)

    async def sessions(self) -> list[HeldSession]:
        """Every session that both engine and table know; what the table has forgotten would not be found again elsewhere."""
        infos = await asyncio.to_thread(self._engine.sessions)
        found = (self._held(info) for info in infos)
        return [held for held in found if held is not None]

    def _held(self, info: SessionInfo) -> HeldSession | None:
        key = key_of(info.session_id)
        record = None if key is None else self._conversations.export(key)
        if key is None or record is None:
            return None
        return HeldSession(
            info.session_id,
            key,
            home=record.home or key,
            num_tokens=info.num_cached_tokens,
            num_kv_bytes=info.num_kv_bytes,
            idle_s=info.idle_s,
            is_active=info.is_active or self._has_turns(key),
        )

    def is_same(self, key: str, record: ConversationRecord) -> bool:
        """Whether no turn of the session has come, and nobody has forgotten it, since the record was made."""
        return not self._has_turns(key) and self._conversations.export(key) == record

    def has_turns(self, key: str) -> bool:
        """Whether a turn of the session is on its way through this replica."""
        return self._has_turns(key)

    def papers_of(self, session_id: SessionId) -> Papers | None:
        """What goes beside a session's image now; None for one that the table does not know. Safe from any thread."""
        key = key_of(session_id)
        record = None if key is None else self._conversations.export(key)
        return None if record is None else Papers(session_id, record, self._chat.export(session_id))

    def record(self, key: str) -> ConversationRecord | None:
        """What the table has of a session."""
        return self._conversations.export(key)

    async def pack(self, session: HeldSession, record: ConversationRecord) -> Packed:
        """Read a session; it stays. Raises what the engine raises."""
        image = await asyncio.to_thread(self._engine.export_session, session.session_id)
        return Packed(Papers(session.session_id, record, self._chat.export(session.session_id)), image)

    async def let_go(self, session: HeldSession) -> None:
        """Forget a session that has a new holder: nothing of it is claimed from now on, and a turn of it begins anew."""
        with self.doors.closed([session.key]):
            self._conversations.forget(session.key)
            self._chat.forget(session.session_id)
            with suppress(LoopServeError):  # gone already, or the engine is on its end
                await asyncio.to_thread(self._engine.release, session.session_id)

    async def import_image(self, image: bytes) -> SessionId:
        """Have the engine take a session over. Raises what the engine raises."""
        return (await asyncio.to_thread(self._engine.import_session, image)).session_id

    def adopt(self, key: str, papers: Papers, *, takes_over: bool) -> None:
        """Know a session that the engine has or can bring; it is claimed from now on, where it `takes_over` in place of who held it."""
        if self._conversations.adopt(key, papers.conversation, takes_over=takes_over):
            self._chat.adopt(papers.session_id, papers.transcripts)

    async def erase(self, session_id: SessionId) -> None:
        """Undo an import."""
        with suppress(LoopServeError):
            await asyncio.to_thread(self._engine.release, session_id)


def key_of(session_id: SessionId) -> str | None:
    """The session key of one of the engine's sessions; None for an id that this deployment has not made."""
    parts = parts_of_session_id(session_id)
    return None if parts is None else session_key(parts.tenant, parts.name)


def is_session_of(papers: Papers) -> bool:
    """Whether conversation and session id of some papers are about the same session."""
    parts = parts_of_session_id(papers.session_id)
    return (
        parts is not None
        and parts.name == papers.conversation.name
        and engine_session_id(parts.tenant, parts.name) == papers.session_id
    )
