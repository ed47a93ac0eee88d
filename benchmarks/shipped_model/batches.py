"""Makes training batches in a process of their own: the model never waits for text, and a batch follows from its step and stage alone."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.shipped_model.recipe import Recipe
from benchmarks.shipped_model.slips import with_slips
from benchmarks.shipped_model.text import PAD, Example, encode_dialogue, special_id
from loopserve.evaluation.dialogues import Split, make_past
from loopserve.evaluation.items import Dialogue


@dataclass(frozen=True)
class Batch:
    """Dialogues of one stage, padded on the right; padding needs no mask because attention is causal."""

    stage: int
    ids: Tensor  # int64 [rows, T]
    kinds: Tensor  # int64 [rows, T], see `text`
    positions: Tensor  # int64 [rows, T]
    num_tokens: int


class BatchKey(NamedTuple):
    """What a batch is: the `index`-th of a run, of which each step takes `parts`, with the dialogues of a stage."""

    index: int
    stage: int
    parts: int = 1


class _Batches(Dataset[Batch]):
    def __init__(self, recipe: Recipe, tokenizer_json: str) -> None:
        self._recipe = recipe
        self._tokenizer_json = tokenizer_json
        self._tokenizer: Tokenizer | None = None

    def __getitem__(self, key: BatchKey) -> Batch:
        if self._tokenizer is None:
            self._tokenizer = Tokenizer.from_str(self._tokenizer_json)
        return make_batch(self._recipe, self._tokenizer, key)


def make_batch(recipe: Recipe, tokenizer: Tokenizer, key: BatchKey) -> Batch:
    """One part of a step's batch: of its stage, or now and then of an earlier one."""
    rng, stage_index = random.Random(f"{recipe.seed}:{key.index}"), key.stage
    if stage_index and rng.random() < recipe.earlier_share:
        stage_index = rng.randrange(stage_index)
    stage = recipe.stages[stage_index]
    rows = max(1, stage.batch_tokens // (stage.shape.tokens * key.parts))

    def count(text: str) -> int:
        return len(text) // 4 + 3  # up to a fifth too few; the tokenizer would be asked for everything twice

    dialogues = (make_past(rng, Split.TRAIN, stage.shape, count_tokens=count, id_="") for _ in range(rows))
    examples = [_encoded(rng, recipe, tokenizer, dialogue) for dialogue in dialogues]
    stretch = [recipe.stretch_positions if rng.random() < stage.stretched else 0 for _ in examples]
    longest = max(len(example.ids) for example in examples)
    pad = special_id(tokenizer, PAD)
    ids, kinds = torch.full((rows, longest), pad), torch.zeros((rows, longest), dtype=torch.long)
    positions = torch.zeros((rows, longest), dtype=torch.long)
    for row, example in enumerate(examples):
        length = len(example.ids)
        ids[row, :length] = torch.tensor(example.ids)
        kinds[row, :length] = torch.tensor(example.kinds)
        positions[row, :length] = torch.tensor(_positions(rng, example, stretch[row]))
    return Batch(stage_index, ids, kinds, positions, sum(len(example.ids) for example in examples))


def _encoded(rng: random.Random, recipe: Recipe, tokenizer: Tokenizer, dialogue: Dialogue) -> Example:
    share = recipe.slips if rng.random() < recipe.slipping else 0.0
    return encode_dialogue(tokenizer, *with_slips(rng, dialogue, share))


def _positions(rng: random.Random, example: Example, farthest: int) -> list[int]:
    """0, 1, 2, ... with jumps before some messages, so that distances far beyond the dialogue's length are met."""
    length = len(example.ids)
    if farthest <= length:
        return list(range(length))
    extra = int(length * ((farthest / length) ** rng.random() - 1.0))
    starts = set(example.messages[1:])
    jumps = dict.fromkeys(rng.sample(sorted(starts), min(len(starts), rng.randint(1, 8))), 0)
    for _ in range(16):
        if jumps:
            jumps[rng.choice(list(jumps))] += extra // 16
    at, positions = -1, []
    for index in range(length):
        at += 1 + jumps.get(index, 0)
        positions.append(at)
    return positions


def batches(recipe: Recipe, tokenizer: Tokenizer, order: Callable[[], Iterator[BatchKey]]) -> Iterator[Batch]:
    """Batches in the order that `order` gives, a few steps ahead."""
    loader = DataLoader(
        _Batches(recipe, tokenizer.to_str()),
        sampler=_Order(order),
        batch_size=None,
        num_workers=1,
        prefetch_factor=2,
    )
    return iter(loader)


class _Order:
    def __init__(self, order: Callable[[], Iterator[BatchKey]]) -> None:
        self._order = order

    def __iter__(self) -> Iterator[BatchKey]:
        return self._order()

    def __len__(self) -> int:
        return 1 << 60
