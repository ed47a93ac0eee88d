"""What one layer of a turn offers to a choice of tokens: recent queries, the cached keys, and which columns are open. Hop 8 of the turn.

Owns how scores are drawn from queries and keys. Knows nothing about how a method ranks, or about what was chosen before.
"""

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import max_pool1d

from loopserve.kernels import KeySketch, sketch_scores, token_scores
from loopserve.methods import Layout


@dataclass(frozen=True, slots=True)
class Observation:
    """One layer at the moment of a choice at N columns. Hs lists are chosen: Hkv, or H where each query head has its own."""

    layout: Layout
    queries: Tensor  # [W, H, D], newest first
    positions: Tensor  # int64 [W]
    key_pool: Tensor  # [S, Hkv, D]
    slots: Tensor  # int64 [N]
    scale: float
    num_lists: int  # Hs
    accumulated: Tensor | None = None  # float32 [Hs, N]: summed weights, if the rule wants them; -inf: left out
    scored: Tensor | None = None  # float32 [H, N]: weights of the newest `num_scored` rows, if they are known
    num_scored: int = 0
    sketch: KeySketch | None = None  # of the keys, to be read instead of them
    sketch_slots: Tensor | None = None  # int64 [N]: where the columns lie in it; None: where they lie in the pool

    @property
    def columns_in_sketch(self) -> Tensor:
        """Where the columns lie in the sketch, int64 [N]."""
        return self.slots if self.sketch_slots is None else self.sketch_slots

    def weights(self, num_rows: int) -> Tensor:
        """Attention weight that the newest `num_rows` rows (or as many as there are) give to each column, float32 [H, N].

        Dense, or as far as a sketch of the keys tells.
        """
        if self.scored is not None and self.num_scored == num_rows:
            return self.scored
        if self.sketch is not None:
            queries, lengths = self.queries[:num_rows], self.positions[:num_rows] + 1
            slots = self.columns_in_sketch.expand(len(queries), -1)
            num_heads = queries.shape[1]
            by_row = sketch_scores(queries, self.sketch, slots, lengths, num_lists=num_heads, scale=self.scale)
            return by_row.weights.sum(dim=0)
        first = 0 if self.scored is None or self.num_scored > num_rows else self.num_scored
        rows = slice(first, num_rows)
        weights = token_scores(self.queries[rows], self.key_pool, self.slots, self.positions[rows], scale=self.scale)
        return weights if self.scored is None or first == 0 else weights + self.scored

    def candidates(self, per_column: Tensor) -> Tensor:
        """The open columns of [X, N]: [X, C]. What is always read must not leak into its neighbours where scores are pooled."""
        return per_column[:, self.layout.num_sinks : self.layout.recent_start]

    def per_list(self, per_head: Tensor) -> Tensor:
        """Scores [H, X] of query heads, summed over those that read one list: [Hs, X]."""
        return summed_per_list(per_head, self.num_lists)


def summed_per_list(per_head: Tensor, num_lists: int) -> Tensor:
    """Scores [H, X] of query heads, summed over those that read one of `num_lists` lists: [Hs, X]."""
    num_heads, num_scores = per_head.shape
    return per_head.reshape(num_lists, num_heads // num_lists, num_scores).sum(dim=1)


def max_pooled(scores: Tensor, num_tokens: int) -> Tensor:
    """Each of [X, C] raised to the largest of the `num_tokens` (odd) around it: what matters seldom stands alone."""
    if scores.shape[1] == 0:
        return scores
    return max_pool1d(scores[None], num_tokens, stride=1, padding=num_tokens // 2)[0]
