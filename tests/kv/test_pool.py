"""Blocks: handed out, shared, kept for their content, and never lost."""

import itertools
from itertools import pairwise

import pytest

from loopserve.kv.pool import BlockPool
from loopserve.plan import NULL_BLOCK


@pytest.fixture
def reclaimed() -> list[int]:
    return []


def pool_of(num_blocks: int, reclaimed, *, makes_runs: bool = True) -> BlockPool:
    return BlockPool(range(1, num_blocks), on_reclaim=reclaimed.append, makes_runs=makes_runs)


def test_every_block_but_the_null_block_is_handed_out_once(reclaimed):
    pool = pool_of(6, reclaimed)
    blocks = [pool.allocate() for _ in range(5)]
    assert sorted(blocks) == [1, 2, 3, 4, 5]
    assert NULL_BLOCK not in blocks
    assert pool.allocate() is None
    assert pool.num_free == 0 and pool.num_usable == 5
    pool.check()


def test_block_follows_the_one_before_it_while_that_is_free(reclaimed):
    pool = pool_of(40, reclaimed)
    first = pool.allocate()
    second = pool.allocate(first)
    third = pool.allocate(second)
    assert [second - first, third - second] == [1, 1]
    assert pool.allocate(first) not in (second, None)


def test_sequences_that_grow_in_turn_each_keep_a_run(reclaimed):
    pool = pool_of(300, reclaimed)
    runs = [[pool.allocate()] for _ in range(4)]
    for _ in range(40):
        for run in runs:
            run.append(pool.allocate(run[-1]))
    assert all(b - a == 1 for run in runs for a, b in itertools.pairwise(run))


def test_block_goes_when_its_last_holder_does(reclaimed):
    pool = pool_of(3, reclaimed)
    block = pool.allocate()
    pool.retain(block)
    pool.release(block)
    assert pool.count(block) == 1 and pool.num_free == 1
    pool.release(block)
    assert pool.count(block) == 0 and pool.num_free == 2
    assert reclaimed == []  # it was never marked: nobody needs to forget it


def test_marked_block_is_kept_and_comes_back(reclaimed):
    pool = pool_of(3, reclaimed)
    block = pool.allocate()
    pool.mark(block)
    pool.release(block)
    assert (pool.num_free, pool.num_kept) == (2, 1)
    pool.retain(block)
    assert (pool.count(block), pool.num_kept) == (1, 0)
    assert reclaimed == []
    pool.check()


def test_kept_blocks_are_reclaimed_last_and_the_least_recently_released_first_where_no_runs_are_made(reclaimed):
    pool = pool_of(5, reclaimed, makes_runs=False)
    first, second, third, never_marked = (pool.allocate() for _ in range(4))
    for block in (first, second, third):
        pool.mark(block)
    for block in (second, first, third, never_marked):
        pool.release(block)
    pool.retain(second)  # used again, so released again later
    pool.release(second)
    assert pool.allocate() == never_marked
    assert reclaimed == []
    assert [pool.allocate() for _ in range(3)] == [first, third, second] == reclaimed
    pool.check()


def test_reclaimed_block_is_not_kept_again_unless_marked_again(reclaimed):
    pool = pool_of(2, reclaimed)
    block = pool.allocate()
    pool.mark(block)
    pool.release(block)
    assert pool.allocate() == block
    pool.release(block)
    assert (pool.num_free, pool.num_kept) == (1, 0)
    pool.check()


@pytest.mark.parametrize("misuse", ["release", "retain", "mark"])
def test_free_block_cannot_be_released_retained_or_marked(misuse, reclaimed):
    pool = pool_of(3, reclaimed)
    with pytest.raises(AssertionError, match="block 1"):
        getattr(pool, misuse)(1)


def grow(pool: BlockPool, num_blocks: int) -> list[int]:
    blocks: list[int] = []
    for _ in range(num_blocks):
        blocks.append(pool.allocate(blocks[-1] if blocks else None))
    return blocks


def test_sequences_are_runs_also_in_a_pool_full_of_kept_prefixes(reclaimed):
    pool = pool_of(101, reclaimed)
    for _ in range(10):
        blocks = grow(pool, 25)
        assert blocks == list(range(blocks[0], blocks[0] + 25))
        for block in blocks[:-1]:  # the last one is partly filled, and so goes back as free
            pool.mark(block)
        for block in reversed(blocks):
            pool.release(block)
        pool.check()
    assert reclaimed


def test_new_run_leaves_room_to_the_one_before_it(reclaimed):
    pool = pool_of(641, reclaimed)
    starts = sorted(pool.allocate() for _ in range(8))
    assert {after - before for before, after in pairwise(starts)} == {80}


def test_run_ends_where_another_sequence_is_held(reclaimed):
    pool = pool_of(40, reclaimed)
    first, second = pool.allocate(), pool.allocate()
    blocks = [first]
    while len(blocks) < 37:
        blocks.append(pool.allocate(blocks[-1]))
    assert second not in blocks
    assert len(set(blocks)) == 37
    pool.check()
