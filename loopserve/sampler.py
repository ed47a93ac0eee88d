"""Logits to tokens: hop 9 of a turn. Owns the order of the logit processors and the random draw; knows no model, no cache, no text.

One row, in this order (the order that users of vLLM and of transformers' `generate` expect):

    log-probabilities   of the unmodified distribution, as OpenAI reports them
    banned ids          -inf (`min_tokens`)
    logit bias          added, as OpenAI documents it
    repetition penalty  over prompt and output: positive logits divided, negative ones multiplied (CTRL, arXiv 1909.05858; transformers)
    presence, frequency over output: `logit - count * frequency - (count > 0) * presence` (OpenAI's formula)
    temperature         0 (below 1e-5) is the argmax of what stands here; top-k of 1 as well
    top-k, top-p, min-p each over what the one before left (transformers' order; nucleus: arXiv 1904.09751, min-p: arXiv 2407.01082)
    draw                Gumbel-max with noise that is a pure function of (seed, output index, token id)

So a draw changes neither with the batch around it, nor with preemption, nor with the device. Inverting a cumulative sum would need one
random number instead of V, but there a rounding difference in any logit moves the outcome; here only a near tie can.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loopserve.dialogue import PositionLogprobs, SamplingParams, TokenId, TokenLogprob
from loopserve.plan import SampleOrder
from loopserve.transfer import HostCopy, on_device

_GREEDY_BELOW = 1e-5  # a lower temperature would leave float32's range and means argmax anyway
_TOP_WIDTH = 20  # OpenAI's largest `top_logprobs`; a fixed width keeps ties independent of the other rows
_WORD = (1 << 64) - 1
_GOLDEN = (
    0x9E3779B97F4A7C15  # splitmix64 (Steele, Lea, Flood, OOPSLA 2014): increment and the finaliser's two multipliers
)
_MIX_A = 0xBF58476D1CE4E5B9
_MIX_B = 0x94D049BB133111EB


@dataclass(frozen=True, slots=True)
class Draw:
    """What one `SampleOrder` drew; `logprobs` where its `top_logprobs` is not None."""

    token_id: TokenId
    logprobs: PositionLogprobs | None = None


@dataclass(frozen=True, slots=True)
class PendingDraws:
    """What was drawn, on a device that may still be drawing it."""

    token_ids: Tensor  # int64 [R]
    orders: tuple[SampleOrder, ...]
    top_width: int  # alternatives a row that were brought over; 0: no log-probabilities
    on_host: HostCopy

    def result(self) -> tuple[Draw, ...]:
        """Wait for it."""
        return _draws(self.on_host.wait().tolist(), self.orders, self.top_width)


def draw(logits: Tensor, orders: Sequence[SampleOrder]) -> PendingDraws:
    """Draw one token a row, without waiting for the device; the copy to the host, one for the whole batch, is queued.

    `logits` is `[R, V]`, any float dtype, and is not modified; `orders[r]` says how row r is drawn. Every token id in the orders must be
    below V: the engine refuses others at submission.
    """
    assert logits.ndim == 2 and logits.shape[0] == len(orders), "one order a row"
    touched = [_is_processed(order) for order in orders]
    if not any(touched) and all(_is_greedy(o.params) and o.params.top_logprobs is None for o in orders):
        return _pending(logits.argmax(dim=-1), None, orders)
    scores = logits.to(torch.float32, copy=any(touched))
    raw_logprobs = _raw_logprobs(scores, orders)
    for row, order in enumerate(orders):
        if touched[row]:
            _process(scores[row], order)
    return _pending(_choose(scores, orders), raw_logprobs, orders)


def _is_greedy(params: SamplingParams) -> bool:
    return params.temperature < _GREEDY_BELOW or params.top_k == 1


def _is_processed(order: SampleOrder) -> bool:
    params = order.params
    return bool(
        order.banned_ids
        or params.logit_bias
        or params.repetition_penalty != 1.0
        or (order.output_ids and (params.presence_penalty != 0.0 or params.frequency_penalty != 0.0))
    )


def _process(scores: Tensor, order: SampleOrder) -> None:
    """Apply bans, bias and penalties to one row `[V]`, in place."""
    params, device = order.params, scores.device
    if order.banned_ids:
        scores.index_fill_(0, on_device(order.banned_ids, device), -torch.inf)
    if params.logit_bias:
        bias = dict(params.logit_bias)
        scores[on_device(list(bias), device)] += on_device(list(bias.values()), device)
    if params.repetition_penalty != 1.0:
        seen_ids = list({*order.prompt_ids, *order.output_ids})
        if seen_ids:
            seen = on_device(seen_ids, device)
            values, penalty = scores[seen], params.repetition_penalty
            scores[seen] = torch.where(values < 0, values * penalty, values / penalty)
    if order.output_ids and (params.presence_penalty != 0.0 or params.frequency_penalty != 0.0):
        counts = Counter(order.output_ids)
        penalties = [params.presence_penalty + count * params.frequency_penalty for count in counts.values()]
        scores[on_device(list(counts), device)] -= on_device(penalties, device)


def _choose(scores: Tensor, orders: Sequence[SampleOrder]) -> Tensor:
    """The token of each row `[R]` int64, on the device of `scores` `[R, V]`, which is not modified."""
    token_ids = scores.argmax(dim=-1)
    drawn = [row for row, order in enumerate(orders) if not _is_greedy(order.params)]
    if not drawn:
        return token_ids
    device, params = scores.device, [orders[row].params for row in drawn]
    rows = on_device(drawn, device)
    temperatures = on_device([p.temperature for p in params], device)
    picked = scores[rows]  # a copy, [D, V]
    # Shifted by its maximum first, so that no temperature overflows the likely tokens.
    picked.sub_(picked.amax(dim=-1, keepdim=True)).div_(temperatures[:, None])
    _keep_top_k(picked, [p.top_k for p in params])
    _keep_top_p(picked, [p.top_p for p in params])
    _keep_min_p(picked, [p.min_p for p in params])
    picked += _gumbel_noise(picked, [orders[row] for row in drawn])
    token_ids[rows] = picked.argmax(dim=-1)
    return token_ids


def _keep_top_k(scores: Tensor, top_ks: Sequence[int]) -> None:
    """Mask all but each row's k largest, in place; equals of the k-th stay, as in transformers."""
    asking = [row for row, k in enumerate(top_ks) if 0 < k < scores.shape[-1]]
    if not asking:
        return
    rows = on_device(asking, scores.device)
    ranks = on_device([top_ks[row] - 1 for row in asking], scores.device)
    part = scores[rows]
    largest = part.topk(max(top_ks[row] for row in asking), dim=-1).values
    scores[rows] = part.masked_fill(part < largest.gather(-1, ranks[:, None]), -torch.inf)


def _keep_top_p(scores: Tensor, top_ps: Sequence[float]) -> None:
    """Mask all but each row's smallest set of most likely tokens that holds `top_p`, in place; equals fall to the lower id."""
    asking = [row for row, p in enumerate(top_ps) if p < 1.0]
    if not asking:
        return
    rows = on_device(asking, scores.device)
    shares = on_device([top_ps[row] for row in asking], scores.device, dtype=torch.float64)
    part = scores[rows]
    ordered, ids = part.sort(dim=-1, descending=True, stable=True)
    # float64: over 150 000 entries a float32 sum is off by more than the tail holds.
    weights = ordered.double().softmax(dim=-1)
    outside = weights.cumsum(dim=-1) - weights >= shares[:, None]  # what stands before it already holds the share
    outside[:, 0] = False
    scores[rows] = part.masked_fill(torch.zeros_like(outside).scatter_(-1, ids, outside), -torch.inf)


def _keep_min_p(scores: Tensor, min_ps: Sequence[float]) -> None:
    """Mask what is less likely than `min_p` times each row's most likely token, in place."""
    asking = [row for row, p in enumerate(min_ps) if p > 0.0]
    if not asking:
        return
    rows = on_device(asking, scores.device)
    floors = on_device([min_ps[row] for row in asking], scores.device).log()
    part = scores[rows]
    scores[rows] = part.masked_fill(part < part.amax(dim=-1, keepdim=True) + floors[:, None], -torch.inf)


def _gumbel_noise(like: Tensor, orders: Sequence[SampleOrder]) -> Tensor:
    """Standard Gumbel noise `[D, V]` float32: entry (r, v) is a hash of row r's (seed, output_index) and v, the same on every device."""
    keys = [_signed(_mix(_mix(order.seed) + order.output_index)) for order in orders]
    ids = torch.arange(1, like.shape[-1] + 1, device=like.device)
    bits = on_device(keys, like.device)[:, None] + ids * _signed(_GOLDEN)  # [D, V] int64, wraps
    bits = (bits ^ _shifted(bits, 30)).mul_(_signed(_MIX_A))
    bits = (bits ^ _shifted(bits, 27)).mul_(_signed(_MIX_B))
    bits ^= _shifted(bits, 31)
    # 52 bits and a half: exact in float64 and never 0 or 1. Float32's 24 bits would give the end of the range once in a hundred draws
    # from 150 000 tokens, and that token would win whatever its logit.
    uniform = _shifted(bits, 12).double().add_(0.5).mul_(2.0**-52)
    return uniform.log_().neg_().log_().neg_().float()


def _shifted(bits: Tensor, count: int) -> Tensor:
    """Logical right shift; torch's own keeps the sign."""
    return (bits >> count).bitwise_and_((1 << (64 - count)) - 1)


def _mix(value: int) -> int:
    """One splitmix64 output for the state `value`, unsigned 64 bits."""
    value = (value + _GOLDEN) & _WORD
    value = ((value ^ (value >> 30)) * _MIX_A) & _WORD
    value = ((value ^ (value >> 27)) * _MIX_B) & _WORD
    return value ^ (value >> 31)


def _signed(word: int) -> int:
    """The int64 with the bits of an unsigned word."""
    return word - (1 << 64) if word >> 63 else word


@dataclass(frozen=True, slots=True)
class _RawLogprobs:
    """Log-softmax `[P, V]` of the rows that asked for it, before any processor."""

    rows: tuple[int, ...]
    width: int
    values: Tensor


def _raw_logprobs(scores: Tensor, orders: Sequence[SampleOrder]) -> _RawLogprobs | None:
    widths = {r: o.params.top_logprobs for r, o in enumerate(orders) if o.params.top_logprobs is not None}
    if not widths:
        return None
    rows = tuple(widths)
    values = scores[on_device(rows, scores.device)].log_softmax(dim=-1)
    return _RawLogprobs(rows, min(max(_TOP_WIDTH, *widths.values()), scores.shape[-1]), values)


def _pending(token_ids: Tensor, raw: _RawLogprobs | None, orders: Sequence[SampleOrder]) -> PendingDraws:
    """Begin to bring tokens `[R]` and log-probabilities over in one copy: float64 holds ids and float32 values alike, exactly."""
    if raw is None:
        return PendingDraws(token_ids, tuple(orders), 0, HostCopy(token_ids))
    chosen = raw.values.gather(-1, token_ids[on_device(raw.rows, token_ids.device)][:, None])
    top = raw.values.topk(raw.width, dim=-1)
    parts = (token_ids, chosen, top.values, top.indices)
    flat = torch.cat([part.reshape(-1).double() for part in parts])
    return PendingDraws(token_ids, tuple(orders), raw.width, HostCopy(flat))


def _draws(flat: Sequence[float], orders: Sequence[SampleOrder], width: int) -> tuple[Draw, ...]:
    """The draws from what `_pending` brought over."""
    num_rows = len(orders)
    draws = [Draw(int(token_id)) for token_id in flat[:num_rows]]
    asking = [row for row, order in enumerate(orders) if order.params.top_logprobs is not None] if width else []
    values_at = num_rows + len(asking)
    ids_at = values_at + len(asking) * width
    for place, row in enumerate(asking):
        start = place * width
        count = min(orders[row].params.top_logprobs or 0, width)
        alternatives = tuple(
            TokenLogprob(int(flat[ids_at + i]), flat[values_at + i]) for i in range(start, start + count)
        )
        token_id = draws[row].token_id
        draws[row] = Draw(token_id, PositionLogprobs(TokenLogprob(token_id, flat[num_rows + place]), alternatives))
    return tuple(draws)
