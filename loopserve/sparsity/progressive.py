"""The "progressive" decode method: the heaviest tokens, chosen again while the answer grows. Source: phase 2 of arXiv 2507.13681."""

from torch import Tensor

from loopserve.config import DecodeSparsity
from loopserve.methods import DECODE_RULES
from loopserve.sparsity.decode import TokenChoice
from loopserve.sparsity.observation import Observation, max_pooled


class Progressive:
    """Top B by the newest queries' weight, max-pooled; again after a few early outputs, then every `refresh_outputs`."""

    rule = DECODE_RULES["progressive"]

    def choose(self, seen: Observation, *, config: DecodeSparsity, layer: int, num_layers: int) -> TokenChoice:
        """See `DecodeMethod.choose`; every layer and list gets the same budget."""
        scores = newest_scores(seen, config.scoring_rows, config.pooling_tokens)
        return heaviest(scores, seen.layout.budget_tokens, coverage_alpha=config.coverage_alpha)


def newest_scores(seen: Observation, num_rows: int, pooling_tokens: int) -> Tensor:
    """Weight that the newest `num_rows` queries give to each candidate, max-pooled over positions, float32 [Hs, C]."""
    weights = seen.candidates(seen.weights(num_rows))
    return seen.per_list(max_pooled(weights, pooling_tokens))


def heaviest(scores: Tensor, budget_tokens: int, *, coverage_alpha: float | None = None) -> TokenChoice:
    """The B' = min(budget_tokens, C) best candidates of float32 [Hs, C], heaviest first.

    With `coverage_alpha`, only as many of them are valid as it takes to hold that share of all candidates' scores.
    """
    weights, indices = scores.topk(min(budget_tokens, scores.shape[1]), dim=1, sorted=True)
    if coverage_alpha is None:
        return TokenChoice(indices)
    before = weights.cumsum(dim=1) - weights
    return TokenChoice(indices, before < coverage_alpha * scores.sum(dim=1, keepdim=True))
