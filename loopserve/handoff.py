"""A session as it leaves one engine and enters another: what is written down of it, and how blocks find their new numbers.

Floor 6 beside the engine, whose thread carries. Knows nothing about who hands over to whom, or over what wire.
"""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from loopserve.dialogue import SessionId
from loopserve.errors import InvalidRequest, Overloaded
from loopserve.kv.cache import KVCache
from loopserve.kv.image import BranchImage, KVFormat, SessionImage
from loopserve.loading import LoadedModel
from loopserve.plan import BlockId
from loopserve.runner import Runner
from loopserve.scheduler import Scheduler
from loopserve.sessions import Session, SessionTable

Piece = tuple[Tensor, Tensor]  # keys and values of some blocks, [L, B, 16, Hkv, D] each

_PIECE_BYTES = 64 << 20  # read between two steps: some 10 ms of a memory's copying


@dataclass(frozen=True, slots=True)
class ImportedSession:
    """What an engine took over."""

    session_id: SessionId
    num_tokens: int  # computed, of its longest branch
    num_bytes: int  # of KV that had to be brought: what the prefix index had already is not counted


@dataclass(frozen=True, slots=True)
class Outline:
    """A session without its bytes; blocks by their numbers in this engine. Equal to another one while nothing of it changed or moved."""

    session_id: SessionId
    salt: str
    num_turns: int
    num_changes: int
    branches: tuple[BranchImage, ...]

    @classmethod
    def of(cls, session: Session) -> "Outline":
        """As it is now; branches that hold no KV are left out, but for the only one."""
        held = [branch for branch in session.branches if branch.table.num_tokens] or session.branches[:1]
        return cls(
            session.session_id,
            session.salt,
            session.num_turns,
            session.num_changes,
            tuple(
                BranchImage(
                    token_ids=tuple(branch.token_ids),
                    num_tokens=branch.table.num_tokens,
                    exact_tokens=branch.table.exact_tokens,
                    sparse_from=branch.sparse_from,
                    blocks=tuple(branch.table.blocks),
                )
                for branch in held
            ),
        )

    @property
    def blocks(self) -> list[BlockId]:
        """Each once, in the order of the image."""
        return [BlockId(b) for b in dict.fromkeys(block for branch in self.branches for block in branch.blocks)]

    def put_together(self, pieces: Sequence[Piece]) -> SessionImage:
        """The session's image, with what was read of its blocks, in order."""
        index_of = {block: index for index, block in enumerate(self.blocks)}
        branches = tuple(
            replace(branch, blocks=tuple(index_of[BlockId(block)] for block in branch.blocks))
            for branch in self.branches
        )
        keys, values = (torch.cat([piece[part] for piece in pieces], dim=1) for part in range(2))
        return SessionImage(self.session_id, self.salt, self.num_turns, branches, keys, values)


class Porter:
    """Carries sessions out of and into one engine. Its methods are for the engine thread, between two steps, without the lock."""

    def __init__(
        self,
        lock: threading.Condition,
        scheduler: Scheduler,
        sessions: SessionTable,
        cache: KVCache,
        runner: Runner,
        *,
        fmt: KVFormat,
        block_bytes: int,
    ) -> None:
        self._lock = lock
        self._scheduler = scheduler
        self._sessions = sessions
        self._cache = cache
        self._runner = runner
        self.fmt = fmt
        self._block_bytes = block_bytes

    def image_of(self, session_id: SessionId) -> SessionImage:
        """An idle session as it is. Raises NotFound, and Overloaded while a turn of it is here."""
        with self._lock:
            self._check_idle(session_id)
            self._sessions.get(session_id)
        outline = self.outline_of(session_id)
        assert outline is not None, "only this thread admits turns and forgets sessions"
        return outline.put_together([self._runner.read(outline.blocks)])

    def take_over(self, image: SessionImage) -> ImportedSession:
        """Let a session in. Raises Overloaded while a turn of it is here or where there is no room, InvalidRequest for another salt."""
        with self._lock:
            self._check_idle(image.session_id)
            known = self._sessions.find(image.session_id)
            if known is not None and known.salt != image.salt:
                raise InvalidRequest(f"Session {image.session_id!r} belongs to another cache salt.", param="session_id")
        return self.let_in(image)

    def let_in(self, image: SessionImage) -> ImportedSession:
        """Adopt an image for a session that has no turn in the batch, and bring its bytes. Raises Overloaded where there is no room."""
        with self._lock:
            blocks = self._sessions.adopt(
                image.session_id, salt=image.salt, num_turns=image.num_turns, branches=image.branches
            )
            copies = self._cache.take_copies()
        self._runner.copy(copies)
        names = torch.tensor(list(blocks), dtype=torch.long)
        keys, values = image.keys.index_select(1, names), image.values.index_select(1, names)
        self._runner.write(list(blocks.values()), keys, values)
        return ImportedSession(image.session_id, image.num_tokens, len(blocks) * self.fmt.block_bytes)

    def outline_of(self, session_id: SessionId) -> Outline | None:
        """What an idle session holds; None where it is busy or gone."""
        with self._lock:
            session = self._sessions.find(session_id)
            if session is None or session.is_active:
                return None
            outline, copies = Outline.of(session), self._cache.take_copies()
        self._runner.copy(copies)
        return outline

    def piece_of(self, outline: Outline, blocks: Sequence[BlockId]) -> Piece | None:
        """Some blocks' bytes; None where the session is not any more as the outline has it."""
        with self._lock:
            session = self._sessions.find(outline.session_id)
            if session is None or session.is_active or Outline.of(session) != outline:
                return None
        return self._runner.read(blocks)

    def pieces(self, outline: Outline) -> Iterator[list[BlockId]]:
        """An outline's blocks, so few at a time that the device can wait for it."""
        blocks, most = outline.blocks, max(1, _PIECE_BYTES // self._block_bytes)
        for first in range(0, len(blocks), most):
            yield blocks[first : first + most]

    def _check_idle(self, session_id: SessionId) -> None:
        if any(turn.request.session_id == session_id for turn in self._scheduler.turns()):
            raise Overloaded(f"A turn of session {session_id!r} is running or waits here; try again when it has ended.")


def kv_format(loaded: LoadedModel) -> KVFormat:
    """What images of a model's sessions have in common."""
    return KVFormat(
        fingerprint=loaded.fingerprint,
        num_layers=loaded.num_layers,
        num_kv_heads=loaded.num_kv_heads,
        head_dim=loaded.head_dim,
        dtype=loaded.dtype,
    )
