"""Owns what decides a training run: the curriculum of dialogues, the rates, and how many tokens are seen. Knows no model."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, replace
from typing import Any

from benchmarks.shipped_model.model import ModelShape
from loopserve.evaluation.dialogues import TASKS, Shape


@dataclass(frozen=True)
class Stage:
    """One step of the curriculum: left once the running share of right answers reaches `enough`, or when `until` of all tokens are seen."""

    shape: Shape
    _: KW_ONLY
    until: float
    enough: float
    batch_tokens: int  # of all workers
    least_steps: int = 100
    stretched: float = 0.0  # share of dialogues whose messages stand further apart than they are long


@dataclass(frozen=True)
class Recipe:
    """All that decides a training run."""

    model: ModelShape
    stages: tuple[Stage, ...]
    tokens: int
    tokenizer_dialogues: int = 2000
    rate: float = 2e-3
    warmup_steps: int = 60
    decay_from: float = 0.5  # of the tokens: from there the rate falls in a straight line
    weight_decay: float = 0.05
    reply_weight: float = 1.0  # of a note's token beside an answer's: a conversation is answered from the notes in it
    slipping: float = 0.5  # share of the dialogues whose notes have slips
    slips: float = 0.5  # share of the notes' turns with slips, in those
    earlier_share: float = 0.2  # of the batches: of an earlier stage
    stretch_positions: int = 12_288  # a stretched dialogue ends at most here
    first_stage: int = 0
    seed: int = 7


def full_recipe(tokens: int, seed: int) -> Recipe:
    """The recipe for a model like the shipped one: from a few facts in 140 tokens to everything in 2,600.

    What the shipped checkpoint itself saw is in its training record. In the short stages long documents seldom find room.
    """
    plain: dict[str, Any] = {
        "system": 0.1,
        "greeting": 0.0,
        "unknown": 0.0,
        "sign_off": 0.0,
        "asked": 1.0,
        "careless": 0.0,
    }
    mixed: dict[str, Any] = {"asked": 1.0, "asked_again": 0.3, "unknown": 0.15, "sign_off": 0.25}
    facts = ("facts",)
    hard = (*TASKS, "multihop", "documents", "labels")  # once more: what is learned last
    shapes = (
        Shape(120, (4, 8), facts, (40, 60), asked_again=0.8, surrounded=0.0, **plain),
        Shape(280, (4, 14), facts, (60, 90), asked_again=0.6, surrounded=0.3, **plain),
        Shape(400, (4, 16), TASKS, (75, 135), asked_again=0.6, surrounded=0.4, **plain),
        Shape(640, (4, 24), TASKS, (75, 150), surrounded=0.5, **mixed),
        Shape(1080, (4, 32), TASKS, (80, 150), surrounded=0.6, **mixed),
        Shape(2000, (2, 40), hard, (95, 175), surrounded=0.7, **mixed),
        Shape(2600, (2, 40), hard, (110, 215), surrounded=0.8, **mixed),
    )
    stages = (
        Stage(shapes[0], until=0.05, enough=0.95, batch_tokens=1920),
        Stage(shapes[1], until=0.1, enough=0.93, batch_tokens=2240),
        Stage(shapes[2], until=0.25, enough=0.9, batch_tokens=2400),
        Stage(shapes[3], until=0.4, enough=0.9, batch_tokens=2560, stretched=0.3),
        Stage(shapes[4], until=0.55, enough=0.93, batch_tokens=4320, stretched=0.5),
        Stage(shapes[5], until=0.75, enough=0.95, batch_tokens=4000, stretched=0.5),
        Stage(shapes[6], until=1.0, enough=2.0, batch_tokens=5200, stretched=0.3),
    )
    return Recipe(ModelShape(), stages, tokens, seed=seed)


def further(recipe: Recipe) -> Recipe:
    """For a model that has been through the recipe: its last stages, at a rate that soon falls from two fifths of the first."""
    return replace(recipe, rate=0.4 * recipe.rate, decay_from=0.15, first_stage=max(0, len(recipe.stages) - 3))


def tiny_recipe(seed: int) -> Recipe:
    """A few steps of a toy model: the whole way, nothing learned."""
    model = ModelShape(vocab=1024, hidden=32, inner=48, layers=2, heads=2, kv_heads=1, head_dim=16)
    shape = Shape(72, (2, 4), ("facts",), (20, 30), asked=1.0)
    stages = (
        Stage(shape, until=0.5, enough=0.97, batch_tokens=512),
        Stage(shape, until=1.0, enough=0.97, batch_tokens=512, stretched=1.0),
    )
    return Recipe(model, stages, tokens=4000, tokenizer_dialogues=20, seed=seed)
