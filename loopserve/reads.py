"""What decode reads of the cached keys and values, in tokens' worth, planned and counted by the same arithmetic. Floor 0, host only.

A token's worth is the key and the value of one token in one KV head; half of it is its key. Dense decode reads one for each token of the
context. Whatever reads keys to choose or to measure counts too, unless the same step's attention reads them all anyway: then, as at the end
of the prefill, scoring costs no further read. Pure: no turn, no tensor.
"""

from dataclasses import dataclass, replace

from loopserve.config import DecodeSparsity
from loopserve.methods import DECODE_RULES, Scores

_KEY = _VALUE = 0.5  # of a token's worth
_KV_BYTES = 4  # of a token and channel: key and value in 16 bits, which sketches are measured by
_SCALE_BYTES = 2


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What of a model decides how much it reads."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True, slots=True)
class DecodeStep:
    """One sparse decode step, as far as its reads go."""

    context_tokens: int  # the new token included
    chosen_at_tokens: int  # context at the last choice, which may be this step's
    budget_tokens: int
    choose: bool
    measure: bool
    dense: bool = False  # reads everything all the same


def num_kept_tokens(context_tokens: int, chosen_at_tokens: int, budget_tokens: int, config: DecodeSparsity) -> int:
    """Tokens on one list of a layer that reads a selection: sinks, chosen, recent at the choice and everything since.

    The mean over layers and lists, where a method shares its budget out unevenly; an upper bound with `config.coverage_alpha`.
    """
    rule = DECODE_RULES[config.method]
    if rule.is_dense:
        return context_tokens
    layout = rule.layout(chosen_at_tokens, budget_tokens, config)
    return layout.num_sinks + min(layout.budget_tokens, layout.num_candidates) + context_tokens - layout.recent_start


def num_places(config: DecodeSparsity, budget_tokens: int | None = None) -> int:
    """Tokens of each layer and KV head that a compact turn has places for on the device, at a budget or the configured one."""
    return config.sink_tokens + (config.budget_tokens if budget_tokens is None else budget_tokens)


def kept_tokens(step: DecodeStep, config: DecodeSparsity, shape: ModelShape) -> float:
    """Tokens that a list reads in a step, mean over the layers."""
    if step.dense:
        return step.context_tokens
    kept = num_kept_tokens(step.context_tokens, step.chosen_at_tokens, step.budget_tokens, config)
    return _over_layers(kept, step.context_tokens, config, shape)


def read_tokens(step: DecodeStep, config: DecodeSparsity, shape: ModelShape) -> float:
    """Tokens' worth of keys and values that a step reads for one KV head, scoring included, mean over the layers.

    Where every query head has a list of its own, a KV head is read once for each of them.
    """
    if step.dense or DECODE_RULES[config.method].is_dense:
        return step.context_tokens
    lists = 1 if config.select_per == "kv_head" else shape.num_heads // shape.num_kv_heads
    kept = lists * num_kept_tokens(step.context_tokens, step.chosen_at_tokens, step.budget_tokens, config)
    return _over_layers(kept + _scored_tokens(step, config, shape), step.context_tokens, config, shape)


def planned_read_tokens(
    budget_tokens: int, *, context_tokens: int, outputs: int, config: DecodeSparsity, shape: ModelShape
) -> float:
    """Mean of `read_tokens` over the decode steps of an answer of `outputs` >= 2 tokens to a prompt of `context_tokens`.

    No `min_coverage` is asked for, which would measure more.
    """
    rule, total, chosen_at = DECODE_RULES[config.method], 0.0, context_tokens
    for number in range(1, outputs):
        context = context_tokens + number
        choose = rule.choice_due(number, config)
        chosen_at = context if choose else chosen_at
        measure = rule.measurement_due(number, config)
        total += read_tokens(DecodeStep(context, chosen_at, budget_tokens, choose, measure), config, shape)
    return total / (outputs - 1)


def budget_for_share(
    method: str, share: float, *, context_tokens: int, outputs: int, config: DecodeSparsity, shape: ModelShape
) -> int:
    """The largest budget with which `method` plans to read at most `share` of what dense decode would; 0 where none is small enough.

    Over the decode steps of an answer of `outputs` tokens (the first costs none; at least one step is planned for) to a prompt of
    `context_tokens`. Whole pages where the method chooses these. Never more than the context, beyond which a budget changes nothing.
    """
    config, outputs = replace(config, method=method), max(2, outputs)
    most = share * (context_tokens + outputs / 2)  # mean of context_tokens + 1 ... context_tokens + outputs - 1

    def fits(budget_tokens: int) -> bool:
        planned = planned_read_tokens(
            budget_tokens, context_tokens=context_tokens, outputs=outputs, config=config, shape=shape
        )
        return planned <= most

    low, high = 0, context_tokens + outputs  # fits(low), or nothing does; reads grow with the budget
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    page = DECODE_RULES[method].page_tokens
    return min(low, context_tokens) // page * page


def _scored_tokens(step: DecodeStep, config: DecodeSparsity, shape: ModelShape) -> float:
    """Tokens' worth that a layer reads to choose and to measure."""
    rule = DECODE_RULES[config.method]
    by_keys = _KEY * step.context_tokens
    measuring = by_keys if step.measure else 0.0
    if not step.choose or rule.scores is Scores.NOTHING:
        return measuring
    if rule.scores is Scores.KEYS:
        if config.scoring == "exact" or (step.measure and not rule.chooses_every_step(config)):
            return by_keys  # choosing and measuring share one pass
        sketch_bytes = -(-shape.head_dim // 8) + _SCALE_BYTES
        mean_value = _VALUE if rule.estimates_left_out(config) else 0.0
        return step.context_tokens * sketch_bytes / (_KV_BYTES * shape.head_dim) + mean_value + measuring
    layout = rule.layout(step.context_tokens, step.budget_tokens, config)
    return layout.num_candidates / rule.page_tokens + measuring


def _over_layers(tokens: float, context_tokens: int, config: DecodeSparsity, shape: ModelShape) -> float:
    """The mean where some layers read the whole context and the others `tokens`."""
    num_dense = len(set(config.dense_layers) & set(range(shape.num_layers)))
    return (num_dense * context_tokens + (shape.num_layers - num_dense) * tokens) / shape.num_layers
