"""`compact_kv` against a loop over its entries: bit for bit, in all of both pools.

Source tokens that no entry names are NaN, and so is half of what the pools held: a wrong read and a wrong write both show.
"""

import pytest
import torch
from torch import Tensor

from loopserve.kernels import compact_kv
from tests.kernels.conftest import DEVICE

SOURCE_SLOTS, POOL_SLOTS = 400, 700
IGNORED = -(10**12)  # where nothing is copied, the place is no place at all
Pair = tuple[Tensor, Tensor]  # keys and values


def chosen(num_rows: int, num_kv_heads: int, num_places: int, *, share: float) -> Pair:
    """Slots and places [R, Hkv, M], of which about `share` are copied; a head's places differ, its slots need not."""
    shape = (num_rows, num_kv_heads, num_places)
    slots = torch.randint(SOURCE_SLOTS, shape)
    places = torch.rand(num_kv_heads, POOL_SLOTS).argsort(dim=1)[:, : num_rows * num_places]
    places = places.view(num_kv_heads, num_rows, num_places).transpose(0, 1).contiguous()
    is_copied = torch.rand(shape) < share
    return slots.where(is_copied, -1), places.where(is_copied, IGNORED)


def entries(slots: Tensor, places: Tensor) -> list[tuple[int, int, int]]:
    """Head, slot and place of all that is to be copied."""
    copied = (slots >= 0).nonzero().tolist()
    return [(head, int(slots[row, head, entry]), int(places[row, head, entry])) for row, head, entry in copied]


def make_source(slots: Tensor, head_dim: int, dtype: torch.dtype) -> Pair:
    """Random where `slots` names the token for the head, else NaN."""
    num_kv_heads = slots.shape[1]
    keys, values = (torch.full((SOURCE_SLOTS, num_kv_heads, head_dim), torch.nan, dtype=dtype) for _ in range(2))
    for head in range(num_kv_heads):
        named = slots[:, head][slots[:, head] >= 0].unique()
        keys[named, head], values[named, head] = torch.randn(2, len(named), head_dim).to(dtype)
    return keys, values


def make_pools(num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> Pair:
    """Half of the slots hold NaN, the others random numbers."""
    keys, values = (torch.randn(POOL_SLOTS, num_kv_heads, head_dim).to(dtype) for _ in range(2))
    keys[::2], values[::2] = torch.nan, torch.nan
    return keys, values


def expected(source: Pair, slots: Tensor, pools: Pair, places: Tensor) -> Pair:
    """What the pools are to hold: copies of them, written entry by entry."""
    results = pools[0].clone(), pools[1].clone()
    for head, slot, place in entries(slots, places):
        for tokens, result in zip(source, results, strict=True):
            result[place, head] = tokens[slot, head]
    return results


def assert_same(pools: Pair, wanted: Pair) -> None:
    for pool, result in zip(pools, wanted, strict=True):
        torch.testing.assert_close(pool, result, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("share", [1.0, 0.5, 0.03])
@pytest.mark.parametrize(("num_rows", "num_places"), [(1, 1), (1, 300), (3, 77)])
@pytest.mark.parametrize(
    ("num_kv_heads", "head_dim", "dtype"),
    [
        (2, 16, torch.float32),
        (1, 64, torch.float32),
        (3, 64, torch.bfloat16),
        (2, 128, torch.bfloat16),
        (2, 128, torch.float16),
        (3, 5, torch.float32),
        (1, 80, torch.bfloat16),
    ],
)
def test_chosen_tokens_land_in_their_places_and_nothing_else_changes(
    share: float, num_rows: int, num_places: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
):
    slots, places = chosen(num_rows, num_kv_heads, num_places, share=share)
    source, pools = make_source(slots, head_dim, dtype), make_pools(num_kv_heads, head_dim, dtype)
    wanted = expected(source, slots, pools, places)
    before = source[0].clone(), source[1].clone()
    compact_kv(*source, slots, *pools, places)
    assert_same(pools, wanted)
    assert_same(source, before)


@pytest.mark.parametrize(("num_rows", "num_places"), [(2, 70), (0, 5), (2, 0)])
def test_where_nothing_is_chosen_nothing_changes(num_rows: int, num_places: int):
    slots = torch.full((num_rows, 2, num_places), -1)
    pools = make_pools(2, 16, torch.float32)
    before = pools[0].clone(), pools[1].clone()
    compact_kv(*make_source(slots, 16, torch.float32), slots, *pools, slots.new_full(slots.shape, IGNORED))
    assert_same(pools, before)


@pytest.mark.parametrize("index", [0, 31, 32, 129])
def test_one_entry_among_many_is_copied_wherever_it_stands(index: int):
    slots, places = torch.full((2, 1, 130), -1), torch.full((2, 1, 130), IGNORED)
    slots[1, 0, index], places[1, 0, index] = 0, POOL_SLOTS - 1
    source, pools = make_source(slots, 128, torch.bfloat16), make_pools(1, 128, torch.bfloat16)
    wanted = expected(source, slots, pools, places)
    compact_kv(*source, slots, *pools, places)
    assert_same(pools, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pool_may_be_its_own_source(dtype: torch.dtype):
    """Read and written are disjoint for each head; what one head reads another may write."""
    pools = torch.randn(POOL_SLOTS, 3, 16).to(dtype), torch.randn(POOL_SLOTS, 3, 16).to(dtype)
    order = torch.rand(3, POOL_SLOTS).argsort(dim=1)  # [Hkv, S]
    slots, places = (half.view(3, 2, 150).transpose(0, 1) for half in (order[:, :300], order[:, 300:600]))
    slots = slots.where(torch.rand(slots.shape) < 0.8, -1)
    wanted = expected(pools, slots, pools, places)
    compact_kv(*pools, slots, *pools, places)
    assert_same(pools, wanted)


def heads_first(tokens: Tensor) -> Tensor:
    """The same numbers; tokens of one head lie side by side."""
    return tokens.transpose(0, 1).contiguous().transpose(0, 1)


def apart(tokens: Tensor) -> Tensor:
    """The same numbers; other ones lie between the heads."""
    room = torch.zeros(len(tokens), tokens.shape[1], 2, tokens.shape[2], dtype=tokens.dtype)
    room[:, :, 1] = tokens
    return room[:, :, 1]


def channels_apart(tokens: Tensor) -> Tensor:
    """The same numbers; one channel of all tokens lies side by side."""
    return tokens.permute(2, 0, 1).contiguous().permute(1, 2, 0)


LAYOUTS = [torch.clone, heads_first, apart, channels_apart]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("swapped", [False, True])
def test_any_strides_are_read_and_written(layout, swapped: bool):
    """Keys in one layout, values and lists in another, source and pools in turn."""
    slots, places = chosen(2, 3, 60, share=0.6)
    other = LAYOUTS[LAYOUTS.index(layout) - 1]
    source, pools = make_source(slots, 16, torch.float32), make_pools(3, 16, torch.float32)
    wanted = expected(source, slots, pools, places)
    source = layout(source[0]), other(source[1])
    pools = (other(pools[0]), layout(pools[1])) if swapped else (layout(pools[0]), other(pools[1]))
    slots, places = heads_first(slots), channels_apart(places)
    compact_kv(*source, slots, *pools, places)
    assert_same(pools, wanted)


def test_a_working_set_may_be_a_part_of_a_larger_pool():
    slots, places = chosen(1, 2, 50, share=0.5)
    source, whole = make_source(slots, 16, torch.float32), torch.randn(2, 3 * POOL_SLOTS, 2, 16)
    part = slice(POOL_SLOTS, 2 * POOL_SLOTS)
    wanted = whole.clone()
    wanted[0, part], wanted[1, part] = expected(source, slots, (whole[0, part], whole[1, part]), places)
    compact_kv(*source, slots, whole[0, part], whole[1, part], places)
    assert torch.equal(whole, wanted)


@pytest.mark.parametrize(("num_kv_heads", "num_slots"), [(1, 2**31 // 128 + 8), (3, 2**30 // 128 + 8)])
def test_tokens_beyond_32_bits_are_found(num_kv_heads: int, num_slots: int):
    """In pools of more than 2**31 elements: the last slots, and the last head of several; memory that is not touched is not backed."""
    large = torch.empty((num_kv_heads, num_slots, 128), dtype=torch.bfloat16).transpose(0, 1)
    near, far = torch.tensor([2, 0, -1]), torch.tensor([num_slots - 1, num_slots - 6, -1])
    near, far = (lists.expand(1, num_kv_heads, 3) for lists in (near, far))
    tokens, back = torch.randn(3, num_kv_heads, 128).bfloat16(), torch.zeros(3, num_kv_heads, 128).bfloat16()
    compact_kv(tokens, tokens, near, large, large, far)
    assert torch.equal(large[[num_slots - 1, num_slots - 6]], tokens[[2, 0]])
    compact_kv(large, large, far, back, back, near)
    assert torch.equal(back[[2, 0]], tokens[[2, 0]])
    assert (back[1] == 0).all()


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="host memory is the device's own")
@pytest.mark.parametrize("share", [1.0, 0.03])
def test_a_source_in_pinned_host_memory_is_read_from_the_device(share: float):
    slots, places = chosen(2, 4, 300, share=share)
    source, pools = make_source(slots, 128, torch.bfloat16), make_pools(4, 128, torch.bfloat16)
    wanted = expected(source, slots, pools, places)
    keys, values = (tokens.cpu().pin_memory() for tokens in source)
    compact_kv(keys, values, slots, *pools, places)
    assert_same(pools, wanted)


SHAPE = (4, 2, 8)
LISTS = {name: torch.full((1, 2, 3), -1) for name in ("slots", "places")}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"source_values": torch.zeros(5, 2, 8)}, "come in pairs"),
        ({"value_pool": torch.zeros(4, 2, 4)}, "come in pairs"),
        ({"source_keys": torch.zeros(4, 1, 8), "source_values": torch.zeros(4, 1, 8)}, "differ in heads or head dim"),
        ({"key_pool": torch.zeros(4, 2, 4), "value_pool": torch.zeros(4, 2, 4)}, "differ in heads or head dim"),
        ({"source_values": torch.zeros(SHAPE).bfloat16()}, "never converts"),
        ({"key_pool": torch.zeros(SHAPE).half(), "value_pool": torch.zeros(SHAPE).half()}, "never converts"),
        ({"slots": torch.zeros(1, 2, 3, dtype=torch.int32)}, "int64"),
        ({"places": torch.zeros(1, 2, 3)}, "int64"),
        ({"places": torch.zeros(1, 2, 4, dtype=torch.int64)}, "one place a slot"),
        ({name: torch.zeros(1, 1, 3, dtype=torch.int64) for name in ("slots", "places")}, "a list a KV head"),
        ({name: torch.zeros(2, 3, dtype=torch.int64) for name in ("slots", "places")}, "a list a KV head"),
        ({"places": torch.zeros(1, 2, 3, dtype=torch.int64, device="meta")}, "lie apart"),
        ({"source_values": torch.zeros(SHAPE, device="meta")}, "lie apart"),
        ({name: torch.zeros(SHAPE, device="meta") for name in ("source_keys", "source_values")}, "on the host"),
        ({name: torch.zeros(4, 16) for name in ("source_keys", "source_values")}, r"\[slots, Hkv, D\]"),
    ],
)
def test_what_does_not_fit_is_refused(wrong: dict[str, Tensor], message: str):
    tokens = {name: torch.zeros(SHAPE) for name in ("source_keys", "source_values", "key_pool", "value_pool")}
    fits = tokens | {name: lists.to(DEVICE) for name, lists in LISTS.items()}
    wrong = {name: tensor if tensor.is_meta else tensor.to(DEVICE) for name, tensor in wrong.items()}
    with pytest.raises(AssertionError, match=message):
        compact_kv(**fits | wrong)
    compact_kv(**fits)
