"""The plan of one step, as data: what the host decides (scheduler) and the device executes (runner). Floor 0, no torch.

A feature that does not fit these records does not enter the scheduler or the runner.

One session's KV while a turn runs, by position:

    |<------- reused ------->|<----- prompt, to compute ----->|<--- outputs --->|
    0                    cached                           prompt_len         now
     shared or own blocks     own blocks, freed or warmed by the session at the turn's end

Blocks of all tiers that a step can reach are numbered one after the other, and slots likewise:

    |null|<------------- device ------------->|<------------------ host memory ------------------>|
    0    1                               num_blocks                             num_blocks + num_host_blocks

New tokens are written to device blocks only. A turn whose blocks are all on the device is *resident*; a *compact* one leaves most of them
in host memory and reads what it chose of them from its *places*, device blocks in which every layer and KV head keeps tokens of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NewType

from loopserve.config import DecodeSparsity
from loopserve.dialogue import PositionLogprobs, SamplingParams, TokenId, TurnId

BlockId = NewType("BlockId", int)

PENDING_TOKEN = TokenId(-1)  # the turn's last step draws it; known to the device alone so far
NULL_BLOCK = BlockId(0)  # never allocated; padded slot indices point into it


@dataclass(frozen=True, slots=True)
class BlockCopy:
    """Copy a whole block, all layers and heads, before the step's forward: copy-on-write, or on its way between tiers."""

    source: BlockId
    target: BlockId


@dataclass(frozen=True, slots=True)
class SparsePrefill:
    """Compute this chunk's rows on chosen lines only."""

    method: str  # a row of `loopserve.methods.PREFILL_RULES`
    alpha: float  # share of the sampled weight that the lines must hold
    min_coverage: float | None  # a head measured below it is computed dense
    seed: int  # row sampling; fixed by turn and chunk, never by load


@dataclass(frozen=True, slots=True)
class CaptureOrder:
    """Watch the queries of a prefill's last chunks: a sparse decode follows, and at the prefill's end they choose what it reads.

    The keys were just read for the prefill's own attention, so this choice costs no further read.
    """

    decode: DecodeSparsity  # the turn's, its `method` included
    choose: bool  # the prefill ends here
    budget_tokens: int


@dataclass(frozen=True, slots=True)
class SparseDecode:
    """Read a token selection instead of the whole context.

    `measure` compares the selection in use with the dense weights of the queries that used it; `choose` chooses it anew before it
    is read, in the same pass where both are due. `dense` reads everything all the same (a fallback window), while the selection and
    its coverage are still kept up.
    """

    budget_tokens: int
    chosen_at_tokens: int  # context length at the choice that is read
    measure: bool
    choose: bool
    dense: bool
    recalls_late: bool = (
        False  # of a compact turn: what is newly chosen is brought meanwhile, and read by the next output
    )


@dataclass(frozen=True, slots=True)
class SampleOrder:
    """Draw the next token from the last row of the segment."""

    params: SamplingParams
    seed: int  # of the turn; the draw depends on (seed, output_index) alone
    output_index: int
    prompt_ids: Sequence[TokenId]  # read for repetition penalty only
    output_ids: Sequence[TokenId]  # read for penalties only
    banned_ids: tuple[TokenId, ...]  # while output_index < min_tokens: end-of-sequence and stop ids


@dataclass(frozen=True, slots=True)
class Segment:
    """The part of one turn that a step computes: a prefill chunk, or one decode token.

    `block_table` is the live list of the turn's blocks and covers `[0, start + len(token_ids))`; within one `table_epoch` it
    only ever grows at its end, so a runner may keep what it has read. `places` is the live list of a compact turn's places; it grows and
    shrinks at its end.
    """

    turn_id: TurnId
    token_ids: Sequence[TokenId]
    start: int  # position of token_ids[0]
    block_table: Sequence[BlockId]
    table_epoch: int
    prefill: SparsePrefill | None = None
    decode: SparseDecode | None = None
    capture: CaptureOrder | None = None
    sample: SampleOrder | None = None
    places: Sequence[BlockId] = ()


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One forward pass. `ended_turns` left the batch since the last plan: their device state can go."""

    step_index: int
    copies: tuple[BlockCopy, ...]
    segments: tuple[Segment, ...]
    ended_turns: tuple[TurnId, ...] = ()


@dataclass(frozen=True, slots=True)
class SampledToken:
    """What one `SampleOrder` drew."""

    turn_id: TurnId
    token_id: TokenId
    logprobs: PositionLogprobs | None = None


@dataclass(frozen=True, slots=True)
class SegmentQuality:
    """What sparsity measured in one segment, summed so that segments add up.

    `coverage_sum / coverage_count` is the mean over layers, heads and measurements; `coverage_worst` the least head of any layer.
    """

    turn_id: TurnId
    coverage_sum: float = 0.0
    coverage_count: int = 0
    coverage_worst: float = 1.0
    cells_computed: int = 0
    cells_total: int = 0
    dense_heads: int = 0


@dataclass(frozen=True, slots=True)
class StepResult:
    """What the runner brings back from one plan, at most one entry a segment in each tuple."""

    tokens: tuple[SampledToken, ...]
    quality: tuple[SegmentQuality, ...] = ()
