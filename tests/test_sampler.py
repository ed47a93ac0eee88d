"""The sampler against plain per-row mathematics, its distribution, and its independence of the batch."""

import math
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loopserve import sampler
from loopserve.dialogue import SamplingParams
from loopserve.plan import SampleOrder

VOCAB = 50


def order(
    *,
    seed: int = 0,
    output_index: int = 0,
    prompt_ids: tuple[int, ...] = (),
    output_ids: tuple[int, ...] = (),
    banned_ids: tuple[int, ...] = (),
    **params: Any,
) -> SampleOrder:
    return SampleOrder(SamplingParams(**params), seed, output_index, prompt_ids, output_ids, banned_ids)


def random_logits(rows: int, *, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * scale


def sample(logits: torch.Tensor, orders: list[SampleOrder]) -> tuple[sampler.Draw, ...]:
    """Draw, and wait for it."""
    return sampler.draw(logits, orders).result()


def token(row: torch.Tensor, one: SampleOrder) -> int:
    return sample(row[None], [one])[0].token_id


def naive_distribution(row: list[float], one: SampleOrder) -> list[float]:
    """Probabilities of every token, in plain Python, one processor after the other."""
    params, scores = one.params, list(row)
    for banned in one.banned_ids:
        scores[banned] = -math.inf
    for token_id, bias in params.logit_bias:
        scores[token_id] += bias
    for token_id in set(one.prompt_ids) | set(one.output_ids):
        value = scores[token_id]
        scores[token_id] = value * params.repetition_penalty if value < 0 else value / params.repetition_penalty
    for token_id, count in Counter(one.output_ids).items():
        scores[token_id] -= count * params.frequency_penalty + params.presence_penalty
    if params.temperature == 0 or params.top_k == 1:
        best = max(range(len(scores)), key=lambda i: (scores[i], -i))
        return [float(i == best) for i in range(len(scores))]
    top = max(scores)
    weights = [math.exp((s - top) / params.temperature) for s in scores]
    if params.top_k:
        kth = sorted(weights, reverse=True)[min(params.top_k, len(weights)) - 1]
        weights = [w if w >= kth else 0.0 for w in weights]
    if params.top_p < 1:
        kept, mass, total = set(), 0.0, sum(weights)
        for i in sorted(range(len(weights)), key=lambda i: (-weights[i], i)):
            if kept and mass / total >= params.top_p:
                break
            kept.add(i)
            mass += weights[i]
        weights = [w if i in kept else 0.0 for i, w in enumerate(weights)]
    if params.min_p:
        weights = [w if w >= params.min_p * max(weights) else 0.0 for w in weights]
    return [w / sum(weights) for w in weights]


def chi_square(counts: Counter[int], distribution: list[float], draws: int) -> tuple[float, int]:
    """Pearson's statistic and its degrees of freedom, cells of fewer than five expected draws pooled."""
    cells = [(counts[i], draws * p) for i, p in enumerate(distribution) if draws * p >= 5]
    rest = (draws - sum(c for c, _ in cells), draws - sum(e for _, e in cells))
    if rest[1] >= 5:
        cells.append(rest)
    return sum((c - e) ** 2 / e for c, e in cells), len(cells) - 1


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "cool": {"temperature": 0.6},
    "hot": {"temperature": 1.7},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.1},
    "all_filters": {"temperature": 1.3, "top_k": 12, "top_p": 0.9, "min_p": 0.05},
    "penalties": {
        "repetition_penalty": 1.4,
        "presence_penalty": 0.7,
        "frequency_penalty": 0.5,
        "prompt_ids": (1, 2, 3, 3),
        "output_ids": (3, 4, 4),
    },
    "bias_and_ban": {"logit_bias": ((7, 4.0), (8, -4.0)), "banned_ids": (0, 9)},
}


@pytest.mark.parametrize("name", CASES)
def test_draws_follow_the_distribution_of_the_naive_formula(name: str):
    draws, row = 4000, random_logits(1, seed=3, scale=1.5)[0]
    wanted = naive_distribution(row.tolist(), order(**CASES[name]))
    orders = [order(seed=11, output_index=i, **CASES[name]) for i in range(draws)]
    counts = Counter(draw.token_id for draw in sample(row.expand(draws, -1), orders))
    assert all(wanted[token_id] > 0 for token_id in counts)
    statistic, freedom = chi_square(counts, wanted, draws)
    # Mean `freedom`, variance `2 * freedom`: five standard deviations, with fixed seeds.
    assert statistic < freedom + 5 * math.sqrt(2 * freedom)


def test_draws_over_seeds_follow_the_same_distribution():
    draws, row = 4000, random_logits(1, seed=4, scale=1.5)[0]
    counts = Counter(d.token_id for d in sample(row.expand(draws, -1), [order(seed=i) for i in range(draws)]))
    statistic, freedom = chi_square(counts, row.double().softmax(-1).tolist(), draws)
    assert statistic < freedom + 5 * math.sqrt(2 * freedom)


def test_neighbouring_output_indices_are_independent():
    draws, row = 4000, torch.zeros(4)
    tokens = [d.token_id for d in sample(row.expand(draws, -1), [order(seed=5, output_index=i) for i in range(draws)])]
    pairs = Counter(4 * a + b for a, b in pairwise(tokens))
    statistic, freedom = chi_square(pairs, [1 / 16] * 16, draws - 1)
    assert statistic < freedom + 5 * math.sqrt(2 * freedom)


def test_draw_is_a_function_of_seed_and_output_index():
    row = torch.zeros(1000)
    tokens = {(s, i): token(row, order(seed=s, output_index=i)) for s in (-1, 0, 1, 2**63, 2**64 - 2) for i in range(4)}
    assert tokens == {(s, i): token(row, order(seed=s, output_index=i)) for s, i in tokens}
    assert len(set(tokens.values())) >= 18  # 20 draws from 1000 equals: two may meet


def test_greedy_is_the_argmax_and_logits_stay_untouched():
    logits = random_logits(4)
    before = logits.clone()
    everything = order(temperature=0, logit_bias=((3, 9.0),), repetition_penalty=2.0, prompt_ids=(1,), banned_ids=(2,))
    plain = [order(temperature=0) for _ in range(3)]
    assert [d.token_id for d in sample(logits[:3], plain)] == logits[:3].argmax(-1).tolist()
    sample(logits, [everything, order(top_k=3, top_p=0.5), order(min_p=0.1), order(top_logprobs=2)])
    assert torch.equal(logits, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_float_type_gives_the_greedy_token(dtype: torch.dtype):
    logits = random_logits(2).to(dtype)
    assert [d.token_id for d in sample(logits, [order(temperature=0), order(top_k=1)])] == logits.argmax(-1).tolist()


@pytest.mark.parametrize(
    "params", [{"top_k": 1}, {"top_p": 1e-9}, {"top_p": 0.0}, {"min_p": 1.0}, {"temperature": 1e-30}]
)
def test_the_narrowest_setting_of_each_filter_is_greedy(params: dict[str, Any]):
    logits = random_logits(64, seed=7, scale=0.1)
    orders = [order(seed=i, **params) for i in range(64)]
    assert [d.token_id for d in sample(logits, orders)] == logits.argmax(-1).tolist()


def test_tiny_top_p_takes_one_of_two_equal_maxima():
    row = torch.tensor([0.0, 5.0, 5.0, 1.0])
    assert {token(row, order(seed=s, top_p=1e-6)) for s in range(50)} == {1}


def test_a_small_but_served_temperature_stays_finite():
    row = torch.tensor([1e4, -1e4, 9.9e3])
    assert token(row, order(temperature=2e-5)) == 0


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits_once():
    row = torch.tensor([4.0, 3.0, -1.0, -1.5])
    assert token(row, order(temperature=0, repetition_penalty=1.4, prompt_ids=(0, 0), output_ids=(0,))) == 1  # 2.86
    assert token(row, order(temperature=0, repetition_penalty=1.3, prompt_ids=(0, 0), output_ids=(0,))) == 0  # 3.08
    low = torch.tensor([-1.0, -1.5])
    assert token(low, order(temperature=0, repetition_penalty=1.6, prompt_ids=(0,))) == 1
    assert token(low, order(temperature=0, repetition_penalty=1.4, prompt_ids=(0,))) == 0


def test_presence_counts_once_and_frequency_every_time_over_the_output_only():
    row = torch.tensor([2.0, 1.0])
    assert token(row, order(temperature=0, presence_penalty=0.9, output_ids=(0, 0, 0))) == 0
    assert token(row, order(temperature=0, presence_penalty=1.1, output_ids=(0,))) == 1
    assert token(row, order(temperature=0, frequency_penalty=0.4, output_ids=(0, 0))) == 0
    assert token(row, order(temperature=0, frequency_penalty=0.4, output_ids=(0, 0, 0))) == 1
    assert token(row, order(temperature=0, frequency_penalty=2.0, presence_penalty=2.0, prompt_ids=(0, 0))) == 0
    assert token(row, order(temperature=0, frequency_penalty=-2.0, output_ids=(1,))) == 1


def test_bias_of_100_forces_and_of_minus_100_forbids():
    logits = random_logits(40, seed=9)
    forced = sample(logits, [order(seed=i, logit_bias=((17, 100.0),)) for i in range(40)])
    assert {d.token_id for d in forced} == {17}
    best = logits.argmax(-1).tolist()
    forbidden = sample(logits, [order(seed=i, logit_bias=((best[i], -100.0),)) for i in range(40)])
    assert all(d.token_id != b for d, b in zip(forbidden, best, strict=True))


def test_banned_ids_never_come_even_when_biased():
    logits = random_logits(40, seed=10)
    best = logits.argmax(-1).tolist()
    orders = [order(seed=i, banned_ids=(best[i],), logit_bias=((best[i], 100.0),)) for i in range(40)]
    assert all(d.token_id != b for d, b in zip(sample(logits, orders), best, strict=True))


def test_logprobs_are_of_the_unmodified_distribution_and_sorted():
    logits = random_logits(2, seed=12)
    processed = order(seed=1, temperature=0.5, logit_bias=((3, 50.0),), banned_ids=(4,), top_k=2, top_logprobs=5)
    wanted = logits.log_softmax(-1)
    for row, draw in enumerate(sample(logits, [processed, replace(processed, seed=2)])):
        assert draw.logprobs is not None
        assert draw.logprobs.chosen.token_id == draw.token_id == 3
        assert draw.logprobs.chosen.logprob == wanted[row, 3].item()
        best = wanted[row].topk(5)
        assert [t.logprob for t in draw.logprobs.top] == best.values.tolist()
        assert [t.token_id for t in draw.logprobs.top] == best.indices.tolist()


def test_rows_get_as_many_alternatives_as_they_ask_for():
    logits = random_logits(4)
    asked = [order(top_logprobs=n) for n in (None, 0, 3, 50)]
    none, zero, three, all_of_them = (draw.logprobs for draw in sample(logits, asked))
    assert none is None
    assert zero is not None and three is not None and all_of_them is not None
    assert (len(zero.top), len(three.top), len(all_of_them.top)) == (0, 3, 50)


def test_greedy_row_with_logprobs_reports_its_own_token_first():
    logits = random_logits(1)
    (draw,) = sample(logits, [order(temperature=0, top_logprobs=2)])
    assert draw.logprobs is not None and draw.logprobs.top[0] == draw.logprobs.chosen


def test_no_rows_draw_nothing():
    assert sample(torch.empty(0, VOCAB), []) == ()


def test_the_batch_comes_to_the_host_in_one_copy(monkeypatch: pytest.MonkeyPatch):
    copies = []
    plain_tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: copies.append(self.shape) or plain_tolist(self))
    for name in ("item", "__bool__", "__int__", "__float__", "cpu", "numpy", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_: pytest.fail("a second way to the host"))
    sample(random_logits(3), [order(top_logprobs=3, top_p=0.5), order(top_k=4), order(banned_ids=(1,), min_p=0.2)])
    assert len(copies) == 1


token_ids = st.lists(st.integers(0, VOCAB - 1), max_size=6).map(tuple)
orders_strategy = st.builds(
    order,
    seed=st.integers(-(2**63), 2**64),
    output_index=st.integers(0, 1000),
    prompt_ids=token_ids,
    output_ids=token_ids,
    banned_ids=token_ids,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 3, 20, VOCAB, 1000]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 0.01]),
    min_p=st.sampled_from([0.0, 0.05, 0.5]),
    repetition_penalty=st.sampled_from([1.0, 0.8, 1.5]),
    presence_penalty=st.sampled_from([0.0, 1.0, -2.0]),
    frequency_penalty=st.sampled_from([0.0, 0.5]),
    logit_bias=st.lists(
        st.tuples(st.integers(0, VOCAB - 1), st.floats(-100, 100)), max_size=3, unique_by=lambda pair: pair[0]
    ).map(tuple),
    top_logprobs=st.sampled_from([None, 0, 4, 20]),
)


@settings(deadline=None, max_examples=60)
@given(st.lists(orders_strategy, min_size=1, max_size=6), st.integers(0, 1000), st.randoms(use_true_random=False))
def test_a_row_is_drawn_alike_alone_and_in_any_batch(orders: list[SampleOrder], seed: int, random: Random):
    logits = random_logits(len(orders), seed=seed)
    together = sample(logits, orders)
    assert tuple(sample(logits[i : i + 1], [o])[0] for i, o in enumerate(orders)) == together
    places = list(range(len(orders)))
    random.shuffle(places)
    shuffled = sample(logits[places], [orders[i] for i in places])
    assert shuffled == tuple(together[i] for i in places)


@settings(deadline=None, max_examples=100, derandomize=True)
@given(orders_strategy, st.integers(0, 1000))
def test_any_mixture_draws_only_what_the_naive_formula_allows(one: SampleOrder, seed: int):
    row = random_logits(1, seed=seed)[0]
    wanted = naive_distribution(row.tolist(), one)
    drawn = token(row, one)
    assert wanted[drawn] > 0
    if max(wanted) == 1.0:
        assert drawn == wanted.index(1.0)
