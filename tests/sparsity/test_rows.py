"""Row sampling."""

import itertools
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from loopserve.config import BLOCK_TOKENS, PrefillSparsity
from loopserve.sparsity import sample_rows

CONFIGS = st.builds(
    PrefillSparsity,
    sampled_rows=st.integers(1, 80),
    heldout_rows=st.integers(0, 20),
    row_sampling=st.sampled_from(["stratified", "random", "last"]),
)


@given(st.integers(1, 600), CONFIGS, st.integers(0, 2**40))
def test_samples_are_disjoint_rows_of_the_chunk_within_their_sizes(num_rows: int, config: PrefillSparsity, seed: int):
    rows = sample_rows(num_rows, config, seed)
    both = rows.select + rows.heldout
    assert len(set(both)) == len(both)
    assert all(0 <= row < num_rows for row in both)
    assert 1 <= len(rows.select) <= config.sampled_rows
    assert len(rows.heldout) <= config.heldout_rows
    assert list(rows.select) == sorted(rows.select)
    if num_rows >= config.sampled_rows + config.heldout_rows + BLOCK_TOKENS:
        assert (len(rows.select), len(rows.heldout)) == (config.sampled_rows, config.heldout_rows)


@given(st.integers(1, 600), CONFIGS, st.integers(0, 2**40))
def test_a_sample_is_fixed_by_size_config_and_seed(num_rows: int, config: PrefillSparsity, seed: int):
    assert sample_rows(num_rows, config, seed) == sample_rows(num_rows, replace(config), seed)


def test_another_seed_draws_other_rows():
    assert sample_rows(512, PrefillSparsity(), 1) != sample_rows(512, PrefillSparsity(), 2)


@given(st.integers(1, 600), st.integers(0, 2**40))
def test_stratified_rows_always_hold_the_last_block_and_never_hold_it_out(num_rows: int, seed: int):
    rows = sample_rows(num_rows, PrefillSparsity(), seed)
    last_block = set(range(max(0, num_rows - BLOCK_TOKENS), num_rows))
    assert last_block <= set(rows.select)
    assert bool(rows.heldout) == (num_rows > BLOCK_TOKENS)


def test_stratified_rows_reach_every_part_of_the_chunk():
    rows = sample_rows(512, PrefillSparsity(sampled_rows=64), 5).select
    assert max(after - before for before, after in itertools.pairwise(rows)) <= 2 * -(-496 // 48)


def test_last_rows_are_the_last():
    config = PrefillSparsity(sampled_rows=8, row_sampling="last")
    assert sample_rows(100, config, 3).select == tuple(range(92, 100))
