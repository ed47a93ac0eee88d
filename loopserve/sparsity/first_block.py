"""The "first_block" decode method: chosen as "progressive" does, but once per turn and never again. It is the baseline of that one.

Its numbers are its own, as one query is not enough for a choice that has to last for a whole answer.
"""

from loopserve.config import DecodeSparsity
from loopserve.methods import DECODE_RULES
from loopserve.sparsity.decode import TokenChoice
from loopserve.sparsity.observation import Observation
from loopserve.sparsity.progressive import heaviest, newest_scores

_POOLING_TOKENS = 7


class FirstBlock:
    """Top B by the scores of the turn's last prefill rows, max-pooled."""

    rule = DECODE_RULES["first_block"]

    def choose(self, seen: Observation, *, config: DecodeSparsity, layer: int, num_layers: int) -> TokenChoice:
        """See `DecodeMethod.choose`."""
        scores = newest_scores(seen, self.rule.num_observed_rows(config), _POOLING_TOKENS)
        return heaviest(scores, seen.layout.budget_tokens, coverage_alpha=config.coverage_alpha)
