"""Owns the search: which lengths are measured, when enough is known or the time is over, and what is to be kept of it.

Lengths rise. A phase is settled when sparse paid at two lengths in a row, and is measured no further; the search ends with both settled, or
with the time. Where sparse did not pay up to the longest length, a phase stays dense at every one: what nobody measured counts as lost.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from loopserve.config import BLOCK_TOKENS, EngineConfig
from loopserve.crossover import Crossover, shape_key
from loopserve.errors import ConfigError
from loopserve.evaluation.machine import describe_machine, sentence
from loopserve.loading import LoadedModel, device_name
from loopserve.methods import DECODE_RULES, PREFILL_RULES
from loopserve.reads import num_kept_tokens
from loopserve.runner import num_pool_blocks
from loopserve.tuning.conversation import Conversation
from loopserve.tuning.pairs import Decode, Prefill, first_that_pays, measure_decode, measure_prefill, speedup
from loopserve.tuning.texts import dialogue_ids, random_ids

MARGIN = (
    1.05  # sparse reads less than everything: it has to be that much faster to be worth it, and the clock is not exact
)
_FIRST_TOKENS, _LAST_TOKENS = (
    2048,
    131_072,
)  # lengths that are measured where none are named: doubling, as far as they fit

Point = Prefill | Decode


class _TimeIsOver(Exception):
    """The limit was reached before a forward; what it would have belonged to does not count."""


@dataclass(frozen=True, slots=True)
class TuningPlan:
    """What is measured, and for how long."""

    contexts: tuple[int, ...] = ()  # none: doubling from 2,048, as far as model and pool go
    rows: int = 4  # that decode side by side; on a GPU one alone hides what reading costs behind the launches
    pairs: int = 3  # dense and sparse, in turns
    steps: int = 16  # of an answer
    seconds_max: float = 300.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rows", "pairs", "steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; at least 1 is needed")
        if any(context < 1 for context in self.contexts):
            raise ConfigError(f"a context of {min(self.contexts)} tokens cannot be measured; it begins with 1")
        if self.seconds_max <= 0:
            raise ConfigError(f"the limit is {self.seconds_max:g} seconds; nothing can be measured in that")


@dataclass(frozen=True, slots=True)
class Tuning:
    """What was measured, and the table's entry that follows."""

    entry: Crossover
    prefills: tuple[Prefill, ...]
    decodes: tuple[Decode, ...]
    text: str  # what the conversation was made of
    is_out_of_time: bool
    longest_tokens: int  # context that model and pool take in so many rows, room for the measurement taken off


def tune(
    loaded: LoadedModel,
    config: EngineConfig,
    plan: TuningPlan,
    *,
    on_point: Callable[[Point], None] = lambda point: None,
    clock: Callable[[], float] = time.monotonic,
    now: datetime | None = None,
) -> Tuning:
    """Measure rising lengths with the engine's own settings. `on_point` comes with each as it is known.

    Runs up to `plan.seconds_max`, and one forward longer. Raises ConfigError where the settings or the lengths leave nothing to compare, or
    the time was over before there was one pair of each phase.
    """
    ends_s = clock() + plan.seconds_max

    def check_time() -> None:
        if clock() > ends_s:
            raise _TimeIsOver

    _check_methods(config)
    if plan.rows > config.max_running_turns:
        raise ConfigError(
            f"{plan.rows} rows are more than a batch takes: max_running_turns is {config.max_running_turns}."
        )
    longest = _longest_tokens(loaded, config, plan)
    contexts = _contexts(config, plan, longest)
    num_tokens = contexts[-1] + _extra_tokens(config, plan)
    if loaded.tokenizer.chat_template:
        text, ids = "made dialogues", dialogue_ids(loaded, num_tokens, seed=plan.seed)
    else:
        text, ids = "random tokens", random_ids(loaded.vocab_size, num_tokens, seed=plan.seed)
    conversation = Conversation(loaded, config, ids, rows=plan.rows, before_step=check_time)
    prefills: list[Prefill] = []
    decodes: list[Decode] = []
    done, is_out_of_time = 0, False
    try:
        for context in contexts:
            conversation.extend(done, context)
            done = context
            if not _is_settled(decodes) and not _reads_all(context, config):
                decodes.append(
                    measure_decode(
                        conversation,
                        context,
                        steps=plan.steps,
                        budget_tokens=config.decode.budget_tokens,
                        pairs=plan.pairs,
                        config=config.decode,
                    )
                )
                on_point(decodes[-1])
            if not _is_settled(prefills):
                prefills.append(
                    measure_prefill(
                        conversation,
                        context,
                        chunk=config.prefill.chunk_tokens,
                        config=config.prefill,
                        pairs=plan.pairs,
                    )
                )
                on_point(prefills[-1])
            if _is_settled(decodes) and _is_settled(prefills):
                break
    except _TimeIsOver:
        is_out_of_time = True
    if not prefills or not decodes:
        raise ConfigError(
            f"{plan.seconds_max:g} seconds were over before one length was measured in both phases: give more seconds, or shorter lengths."
        )
    entry = _entry(loaded, config, plan, prefills, decodes, text=text, now=now)
    return Tuning(entry, tuple(prefills), tuple(decodes), text, is_out_of_time, longest)


def _check_methods(config: EngineConfig) -> None:
    """Raise ConfigError where a phase has nothing sparse to measure."""
    for phase, method, rules in (
        ("prefill", config.prefill.method, PREFILL_RULES),
        ("decode", config.decode.method, DECODE_RULES),
    ):
        if method not in rules or rules[method].is_dense:
            sparse = ", ".join(name for name, rule in rules.items() if not rule.is_dense)
            raise ConfigError(f"{phase}.method is {method!r}; only a sparse one can be measured: {sparse}.")


def _extra_tokens(config: EngineConfig, plan: TuningPlan) -> int:
    """Positions beyond a context that measuring it takes."""
    return max(config.prefill.chunk_tokens, plan.steps)


def _longest_tokens(loaded: LoadedModel, config: EngineConfig, plan: TuningPlan) -> int:
    """The longest context that can be measured: a pool that cannot hold the rows could not serve them either."""
    pool_tokens = (num_pool_blocks(loaded, config) - 1) // plan.rows * BLOCK_TOKENS
    session_tokens = config.max_session_tokens or loaded.max_positions
    return min(pool_tokens, session_tokens, loaded.max_positions) - _extra_tokens(config, plan)


def _contexts(config: EngineConfig, plan: TuningPlan, longest: int) -> tuple[int, ...]:
    """The lengths to measure, rising. Raises ConfigError where one does not fit, or where decode would read everything at each."""
    if plan.contexts:
        contexts = sorted(set(plan.contexts))
    else:
        step = config.prefill.chunk_tokens
        last = min(longest, _LAST_TOKENS) // step * step
        doubling = [_FIRST_TOKENS << power for power in range((_LAST_TOKENS // _FIRST_TOKENS).bit_length())]
        contexts = [context for context in doubling if context < last] + [last]
    if not 0 < contexts[-1] <= longest:
        raise ConfigError(
            f"A context of {contexts[-1]} tokens does not fit: the model's positions, and the KV pool shared by {plan.rows} rows, leave "
            f"room for {max(longest, 0)}. Name shorter lengths, fewer rows, or a larger pool."
        )
    if _reads_all(contexts[-1], config):
        raise ConfigError(
            f"At {contexts[-1]} tokens a budget of {config.decode.budget_tokens} leaves nothing out: name longer contexts, or a smaller "
            "decode.budget_tokens."
        )
    return tuple(contexts)


def _reads_all(context: int, config: EngineConfig) -> bool:
    """Whether a selection holds the whole context, in which case `auto` is dense whatever the table says."""
    return num_kept_tokens(context, context, config.decode.budget_tokens, config.decode) >= context


def _is_settled(points: Sequence[Point]) -> bool:
    return len(points) >= 2 and all(speedup(point) > MARGIN for point in points[-2:])


def _entry(
    loaded: LoadedModel,
    config: EngineConfig,
    plan: TuningPlan,
    prefills: Sequence[Prefill],
    decodes: Sequence[Decode],
    *,
    text: str,
    now: datetime | None,
) -> Crossover:
    chunk = config.prefill.chunk_tokens
    prefill, decode = first_that_pays(prefills, margin=MARGIN), first_that_pays(decodes, margin=MARGIN)
    machine = describe_machine(loaded.device, now=datetime.now(UTC) if now is None else now)
    return Crossover(
        device=device_name(loaded.device),
        shape=shape_key(loaded.shape),
        prefill_min_context_tokens=None if prefill is None else prefill + chunk,
        decode_min_context_tokens=decode,
        decode_rows=plan.rows,
        reason=(
            f"measured with {loaded.name}, {str(loaded.dtype).removeprefix('torch.')}, {text}, medians of {plan.pairs} pairs; times as "
            f"fast as dense: prefill ({config.prefill.method}, {chunk} rows, alpha {config.prefill.alpha:g}) {_said(prefills)}; decode "
            f"({config.decode.method}, budget {config.decode.budget_tokens}, rows side by side: {plan.rows}) {_said(decodes)}; "
            f"{sentence(machine)}"
        ),
    )


def _said(points: Sequence[Point]) -> str:
    shares = (f" ({point.cells_share:.0%} of the cells)" if isinstance(point, Prefill) else "" for point in points)
    return ", ".join(
        f"{speedup(point):.2f} at {point.context_tokens}{share}" for point, share in zip(points, shares, strict=True)
    )
