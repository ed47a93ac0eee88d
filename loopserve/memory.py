"""What the present conversations hold on each tier and what they would need: the demand curve. Host only, pure over others' records.

A compact turn in decode holds its *working set* on the device: places for sinks and token selection, and the blocks of its newest tokens.
The curve says how many bytes of the device all turns take at each budget, were they all compact that may be. Counted in blocks, as they
are held: at the budget in force it is what the pool shows.
"""

from collections.abc import Iterable

from loopserve.config import BLOCK_TOKENS, DecodeSparsity, EngineConfig
from loopserve.kv.cache import Tier
from loopserve.reads import num_places
from loopserve.room import Room
from loopserve.scheduler import Scheduler
from loopserve.sessions import Session, SessionTable
from loopserve.stats import BudgetDemand, DiskCounts, MemoryStats
from loopserve.turn import Turn


def memory_stats(
    config: EngineConfig,
    scheduler: Scheduler,
    room: Room,
    sessions: SessionTable,
    *,
    block_bytes: int,
    device_bytes: int,
    disk: DiskCounts | None,
) -> MemoryStats:
    """Count it. Linear in turns, sessions and held blocks. `device_bytes`: all that the runner keeps there beside the model."""
    decode, turns = config.decode, list(scheduler.turns())
    warm = [length for length in map(_warm_len, sessions) if length]
    rungs: tuple[int | None, ...] = (*decode.budget_rungs, None)

    in_full = [room.device_blocks_at(turn, None) for turn in turns]

    def active_bytes(budget_tokens: int | None) -> int:
        held = [room.device_blocks_at(turn, budget_tokens) for turn in turns]
        whole = [turn for turn, here, most in zip(turns, held, in_full, strict=True) if here == most]
        return (sum(held) - _shared_twice(whole)) * block_bytes

    def warm_bytes(budget_tokens: int | None) -> int:
        return _warm_blocks(warm, budget_tokens if room.has_host else None, decode) * block_bytes

    return MemoryStats(
        num_running_turns=scheduler.num_running,
        num_waiting_turns=scheduler.num_waiting,
        max_running_turns=config.max_running_turns,
        num_compact_turns=sum(turn.is_compact for turn in turns),
        block_bytes=block_bytes,
        device_bytes=device_bytes,
        blocks=sessions.occupancy(),
        host_blocks=sessions.occupancy(Tier.HOST),
        num_active_sessions=len({turn.request.session_id for turn in turns}),
        num_warm_sessions=len(warm),
        active_tokens=sum(turn.prompt_len + turn.num_outputs for turn in turns),
        warm_tokens=sum(warm),
        computed_tokens=sum(turn.num_computed for turn in turns if turn.branch is not None),
        demand=tuple(BudgetDemand(rung, active_bytes(rung), warm_bytes(rung)) for rung in rungs),
        budget_tokens=room.default_budget_tokens,
        compact_budget_tokens=room.compact_budget_tokens,
        budget_ceiling_tokens=room.budget_ceiling_tokens,
        budget_max_tokens=decode.budget_tokens,
        budget_floor_tokens=decode.budget_floor_tokens,
        pressure=room.counts(),
        disk=disk,
    )


def _warm_len(session: Session) -> int:
    """Tokens of an idle session's longest branch that still have KV; 0 for an active one."""
    return 0 if session.is_active else session.kv_tokens


def _shared_twice(turns: Iterable[Turn]) -> int:
    """Blocks that turns which hold all of theirs share, counted for each but one of those that hold them."""
    blocks = [block for turn in turns if turn.branch is not None for block in turn.branch.table.blocks]
    return len(blocks) - len(set(blocks))


def _warm_blocks(lengths: Iterable[int], budget_tokens: int | None, config: DecodeSparsity) -> int:
    """What idle conversations of these lengths would take if each came back with the default policy: places, and a block to write."""
    whole = (-(-length // BLOCK_TOKENS) for length in lengths)
    if budget_tokens is None:
        return sum(whole)
    compact = -(-num_places(config, budget_tokens) // BLOCK_TOKENS) + 1
    return sum(min(blocks, compact) for blocks in whole)
