"""Block tables: what is shared, what is copied, what is exact, and what the prefix index may know."""

import pytest

from loopserve.config import BLOCK_TOKENS
from loopserve.kv.cache import BlockTable, KVCache, Provenance

TOKENS = list(range(100, 200))


@pytest.fixture
def cache():
    cache = KVCache(12, fingerprint="model")
    yield cache
    cache.check()


def grown(cache: KVCache, num_tokens: int, *, salt: str = "", exact: bool = True, tokens=TOKENS) -> BlockTable:
    table = cache.open(salt)
    grow(cache, table, num_tokens, exact=exact, tokens=tokens)
    return table


def grow(cache: KVCache, table: BlockTable, num_tokens: int, *, exact: bool = True, tokens=TOKENS) -> None:
    assert cache.reserve(table, num_tokens)
    cache.commit(table, tokens, num_tokens=num_tokens, exact=exact)


def matched_tokens(cache: KVCache, tokens=TOKENS, *, salt: str = "", max_tokens: int = 99) -> int:
    table = cache.match(tokens, salt, max_tokens=max_tokens)
    num_tokens = table.num_tokens
    cache.free(table)
    return num_tokens


def test_match_holds_the_full_exact_blocks_of_the_same_prefix(cache):
    source = grown(cache, 40)
    table = cache.match(TOKENS, "", max_tokens=99)
    assert table.blocks == source.blocks[:2]
    assert (table.num_tokens, table.exact_tokens) == (32, 32)
    assert [cache.pool.count(block) for block in source.blocks] == [2, 2, 1]


@pytest.mark.parametrize(("max_tokens", "expected"), [(15, 0), (16, 16), (31, 16), (32, 32), (33, 32)])
def test_match_stays_within_its_limit(cache, max_tokens, expected):
    grown(cache, 48)
    assert matched_tokens(cache, max_tokens=max_tokens) == expected


def test_match_ends_at_the_first_different_token_even_if_later_blocks_agree(cache):
    grown(cache, 64)
    assert matched_tokens(cache, [*TOKENS[:20], 0, *TOKENS[21:]]) == 16
    assert matched_tokens(cache, [0, *TOKENS[1:]]) == 0
    assert matched_tokens(cache, TOKENS[16:]) == 0, "the same block elsewhere is another block"


def test_nothing_is_shared_across_salts_or_fingerprints(cache):
    grown(cache, 64, salt="a")
    assert matched_tokens(cache, salt="a") == 64
    assert matched_tokens(cache, salt="b") == matched_tokens(cache, salt="") == 0
    assert cache.open("ab").seed != KVCache(2, fingerprint="modela").open("b").seed, "parts must not run together"


def test_approximate_blocks_and_what_follows_them_are_never_indexed(cache):
    table = grown(cache, 16)
    grow(cache, table, 40, exact=False)
    grow(cache, table, 64, exact=True)  # dense rows, but over an approximate context
    assert (table.num_tokens, table.exact_tokens) == (64, 16)
    assert [cache.provenance(block) for block in table.blocks] == [Provenance.EXACT] + [Provenance.APPROXIMATE] * 3
    assert matched_tokens(cache) == 16


def test_block_that_is_exact_only_in_part_is_approximate(cache):
    table = grown(cache, 20)
    assert cache.provenance(table.blocks[1]) is None, "not full yet"
    grow(cache, table, 32, exact=False)
    assert table.exact_tokens == 20
    assert cache.provenance(table.blocks[1]) is Provenance.APPROXIMATE


def test_block_filled_token_by_token_is_indexed_as_if_filled_at_once(cache):
    table = cache.open("")
    for num_tokens in range(1, 33):
        grow(cache, table, num_tokens)
    assert matched_tokens(cache) == 32
    assert len(table.hashes) == 2


def test_second_computation_of_a_prefix_is_not_indexed_twice(cache):
    first, second = grown(cache, 32), grown(cache, 32)
    assert first.hashes == second.hashes and not set(first.blocks) & set(second.blocks)
    cache.free(second)
    assert cache.pool.num_kept == 0, "the copy's content is not worth keeping"
    assert matched_tokens(cache) == 32


def test_fork_shares_full_blocks_and_copies_a_part_of_one(cache):
    source = grown(cache, 40)
    fork = cache.fork(source, 35)
    assert fork.blocks[:2] == source.blocks[:2]
    assert fork.blocks[2] not in source.blocks
    assert (fork.num_tokens, fork.exact_tokens) == (35, 35)
    (copy,) = cache.take_copies()
    assert (copy.source, copy.target) == (source.blocks[2], fork.blocks[2])
    assert cache.take_copies() == ()
    grow(cache, fork, 48)
    assert len(fork.hashes) == 3


def test_fork_at_a_blocks_edge_copies_nothing(cache):
    source = grown(cache, 40)
    assert cache.fork(source, 32).blocks == source.blocks[:2]
    assert cache.fork(source, 0).blocks == []
    assert cache.take_copies() == ()


def test_fork_keeps_track_of_what_is_approximate(cache):
    source = grown(cache, 20)
    grow(cache, source, 60, exact=False)
    fork = cache.fork(source, 50)
    assert (fork.exact_tokens, len(fork.hashes)) == (20, 1)
    shallow = cache.fork(source, 18)
    assert shallow.exact_tokens == 18
    grow(cache, shallow, 32)
    assert shallow.exact_tokens == 32, "its past is exact, whatever its source did later"


def test_fork_inside_a_block_fails_whole_when_no_block_is_free(cache):
    source = grown(cache, 40)
    while cache.pool.allocate() is not None:
        pass
    assert cache.fork(source, 35) is None
    assert [cache.pool.count(block) for block in source.blocks] == [1, 1, 1]
    assert cache.take_copies() == ()
    assert cache.fork(source, 32) is not None


def test_truncate_goes_on_in_its_own_unindexed_block_without_a_copy(cache):
    table = grown(cache, 40)
    blocks, epoch = list(table.blocks), table.epoch
    assert cache.truncate(table, 37)
    assert table.blocks == blocks
    assert (table.num_tokens, table.exact_tokens) == (37, 37)
    assert table.epoch != epoch, "a runner must read the table again"
    assert cache.take_copies() == ()


def test_truncate_inside_an_indexed_block_copies_it_and_leaves_the_index_whole(cache):
    table = grown(cache, 48)
    before = table.blocks[1]
    assert cache.truncate(table, 20)
    assert [(c.source, c.target) for c in cache.take_copies()] == [(before, table.blocks[1])]
    grow(cache, table, 32, tokens=[*TOKENS[:20], *range(12)])
    assert matched_tokens(cache) == 48, "what the table left is still there to be found"


def test_truncate_inside_a_shared_block_copies_it(cache):
    table = grown(cache, 16)
    grow(cache, table, 32, exact=False)
    fork = cache.fork(table, 32)
    assert cache.truncate(fork, 25)
    assert fork.blocks[1] != table.blocks[1]
    assert len(cache.take_copies()) == 1
    assert cache.pool.count(table.blocks[1]) == 1


def test_truncate_inside_its_own_approximate_block_writes_it_again(cache):
    table = grown(cache, 16)
    grow(cache, table, 48, exact=False)
    blocks = list(table.blocks)
    assert cache.truncate(table, 20)
    assert table.blocks == blocks[:2]
    assert cache.provenance(blocks[1]) is None, "no longer full"
    assert cache.take_copies() == ()


def test_truncate_that_needs_a_block_and_finds_none_changes_nothing(cache):
    table = grown(cache, 48)
    while cache.pool.allocate() is not None:
        pass
    blocks, epoch = list(table.blocks), table.epoch
    assert not cache.truncate(table, 20)
    assert (table.blocks, table.num_tokens, table.epoch) == (blocks, 48, epoch)
    assert cache.truncate(table, 16)
    assert table.blocks == blocks[:1]


def test_truncate_gives_back_reserved_room_too(cache):
    table = grown(cache, 16)
    assert cache.reserve(table, 80)
    assert cache.truncate(table, 16)
    assert len(table.blocks) == 1


def test_reserve_is_all_or_nothing(cache):
    table = grown(cache, 16)
    assert cache.num_blocks_missing(table, 16) == 0
    assert cache.num_blocks_missing(table, 17) == 1
    assert not cache.reserve(table, 16 * 12)
    assert len(table.blocks) == 1 and cache.pool.num_free == 10
    assert cache.reserve(table, 16 * 11)
    assert cache.pool.num_free == 0


def test_commit_outside_the_reserved_room_is_our_own_mistake(cache):
    table = grown(cache, 16)
    with pytest.raises(AssertionError, match="reserved room"):
        cache.commit(table, TOKENS, num_tokens=17, exact=True)


def test_freed_prefix_is_found_until_its_blocks_are_needed_from_its_end_on():
    cache = KVCache(12, fingerprint="model", makes_runs=False)
    cache.free(grown(cache, 3 * BLOCK_TOKENS))
    assert cache.pool.num_kept == 3
    assert matched_tokens(cache) == 48
    other = grown(cache, 9 * BLOCK_TOKENS, tokens=[7] * 200)
    assert matched_tokens(cache) == 32, "the end of a chain goes first: it is useless without its start"
    cache.free(other)
    cache.check()


def test_reclaimed_blocks_are_forgotten_by_the_index(cache):
    cache.free(grown(cache, 64))
    table = grown(cache, 11 * BLOCK_TOKENS, tokens=[7] * 200)
    assert matched_tokens(cache) == 0
    cache.free(table)
    assert cache.provenance(1) is Provenance.EXACT


def test_freed_table_can_be_filled_again(cache):
    table = grown(cache, 40)
    epoch = table.epoch
    cache.free(table)
    assert (table.blocks, table.hashes, table.num_tokens, table.exact_tokens) == ([], [], 0, 0)
    assert table.epoch != epoch
    grow(cache, table, 33)
    assert matched_tokens(cache) == 32


def test_copies_are_ordered_as_they_were_made(cache):
    source = grown(cache, 20)
    fork = cache.fork(source, 18)
    again = cache.fork(fork, 17)
    assert [(c.source, c.target) for c in cache.take_copies()] == [
        (source.blocks[1], fork.blocks[1]),
        (fork.blocks[1], again.blocks[1]),
    ]


# Two tiers.


@pytest.fixture
def tiers():
    cache = KVCache(8, num_host_blocks=5, fingerprint="model")
    yield cache
    cache.check()


def tiers_of(cache: KVCache, table: BlockTable) -> str:
    """The tiers of a table's blocks, a letter each."""
    return "".join(cache.tier_of(block).value[0] for block in table.blocks)


def test_offload_moves_all_but_the_newest_blocks_and_orders_the_copies(tiers):
    table = grown(tiers, 40)
    before, epoch = list(table.blocks), table.epoch
    assert tiers.offload(table, keep_blocks=1)
    assert tiers_of(tiers, table) == "hhd" and table.num_host_blocks == 2 and table.num_device_blocks == 1
    assert table.epoch > epoch, "a runner must read the table again"
    assert [(copy.source, copy.target) for copy in tiers.take_copies()] == list(
        zip(before[:2], table.blocks[:2], strict=True)
    )
    assert tiers.recall(table)
    assert tiers_of(tiers, table) == "ddd" and table.num_tokens == table.exact_tokens == 40


def test_what_both_tiers_have_is_not_copied_again(tiers):
    table = grown(tiers, 32)
    assert tiers.offload(table)
    tiers.take_copies()
    assert tiers.recall(table), "the device's blocks were kept for their prefix"
    assert tiers.take_copies() == ()
    assert tiers.offload(table)
    assert tiers.take_copies() == ()


@pytest.mark.parametrize("exact", [True, False])
def test_blocks_that_two_tables_share_lie_once_on_each_tier(tiers, exact):
    table = grown(tiers, 32, exact=exact)
    fork = tiers.fork(table, 32)
    assert tiers.offload(table)
    assert tiers_of(tiers, table) == "hh" and tiers_of(tiers, fork) == "dd"
    assert len(tiers.take_copies()) == 2
    assert tiers.offload(fork)
    assert fork.blocks == table.blocks and tiers.take_copies() == ()
    assert [tiers.count(block) for block in table.blocks] == [2, 2]
    assert tiers.recall(fork)
    assert tiers.host_pool.count(table.blocks[0]) == 1


def test_a_block_that_is_written_further_is_no_copy_of_anything_any_more(tiers):
    table = grown(tiers, 32, exact=False)
    fork = tiers.fork(table, 32)
    assert tiers.offload(fork)
    tiers.take_copies()
    assert tiers.truncate(table, 20)
    grow(tiers, table, 32, exact=False, tokens=[0] * 40)
    assert tiers.offload(table)
    assert table.blocks[0] == fork.blocks[0] and table.blocks[1] != fork.blocks[1]
    assert len(tiers.take_copies()) == 1


def test_what_finds_no_room_stays_where_it_is(tiers):
    table = grown(tiers, 7 * 16)
    assert not tiers.offload(table)
    assert tiers_of(tiers, table) == "hhhhhdd"
    other = grown(tiers, 3 * 16, tokens=range(1000, 1100))
    assert not tiers.recall(table)
    assert tiers_of(tiers, table).count("d") >= 4 and other.num_device_blocks == 3


def test_a_prefix_is_found_on_either_tier_and_forgotten_on_both(tiers):
    table = grown(tiers, 48)
    assert tiers.offload(table)
    tiers.free(table)
    found = tiers.match(TOKENS, "", max_tokens=48)
    assert tiers_of(tiers, found) == "ddd", "the device's copies are nearer"
    tiers.free(found)
    while tiers.pool.num_kept:
        tiers.extend([], 1)
    again = tiers.match(TOKENS, "", max_tokens=48)
    assert tiers_of(tiers, again) == "hhh" and again.num_host_blocks == 3
    tiers.free(again)
    tiers.forget(TOKENS[:48], "")
    assert matched_tokens(tiers, max_tokens=48) == 0 and tiers.host_pool.num_kept == 0


def test_a_part_block_in_host_memory_is_copied_before_it_is_written(tiers):
    table = grown(tiers, 40)
    assert tiers.offload(table)
    copies = len(tiers.take_copies())
    assert copies == 3
    assert tiers.truncate(table, 40) and tiers_of(tiers, table) == "hhd"
    assert len(tiers.take_copies()) == 1
    assert tiers.truncate(table, 20) and tiers_of(tiers, table) == "hd"


def test_places_are_device_blocks_of_nobody_elses(tiers):
    places = []
    assert tiers.extend(places, 3) and not tiers.extend(places, 5)
    assert len(places) == 3 and all(tiers.pool.count(block) == 1 for block in places)
    tiers.shorten(places, 1)
    assert len(places) == 1 and tiers.pool.num_free == 6
    assert len(tiers.take_stale()) == 2
