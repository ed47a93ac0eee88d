"""Which rows of a chunk are scored densely: those that choose its lines, and others that measure the choice. Host only.

A sample depends on the seed, the size of the chunk and the config, never on load or on what else is in the step.
"""

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

from loopserve.config import BLOCK_TOKENS, PrefillSparsity


@dataclass(frozen=True, slots=True)
class RowSample:
    """Row indices inside a chunk, ascending; no row is in both."""

    select: tuple[int, ...]  # their weights choose the lines
    heldout: tuple[int, ...]  # on these coverage is measured


def sample_rows(num_rows: int, config: PrefillSparsity, seed: int) -> RowSample:
    """Draw the sampled and the held-out rows of a chunk of `num_rows` >= 1 rows.

    "stratified": the last block, and one random row from each of equal strata of what lies before it; "random": anywhere;
    "last": the newest rows. Held-out rows are stratified over all other rows. A chunk with fewer rows than both samples want is shared out
    in their proportion; a chunk of one block or less holds nothing out (all its rows are among the last, which read everything).
    """
    assert num_rows >= 1, "a chunk has at least one row"
    rng = random.Random(seed)
    forced = min(BLOCK_TOKENS, num_rows, config.sampled_rows) if config.row_sampling == "stratified" else 0
    wanted = config.sampled_rows + config.heldout_rows
    num_heldout = min(config.heldout_rows, max(1, num_rows * config.heldout_rows // wanted))
    num_heldout = min(num_heldout, num_rows - max(forced, 1))
    num_select = min(config.sampled_rows, num_rows - num_heldout)
    if config.row_sampling == "last":
        select = list(range(num_rows - num_select, num_rows))
    elif config.row_sampling == "random":
        select = rng.sample(range(num_rows), num_select)
    else:
        before = range(num_rows - forced)
        select = [*_one_of_each_stratum(before, num_select - forced, rng), *range(num_rows - forced, num_rows)]
    chosen = set(select)
    others = [row for row in range(num_rows) if row not in chosen]
    return RowSample(tuple(sorted(select)), tuple(_one_of_each_stratum(others, num_heldout, rng)))


def _one_of_each_stratum(rows: Sequence[int], num_strata: int, rng: random.Random) -> list[int]:
    bounds = [len(rows) * stratum // num_strata for stratum in range(num_strata + 1)] if num_strata else [0]
    return [rows[rng.randrange(low, high)] for low, high in itertools.pairwise(bounds)]
