"""What one turn computes in one step: its segment, what sparsity is told to do for it, and the account of both once it is computed.

Host only, hop 6. Edits the turn's own counters; knows nothing about queues, blocks to be had or other turns. A segment may be planned
before the one in front of it is applied, so an account is made from the segment, not from what the turn has become since.
"""

from loopserve.methods import DECODE_RULES
from loopserve.plan import PENDING_TOKEN, CaptureOrder, Segment, SegmentQuality, SparseDecode, SparsePrefill
from loopserve.reads import DecodeStep, ModelShape, kept_tokens, read_tokens
from loopserve.turn import Turn


def segment_of(turn: Turn, end: int, *, budget_tokens: int) -> Segment:
    """The turn's known tokens from the first that is not computed up to position `end`, for which it has room. Mutates the turn."""
    start, table = turn.num_computed, turn.leased_branch.table
    return Segment(
        turn_id=turn.turn_id,
        token_ids=turn.known_ids[start:end],
        start=start,
        block_table=table.blocks,
        table_epoch=table.epoch,
        prefill=None if turn.is_decoding else _sparse_prefill(turn, start, end),
        decode=_sparse_decode(turn, end, budget_tokens) if turn.is_decoding and turn.decode_sparse else None,
        capture=None if turn.is_decoding else _capture(turn, end, budget_tokens),
        sample=turn.sample_order() if end == len(turn.known_ids) else None,
        places=turn.leased_branch.places,
    )


def segment_ahead(turn: Turn, before: Segment, *, budget_tokens: int) -> Segment:
    """The decode row after `before`, whose token is not known yet. Mutates the turn."""
    start, table = before.start + 1, turn.leased_branch.table
    return Segment(
        turn_id=turn.turn_id,
        token_ids=(PENDING_TOKEN,),
        start=start,
        block_table=table.blocks,
        table_epoch=table.epoch,
        decode=_sparse_decode(turn, start + 1, budget_tokens) if turn.decode_sparse else None,
        sample=turn.sample_order(num_pending=1),
        places=turn.leased_branch.places,
    )


def chooses_next(turn: Turn) -> bool:
    """Whether the turn's next decode step makes a choice before it reads."""
    decode = turn.policy.decode
    return DECODE_RULES[decode.method].choice_due(turn.decode_steps + 1, decode)


def account(turn: Turn, segment: Segment, quality: SegmentQuality | None, shape: ModelShape) -> None:
    """Tally what a segment computed, before its token is appended; `quality`: what was measured in it. Mutates the turn."""
    if quality is not None:
        turn.tally.add_measured(quality)
    turn.tally.refreshes += _chooses(segment)
    if segment.decode is not None and not segment.decode.dense and turn.leased_branch.sparse_from is None:
        turn.leased_branch.sparse_from = segment.start
    if turn.is_decoding:
        _account_decode(turn, segment, quality, shape)
    elif segment.prefill is None:
        num_planes = shape.num_layers * shape.num_heads  # the unit in which attention cells are counted
        turn.tally.add_dense_prefill(start=segment.start, num_rows=len(segment.token_ids), num_planes=num_planes)


def _sparse_prefill(turn: Turn, start: int, end: int) -> SparsePrefill | None:
    if not turn.policy.prefill_is_sparse(end):
        return None
    chunk_index = (start - turn.start) // turn.policy.prefill.chunk_tokens
    return SparsePrefill(
        method=turn.policy.prefill.method,
        alpha=turn.policy.prefill.alpha,
        min_coverage=turn.policy.min_coverage,
        seed=turn.seed + chunk_index,
    )


def _capture(turn: Turn, end: int, budget_tokens: int) -> CaptureOrder | None:
    """Whether a chunk that ends at `end` holds rows that the first choice wants; at the prefill's end it is made."""
    decode, num_known = turn.policy.decode, len(turn.known_ids)
    is_observed = end > num_known - DECODE_RULES[decode.method].num_observed_rows(decode)
    choose = end == num_known
    if not turn.decode_sparse or not (choose or is_observed):
        return None
    if choose:
        turn.budget_at_choice, turn.chosen_at_tokens = budget_tokens, end
    return CaptureOrder(decode, choose=choose, budget_tokens=budget_tokens)


def _sparse_decode(turn: Turn, context_tokens: int, budget_tokens: int) -> SparseDecode:
    turn.decode_steps += 1
    decode = turn.policy.decode
    rule = DECODE_RULES[decode.method]
    choose = rule.choice_due(turn.decode_steps, decode)
    if choose:
        turn.budget_at_choice, turn.chosen_at_tokens = budget_tokens, context_tokens
    measure = rule.measurement_due(turn.decode_steps, decode)
    if turn.policy.min_coverage is not None:
        measure |= decode.promise_due(turn.decode_steps)
    has_recalled, turn.has_recalled = (
        turn.has_recalled,
        turn.is_compact,
    )  # with nothing brought yet, an answer would know nothing
    return SparseDecode(
        turn.budget_at_choice,
        turn.chosen_at_tokens,
        measure=measure,
        choose=choose,
        dense=turn.window_dense,
        recalls_late=has_recalled and decode.recall == "late",
    )


def _chooses(segment: Segment) -> bool:
    at_prefills_end = segment.capture is not None and segment.capture.choose
    return at_prefills_end or (segment.decode is not None and segment.decode.choose)


def _account_decode(turn: Turn, segment: Segment, quality: SegmentQuality | None, shape: ModelShape) -> None:
    context_tokens, order = segment.start + len(segment.token_ids), segment.decode
    kept = read = float(context_tokens)
    if order is not None:
        step = DecodeStep(
            context_tokens=context_tokens,
            chosen_at_tokens=order.chosen_at_tokens,
            budget_tokens=order.budget_tokens,
            choose=order.choose,
            measure=order.measure,
            dense=order.dense,
        )
        kept, read = (count(step, turn.policy.decode, shape) for count in (kept_tokens, read_tokens))
    turn.tally.add_decode_step(kept_tokens=kept, read_tokens=read, context_tokens=context_tokens)
    least = turn.policy.min_coverage
    if order is not None and quality is not None and quality.coverage_count and least is not None:
        # Measured on the window that just ended; the one that this refresh began is decided by it, from the next step on.
        turn.window_dense = quality.coverage_sum / quality.coverage_count < least
        turn.tally.dense_fallbacks += turn.window_dense
