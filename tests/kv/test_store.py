"""Bytes on two tiers: copies land where they are ordered to, in order, with their sketches; the stage and the places hold what they say."""

import pytest
import torch

from loopserve.config import BLOCK_TOKENS
from loopserve.kernels import store_sketch
from loopserve.kv.stage import Stage
from loopserve.kv.store import KVStore, Stretch
from loopserve.kv.working_set import WorkingSets
from loopserve.plan import BlockCopy, BlockId

LAYERS, HEADS, DIM = 2, 2, 8
DEVICE_BLOCKS, HOST_BLOCKS = 6, 5


def filled_store(*, sketch: bool = False) -> KVStore:
    """Every token of both tiers has a key of its own, and a value that is its negative."""
    store = KVStore(
        num_layers=LAYERS,
        num_blocks=DEVICE_BLOCKS,
        num_kv_heads=HEADS,
        head_dim=DIM,
        dtype=torch.float32,
        device=torch.device("cpu"),
        sketch=sketch,
        num_host_blocks=HOST_BLOCKS,
    )
    generator = torch.Generator().manual_seed(0)
    for layer in range(LAYERS):
        for keys, values in ((store.keys, store.values), (store.host_keys, store.host_values)):
            keys[layer].normal_(generator=generator)
            values[layer].copy_(-keys[layer])
    if sketch:
        for layer in range(LAYERS):
            every = torch.cat((store.keys[layer], store.host_keys[layer]))
            store_sketch(every, store.sketches[layer], torch.arange(len(every)))
    return store


def copies(*pairs: tuple[int, int]) -> list[BlockCopy]:
    return [BlockCopy(BlockId(source), BlockId(target)) for source, target in pairs]


def block(store: KVStore, layer: int, number: int) -> torch.Tensor:
    keys, values = store.slots(layer, number * BLOCK_TOKENS, BLOCK_TOKENS)
    assert torch.equal(values, -keys), "a value is not where its key is"
    return keys.clone()


@pytest.mark.parametrize(
    "pairs",
    [
        [(1, 6)],
        [(1, 7), (2, 8), (3, 9)],  # a run to the host
        [(6, 2), (7, 3), (8, 4)],  # a run to the device
        [(1, 2), (2, 3), (3, 4)],  # each reads what the one before it wrote
        [(1, 9), (6, 1), (9, 2), (1, 10)],
        [(3, 2), (4, 3), (5, 4)],
        [(4, 9), (5, 10), (6, 1)],  # block 5 is the device's last
        [(1, 5), (2, 6)],
    ],
)
def test_copies_are_carried_out_one_after_the_other(pairs):
    store = filled_store(sketch=True)
    expected = {(layer, n): block(store, layer, n) for layer in range(LAYERS) for n in range(11)}
    for source, target in pairs:
        for layer in range(LAYERS):
            expected[layer, target] = expected[layer, source]
    store.copy_blocks(copies(*pairs))
    for (layer, number), keys in expected.items():
        assert torch.equal(block(store, layer, number), keys), (layer, number)
    fresh = filled_store(sketch=True).sketches[0]
    for layer in range(LAYERS):
        every = torch.cat((store.keys[layer], store.host_keys[layer]))
        store_sketch(every, fresh, torch.arange(len(every)))
        assert torch.equal(fresh.signs, store.sketches[layer].signs), "a sketch was left behind"
        assert torch.equal(fresh.scales, store.sketches[layer].scales)


def test_blocks_are_read_and_written_whole_with_their_sketches():
    store, other = filled_store(sketch=True), filled_store(sketch=True)
    numbers = [BlockId(n) for n in (4, 5, 6, 2, 9, 8)]
    keys, values = store.read_blocks(numbers)
    assert keys.shape == (LAYERS, 6, BLOCK_TOKENS, HEADS, DIM) and torch.equal(values, -keys)
    targets = [BlockId(n) for n in (1, 2, 3, 5, 6, 7)]
    other.write_blocks(targets, keys, values)
    for layer in range(LAYERS):
        for source, target in zip(numbers, targets, strict=True):
            assert torch.equal(block(other, layer, target), block(store, layer, source))
        fresh = filled_store(sketch=True).sketches[0]
        every = torch.cat((other.keys[layer], other.host_keys[layer]))
        store_sketch(every, fresh, torch.arange(len(every)))
        assert torch.equal(fresh.signs, other.sketches[layer].signs)


def test_blocks_are_erased_on_their_own_tier():
    store = filled_store(sketch=True)
    store.erase_blocks([BlockId(2), BlockId(7)])
    for layer in range(LAYERS):
        zero = [n for n in range(11) if not block(store, layer, n).any()]
        assert zero == [2, 7]
        signs = store.sketches[layer].scales.view(11, -1)
        assert [n for n in range(11) if not signs[n].any()] == [2, 7]


def test_the_stage_puts_a_sequence_together_and_grows_with_it():
    store = filled_store()
    stage = Stage(store)
    assert stage.device_bytes == 0
    stretches = [Stretch(0, 7 * 16, 32), Stretch(32, 2 * 16, 16), Stretch(48, 9 * 16, 16)]
    for layer in range(LAYERS):
        keys, values = stage.keys_and_values(layer, stretches, 53)
        expected = torch.cat([block(store, layer, n) for n in (7, 8, 2, 9)])[:53]
        assert torch.equal(keys, expected) and torch.equal(values, -expected)
        assert torch.equal(stage.keys(layer, stretches, 53), expected)
    held = stage.device_bytes
    keys, _ = stage.keys_and_values(0, [Stretch(0, 16, 48)], 40)
    assert len(keys) == 40 and stage.device_bytes == held


class Places:
    """One layer of two turns with places: what they ask for, they get."""

    def __init__(self, *, budget_places: int = 20) -> None:
        self.store = filled_store()
        self.sets = WorkingSets(self.store, 2, budget_places)
        self.sets.resize(1, [BlockId(4), BlockId(5)], 0)
        # 48 tokens in host memory, 16 on the device
        self.slots = torch.cat([torch.arange(16) + n * 16 for n in (8, 6, 10, 2)])[None]

    def read(self, columns: torch.Tensor, valid=None, *, late=False) -> torch.Tensor | None:
        """Locate [1, H, M] columns of turn 1 in layer 1, and check every key and value that may be read."""
        slots, readable = self.sets.locate(1, torch.tensor([1]), self.slots, columns, valid, late=late)
        every = torch.cat((self.store.keys[1], self.store.host_keys[1]))
        for head in range(HEADS):
            for m in range(columns.shape[2]):
                if readable is None or readable[0, head, m]:
                    key = self.store.keys[1][slots[0, head, m], head]
                    assert torch.equal(key, every[self.slots[0, columns[0, head, m]], head])
                    assert torch.equal(self.store.values[1][slots[0, head, m], head], -key)
        assert slots.max() < self.store.num_slots
        return readable


def test_each_head_finds_the_tokens_that_it_chose():
    places, generator = Places(), torch.Generator().manual_seed(1)
    for _ in range(30):
        columns = torch.stack([torch.randperm(64, generator=generator)[:32] for _ in range(HEADS)])[None]
        assert places.read(columns) is None
    assert int(places.sets.num_recalled) > 0


def test_only_what_is_not_held_is_brought():
    places = Places()
    columns = torch.arange(20).expand(1, HEADS, 20)
    places.read(columns)
    assert int(places.sets.num_recalled) == 2 * 20
    places.read(columns.flip(2))
    assert int(places.sets.num_recalled) == 2 * 20, "all of it was there"
    places.read(columns + 5)
    assert int(places.sets.num_recalled) == 2 * 25
    places.read(torch.arange(48, 64).expand(1, HEADS, 16))
    assert int(places.sets.num_recalled) == 2 * 25, "these lie on the device"


def test_what_is_not_valid_is_neither_brought_nor_read():
    places = Places()
    columns = torch.arange(40).expand(1, HEADS, 40)  # more than there are places
    valid = torch.arange(40).remainder(2).eq(0).expand(1, HEADS, 40)
    readable = places.read(columns, valid)
    assert torch.equal(readable, valid) and int(places.sets.num_recalled) == 2 * 20


def test_what_comes_late_is_read_the_next_time():
    places = Places()
    columns = torch.arange(20).expand(1, HEADS, 20)
    assert not places.read(columns, late=True).any()
    assert places.read(columns, late=True).all()
    readable = places.read(columns + 5, late=True)
    assert readable[0, 0].tolist() == [True] * 15 + [False] * 5


def test_places_keep_what_they_hold_when_there_are_more_or_fewer():
    places = Places(budget_places=48)
    places.read(torch.arange(30).expand(1, HEADS, 30))
    places.sets.resize(1, [BlockId(4), BlockId(5), BlockId(3)], 2)
    brought = int(places.sets.num_recalled)
    places.read(torch.arange(30).expand(1, HEADS, 30))
    assert int(places.sets.num_recalled) == brought
    places.sets.resize(1, [BlockId(4)], 1)
    places.read(torch.arange(16).expand(1, HEADS, 16))
    places.sets.clear(1)
    places.sets.resize(1, [BlockId(4)], 0)
    before = int(places.sets.num_recalled)
    places.read(torch.arange(16).expand(1, HEADS, 16))
    assert int(places.sets.num_recalled) == before + 2 * 16
