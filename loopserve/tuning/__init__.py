"""Measures where sparse attention pays: one conversation on a runner, dense and sparse in turns, at one context length after the other.

What is found becomes an entry of a table (`crossover.py`), by which `auto` decides. Times only: whether answers are right is asked in
`evaluation/`.

found = tune(load_model(config), config, TuningPlan(), on_length=print)
write_entry(Path("crossover.json"), found.entry)
"""

from loopserve.tuning.conversation import Conversation
from loopserve.tuning.pairs import Decode, Prefill, first_that_pays, measure_decode, measure_prefill, speedup
from loopserve.tuning.texts import dialogue_ids, random_ids
from loopserve.tuning.tune import MARGIN, Tuning, TuningPlan, tune

__all__ = [
    "MARGIN",
    "Conversation",
    "Decode",
    "Prefill",
    "Tuning",
    "TuningPlan",
    "dialogue_ids",
    "first_that_pays",
    "measure_decode",
    "measure_prefill",
    "random_ids",
    "speedup",
    "tune",
]
