"""Phase 2 of one turn: which cached tokens each KV head reads, scored by the newest queries. Hop 8 of the turn.

Owns the token selection of a turn, layer by layer, on the device. Knows nothing about how a method ranks tokens
(`progressive.py`, ...), about blocks or about other turns. The columns of a layer are shared out as `loopserve.methods.Layout` draws
it; nothing overlaps, so every column is read at most once. Source: phase 2 of arXiv 2507.13681.
"""

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from loopserve.config import DecodeSparsity
from loopserve.kernels import KeySketch, LeftOut, sketch_scores, token_scores
from loopserve.methods import DecodeRule
from loopserve.sparsity.observation import Observation, summed_per_list
from loopserve.transfer import on_device

_ROWS_AT_A_TIME = 64  # of a prefill chunk when weights are added up: bounds the intermediate [G, rows, N]


@dataclass(frozen=True, slots=True)
class TokenChoice:
    """Chosen candidates of each list, distinct where valid."""

    indices: Tensor  # int64 [Hs, B']
    valid: Tensor | None = None  # bool [Hs, B']; False: padding, not chosen; None: all are chosen


class DecodeMethod(Protocol):
    """A way to choose tokens; stateless."""

    @property
    def rule(self) -> DecodeRule:
        """What the host knows of it: when it chooses, and what it keeps beside the chosen."""

    def choose(self, seen: Observation, *, config: DecodeSparsity, layer: int, num_layers: int) -> TokenChoice:
        """Choose at most `seen.layout.budget_tokens` of the C candidates for each list, in the mean over lists and layers.

        `layer` counts those that choose: `config.dense_layers` are left out.
        """


@dataclass(frozen=True, slots=True)
class _Choice:
    """What one layer reads until it chooses again."""

    columns: Tensor  # int64 [Hs, num_sinks + B']: sinks, then chosen
    valid: Tensor | None  # bool, shaped as columns; None: all are read
    recent_start: int


class TurnSelection:
    """The token selection of one turn, all layers, and the newest queries that will score the next one.

    Hs below is the number of lists: Hkv, or H where `config.select_per` is "query_head". Every method mutates at most this object.
    """

    def __init__(
        self,
        num_layers: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        config: DecodeSparsity,
        method: DecodeMethod,
        *,
        device: torch.device | str,
        dtype: torch.dtype,
        value_sums: Tensor | None = None,
    ) -> None:
        """`value_sums` float32 [L, Hkv, D]: where the caller adds up the values of all tokens once a choice has begun it; see `choose`."""
        assert num_heads % num_kv_heads == 0, "query heads are no multiple of KV heads"
        self.config = config
        self._method = method
        self._num_heads = num_heads
        self._num_lists = num_kv_heads if config.select_per == "kv_head" else num_heads
        observed = 0 if method.rule.accumulates else method.rule.num_observed_rows(config)
        self._num_rows = max(config.scoring_rows, observed)
        self._queries = torch.zeros((num_layers, self._num_rows, num_heads, head_dim), device=device, dtype=dtype)
        self._positions = torch.zeros((num_layers, self._num_rows), device=device, dtype=torch.int64)
        self._sparse_layers = [layer for layer in range(num_layers) if layer not in config.dense_layers]
        # Host counts per layer: layers record and choose one after the other within a step.
        self._num_recorded = [0] * num_layers
        self._num_measured = [0] * num_layers  # of these, what is older than the choice in use, or measured on it
        self._choices: list[_Choice | None] = [None] * num_layers
        self._accumulated: list[Tensor | None] = [None] * num_layers  # summed weights, float32 [Hs, N so far]
        self._left_out: list[Tensor | None] = [None] * num_layers  # log of the weight that is not read, float32 [1, H]
        self._value_sums = value_sums

    @property
    def device_bytes(self) -> int:
        """What its tensors keep alive on their device; value sums are the caller's. May be asked from any thread."""
        chosen = [tensor for choice in self._choices if choice is not None for tensor in (choice.columns, choice.valid)]
        tensors = [self._queries, self._positions, *self._accumulated, *self._left_out, *chosen]
        storages = (tensor.untyped_storage() for tensor in tensors if tensor is not None)
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    def observe(
        self, layer: int, query: Tensor, positions: Tensor, key_pool: Tensor, slots: Tensor, *, scale: float
    ) -> None:
        """Watch rows of the prefill: query [t, H, D] at `positions` int64 [t], ascending; their keys are stored in `slots` int64 [N]."""
        self.record(layer, query, positions)
        if self._method.rule.accumulates:
            sums = self._grown(layer, slots.shape[0])
            for rows in range(0, query.shape[0], _ROWS_AT_A_TIME):
                part = slice(rows, rows + _ROWS_AT_A_TIME)
                weights = token_scores(query[part], key_pool, slots, positions[part], scale=scale)
                sums += summed_per_list(weights, self._num_lists)

    def record(self, layer: int, query: Tensor, positions: Tensor) -> None:
        """Keep the newest query rows of a layer: query [t, H, D], at `positions` int64 [t], ascending."""
        rows = self._num_rows
        num_new = query.shape[0]
        query, positions = query[-rows:], positions[-rows:]
        at = (self._num_recorded[layer] + num_new - query.shape[0]) % rows
        head = min(query.shape[0], rows - at)  # the ring's end may split the new rows
        for ring, new in ((self._queries[layer], query), (self._positions[layer], positions)):
            ring[at : at + head] = new[:head]
            if head < new.shape[0]:
                ring[: new.shape[0] - head] = new[head:]
        self._num_recorded[layer] += num_new

    def choose(
        self, layer: int, key_pool: Tensor, value_pool: Tensor, slots: Tensor, *, budget_tokens: int, scale: float
    ) -> None:
        """Choose what a layer reads of its N = len(slots) columns, at the end of the prefill. Pools [S, Hkv, D], slots int64 [N].

        Begins the layer's sum of values, where their mean is wanted; whoever stores a later token adds that one's.
        """
        self._choose(layer, self._observation(layer, key_pool, slots, budget_tokens=budget_tokens, scale=scale))
        if self._value_sums is not None and self._method.rule.estimates_left_out(self.config):
            self._value_sums[layer] = value_pool[slots].sum(dim=0, dtype=torch.float32)

    def refresh(
        self,
        layer: int,
        key_pool: Tensor,
        slots: Tensor,
        *,
        budget_tokens: int,
        scale: float,
        measure: bool = True,
        choose: bool = True,
        sketch: KeySketch | None = None,
        sketch_slots: Tensor | None = None,
    ) -> Tensor | None:
        """Say how good a layer's choice was, and choose again from its N = len(slots) columns.

        Returns the share of dense weight that the choice in use held under the queries recorded since it was made or last measured
        (the newest `config.scoring_rows` of them), float32 [H]; None where none is in use, none was recorded, or `measure` is off.
        Where every step chooses, the newest query is measured on what it is about to read. With a `sketch` of the keys, a choice reads
        that instead of them, at `sketch_slots` where these differ; one that lasts longer than the step takes the keys where they are all
        read to measure.
        """
        seen = self._observation(layer, key_pool, slots, budget_tokens=budget_tokens, scale=scale)
        seen = replace(seen, sketch_slots=sketch_slots)
        num_new = min(self._num_recorded[layer] - self._num_measured[layer], self.config.scoring_rows)
        if choose and self._method.rule.chooses_every_step(self.config):
            if sketch is not None and self._method.rule.estimates_left_out(self.config):
                self._choose_and_weigh(layer, seen, sketch)
            else:
                self._choose(layer, replace(seen, sketch=sketch))
            choose, num_new = False, 1
        seen = replace(seen, sketch=None if measure else sketch)
        in_use, coverage = self._choices[layer], None
        if measure and in_use is not None and num_new > 0:
            weights = token_scores(seen.queries[:num_new], key_pool, slots, seen.positions[:num_new], scale=scale)
            coverage = (self._held_weight(weights, in_use) / num_new).clamp(max=1.0)  # rounding may exceed
            self._num_measured[layer] = self._num_recorded[layer]
            seen = replace(seen, scored=weights, num_scored=num_new)
        if choose:
            self._choose(layer, seen)
        return coverage

    def left_out(self, layer: int, num_tokens: int) -> LeftOut | None:
        """What stands for those of `num_tokens` columns that a layer does not read; None where nobody weighed them."""
        log_weight = self._left_out[layer]
        if log_weight is None:
            return None
        assert self._value_sums is not None, "a mean is wanted, but nobody adds up values"
        return LeftOut(log_weight, (self._value_sums[layer] / num_tokens)[None])

    def note_read(self, layer: int, query: Tensor, key_pool: Tensor, slots: Tensor, *, scale: float) -> None:
        """Add up the weights that a decode row [1, H, D] gave to the tokens that it read, where the method wants them."""
        if not self._method.rule.accumulates:
            return
        columns, valid = self.kept_columns(layer, slots.shape[0])  # [Hs, M]
        per_kv_head = self._num_lists // key_pool.shape[1]
        kv_head = torch.arange(self._num_lists, device=columns.device) // per_kv_head
        keys = key_pool[slots[columns], kv_head[:, None]].float()  # [Hs, M, D]
        rows = query[0].float().view(self._num_lists, -1, query.shape[2])  # [Hs, G, D]
        logits = rows @ keys.mT * scale  # [Hs, G, M]
        if valid is not None:
            logits = logits.masked_fill(~valid[:, None], -torch.inf)
        self._grown(layer, slots.shape[0]).scatter_add_(1, columns, logits.softmax(dim=2).sum(dim=1))

    def kept_columns(self, layer: int, num_columns: int) -> tuple[Tensor, Tensor | None]:
        """Columns that each list of a layer reads when N = `num_columns`: (int64 [Hs, M], valid bool [Hs, M] or None: all are)."""
        choice = self._choices[layer]
        assert choice is not None, "a layer must choose before it reads"
        recent = torch.arange(choice.recent_start, num_columns, device=choice.columns.device)
        recent = recent.expand(self._num_lists, -1)
        columns = torch.cat((choice.columns, recent), dim=1)
        if choice.valid is None:
            return columns, None
        return columns, torch.cat((choice.valid, torch.ones_like(recent, dtype=torch.bool)), dim=1)

    def _observation(
        self, layer: int, key_pool: Tensor, slots: Tensor, *, budget_tokens: int, scale: float
    ) -> Observation:
        """What the layer offers to a choice now, the recorded rows newest first."""
        rows, newest = self._num_rows, self._num_recorded[layer] - 1
        num_kept = min(self._num_recorded[layer], rows)
        ring = on_device([(newest - back) % rows for back in range(num_kept)], slots.device, dtype=torch.int64)
        return Observation(
            layout=self._method.rule.layout(slots.shape[0], budget_tokens, self.config),
            queries=self._queries[layer].index_select(0, ring),
            positions=self._positions[layer].index_select(0, ring),
            key_pool=key_pool,
            slots=slots,
            scale=scale,
            num_lists=self._num_lists,
            accumulated=self._grown(layer, slots.shape[0]) if self._method.rule.accumulates else None,
        )

    def _choose_and_weigh(self, layer: int, seen: Observation, sketch: KeySketch) -> None:
        """Choose by the newest query's sketch scores, and keep how much weight they give to all that is left out."""
        lengths = seen.positions[:1] + 1
        by_sketch = sketch_scores(
            seen.queries[:1], sketch, seen.columns_in_sketch[None], lengths, num_lists=self._num_heads, scale=seen.scale
        )
        weights = by_sketch.weights[0]  # [H, N]
        self._choose(layer, replace(seen, sketch=sketch, scored=weights, num_scored=1))
        choice = self._choices[layer]
        assert choice is not None, "it was made just now"
        share = (1.0 - self._held_weight(weights, choice)).clamp(min=0.0)  # rounding may exceed
        self._left_out[layer] = by_sketch.log_sum + share.log()[None]

    def _choose(self, layer: int, seen: Observation) -> None:
        self._left_out[layer] = None
        sparse = self._sparse_layers
        choice = self._method.choose(seen, config=self.config, layer=sparse.index(layer), num_layers=len(sparse))
        num_sinks = seen.layout.num_sinks
        sinks = torch.arange(num_sinks, device=seen.slots.device).expand(self._num_lists, -1)
        valid = choice.valid
        if valid is not None:
            valid = torch.cat((torch.ones_like(sinks, dtype=torch.bool), valid), dim=1)
        columns = torch.cat((sinks, choice.indices + num_sinks), dim=1)
        self._choices[layer] = _Choice(columns, valid, seen.layout.recent_start)
        if seen.accumulated is not None:  # what is left out now stays out
            sums = seen.candidates(seen.accumulated)
            kept = sums.gather(1, choice.indices)
            sums.fill_(-torch.inf).scatter_(1, choice.indices, kept)
        self._num_measured[layer] = self._num_recorded[layer]

    def _grown(self, layer: int, num_columns: int) -> Tensor:
        """The layer's accumulated weights [Hs, N], with nothing yet for columns that are new."""
        sums = self._accumulated[layer]
        if sums is None:
            sums = torch.zeros((self._num_lists, 0), device=self._queries.device)
        if sums.shape[1] < num_columns:
            sums = pad(sums, (0, num_columns - sums.shape[1]))
        self._accumulated[layer] = sums
        return sums

    def _held_weight(self, weight: Tensor, choice: _Choice) -> Tensor:
        """Weight of [H, N] that a choice reads, [H]."""
        per_list = self._num_heads // self._num_lists
        listed = weight.gather(1, choice.columns.repeat_interleave(per_list, dim=0))  # [H, ...]
        if choice.valid is not None:
            listed = listed.masked_fill(~choice.valid.repeat_interleave(per_list, dim=0), 0.0)
        return listed.sum(dim=1) + weight[:, choice.recent_start :].sum(dim=1)
