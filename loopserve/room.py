"""Hop 6: what each running turn holds on which tier, and who gives way when the device is full. Host only, no tensor in sight.

A turn is *resident*, all of its KV on the device, or *compact*: its KV lies in host memory but for the newest tokens, and it decodes
from its places. Both answer the same with the same selection. When a running turn finds no block, these give way in order, each counted:

    kept prefixes               at once, by the pool itself
    idle sessions               to host memory, or away
    a resident turn             becomes compact, when it is planned next
    budgets of compact turns    a rung lower, from each turn's next choice on, never below the floor; also where somebody waits long
    the newest turn             is preempted (`loopserve.scheduler`), to host memory where there is room

Room that has to be made by another turn comes with the next step: who needs it waits so long. Knows nothing about queues.
"""

from collections.abc import Sequence
from enum import Enum

from loopserve.config import BLOCK_TOKENS, EngineConfig
from loopserve.kv.cache import KVCache
from loopserve.methods import DECODE_RULES, Layout
from loopserve.orders import chooses_next
from loopserve.plan import BlockId
from loopserve.reads import num_places
from loopserve.sessions import SessionTable
from loopserve.stats import PressureCounts
from loopserve.turn import Turn

_TAIL_BLOCKS = (
    2  # a compact turn's full blocks leave the device so many at a time: each time its whole table is read again
)
_RELAX_FREE_RATIO = 0.1  # budgets recover while more of the pool than this stays free


class Form(Enum):
    """How a turn holds its KV."""

    RESIDENT = "resident"
    COMPACT = "compact"


class Relief(Enum):
    """When room comes."""

    NOW = "now"
    NEXT_STEP = "next step"
    NEVER = "never"  # but by preemption


class Room:
    """Decides what lies where for the turns that a scheduler runs. Not thread-safe: it belongs to the engine thread."""

    def __init__(self, config: EngineConfig, cache: KVCache, sessions: SessionTable) -> None:
        self._config = config
        self._cache = cache
        self._sessions = sessions
        self._pressure_ceiling_tokens: int | None = None  # the engine's own, over compact turns
        self._num_compacted = 0
        self._num_lowered = 0
        self.num_changes = 0  # whenever somebody gave way, or was asked to: who was refused may try again
        self.budget_ceiling_tokens: int | None = (
            None  # over every turn that asks for no budget, from its next choice on
        )
        self.compact_above_ratio = config.compact_above_ratio

    @property
    def has_host(self) -> bool:
        """Whether turns can be compact at all."""
        return self._cache.has_host

    @property
    def default_budget_tokens(self) -> int:
        """Budget in force for resident turns that ask for none: the engine's own, under the ceiling."""
        own = self._config.decode.budget_tokens
        return own if self.budget_ceiling_tokens is None else min(own, self.budget_ceiling_tokens)

    @property
    def compact_budget_tokens(self) -> int:
        """Budget in force for compact turns that ask for none: lower under pressure."""
        ceiling = self._pressure_ceiling_tokens
        return self.default_budget_tokens if ceiling is None else min(self.default_budget_tokens, ceiling)

    def budget(self, turn: Turn) -> int:
        """The budget of a turn's next choice. What its request asks for is its own."""
        if turn.policy.budget_tokens is not None:
            return turn.policy.budget_tokens
        return self.compact_budget_tokens if turn.is_compact else self.default_budget_tokens

    def counts(self) -> PressureCounts:
        """How often something gave way, since the start; preemptions and refusals are counted by who does these."""
        return PressureCounts(
            reclaimed_prefix_blocks=self._cache.num_reclaimed,
            offloaded_sessions=self._sessions.num_offloaded,
            dropped_sessions=self._sessions.num_dropped,
            compacted_turns=self._num_compacted,
            lowered_budgets=self._num_lowered,
        )

    def form_for(self, turn: Turn, num_known: int, running: Sequence[Turn], *, waited_s: float) -> Form | None:
        """How a turn of so many tokens can join those that run. None: not now; then some of them may be about to make room."""
        wanted = _blocks(num_known)
        forms = [Form.RESIDENT]
        if self.can_be_compact(turn):
            pinned = len(self._pinned(running)) + wanted
            is_above = pinned > self.compact_above_ratio * self._cache.pool.num_usable
            forms = [Form.COMPACT, Form.RESIDENT] if is_above else [Form.RESIDENT, Form.COMPACT]
        for form in forms:
            if form is Form.RESIDENT and self._fits(wanted, running):
                return form
            if (
                form is Form.COMPACT
                and self._fits(self._compact_blocks(turn), running)
                and self._host_fits(wanted, running)
            ):
                return form
        if not self._ask_to_be_compact(running) and waited_s > self._config.lower_after_s:
            self._lower_budgets(running)
        return None

    def settle_in(self, turn: Turn, form: Form, num_known: int) -> bool:
        """Bring a turn's KV to where its form wants it, and leave room for all that it knows; False when there is none after all."""
        table = turn.leased_branch.table
        first_block, room_blocks = 0, self._cache.num_blocks_missing(table, num_known)
        if form is Form.COMPACT:
            self._make_compact(turn)
            self._offload(turn)
            first_block, room_blocks = self._first_kept_block(turn), 0
        while room_blocks + min(table.num_host_blocks, len(table.blocks) - first_block) > self._cache.pool.num_free:
            if not self._sessions.evict_one():
                return False
        return self._cache.recall(table, from_block=first_block)

    def prepare(self, turn: Turn, end: int) -> bool:
        """Give a turn room to compute its tokens up to position `end`; False when blocks are missing and no idle session holds any."""
        branch = turn.leased_branch
        if turn.is_compact:
            self._offload(turn)
            if turn.is_decoding and not self._fit_places(turn):
                return False
        while not self._cache.reserve(branch.table, end):
            if not self._sessions.evict_one():
                return False
        return True

    def relieve(self, turn: Turn, running: Sequence[Turn]) -> Relief:
        """Have somebody give way so that `turn` gets the blocks that it misses."""
        largest = self._largest_resident(running)
        if largest is not None:
            self._make_compact(largest)
            return Relief.NOW if largest is turn else Relief.NEXT_STEP
        return Relief.NEXT_STEP if self._lower_budgets(running) else Relief.NEVER

    def relax(self, running: Sequence[Turn]) -> None:
        """Let budgets that were lowered under pressure recover by a rung, where there is room for it."""
        ceiling = self._pressure_ceiling_tokens
        if ceiling is None:
            return
        higher = next((rung for rung in self._config.decode.budget_rungs if rung > ceiling), None)
        goal = min(self.default_budget_tokens, higher or self.default_budget_tokens)
        followers = [t for t in running if t.is_compact and t.policy.budget_tokens is None]
        cost = sum(max(0, _places(t, goal) - len(t.leased_branch.places)) for t in followers)
        pool = self._cache.pool
        if pool.num_free - cost >= _RELAX_FREE_RATIO * pool.num_usable:
            self._pressure_ceiling_tokens = None if goal >= self.default_budget_tokens else goal

    def stays_as_it_is(self, turn: Turn) -> bool:
        """Whether a turn's next decode step needs no move and no other places, so that it can be planned before this one is applied."""
        if not turn.is_compact:
            return True
        places = turn.leased_branch.places
        return not self._offload_due(turn) and len(places) == self._wanted_places(turn)

    def leave(self, turn: Turn) -> None:
        """A turn is over, or preempted: its places go."""
        turn.is_compact = turn.has_recalled = False
        if turn.branch is not None:
            self._cache.shorten(turn.branch.places, 0)

    def park(self, turn: Turn) -> bool:
        """Move all that a turn has computed to host memory; False where it found no room, and has to be computed again."""
        branch = turn.leased_branch
        self._cache.trim(branch.table)
        return self._sessions.offload(branch)

    def device_blocks_at(self, turn: Turn, budget_tokens: int | None) -> int:
        """Device blocks that a turn holds between two decode steps at a budget, compact where it may be; None: of all its tokens.

        A turn that asked for a budget of its own holds what that takes.
        """
        length = turn.prompt_len + turn.num_outputs
        whole = _blocks(length)
        budget = turn.policy.budget_tokens or budget_tokens
        is_sparse = budget is not None and turn.policy.decode_is_sparse(length + 1, budget_tokens=budget)
        if budget_tokens is None or budget is None or not is_sparse or not self._may_be_compact(turn):
            return whole
        if turn.is_compact and turn.is_decoding:
            newest = turn.leased_branch.table.num_device_blocks
        else:
            newest = whole - self._layout(turn, length, budget).recent_start // BLOCK_TOKENS
        return min(whole, _places(turn, budget) + newest)

    def can_be_compact(self, turn: Turn) -> bool:
        """Whether a turn may decode from places: it chooses what it reads, per KV head, and promised nothing that needs all keys."""
        return turn.decode_sparse and self._may_be_compact(turn)

    def _may_be_compact(self, turn: Turn) -> bool:
        decode = turn.policy.decode
        most = _blocks(num_places(self._config.decode))
        return (
            self._cache.has_host
            and turn.policy.min_coverage is None
            and DECODE_RULES[decode.method].can_be_compact
            and decode.select_per == "kv_head"
            and not decode.dense_layers
            and max(_places(turn, self.budget(turn)), _places(turn, turn.budget_at_choice)) <= most
        )

    def _fits(self, num_blocks: int, running: Sequence[Turn]) -> bool:
        """Whether so many more blocks fit beside all that the running turns know, with one to grow for each of them."""
        pool = self._cache.pool
        needed = num_blocks + sum(self._promised(turn) for turn in running)
        return needed <= pool.num_free or needed <= pool.num_usable - len(self._pinned(running))

    def _host_fits(self, num_blocks: int, running: Sequence[Turn]) -> bool:
        pool = self._cache.host_pool
        pinned = {b for turn in running for b in turn.leased_branch.table.blocks if b in pool.ids}
        return num_blocks <= pool.num_usable - len(pinned)

    def _promised(self, turn: Turn) -> int:
        branch = turn.leased_branch
        if turn.is_compact:
            return max(0, self._compact_blocks(turn) - branch.table.num_device_blocks - len(branch.places)) + 1
        return self._cache.num_blocks_missing(branch.table, len(turn.known_ids)) + 1

    def _pinned(self, running: Sequence[Turn]) -> set[BlockId]:
        pool = self._cache.pool
        return {
            block
            for turn in running
            for block in (*turn.leased_branch.table.blocks, *turn.leased_branch.places)
            if block in pool.ids
        }

    def _compact_blocks(self, turn: Turn) -> int:
        """Device blocks that a compact turn needs at once: its places and newest tokens, or its next chunk, where that is more."""
        layout = self._layout(turn, turn.prompt_len, self.budget(turn))
        tail = _blocks(turn.prompt_len - layout.recent_start) + _TAIL_BLOCKS + 1
        to_decode = _places(turn, self.budget(turn)) + tail
        if turn.is_decoding:
            return to_decode
        num_missing = turn.prompt_len if turn.branch is None else len(turn.known_ids) - turn.num_computed
        chunk = _blocks(min(turn.policy.prefill.chunk_tokens, num_missing)) + 1
        return max(chunk, to_decode)

    def _make_compact(self, turn: Turn) -> None:
        turn.is_compact, turn.has_recalled = True, False
        self._num_compacted += 1
        self.num_changes += 1

    def _largest_resident(self, running: Sequence[Turn]) -> Turn | None:
        able = [turn for turn in running if not turn.is_compact and self.can_be_compact(turn)]
        return max(able, key=lambda turn: turn.leased_branch.table.num_device_blocks, default=None)

    def _ask_to_be_compact(self, running: Sequence[Turn]) -> bool:
        """One turn at a time: only when it has moved, and that was not enough, the next. False: all are compact that can be."""
        if any(turn.is_compact and self._offload_due(turn) for turn in running):
            return True
        largest = self._largest_resident(running)
        if largest is not None:
            self._make_compact(largest)
        return largest is not None

    def _lower_budgets(self, running: Sequence[Turn]) -> bool:
        decode = self._config.decode
        is_led = any(turn.is_compact and turn.policy.budget_tokens is None for turn in running)
        lower = [rung for rung in decode.budget_rungs if rung < self.compact_budget_tokens]
        if not is_led or not lower:
            return False
        self._pressure_ceiling_tokens = lower[-1]
        self._num_lowered += 1
        self.num_changes += 1
        return True

    def _offload(self, turn: Turn) -> None:
        table = turn.leased_branch.table
        before = table.num_device_blocks
        if self._offload_due(turn):
            keep_blocks = len(table.blocks) - self._first_kept_block(turn)
            self._sessions.offload(turn.leased_branch, keep_blocks=keep_blocks)
            self.num_changes += table.num_device_blocks < before

    def _offload_due(self, turn: Turn) -> bool:
        num_leaving = self._first_kept_block(turn) - turn.leased_branch.table.num_host_blocks
        return num_leaving >= (_TAIL_BLOCKS if turn.is_decoding else 1)

    def _first_kept_block(self, turn: Turn) -> int:
        """From which of the table's blocks on they stay on the device: what is not full, and what is read because it is recent."""
        chosen_at, budget = turn.chosen_at_tokens, turn.budget_at_choice
        if not turn.is_decoding:  # as the choice at the prefill's end will have it
            chosen_at, budget = len(turn.known_ids), self.budget(turn)
        return min(turn.num_computed, self._layout(turn, chosen_at, budget).recent_start) // BLOCK_TOKENS

    def _layout(self, turn: Turn, num_tokens: int, budget_tokens: int) -> Layout:
        decode = turn.policy.decode
        return DECODE_RULES[decode.method].layout(num_tokens, budget_tokens, decode)

    def _fit_places(self, turn: Turn) -> bool:
        places, wanted = turn.leased_branch.places, self._wanted_places(turn)
        if wanted < len(places):
            self._cache.shorten(places, wanted)
            self.num_changes += 1
        while not self._cache.extend(places, wanted - len(places)):
            if not self._sessions.evict_one():
                return False
        return True

    def _wanted_places(self, turn: Turn) -> int:
        """Blocks of places for a turn's next decode step: as its choice wants them, until it chooses again."""
        return _places(turn, self.budget(turn) if chooses_next(turn) else turn.budget_at_choice)


def _places(turn: Turn, budget_tokens: int) -> int:
    return _blocks(num_places(turn.policy.decode, budget_tokens))


def _blocks(num_tokens: int) -> int:
    return -(-num_tokens // BLOCK_TOKENS)
