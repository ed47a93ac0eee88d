"""Hop 6: which turns compute what in the next step, and what a step's result means for them. Host only, no tensor in sight.

Owns the queues. Every turn is in one of them until its one terminal event:

    submit -> waiting -> running -> ended
                 ^___________|  preempted: its blocks are given up, prompt and outputs are computed again

Who gives way when the device is full is told by `loopserve.room`; the last to do so is the newest running turn. Steps in which the oldest
running turn waits for others to make room are few, and none of them is empty, so every turn ends.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from loopserve.config import EngineConfig
from loopserve.dialogue import FinishReason, Mode, TokensGenerated, TurnEnded, TurnEvent, TurnId, TurnStarted
from loopserve.errors import Overloaded
from loopserve.kv.cache import KVCache
from loopserve.orders import account, segment_ahead, segment_of
from loopserve.plan import SampledToken, Segment, StepPlan, StepResult
from loopserve.reads import ModelShape
from loopserve.room import Relief, Room
from loopserve.sessions import SessionTable
from loopserve.stats import StepStats, TokenGap, TurnStats
from loopserve.turn import Turn

_RETRY_S = 1.0  # who was refused tries again even if nothing changed: others give way to who waits long


@dataclass(frozen=True, slots=True)
class Notice:
    """An event of a turn, to be delivered."""

    turn: Turn
    event: TurnEvent


@dataclass(frozen=True, slots=True)
class _Blocked:
    """When somebody was refused, and what had changed until then."""

    num_changes: int  # `Room.num_changes`
    at_s: float


class Scheduler:
    """Plans steps over the turns it was given. Not thread-safe: it belongs to the engine thread."""

    def __init__(
        self,
        config: EngineConfig,
        cache: KVCache,
        sessions: SessionTable,
        room: Room,
        *,
        shape: ModelShape,
        clock: Callable[[], float],
    ) -> None:
        self._config = config
        self._cache = cache
        self._sessions = sessions
        self._room = room
        self._shape = shape
        self._clock = clock
        self._waiting: deque[Turn] = deque()
        self._running: list[Turn] = []  # oldest first
        self._notices: list[Notice] = []
        self._turn_stats: list[TurnStats] = []
        self._left_batch: list[TurnId] = []
        self._step_index = 0
        self._num_preempted = 0
        self._blocked: _Blocked | None = None  # the pool was found too full, and nothing was given back since
        self._first_tokens: list[TokenGap] = []
        self._token_gaps: list[TokenGap] = []

    @property
    def num_waiting(self) -> int:
        """Turns that are not in the batch yet."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Turns in the batch."""
        return len(self._running)

    @property
    def has_work(self) -> bool:
        """Whether a step could compute something, or find out that it cannot: some turn waits for no disk."""
        now_s = self._clock()
        return bool(self._running) or any(not turn.is_fetching(now_s) for turn in self._waiting)

    def turns(self) -> Iterator[Turn]:
        """Every turn that has not ended."""
        yield from self._running
        yield from self._waiting

    def add(self, turn: Turn) -> None:
        """Queue a turn. Raises Overloaded when the queue is full."""
        if len(self._waiting) >= self._config.max_waiting_turns:
            raise Overloaded(f"All {self._config.max_waiting_turns} places in the queue are taken; try again shortly.")
        self._waiting.append(turn)

    def plan(self) -> StepPlan | None:
        """The next step, or None when there is nothing to compute. Admits, preempts and reserves on the way."""
        self._expire_waiting()
        if not self._waiting:
            self._room.relax(self._running)
        segments: list[Segment] = []
        while not segments:
            num_changes = self._room.num_changes
            segments = self._segments()
            if not segments and self._room.num_changes == num_changes:
                return None  # nobody computes, and nobody makes room for others
        return self._step(segments)

    def _segments(self) -> list[Segment]:
        room_tokens = self._config.max_step_prefill_tokens
        segments: list[Segment] = []
        for turn in list(self._running):
            if turn not in self._running:
                continue  # preempted by an older turn of this loop
            segment = self._segment(turn, room_tokens)
            if segment is not None:
                segments.append(segment)
                room_tokens -= 0 if turn.is_decoding else len(segment.token_ids)
        segments.extend(self._admissions(room_tokens))
        return segments

    def plan_ahead(self, plan: StepPlan) -> StepPlan | None:
        """The step after `plan`, which is still running: every turn goes on with the token that `plan` is about to draw.

        None where that cannot be told yet, or would do somebody wrong: a turn computes its prompt or could be admitted, something hangs on
        what will be drawn or measured, or a block is missing. A turn that ends with that token computes it in vain.
        """
        self._expire_waiting()
        is_settled = not self._waiting or self._is_blocked or len(self._running) >= self._config.max_running_turns
        planned = {segment.turn_id: segment for segment in plan.segments}
        turns = [turn for turn in self._running if turn.num_outputs + 1 < turn.max_outputs]  # the others end
        can_go_on = all(
            turn.turn_id in planned and turn.can_run_ahead and self._room.stays_as_it_is(turn) for turn in self._running
        )
        if not is_settled or not turns or not can_go_on:
            return None
        for turn in turns:
            if not self._cache.reserve(turn.leased_branch.table, planned[turn.turn_id].start + 2):
                return None
        segments = [segment_ahead(turn, planned[turn.turn_id], budget_tokens=self._room.budget(turn)) for turn in turns]
        return self._step(segments)

    def _step(self, segments: Sequence[Segment]) -> StepPlan:
        self._step_index += 1
        # Whoever ordered them: a block that was given up may be written in this step.
        copies = self._cache.take_copies()
        plan = StepPlan(self._step_index, copies, tuple(segments), ended_turns=tuple(self._left_batch))
        self._left_batch.clear()
        return plan

    def apply(self, plan: StepPlan, result: StepResult) -> None:
        """Record what the step computed: commit KV, append tokens, end turns."""
        tokens = {token.turn_id: token for token in result.tokens}
        measured = {quality.turn_id: quality for quality in result.quality}
        turns = {turn.turn_id: turn for turn in self._running}
        for segment in plan.segments:
            turn = turns.get(segment.turn_id)
            if turn is None:
                continue  # it ended while this step, planned ahead, was running
            account(turn, segment, measured.get(segment.turn_id), self._shape)
            is_exact = segment.prefill is None and (segment.decode is None or segment.decode.dense)
            self._cache.commit(
                turn.leased_branch.table,
                turn.known_ids,
                num_tokens=segment.start + len(segment.token_ids),
                exact=is_exact,
            )
            if segment.sample is not None:
                turn.is_decoding = True
                self._append(turn, tokens[segment.turn_id])

    def end(self, turn: Turn, reason: FinishReason, *, error: str | None = None) -> None:
        """Take the turn out, keep what it computed as warm KV, and issue its terminal event."""
        assert not turn.ended, "a turn ends once"
        turn.ended = True
        self._blocked = None
        if turn in self._running:
            self._running.remove(turn)
            self._left_batch.append(turn.turn_id)
        else:
            self._waiting.remove(turn)
        self._room.leave(turn)
        usage, output_ids = turn.usage(), tuple(turn.output_ids())
        if turn.session is not None and turn.branch is not None:
            self._cache.trim(turn.branch.table)  # what a step planned ahead has no use for any more
            self._sessions.give_back(turn.session, turn.branch)
        self._notices.append(Notice(turn, TurnEnded(turn.turn_id, reason, usage, output_ids, error)))
        self._turn_stats.append(
            TurnStats(
                session_id=turn.request.session_id,
                turn_number=turn.turn_number,
                reason=reason,
                usage=usage,
                queue_s=None if turn.admitted_s is None else turn.admitted_s - turn.arrived_s,
                first_token_s=None if turn.first_token_s is None else turn.first_token_s - turn.arrived_s,
                total_s=self._clock() - turn.arrived_s,
                num_preemptions=turn.num_preemptions,
                trace_parent=turn.request.trace_parent,
                budget_tokens=turn.budget_at_choice or None,
            )
        )

    def room_was_made(self) -> None:
        """Blocks were given back by other means than an ended turn: try admissions again."""
        self._blocked = None

    def take_notices(self) -> list[Notice]:
        """The events since the last call, in order."""
        notices, self._notices = self._notices, []
        return notices

    def take_turn_stats(self) -> list[TurnStats]:
        """The ended turns since the last call."""
        stats, self._turn_stats = self._turn_stats, []
        return stats

    def step_stats(self, plan: StepPlan, *, duration_s: float) -> StepStats:
        """The measurements of one step; preemptions are those since the last call."""
        num_decode = sum(
            1 for segment in plan.segments if segment.sample is not None and segment.sample.output_index > 0
        )
        num_rows = sum(len(segment.token_ids) for segment in plan.segments)
        preempted, self._num_preempted = self._num_preempted, 0
        first_tokens, self._first_tokens = self._first_tokens, []
        token_gaps, self._token_gaps = self._token_gaps, []
        return StepStats(
            step_index=plan.step_index,
            duration_s=duration_s,
            num_prefill_tokens=num_rows - num_decode,
            num_decode_tokens=num_decode,
            num_running=self.num_running,
            num_waiting=self.num_waiting,
            num_preempted=preempted,
            num_free_blocks=self._cache.pool.num_free,
            first_tokens=tuple(first_tokens),
            token_gaps=tuple(token_gaps),
        )

    @property
    def _is_blocked(self) -> bool:
        blocked = self._blocked
        if blocked is None or blocked.num_changes != self._room.num_changes:
            return False
        return self._clock() - blocked.at_s < _RETRY_S

    def _admissions(self, room_tokens: int) -> Iterator[Segment]:
        for turn in list(self._waiting):
            if self._is_blocked or len(self._running) >= self._config.max_running_turns:
                return
            if turn.waits_for_leader or turn.is_fetching(self._clock()):
                continue
            if room_tokens <= 0:
                return
            num_changes = self._room.num_changes
            if not self._admit(turn):
                self._blocked = _Blocked(num_changes, self._clock())
                return
            segment = self._segment(turn, room_tokens)
            if segment is None:
                return  # its chunk does not fit any more; a shorter prompt does not overtake
            room_tokens -= len(segment.token_ids)
            yield segment

    def _admit(self, turn: Turn) -> bool:
        """Move a waiting turn into the batch if all it knows fits beside what runs."""
        num_known = turn.prompt_len + turn.num_outputs
        turn.decode_sparse = turn.policy.decode_is_sparse(num_known + 1, budget_tokens=self._room.budget(turn))
        waited_s = self._clock() - turn.arrived_s
        form = self._room.form_for(turn, num_known, self._running, waited_s=waited_s)
        if form is None:
            return False
        if turn.branch is None:
            self._lease(turn)
        elif self._config.reuse and turn.num_computed == 0:
            self._sessions.refill(turn.leased_session, turn.branch, reuse_tokens_max=turn.request.reuse_tokens_max)
        self._waiting.remove(turn)
        self._running.append(turn)
        turn.start = turn.num_computed
        turn.is_decoding = False
        turn.decode_steps = 0
        turn.budget_at_choice = 0
        turn.window_dense = False
        if not self._room.settle_in(turn, form, num_known):
            self._preempt(turn)
            return False
        return True

    def _lease(self, turn: Turn) -> None:
        session = self._sessions.open(turn.request.session_id, salt=turn.request.cache_salt)
        lease = self._sessions.lease(
            session,
            turn.request.prompt_ids,
            turn.turn_id,
            exact=turn.policy.mode is Mode.EXACT,
            rectify=turn.policy.decode.rectify,
            reuse_tokens_max=turn.request.reuse_tokens_max,
        )
        turn.session, turn.branch = session, lease.branch
        turn.cached_tokens = turn.num_computed
        turn.tally.rectified_tokens = lease.rectified_tokens
        turn.admitted_s = self._clock()
        if turn.leader is None:
            session.num_turns += 1
        turn.turn_number = session.num_turns
        self._notices.append(Notice(turn, TurnStarted(turn.turn_id, turn.cached_tokens, lease.rectified_tokens)))

    def _segment(self, turn: Turn, room_tokens: int) -> Segment | None:
        """The turn's part of the step, with room reserved; None when it waits: for token room, for others to make room, or preempted."""
        is_decoding = turn.is_decoding
        num_rows = 1 if is_decoding else turn.next_chunk_len(turn.policy.prefill.chunk_tokens)
        if not is_decoding and num_rows > room_tokens:
            return None
        end = turn.num_computed + num_rows
        while not self._room.prepare(turn, end):
            relief = self._room.relieve(turn, self._running)
            if relief is Relief.NEXT_STEP:
                return None
            if relief is Relief.NEVER:
                newest = self._running[-1]
                self._preempt(newest)
                if newest is turn:
                    return None
        return segment_of(turn, end, budget_tokens=self._room.budget(turn))

    def _preempt(self, turn: Turn) -> None:
        self._running.remove(turn)
        self._left_batch.append(turn.turn_id)
        self._room.leave(turn)
        turn.is_decoding = False
        if not self._room.park(turn):
            self._cache.free(turn.leased_branch.table)
            turn.leased_branch.sparse_from = None  # what sparse decoding wrote is gone; it is prefilled again
        self._waiting.appendleft(turn)
        turn.num_preemptions += 1
        self._num_preempted += 1
        self._blocked = None

    def _expire_waiting(self) -> None:
        """End turns that nobody will wait for any longer. Preempted ones have been answering and are left alone."""
        limit_s = self._config.max_queue_s
        deadline_s = self._clock() - limit_s
        for turn in [t for t in self._waiting if t.branch is None and t.arrived_s < deadline_s]:
            self.end(
                turn,
                FinishReason.ERROR,
                error=f"The turn waited {limit_s:.0f} s for a place in the batch; try again later.",
            )

    def _append(self, turn: Turn, token: SampledToken) -> None:
        turn.known_ids.append(token.token_id)
        now_s = self._clock()
        if turn.first_token_s is None:
            turn.first_token_s = now_s
            self._first_tokens.append(TokenGap(turn.turn_number, now_s - turn.arrived_s))
        else:
            self._token_gaps.append(TokenGap(turn.turn_number, now_s - turn.last_token_s))
        turn.last_token_s = now_s
        logprobs = () if token.logprobs is None else (token.logprobs,)
        self._notices.append(Notice(turn, TokensGenerated(turn.turn_id, (token.token_id,), logprobs)))
        reason = turn.reason_to_end()
        if reason is not None:
            self.end(turn, reason)
