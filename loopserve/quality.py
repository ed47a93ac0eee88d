"""What a request's quality contract means for one turn, and the running account of what sparsity did. Host only, pure.

Resolves the contract against the engine's configuration (`TurnPolicy`) and adds up what the runner measured (`QualityTally`).
Knows nothing about tensors: the numbers arrive as `SegmentQuality`.
"""

from dataclasses import dataclass, replace

from loopserve.config import DecodeSparsity, EngineConfig, PrefillSparsity
from loopserve.dialogue import Mode, QualityContract, QualityReport
from loopserve.methods import DECODE_RULES, PREFILL_RULES
from loopserve.plan import SegmentQuality
from loopserve.reads import num_kept_tokens


@dataclass(frozen=True, slots=True)
class TurnPolicy:
    """The contract of one turn with every default filled in."""

    mode: Mode
    min_coverage: float | None
    budget_tokens: int | None  # None: the engine's budget in force
    prefill: PrefillSparsity  # the engine's, with the turn's method
    decode: DecodeSparsity  # the engine's, with the turn's method
    prefill_min_context_tokens: int  # `auto` computes shorter contexts dense
    decode_min_context_tokens: int

    @classmethod
    def resolve(cls, contract: QualityContract, config: EngineConfig) -> "TurnPolicy":
        """Fill the contract's gaps from the configuration, whose thresholds the engine has filled in (`Found.applied_to`)."""
        mode = contract.mode
        if mode is Mode.AUTO:  # what the engine does when nobody asks for anything
            mode = Mode(config.default_mode)
        prefill_from, decode_from = config.prefill.auto_min_context_tokens, config.decode.auto_min_context_tokens
        assert prefill_from is not None, "the engine fills in where sparse prefill pays"
        assert decode_from is not None, "the engine fills in where sparse decode pays"
        return cls(
            mode=mode,
            min_coverage=config.default_min_coverage if contract.min_coverage is None else contract.min_coverage,
            budget_tokens=contract.budget_tokens,
            prefill=replace(config.prefill, method=contract.prefill_method or config.prefill.method),
            decode=replace(config.decode, method=contract.decode_method or config.decode.method),
            prefill_min_context_tokens=prefill_from,
            decode_min_context_tokens=decode_from,
        )

    def prefill_is_sparse(self, context_tokens: int) -> bool:
        """Whether a chunk that ends at `context_tokens` computes chosen lines only."""
        if PREFILL_RULES[self.prefill.method].is_dense:
            return False
        if self.mode is Mode.AUTO:
            return context_tokens >= self.prefill_min_context_tokens
        return self.mode is Mode.SPARSE

    def decode_is_sparse(self, context_tokens: int, *, budget_tokens: int) -> bool:
        """Whether an answer over `context_tokens` is decoded on a token selection."""
        if DECODE_RULES[self.decode.method].is_dense:
            return False
        if self.mode is Mode.AUTO:
            reads_all = num_kept_tokens(context_tokens, context_tokens, budget_tokens, self.decode) >= context_tokens
            return context_tokens >= self.decode_min_context_tokens and not reads_all
        return self.mode is Mode.SPARSE


@dataclass(slots=True)
class QualityTally:
    """The running account of one turn."""

    coverage_sum: float = 0.0
    coverage_count: int = 0
    coverage_worst: float = 1.0
    cells_computed: int = 0
    cells_total: int = 0
    decode_steps: int = 0
    kept_tokens: float = 0.0
    read_tokens: float = 0.0
    context_tokens: int = 0
    refreshes: int = 0
    dense_fallbacks: int = 0
    rectified_tokens: int = 0

    def add_measured(self, quality: SegmentQuality) -> None:
        """Add what the runner measured in one segment."""
        self.coverage_sum += quality.coverage_sum
        self.coverage_count += quality.coverage_count
        self.coverage_worst = min(self.coverage_worst, quality.coverage_worst)
        self.cells_computed += quality.cells_computed
        self.cells_total += quality.cells_total
        self.dense_fallbacks += quality.dense_heads

    def add_dense_prefill(self, *, start: int, num_rows: int, num_planes: int) -> None:
        """Add a chunk that computed every causal cell; `num_planes` is layers x query heads, as the runner counts cells."""
        cells = num_planes * (num_rows * start + num_rows * (num_rows + 1) // 2)
        self.cells_computed += cells
        self.cells_total += cells

    def add_decode_step(self, *, kept_tokens: float, read_tokens: float, context_tokens: int) -> None:
        """Add one decode step."""
        self.decode_steps += 1
        self.kept_tokens += kept_tokens
        self.read_tokens += read_tokens
        self.context_tokens += context_tokens

    def report(self, mode: Mode) -> QualityReport:
        """The account so far."""
        steps = max(1, self.decode_steps)
        measured = self.coverage_count > 0
        return QualityReport(
            mode=mode,
            coverage_mean=self.coverage_sum / self.coverage_count if measured else None,
            coverage_worst_head=self.coverage_worst if measured else None,
            kept_tokens=self.kept_tokens / steps,
            context_tokens=self.context_tokens / steps,
            prefill_cells_computed_share=self.cells_computed / self.cells_total if self.cells_total else 1.0,
            refreshes=self.refreshes,
            dense_fallbacks=self.dense_fallbacks,
            rectified_tokens=self.rectified_tokens,
            read_tokens=self.read_tokens / steps,
        )
