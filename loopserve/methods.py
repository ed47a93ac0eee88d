"""The selection methods by name, and what the host must know of each: whether it reads everything, when it chooses, what it keeps.

Floor 0, host only, pure. How a method ranks lines or tokens is `loopserve.sparsity`'s business; both tables have the same names.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType

from loopserve.config import DecodeSparsity

ALL_ROWS = 1 << 62  # of a prefill, however many there are


class Rechoice(Enum):
    """When a token selection is chosen again after the first time, which is at the end of the turn's prefill."""

    NEVER = "never"
    ON_SCHEDULE = "on schedule"  # `DecodeSparsity.refresh_due`
    EVERY_STEP = "every step"


class Scores(Enum):
    """What a choice in decode reads to score tokens, beside what attention reads anyway."""

    NOTHING = "nothing"
    KEYS = "keys"  # all of them, or their sketches: `DecodeSparsity.scoring`
    PAGES = "pages"  # a summary of each page, as large as one token's key and value


@dataclass(frozen=True, slots=True)
class Layout:
    """How the columns of one layer are shared out by a choice at N tokens; B of the candidates are chosen.

    |<- sinks ->|<------------ candidates ------------>|<- recent ->|<- since the choice ->|
    0       num_sinks                            recent_start       N                     now
      always        B, by the method                   always, as is what comes after
    """

    num_sinks: int
    recent_start: int
    budget_tokens: int  # B

    @property
    def num_candidates(self) -> int:
        """Columns that a method chooses from."""
        return self.recent_start - self.num_sinks


@dataclass(frozen=True, slots=True)
class PrefillRule:
    """What the host knows of a prefill method."""

    name: str
    is_dense: bool = False  # computes every cell: its chunks are exact


@dataclass(frozen=True, slots=True)
class DecodeRule:
    """What the host knows of a decode method."""

    name: str
    rechoice: Rechoice = Rechoice.NEVER
    scores: Scores = Scores.NOTHING
    is_dense: bool = False  # reads every token
    observed_rows: int | None = None  # of the prefill's last; None: `DecodeSparsity.scoring_rows`
    window_tokens: int | None = None  # newest tokens at the choice, always read; None: `DecodeSparsity.window_tokens`
    page_tokens: int = 1  # tokens are chosen by aligned pages; of the recent ones the page being filled stays
    can_be_compact: bool = (
        False  # a choice lasts, is no larger than its budget in any list, and needs no other keys to be read
    )
    recent_share: float = 0.0  # of budget and window together: what a window that slides takes at least

    def num_observed_rows(self, config: DecodeSparsity) -> int:
        """Last rows of the turn's prefill whose queries make the first choice."""
        return config.scoring_rows if self.observed_rows is None else self.observed_rows

    @property
    def accumulates(self) -> bool:
        """Whether it adds up the weights of all rows, those of decode included, instead of looking at the newest."""
        return self.observed_rows == ALL_ROWS

    def choice_due(self, decode_step: int, config: DecodeSparsity) -> bool:
        """Whether decode step 1, 2, ... since the prefill chooses again before it reads."""
        if self.rechoice is Rechoice.ON_SCHEDULE:
            return config.refresh_due(decode_step)
        return self.rechoice is Rechoice.EVERY_STEP

    def chooses_every_step(self, config: DecodeSparsity) -> bool:
        """Whether a query reads only what was chosen by it, and never what an earlier one chose."""
        if self.rechoice is Rechoice.ON_SCHEDULE:
            return config.refresh_outputs == 1
        return self.rechoice is Rechoice.EVERY_STEP

    def measurement_due(self, decode_step: int, config: DecodeSparsity) -> bool:
        """Whether a step measures coverage, if its turn asks for none: where a choice reads all keys anyway, else now and then."""
        if self.scores is Scores.KEYS and config.scoring == "exact":
            return self.choice_due(decode_step, config)
        return config.measure_outputs > 0 and decode_step % config.measure_outputs == 0

    def estimates_left_out(self, config: DecodeSparsity) -> bool:
        """Whether a step knows, by sketches, how much weight its query gives to what is not read, and reads the mean value for it."""
        by_sketch = self.scores is Scores.KEYS and config.scoring == "sketch" and config.scoring_rows == 1
        return config.left_out == "mean" and by_sketch and self.chooses_every_step(config)

    def ranks_by_sketch(self, config: DecodeSparsity) -> bool:
        """Whether each output reads the heaviest tokens by the sketches' weights under its own query, and nothing is kept in between."""
        is_plain = config.scoring_rows == config.pooling_tokens == 1 and config.coverage_alpha is None
        by_sketch = self.name == "progressive" and config.scoring == "sketch"
        return is_plain and by_sketch and self.chooses_every_step(config)

    def layout(self, num_columns: int, budget_tokens: int, config: DecodeSparsity) -> Layout:
        """What a choice at `num_columns` tokens keeps of them."""
        if self.page_tokens > 1:
            page = self.page_tokens
            return Layout(0, max(0, num_columns - 1) // page * page, budget_tokens // page * page)
        num_sinks = min(config.sink_tokens, num_columns)
        window = config.window_tokens if self.window_tokens is None else self.window_tokens
        both = budget_tokens + window
        num_recent = max(window, int(both * self.recent_share))
        return Layout(num_sinks, max(num_sinks, num_columns - num_recent), both - num_recent)


_PREFILL = (
    PrefillRule("dense", is_dense=True),
    PrefillRule("lines"),
    PrefillRule("a_shape"),
    PrefillRule("fixed_lines"),
    PrefillRule("flexprefill"),
)
_DECODE = (
    DecodeRule("dense", is_dense=True),
    DecodeRule("progressive", Rechoice.ON_SCHEDULE, Scores.KEYS, can_be_compact=True),
    DecodeRule("first_block", observed_rows=16, window_tokens=32, can_be_compact=True),
    DecodeRule("snapkv", observed_rows=32, window_tokens=32, can_be_compact=True),
    DecodeRule("pyramidkv", observed_rows=32, window_tokens=32),
    DecodeRule("adakv", observed_rows=32, window_tokens=32),
    DecodeRule("h2o", Rechoice.EVERY_STEP, observed_rows=ALL_ROWS, recent_share=0.5),
    DecodeRule("quest", Rechoice.EVERY_STEP, Scores.PAGES, observed_rows=1, page_tokens=16),
    DecodeRule("streaming", Rechoice.EVERY_STEP, recent_share=1.0),
)

PREFILL_RULES: Mapping[str, PrefillRule] = MappingProxyType({rule.name: rule for rule in _PREFILL})
DECODE_RULES: Mapping[str, DecodeRule] = MappingProxyType({rule.name: rule for rule in _DECODE})
