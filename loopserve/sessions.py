"""Sessions and their branches: what each conversation's history is, and which KV of it is still there. Host only.

Owns the session clock. A session holds one branch per continuation that a client may come back to; a branch is a token history
and a block table. An idle branch's blocks are *warm*: they wait for the next turn. When the device runs out they move to host memory, least
recently used first, and are given up when that runs out, too; the history stays, so the KV can always be computed again. Knows nothing
about turns, but for the id of the one that a branch is busy with.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from loopserve.config import BLOCK_TOKENS
from loopserve.dialogue import SessionId, TokenId, TurnId
from loopserve.errors import NotFound, Overloaded
from loopserve.kv.cache import BlockTable, KVCache, Tier
from loopserve.plan import BlockId
from loopserve.stats import Occupancy

_COMPARE_TOKENS = 512  # list slices compare in C; one difference then costs at most this many Python steps


@dataclass(slots=True, eq=False)
class Branch:
    """One continuation of a session. `token_ids[:table.num_tokens]` is what its KV holds."""

    table: BlockTable
    token_ids: list[TokenId] = field(default_factory=list)
    busy: TurnId | None = None
    places: list[BlockId] = field(
        default_factory=list
    )  # of a compact turn: device blocks for chosen tokens, no part of the table
    sparse_from: int | None = None  # where the last answer's sparsely decoded tokens begin, until rectified
    last_used_s: float = 0.0


@dataclass(slots=True, eq=False)
class Session:
    """One conversation."""

    session_id: SessionId
    salt: str
    last_used_s: float
    branches: list[Branch] = field(default_factory=list)
    num_turns: int = 0
    num_changes: int = 0  # of what its branches hold
    num_changes_saved: int = 0  # when it was last written to disk, or read from there

    @property
    def kv_tokens(self) -> int:
        """Computed tokens of its longest branch."""
        return max((branch.table.num_tokens for branch in self.branches), default=0)

    @property
    def is_active(self) -> bool:
        """Whether a turn of it is in the batch."""
        return any(branch.busy is not None for branch in self.branches)


class BranchRecord(Protocol):
    """A branch as it was somewhere else; `blocks` is what its blocks are called there."""

    @property
    def token_ids(self) -> Sequence[TokenId]:
        """Its history."""

    @property
    def num_tokens(self) -> int:
        """How much of it is computed."""

    @property
    def exact_tokens(self) -> int:
        """How much of that is exact."""

    @property
    def sparse_from(self) -> int | None:
        """See `Branch`."""

    @property
    def blocks(self) -> Sequence[int]:
        """One for every 16 computed tokens; the last may be partly filled."""


@dataclass(frozen=True, slots=True)
class SessionInfo:
    """What a user may see of a session. Tokens are those of its longest branch."""

    session_id: SessionId
    num_tokens: int
    num_cached_tokens: int
    num_branches: int
    num_turns: int
    is_active: bool
    idle_s: float
    num_kv_bytes: int = 0  # of its blocks on all tiers, each counted once, also where other sessions share it


@dataclass(frozen=True, slots=True)
class Lease:
    """A branch made ready for a turn: its first `branch.table.num_tokens` prompt tokens need not be computed.

    `rectified_tokens` were there, but are computed again because sparse decoding wrote them.
    """

    branch: Branch
    rectified_tokens: int


@dataclass(frozen=True, slots=True)
class _Candidate:
    branch: Branch | None  # None: the prefix index
    reusable_tokens: int
    rectified_tokens: int = 0


class SessionTable:
    """All sessions of one engine. Not thread-safe: it belongs to the engine thread."""

    def __init__(
        self,
        cache: KVCache,
        *,
        max_sessions: int,
        max_branches: int,
        reuse: bool,
        clock: Callable[[], float],
        block_bytes: int = 0,
    ) -> None:
        self._cache = cache
        self._block_bytes = block_bytes
        self._max_sessions = max_sessions
        self._max_branches = max_branches
        self._reuse = reuse
        self._clock = clock
        self.num_offloaded = 0  # branches whose warm KV moved to host memory
        self.num_dropped = 0  # branches whose warm KV was given up
        self._sessions: OrderedDict[SessionId, Session] = OrderedDict()  # least recently used first

    def __iter__(self) -> Iterator[Session]:
        return iter(self._sessions.values())

    def find(self, session_id: SessionId) -> Session | None:
        """The session, if it is here."""
        return self._sessions.get(session_id)

    def get(self, session_id: SessionId) -> Session:
        """The session. Raises NotFound."""
        session = self.find(session_id)
        if session is None:
            raise NotFound(f"There is no session {session_id!r} on this replica.", param="session_id")
        return session

    def open(self, session_id: SessionId, *, salt: str) -> Session:
        """The session, made if it is new. A session keeps its salt; whoever accepts turns refuses another one."""
        session = self._sessions.get(session_id)
        if session is None:
            self._drop_oldest_idle()
            session = Session(session_id=session_id, salt=salt, last_used_s=self._clock())
            self._sessions[session_id] = session
        assert session.salt == salt, "a session keeps its salt"
        self._sessions.move_to_end(session_id)
        return session

    def lease(
        self,
        session: Session,
        prompt_ids: Sequence[TokenId],
        turn_id: TurnId,
        *,
        exact: bool,
        rectify: bool,
        reuse_tokens_max: int | None = None,
    ) -> Lease:
        """A branch for a turn with this prompt, holding as much of its KV as can be reused; busy until `give_back`.

        At least the prompt's last token is left to compute: the first output is drawn from its row. `reuse_tokens_max` leaves what lies
        behind it, too. `exact` reuses exact KV only. A branch that the prompt continues (but for a tail shorter than a block) is
        continued in place; otherwise the turn gets a branch of its own and what it leaves stays as it was.
        """
        most = _reusable(prompt_ids, reuse_tokens_max)
        best = max(
            self._candidates(session, prompt_ids, most, exact=exact, rectify=rectify),
            key=lambda candidate: candidate.reusable_tokens,
            default=_Candidate(None, 0),
        )
        continued = self._continued(session, prompt_ids, best.branch)
        if continued is not None and continued is best.branch:
            is_cut = self._cache.truncate(continued.table, best.reusable_tokens)
            while not is_cut and self.evict_one(spare=continued):
                is_cut = self._cache.truncate(continued.table, best.reusable_tokens)
            if not is_cut:
                full_tokens = best.reusable_tokens // BLOCK_TOKENS * BLOCK_TOKENS
                self._cache.truncate(continued.table, full_tokens)  # at a block's edge it needs no block
            branch = continued
        else:
            table = self._table_for(session, best, prompt_ids, most)
            if continued is not None:
                self._cache.free(continued.table)
                continued.table = table
            branch = continued or self._new_branch(session, table)
        self._forget_tail(session, branch, prompt_ids)
        branch.busy = turn_id
        branch.token_ids = list(prompt_ids)
        branch.sparse_from = None
        session.last_used_s = branch.last_used_s = self._clock()
        return Lease(branch, best.rectified_tokens)

    def refill(self, session: Session, branch: Branch, *, reuse_tokens_max: int | None = None) -> None:
        """Give a preempted turn's empty branch what the prefix index still has of it."""
        assert branch.table.num_tokens == 0, "only an emptied branch is refilled"
        epoch = branch.table.epoch
        most = _reusable(branch.token_ids, reuse_tokens_max)
        branch.table = self._cache.match(branch.token_ids, session.salt, max_tokens=most)
        branch.table.epoch = epoch + 1

    def give_back(self, session: Session, branch: Branch) -> None:
        """The branch's turn is over: its blocks become warm."""
        branch.busy = None
        session.num_changes += 1
        session.last_used_s = branch.last_used_s = self._clock()
        if branch.table.num_tokens == 0 and branch in session.branches and len(session.branches) > 1:
            self._drop(session, branch)

    def evict_one(self, *, spare: Branch | None = None) -> bool:
        """Take the warm blocks of the branch that has been idle longest off the device. False when no idle branch but `spare` holds any."""
        idle = [b for b in self._idle_branches() if b.table.num_device_blocks and b is not spare]
        if not idle:
            return False
        branch = min(idle, key=lambda branch: branch.last_used_s)
        if self.offload(branch):
            self.num_offloaded += 1
        else:
            self._give_up(branch)
        return True

    def offload_idle_since(self, latest_s: float) -> None:
        """Move the KV of branches that were last used by then to host memory, as long as no other has to give way there."""
        for branch in list(self._idle_branches()):
            num_blocks = branch.table.num_device_blocks
            if 0 < num_blocks <= self._cache.host_pool.num_free and branch.last_used_s <= latest_s:
                self._cache.offload(branch.table)
                self.num_offloaded += 1

    def offload(self, branch: Branch, *, keep_blocks: int = 0) -> bool:
        """Move a branch's blocks to host memory, but for the last `keep_blocks`; idle branches that were used before it give way there.

        False when some of them found no room; these stay.
        """
        if not self._cache.has_host:
            return False
        while not self._cache.offload(branch.table, keep_blocks=keep_blocks):
            older = [b for b in self._idle_branches() if b.table.num_host_blocks and b is not branch]
            oldest = min(older, key=lambda b: b.last_used_s, default=None)
            if oldest is None or (branch.busy is None and oldest.last_used_s >= branch.last_used_s):
                return False
            self._give_up(oldest)
        return True

    def _idle_branches(self) -> Iterator[Branch]:
        return (b for s in self._sessions.values() for b in s.branches if b.busy is None)

    def _give_up(self, branch: Branch) -> None:
        self.num_dropped += 1
        self._cache.free(branch.table)

    def release(self, session_id: SessionId) -> None:
        """Forget a session and its KV; the prefix index keeps what other sessions hold, nothing else. Raises NotFound.

        No turn of it may be in the batch.
        """
        session = self.get(session_id)
        assert not session.is_active, "turns must end before their session is released"
        self._forget(session)

    def adopt(
        self, session_id: SessionId, *, salt: str, num_turns: int, branches: Sequence[BranchRecord]
    ) -> dict[int, BlockId]:
        """Take a session over as it was somewhere else, in place of what is known of it here; the caller has to bring its bytes.

        The answer is the blocks that have to be filled, by what they are called there. Sessions that have been idle longest give way in
        host memory. Raises Overloaded, and changes nothing but these, when there is no room; no turn of the session may be in the batch.
        """
        before = self.find(session_id)
        assert before is None or not before.is_active, "a session with a turn in the batch is not replaced"
        while True:
            known: dict[int, BlockId] = {}
            tables = [self._adopted(record, salt, known) for record in branches]
            if None not in tables:
                break
            for table in tables:
                if table is not None:
                    self._cache.free(table)
            holders = [b for b in self._idle_branches() if b.table.blocks]
            idle = [b for b in holders if b.table.num_host_blocks] or holders
            if not idle:
                raise Overloaded(f"There is no room for the KV of session {session_id!r}.")
            self._give_up(min(idle, key=lambda branch: branch.last_used_s))
        if before is not None:
            self._forget(before)
        session = self.open(session_id, salt=salt)
        session.num_turns, session.last_used_s = num_turns, self._clock()
        session.num_changes += 1
        session.branches = [
            Branch(table, list(record.token_ids), sparse_from=record.sparse_from, last_used_s=session.last_used_s)
            for table, record in zip(tables, branches, strict=True)
            if table is not None
        ]
        return known

    def _adopted(self, record: BranchRecord, salt: str, known: dict[int, BlockId]) -> BlockTable | None:
        return self._cache.adopt(
            record.token_ids,
            salt,
            num_tokens=record.num_tokens,
            exact_tokens=record.exact_tokens,
            blocks=record.blocks,
            known=known,
        )

    def info(self, session: Session) -> SessionInfo:
        """What a user may see of the session."""
        return SessionInfo(
            session_id=session.session_id,
            num_tokens=max((len(b.token_ids) for b in session.branches), default=0),
            num_cached_tokens=session.kv_tokens,
            num_branches=len(session.branches),
            num_turns=session.num_turns,
            is_active=session.is_active,
            idle_s=0.0 if session.is_active else self._clock() - session.last_used_s,
            num_kv_bytes=len({block for b in session.branches for block in b.table.blocks}) * self._block_bytes,
        )

    def occupancy(self, tier: Tier = Tier.DEVICE) -> Occupancy:
        """Blocks of one tier by kind, counted now: linear in the blocks held."""
        pool = self._cache.pool if tier is Tier.DEVICE else self._cache.host_pool
        holders: dict[int, set[SessionId]] = {}
        active_blocks: set[int] = set()
        for session in self._sessions.values():
            for branch in session.branches:
                held = [block for block in (*branch.table.blocks, *branch.places) if block in pool.ids]
                for block in held:
                    holders.setdefault(block, set()).add(session.session_id)
                if branch.busy is not None:
                    active_blocks.update(held)
        shared = {block for block, ids in holders.items() if len(ids) > 1}
        return Occupancy(
            total=pool.num_usable,
            active=len(active_blocks - shared),
            warm=len(holders.keys() - shared - active_blocks),
            shared=len(shared),
            cached=pool.num_kept,
            free=pool.num_free - pool.num_kept,
            shared_active=len(shared & active_blocks),
        )

    def _candidates(
        self, session: Session, prompt_ids: Sequence[TokenId], most: int, *, exact: bool, rectify: bool
    ) -> Iterator[_Candidate]:
        if not self._reuse:
            return
        for branch in session.branches:
            usable = min(common_prefix_len(branch.token_ids, prompt_ids), branch.table.num_tokens, most)
            if exact:
                yield _Candidate(branch, min(usable, branch.table.exact_tokens))
            elif rectify and branch.sparse_from is not None and branch.sparse_from < usable:
                yield _Candidate(branch, branch.sparse_from, usable - branch.sparse_from)
            else:
                yield _Candidate(branch, usable)
        indexed = self._cache.match(prompt_ids, session.salt, max_tokens=most)
        yield _Candidate(None, indexed.num_tokens)
        self._cache.free(indexed)  # looked up again if it wins: nothing is allocated in between

    def _continued(self, session: Session, prompt_ids: Sequence[TokenId], best: Branch | None) -> Branch | None:
        """The idle branch that the prompt continues; of several (short answers differ in few tokens) the one with the best KV."""

        def lost_tokens(branch: Branch) -> int:
            return len(branch.token_ids) - common_prefix_len(branch.token_ids, prompt_ids)

        idle = [b for b in session.branches if b.busy is None and lost_tokens(b) < BLOCK_TOKENS]
        return max(idle, key=lambda b: (b is best, len(b.token_ids)), default=None)

    def _table_for(self, session: Session, best: _Candidate, prompt_ids: Sequence[TokenId], most: int) -> BlockTable:
        if best.reusable_tokens == 0:
            return self._cache.open(session.salt)
        if best.branch is None:
            return self._cache.match(prompt_ids, session.salt, max_tokens=most)
        table = self._cache.fork(best.branch.table, best.reusable_tokens)
        if table is None and self.evict_one(spare=best.branch):
            table = self._cache.fork(best.branch.table, best.reusable_tokens)
        if table is None:  # no block for the copy of the part block: share the full ones
            full_tokens = best.reusable_tokens // BLOCK_TOKENS * BLOCK_TOKENS
            table = self._cache.fork(best.branch.table, full_tokens)
        assert table is not None, "forking at a block's edge needs no block"
        return table

    def _new_branch(self, session: Session, table: BlockTable) -> Branch:
        branch = Branch(table=table)
        session.branches.append(branch)
        self._drop_surplus_branches(session, keep=branch)
        return branch

    def _drop_surplus_branches(self, session: Session, *, keep: Branch) -> None:
        idle = [b for b in session.branches if b.busy is None and b is not keep]
        surplus = len(session.branches) - self._max_branches
        for branch in sorted(idle, key=lambda b: b.last_used_s)[: max(0, surplus)]:
            self._drop(session, branch)

    def _drop_oldest_idle(self) -> None:
        if len(self._sessions) < self._max_sessions:
            return
        # Every active session has a running turn, and these are fewer than max_sessions: an idle one is found.
        for session in self._sessions.values():
            if not session.is_active:
                self._forget(session)
                return

    # Who forgets a history also takes what only that history could name out of the prefix index, so that a session's release finds
    # all there is of it.

    def _forget(self, session: Session) -> None:
        for branch in session.branches:
            self._cache.free(branch.table)
        for branch in session.branches:
            self._cache.forget(branch.token_ids, session.salt)
        del self._sessions[session.session_id]

    def _drop(self, session: Session, branch: Branch) -> None:
        """Forget one branch. What its history shares with the other branches' stays."""
        self._cache.free(branch.table)
        session.branches.remove(branch)
        shared = max((common_prefix_len(branch.token_ids, b.token_ids) for b in session.branches), default=0)
        self._cache.forget(branch.token_ids, session.salt, from_tokens=shared)

    def _forget_tail(self, session: Session, branch: Branch, prompt_ids: Sequence[TokenId]) -> None:
        """Forget what the branch's history loses when `prompt_ids` take its place."""
        kept = common_prefix_len(branch.token_ids, prompt_ids)
        if len(branch.token_ids) // BLOCK_TOKENS > kept // BLOCK_TOKENS:  # a full block holds some of it
            self._cache.forget(branch.token_ids, session.salt, from_tokens=kept)


def _reusable(token_ids: Sequence[TokenId], reuse_tokens_max: int | None) -> int:
    """How many leading tokens need not be computed, however much is cached."""
    most = len(token_ids) - 1
    return most if reuse_tokens_max is None else min(most, reuse_tokens_max)


def common_prefix_len(left: Sequence[TokenId], right: Sequence[TokenId]) -> int:
    """How many leading tokens agree."""
    shortest = min(len(left), len(right))
    for start in range(0, shortest, _COMPARE_TOKENS):
        end = min(start + _COMPARE_TOKENS, shortest)
        if list(left[start:end]) != list(right[start:end]):
            return next(i for i in range(start, end) if left[i] != right[i])
    return shortest
