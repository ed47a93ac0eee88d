"""What is drawn: always inside its limits, on average what was asked for, and refused where it means nothing."""

import random
from statistics import fmean, median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loopserve.bench.distributions import Distribution, Shape
from loopserve.bench.workload import Synthetic, Workload, made_text
from loopserve.errors import InvalidRequest

SIZES = st.integers(1, 10_000)


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("5", Distribution(Shape.CONSTANT, 5, 5)),
        ("constant:0.5", Distribution(Shape.CONSTANT, 0.5, 0.5)),
        ("uniform:40..200", Distribution(Shape.UNIFORM, 40, 200)),
        ("exponential:50", Distribution(Shape.EXPONENTIAL, 50, 500)),
        ("exponential:50..60.5", Distribution(Shape.EXPONENTIAL, 50, 60.5)),
        ("lognormal:120,0.6", Distribution(Shape.LOGNORMAL, 120, 1200, 0.6)),
        ("lognormal:120,0.6..800", Distribution(Shape.LOGNORMAL, 120, 800, 0.6)),
    ],
)
def test_a_word_is_read_and_written_back(word: str, meant: Distribution) -> None:
    assert Distribution.parse(word) == meant
    assert Distribution.parse(str(meant)) == meant


@pytest.mark.parametrize(
    "word",
    ["", "x", "-1", "uniform:5", "uniform:9..3", "constant:1..2", "5..9", "exponential:5,1", "lognormal:5", "gauss:1,2",
     "lognormal:5,9", "uniform:1,2..3", "exponential:50..40", "nan", "inf"],
)  # fmt: skip
def test_a_word_that_means_nothing_is_refused_by_the_options_name(word: str) -> None:
    with pytest.raises(InvalidRequest, match="--turns: ") as refused:
        Distribution.parse(word, name="--turns")
    assert refused.value.param == "--turns"


@given(st.sampled_from(Shape), SIZES, SIZES, st.floats(0.01, 3), st.integers())
def test_every_draw_lies_inside_the_limits(shape: Shape, one: int, other: int, sigma: float, seed: int) -> None:
    low, high = sorted((one, other))
    word = {
        Shape.CONSTANT: f"{low}",
        Shape.UNIFORM: f"uniform:{low}..{high}",
        Shape.EXPONENTIAL: f"exponential:{low}..{high}",
        Shape.LOGNORMAL: f"lognormal:{low},{sigma:.2f}..{high}",
    }[shape]
    drawn, rng = Distribution.parse(word), random.Random(seed)
    least = low if shape in (Shape.CONSTANT, Shape.UNIFORM) else 0
    assert all(least <= drawn.draw(rng) <= drawn.high for _ in range(50))
    assert all(1 <= drawn.draw_whole(rng, least=1) <= drawn.high for _ in range(50))


def test_draws_are_spread_as_their_shape_says() -> None:
    rng = random.Random(7)

    def drawn(word: str) -> list[float]:
        return [Distribution.parse(word).draw(rng) for _ in range(20_000)]

    assert fmean(drawn("uniform:40..200")) == pytest.approx(120, rel=0.02)
    assert fmean(drawn("exponential:50..100000")) == pytest.approx(50, rel=0.03)
    assert median(drawn("lognormal:120,0.6")) == pytest.approx(120, rel=0.03)
    assert set(drawn("3")) == {3.0}
    whole = [Distribution.parse("uniform:1..3").draw_whole(rng, least=1) for _ in range(9000)]
    assert [whole.count(n) / 9000 for n in (1, 2, 3)] == pytest.approx([1 / 3] * 3, abs=0.03)


def test_nothing_is_a_length_too() -> None:
    rng = random.Random(0)
    for word in ("0", "uniform:0..0", "exponential:0", "lognormal:0,1"):
        assert Distribution.parse(word).draw(rng) == 0


def test_a_dialogue_depends_on_seed_and_number_alone() -> None:
    source = Synthetic(
        turns=Distribution.parse("uniform:2..9"), input_tokens=Distribution.parse("uniform:5..50"), seed=3
    )
    later_first = [source.script(index) for index in (4, 0, 2)]
    assert [source.script(index) for index in (0, 2, 4)] == [later_first[1], later_first[2], later_first[0]]
    assert len({script.turns[0].user for script in later_first}) == 3
    assert Synthetic(seed=4).script(0) != Synthetic(seed=3).script(0)


def test_a_system_prompt_is_shared_or_not() -> None:
    tokens = Distribution.constant(20)
    shared, own = (Synthetic(system_tokens=tokens, shares_system=shares) for shares in (True, False))
    assert len({shared.script(index).system for index in range(5)}) == 1
    assert len({own.script(index).system for index in range(5)}) == 5
    assert Synthetic().script(0).system is None


def test_lengths_are_tokens_of_the_model_at_hand() -> None:
    source = Synthetic(input_tokens=Distribution.constant(100), tokens_per_word=2.5)
    assert len(source.script(0).turns[0].user.split()) == 40
    assert len(made_text(random.Random(0), 17).split()) == 17


def test_nobody_thinks_before_the_first_turn() -> None:
    script = Synthetic(think_s=Distribution.constant(2)).script(0)
    assert [turn.think_s for turn in script.turns] == [0, 2, 2, 2, 2, 2]


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_dialogues": None},
        {"num_dialogues": 0},
        {"num_warmup": -1},
        {"concurrency": 0},
        {"concurrency": 100_000},
        {"rate_per_s": 0.0},
        {"duration_s": -1.0},
        {"drain_s": -1.0},
    ],
)
def test_a_load_without_sense_or_end_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(InvalidRequest):
        Workload(Synthetic(), **{"num_dialogues": 5, **wrong})  # type: ignore[arg-type]


def test_lengths_that_no_server_takes_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="goes above 10000"):
        Synthetic(turns=Distribution.constant(20_000))
