"""Owns what is compared in each published quality experiment: dialogues and how many, methods, budgets, settings. Fixed before a run.

Nothing here runs anything (`run.py` does), and nothing here is looked up in a result.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from loopserve.evaluation.dialogues import RECALL_TASKS, TASKS
from loopserve.evaluation.tasks import OWN, Wanted
from loopserve.evaluation.variants import Budget, Override, Variant, find_method, make_variants

BUDGETS = tuple(Budget(share=share) for share in (0.50, 0.25, 0.10, 0.05))
TIGHT = tuple(Budget(share=share) for share in (0.10, 0.05))
DECODE_METHODS = (
    "loopserve",
    "loopserve-decode",
    "first-block",
    "streaming",
    "snapkv",
    "h2o",
    "pyramidkv",
    "adakv",
    "quest",
)
PREFILL_METHODS = ("loopserve-prefill", "a-shape", "fixed-lines", "flexprefill")


@dataclass(frozen=True, slots=True)
class Experiment:
    """One or several runs of the suite that make one result; `against` is what others are compared with at their budget."""

    question: str
    wanted: Wanted
    variants: tuple[Variant, ...]
    lengths: tuple[int, ...] = (2048,)
    against: str = "loopserve"

    def runs(self) -> tuple[Wanted, ...]:
        """What each run asks."""
        return tuple(replace(self.wanted, tokens=length) for length in self.lengths)


def _options(method: str, budgets: tuple[Budget, ...], *options: tuple[Override, ...]) -> tuple[Variant, ...]:
    """A method as the defaults have it, and under each set of overrides."""
    return tuple(variant for option in ((), *options) for variant in make_variants([method], budgets, overrides=option))


def _one(name: str, *values: str) -> tuple[tuple[Override, ...], ...]:
    return tuple(((name, value),) for value in values)


# One row of the paper's open choices each: what else it could be than the default, which stands beside them.
_DECODE_OPTIONS: tuple[tuple[Override, ...], ...] = (
    *_one("decode.scoring", "exact"),
    *_one("decode.refresh_outputs", "2", "4", "16"),
    *_one("decode.scoring_rows", "2", "4", "16"),
    *_one("decode.pooling_tokens", "3", "7"),
    *_one("decode.select_per", "query_head"),
    *_one("decode.window_tokens", "4", "16", "32"),
    *_one("decode.dense_layers", "[0]", "[0,1]"),
    *_one("decode.coverage_alpha", "0.9", "0.99"),
    (  # the paper's schedule, with what smooths a choice that has to last
        ("decode.refresh_outputs", "16"),
        ("decode.scoring_rows", "16"),
        ("decode.pooling_tokens", "7"),
        ("decode.window_tokens", "32"),
    ),
)
_PREFILL_OPTIONS: tuple[tuple[Override, ...], ...] = (
    *_one("prefill.row_sampling", "random", "last"),
    *_one("prefill.sampled_rows", "16", "32", "128"),
    *_one("prefill.chunk_tokens", "128", "256"),
    *_one("prefill.tile_tokens", "32"),
    *_one("prefill.local_tokens", "64"),
    *_one("prefill.dense_last_rows", "0"),
    *_one("decode.dense_layers", "[0]"),
)

_TEST = Wanted(TASKS, num=400, split="test", seed=11)
_VALIDATION = Wanted(RECALL_TASKS, num=40, split="validation", seed=5)
_RECALL = Wanted(RECALL_TASKS, num=100, split="test", seed=3)
_WINDOW: tuple[Override, ...] = (
    ("prefill.local_tokens", "256"),
    ("prefill.sink_tokens", "4"),
    ("prefill.dense_last_rows", "0"),
    ("prefill.dense_head_share", "1.0"),
    ("decode.window_tokens", "256"),
    ("decode.budget_floor_tokens", "1"),
    ("decode.budget_tokens", "1"),  # all of it slides with the window
)

EXPERIMENTS: Mapping[str, Experiment] = MappingProxyType(
    {
        "recall": Experiment(
            "Does the shipped model recall, at every length, and is it attention that does it?",
            _RECALL,
            (
                *make_variants(["dense"], ()),
                replace(
                    make_variants(["a-shape"], (), overrides=_WINDOW)[0],
                    method=replace(find_method("a-shape"), decode="streaming"),
                ),
            ),
            lengths=(512, 1024, 2048, 4096),
            against="dense",
        ),
        "own_answers": Experiment(
            "What is recall worth, and what does sparsity cost, where the past holds the model's own answers?",
            replace(_RECALL, past=OWN),
            (*make_variants(["dense"], ()), *make_variants(["loopserve"], BUDGETS)),
            lengths=(1024, 2048),
        ),
        "methods": Experiment(
            "What does each method lose to dense, at 50, 25, 10 and 5 % of the KV that dense decode reads?",
            _TEST,
            (
                *make_variants(["dense"], ()),
                *make_variants(DECODE_METHODS, BUDGETS),
                *make_variants(PREFILL_METHODS, ()),
            ),
        ),
        "loopserve": Experiment(
            "What does `loopserve` lose to dense on the dialogues of `methods`? Its own rows alone: a quarter of an hour, not an hour.",
            _TEST,
            (*make_variants(["dense"], ()), *make_variants(["loopserve"], BUDGETS)),
        ),
        "coverage": Experiment(
            "Does prefill cover what it is asked to cover, and what does that cost?",
            replace(_VALIDATION, seed=6),
            (
                *make_variants(["dense"], ()),
                *make_variants(["loopserve-prefill", "flexprefill"], (), alphas=(0.8, 0.85, 0.9, 0.95, 0.98, 1.0)),
                *make_variants(["fixed-lines", "a-shape"], ()),
            ),
            against="loopserve-prefill",
        ),
        "decode_choices": Experiment(
            "Which of the choices that the paper leaves open in decode are right?",
            _VALIDATION,
            (*make_variants(["dense"], ()), *_options("loopserve-decode", TIGHT, *_DECODE_OPTIONS)),
            against="loopserve-decode",
        ),
        "prefill_choices": Experiment(
            "Which of the choices that the paper leaves open in prefill are right?",
            _VALIDATION,
            (*make_variants(["dense"], ()), *_options("loopserve-prefill", (), *_PREFILL_OPTIONS)),
            against="loopserve-prefill",
        ),
    }
)
