"""What the present conversations hold and what they would need: the demand curve. Host only, pure over others' records.

A turn in decode reads its *working set*: sinks, token selection and recent window. The curve says how many bytes all of these take at
each budget. Whether the rest of a conversation lies in the pool too is another question, answered by `Occupancy`: a resident turn's does.
"""

from collections.abc import Iterable

from loopserve.config import BLOCK_TOKENS, DecodeSparsity, EngineConfig
from loopserve.reads import num_kept_tokens
from loopserve.room import Room
from loopserve.scheduler import Scheduler
from loopserve.sessions import Session, SessionTable
from loopserve.stats import BudgetDemand, MemoryStats


def memory_stats(
    config: EngineConfig, scheduler: Scheduler, room: Room, sessions: SessionTable, *, block_bytes: int
) -> MemoryStats:
    """Count it. Linear in turns, sessions and held blocks."""
    decode = config.decode
    active = [turn.prompt_len + turn.num_outputs for turn in scheduler.turns()]
    warm = [length for length in map(_warm_len, sessions) if length]
    num_active_sessions = len({turn.request.session_id for turn in scheduler.turns()})
    rungs: tuple[int | None, ...] = (*decode.budget_rungs, None)

    def needed_bytes(lengths: Iterable[int], budget_tokens: int | None) -> int:
        return (
            sum(_working_set_tokens(length, budget_tokens, decode) for length in lengths) * block_bytes // BLOCK_TOKENS
        )

    return MemoryStats(
        num_running_turns=scheduler.num_running,
        num_waiting_turns=scheduler.num_waiting,
        max_running_turns=config.max_running_turns,
        block_bytes=block_bytes,
        blocks=sessions.occupancy(),
        num_active_sessions=num_active_sessions,
        num_warm_sessions=len(warm),
        active_tokens=sum(active),
        warm_tokens=sum(warm),
        demand=tuple(BudgetDemand(rung, needed_bytes(active, rung), needed_bytes(warm, rung)) for rung in rungs),
        budget_tokens=room.default_budget_tokens,
        budget_ceiling_tokens=room.budget_ceiling_tokens,
        budget_max_tokens=decode.budget_tokens,
        budget_floor_tokens=decode.budget_floor_tokens,
    )


def _warm_len(session: Session) -> int:
    """Tokens of an idle session's longest branch that still have KV; 0 for an active one."""
    return 0 if session.is_active else max((branch.table.num_tokens for branch in session.branches), default=0)


def _working_set_tokens(length: int, budget_tokens: int | None, config: DecodeSparsity) -> int:
    """Right after a choice; tokens generated since come on top until the next one."""
    return length if budget_tokens is None else num_kept_tokens(length, length, budget_tokens, config)
