"""Decode steps that are captured once and replayed: the same tokens, with nothing left for Python to do."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import loaded_model

from loopserve.config import DecodeSparsity, EngineConfig, PrefillSparsity
from loopserve.dialogue import Mode, QualityContract, SamplingParams, SessionId, TurnEnded, TurnId, TurnRequest
from loopserve.engine import Engine
from loopserve.graphs import DecodeGraphs, Step, _row_bucket
from loopserve.loading import LoadedModel
from loopserve.runner import ModelRunner
from tests.engine.replay import Replays

NUM_BLOCKS = 400
DECODE = DecodeSparsity(budget_tokens=32, budget_floor_tokens=8, measure_outputs=23)
CONFIG = EngineConfig(
    kv_blocks=NUM_BLOCKS, max_running_turns=12, decode=DECODE, prefill=PrefillSparsity(chunk_tokens=64)
)


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return loaded_model("llama")


@pytest.fixture
def replays() -> Iterator[Replays]:
    replays = Replays()
    with replays.whole_operations():
        yield replays


def ask(number: int, length: int, contract: QualityContract, *, outputs: int, seed: int = 0) -> TurnRequest:
    prompt = tuple((7 * i + 13 * number) % 250 for i in range(length))
    sampling = SamplingParams(max_tokens=outputs, temperature=0.0 if seed == 0 else 1.0, seed=seed, ignore_eos=True)
    return TurnRequest(SessionId(f"s{number}"), prompt, sampling, contract)


def assert_alike(ends: list[TurnEnded], others: list[TurnEnded]) -> None:
    """All that is told of each turn, but for the last digits of its coverage: padding adds zeros to sums in another order."""
    for end, other in zip(ends, others, strict=True):
        assert end.token_ids == other.token_ids
        quality, expected = end.usage.quality, other.usage.quality
        for name in ("coverage_mean", "coverage_worst_head"):
            assert getattr(quality, name) == pytest.approx(getattr(expected, name), abs=1e-5)
        without = replace(
            expected, coverage_mean=quality.coverage_mean, coverage_worst_head=quality.coverage_worst_head
        )
        assert end.usage == replace(other.usage, quality=without)


def answers(
    loaded: LoadedModel, config: EngineConfig, asked: list[TurnRequest], replays: Replays | None, *, runner=None
) -> list[TurnEnded]:
    """What an engine answers when it is asked one turn more with every step."""
    if replays is not None and runner is None:
        runner = ModelRunner(loaded, config, num_blocks=NUM_BLOCKS, capture=replays.capture)
    engine = Engine(config, loaded=loaded, runner=runner)
    ended: dict[TurnId, TurnEnded] = {}

    def listen(events):
        ended.update({e.turn_id: e for e in events if isinstance(e, TurnEnded)})

    ids = []
    for request in asked:
        ids += engine.submit(request, listen)
        engine.step()
    while engine.step():
        engine.check()
    return [ended[turn_id] for turn_id in ids]


SPARSE, DENSE = QualityContract(mode=Mode.SPARSE), QualityContract(mode=Mode.EXACT)
MIXES = {
    "dense": [DENSE] * 5,
    "ranked": [SPARSE] * 5,
    "both": [SPARSE, DENSE, SPARSE, DENSE, SPARSE],
    "budgets of their own": [replace(SPARSE, budget_tokens=tokens) for tokens in (8, 40, 16, 200, 8)],
    "a method that keeps state, beside": [SPARSE, replace(SPARSE, decode_method="h2o"), DENSE, SPARSE, SPARSE],
    "with a promise": [replace(SPARSE, min_coverage=0.99), SPARSE, SPARSE, DENSE, SPARSE],
}


UNSUITED = [MIXES["a method that keeps state, beside"], MIXES["with a promise"]]  # few of their steps can be captured


@pytest.mark.parametrize("contracts", MIXES.values(), ids=MIXES)
@pytest.mark.parametrize("left_out", ["mean", "nothing"])
def test_replayed_steps_answer_as_steps_laid_out_anew(
    loaded: LoadedModel, replays: Replays, contracts: list[QualityContract], left_out: str
):
    config = replace(CONFIG, decode=replace(DECODE, left_out=left_out))
    lengths = (150, 20, 90, 700, 33)
    asked = [
        ask(number, length, contract, outputs=60 - 3 * number, seed=number % 2)
        for number, (length, contract) in enumerate(zip(lengths, contracts, strict=True))
    ]
    assert_alike(answers(loaded, config, asked, replays), answers(loaded, config, asked, None))
    if contracts not in UNSUITED:
        assert replays.num_replayed > replays.num_captured > 0


def test_a_replayed_step_runs_no_python_of_the_model(loaded: LoadedModel, replays: Replays):
    calls = []
    handle = loaded.model.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        answers(loaded, CONFIG, [ask(0, 100, replace(SPARSE, budget_tokens=8), outputs=60)], replays)
    finally:
        handle.remove()
    prefill, first_uses, measuring = 2, 2, 59 // DECODE.measure_outputs  # a step that measures has a shape of its own
    assert replays.num_captured == 1
    assert replays.num_replayed == 59 - measuring - first_uses
    assert len(calls) == prefill + measuring + first_uses + replays.num_captured


def test_steps_that_measure_are_replayed_too(loaded: LoadedModel, replays: Replays):
    config = replace(CONFIG, decode=replace(DECODE, measure_outputs=2))
    asked = [ask(number, 100 + number, SPARSE, outputs=40) for number in range(5)]
    ends = answers(loaded, config, asked, replays)
    assert_alike(ends, answers(loaded, config, asked, None))
    assert all(end.usage.quality.coverage_mean is not None for end in ends)
    assert replays.num_captured >= 2
    assert replays.num_replayed > 25


@pytest.mark.parametrize("select_per", ["kv_head", "query_head"])
def test_lists_may_be_each_query_heads_own(loaded: LoadedModel, replays: Replays, select_per: str):
    config = replace(CONFIG, decode=replace(DECODE, select_per=select_per, dense_layers=(1,)))
    asked = [ask(number, 60 + 50 * number, SPARSE, outputs=20) for number in range(3)]
    assert_alike(answers(loaded, config, asked, replays), answers(loaded, config, asked, None))
    assert replays.num_replayed > 0


def test_shapes_that_are_not_used_any_more_are_forgotten(
    loaded: LoadedModel, replays: Replays, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("loopserve.graphs._GRAPHS_MAX", 1)
    asked = [ask(number, 60, (SPARSE, DENSE)[number % 2], outputs=25 + 9 * number) for number in range(4)]
    assert_alike(answers(loaded, CONFIG, asked, replays), answers(loaded, CONFIG, asked, None))


@pytest.mark.parametrize(("error", "num_tries"), [(RuntimeError("not here"), 1), (torch.OutOfMemoryError("full"), 2)])
def test_a_step_that_cannot_be_captured_runs_as_it_did(
    loaded: LoadedModel, caplog: pytest.LogCaptureFixture, error: RuntimeError, num_tries: int
):
    tries = []

    class Refusing(Replays):
        def capture(self, step: Step) -> Step:
            tries.append(step)
            raise error

    config = replace(CONFIG, decode=replace(DECODE, measure_outputs=2))  # two shapes take turns
    asked = [ask(0, 60, replace(SPARSE, budget_tokens=8), outputs=30)]
    assert_alike(answers(loaded, config, asked, Refusing()), answers(loaded, config, asked, None))
    assert len(tries) == num_tries, "without memory for one shape, another is tried"
    assert len([record for record in caplog.records if record.levelname == "WARNING"]) == num_tries


def test_one_long_context_beside_short_ones_does_not_have_all_of_them_padded_to_its_length(
    loaded: LoadedModel, replays: Replays, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("loopserve.graphs._PADDING_FREE_COLUMNS", 16)
    monkeypatch.setattr("loopserve.graphs._PADDING_RATIO_MAX", 4)  # of eight rows, seven of which are short
    asked = [
        ask(number, length, SPARSE, outputs=40) for number, length in enumerate((1500, 20, 21, 22, 23, 24, 25, 26))
    ]
    shapes = []
    shape_of = DecodeGraphs.shape_of
    monkeypatch.setattr(DecodeGraphs, "shape_of", lambda *args: shapes.append(shape_of(*args)) or shapes[-1])
    assert_alike(answers(loaded, CONFIG, asked, replays), answers(loaded, CONFIG, asked, None))
    rows = [(shape.ranked_rows, shape.ranked_columns) for shape in shapes if shape is not None]
    assert rows and all(num_rows * columns <= 8 * 1700 for num_rows, columns in rows)
    assert None in shapes


def test_budgets_beyond_the_configured_ones_share_shapes(loaded: LoadedModel, replays: Replays):
    asked = [ask(number, 100, replace(SPARSE, budget_tokens=33 + number), outputs=24) for number in range(5)]
    one_by_one = [answers(loaded, CONFIG, [request], None)[0] for request in asked]
    runner = ModelRunner(loaded, CONFIG, num_blocks=NUM_BLOCKS, capture=replays.capture)
    for request, expected in zip(asked, one_by_one, strict=True):
        assert_alike(answers(loaded, CONFIG, [request], replays, runner=runner), [expected])
    assert replays.num_captured <= 2, "33 to 37 are one shape, and one more that measures"


@given(st.integers(0, 500))
@settings(max_examples=60)
def test_rows_are_padded_by_less_than_eight_or_to_the_next_power_of_two(num_rows: int):
    bucket = _row_bucket(num_rows)
    assert num_rows <= bucket < max(num_rows + 8, 2 * num_rows + 1)
    assert (bucket == 0) == (num_rows == 0)


@pytest.mark.gpu
@pytest.mark.parametrize("launch_ahead", [False, True])
def test_a_cuda_device_answers_as_a_cpu_with_captured_steps_and_without(loaded: LoadedModel, launch_ahead: bool):
    on_cuda = loaded_model("llama", device="cuda")
    asked = [ask(number, 60 + 90 * number, (SPARSE, DENSE)[number % 2], outputs=30) for number in range(5)]
    expected = [end.token_ids for end in answers(loaded, CONFIG, asked, None)]
    for cuda_graphs in (True, False):
        config = replace(CONFIG, cuda_graphs=cuda_graphs, launch_ahead=launch_ahead)
        assert [end.token_ids for end in answers(on_cuda, config, asked, None)] == expected
