"""Measuring where sparse attention pays: what is compared, when it ends, and that the engine takes the table. No time is judged."""

import sys
from dataclasses import replace

import pytest
import torch
from tiny_models import loaded_model
from typer.testing import CliRunner

from loopserve.cli import app
from loopserve.cli.tune import remarks
from loopserve.config import BLOCK_TOKENS, DecodeSparsity, EngineConfig, PrefillSparsity
from loopserve.crossover import Place, find_crossover, read_table, shape_key
from loopserve.engine import Engine
from loopserve.errors import ConfigError, InvalidRequest
from loopserve.loading import cpu_model
from loopserve.plan import SparsePrefill
from loopserve.tuning import Conversation, Decode, Prefill, TuningPlan, first_that_pays, tune
from loopserve.tuning.texts import dialogue_ids, random_ids

CHUNK = 32
CONFIG = EngineConfig(
    device="cpu",
    dtype="float32",
    kv_blocks=128,
    max_step_prefill_tokens=CHUNK,
    prefill=PrefillSparsity(chunk_tokens=CHUNK, sampled_rows=8, heldout_rows=4, tile_tokens=16, local_tokens=16),
    decode=DecodeSparsity(budget_tokens=16, budget_floor_tokens=8),
)
PLAN = TuningPlan(contexts=(64, 96), rows=2, pairs=1, steps=3)


@pytest.fixture(scope="module")
def loaded():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield loaded_model("llama")
    torch.set_num_threads(before)


def prefill(context, speedup):
    return Prefill(context, 0.95, (speedup,), (1.0,), 0.5, 0, None)


def decode(context, speedup):
    return Decode(context, 16, (speedup,), (1.0,), 21, None)


@pytest.fixture
def told_speeds(monkeypatch):
    """Let a search find told speeds, {context: (prefill, decode)}, over a conversation that computes nothing. What it measured."""
    measured = []
    module = sys.modules["loopserve.tuning.tune"]  # the package has a function of this name

    class Nothing:
        def __init__(self, *arguments, **settings):
            pass

        def extend(self, start, end):
            pass

    def install(speeds):
        def measure_prefill(conversation, context, **settings):
            measured.append(("prefill", context))
            return prefill(context, speeds[context][0])

        def measure_decode(conversation, context, **settings):
            measured.append(("decode", context))
            return decode(context, speeds[context][1])

        monkeypatch.setattr(module, "Conversation", Nothing)
        monkeypatch.setattr(module, "measure_prefill", measure_prefill)
        monkeypatch.setattr(module, "measure_decode", measure_decode)
        return measured

    return install


def test_the_crossover_is_where_sparse_pays_for_good():
    assert first_that_pays([decode(512, 0.9), decode(1024, 1.1), decode(2048, 1.2)]) == 1024
    assert first_that_pays([decode(512, 1.5), decode(1024, 0.9), decode(2048, 1.2)]) == 2048
    assert first_that_pays([decode(512, 1.5), decode(1024, 0.9)]) is None
    assert first_that_pays([decode(512, 1.04), decode(1024, 1.1)], margin=1.05) == 1024


def test_each_row_of_a_conversation_has_the_kv_of_the_first(loaded):
    ids = random_ids(loaded.vocab_size, 80, seed=1)
    conversation = Conversation(loaded, CONFIG, ids, rows=3, scattered=True)
    conversation.extend(0, 60)
    conversation.answer(60, 2, budget_tokens=16)
    conversation.chunk(60, 76, sparse=SparsePrefill("lines", alpha=0.5, min_coverage=None, seed=0))
    conversation.extend(60, 70)
    conversation.answer(70, 2, budget_tokens=None)
    store, slots = conversation._runner.store, []
    for table in conversation._tables:
        slots.append(torch.tensor([block * BLOCK_TOKENS + at for block in table for at in range(BLOCK_TOKENS)][:72]))
    exact = Conversation(loaded, CONFIG, ids, scattered=False)
    exact.extend(0, 72)
    wanted = torch.arange(72) + BLOCK_TOKENS * exact._tables[0][0]
    reference = exact._runner.store
    for pool, right in zip((*store.keys, *store.values), (*reference.keys, *reference.values), strict=True):
        for own in slots:
            torch.testing.assert_close(pool[own], right[wanted], atol=1e-4, rtol=1e-4)


def test_a_search_measures_both_phases_at_rising_lengths_with_the_engines_settings(loaded):
    seen = []
    found = tune(loaded, CONFIG, replace(PLAN, contexts=(96, 64)), on_point=seen.append)
    assert [(type(point), point.context_tokens) for point in seen] == [
        (Decode, 64),
        (Prefill, 64),
        (Decode, 96),
        (Prefill, 96),
    ]
    assert found.decodes == (seen[0], seen[2]) and found.prefills == (seen[1], seen[3])
    assert all(len(point.dense_s) == len(point.sparse_s) == 1 for point in seen)
    assert all(0.0 < point.cells_share <= 1.0 for point in found.prefills)
    assert {point.budget_tokens for point in found.decodes} == {16}
    assert (found.entry.device, found.entry.shape) == (cpu_model(), shape_key(loaded.shape))
    assert found.entry.decode_rows == 2
    assert found.text == "made dialogues"
    assert "rows side by side: 2" in found.entry.reason and f"{CHUNK} rows" in found.entry.reason


def test_a_search_ends_where_both_phases_paid_twice_in_a_row(loaded, told_speeds):
    measured = told_speeds({64: (0.5, 1.2), 96: (1.3, 1.3), 128: (1.4, 9.0), 160: (9.0, 9.0)})
    found = tune(loaded, CONFIG, replace(PLAN, contexts=(64, 96, 128, 160)))
    assert measured == [("decode", 64), ("prefill", 64), ("decode", 96), ("prefill", 96), ("prefill", 128)]
    assert found.entry.prefill_min_context_tokens == 96 + CHUNK  # `auto` asks for the context at a chunk's end
    assert found.entry.decode_min_context_tokens == 64
    assert not found.is_out_of_time


def test_a_phase_that_never_paid_stays_dense_and_the_remarks_say_how_far_it_was_looked(loaded, told_speeds):
    told_speeds({64: (0.5, 1.04), 96: (1.04, 1.2)})
    found = tune(loaded, CONFIG, PLAN)
    assert found.entry.prefill_min_context_tokens is None
    assert found.entry.decode_min_context_tokens == 96
    text = " ".join(remarks(found, 300.0))
    assert "prefill is dense at every length, decode sparse from 96 tokens on" in text
    assert "Beyond 96 tokens prefill was not measured" in text
    assert "decode was not measured" not in text


def test_decode_is_not_measured_where_a_selection_holds_everything(loaded, told_speeds):
    measured = told_speeds({16: (0.5, 0.5), 64: (0.5, 0.5)})
    tune(loaded, CONFIG, replace(PLAN, contexts=(16, 64)))
    assert ("decode", 16) not in measured and ("decode", 64) in measured


class Clock:
    """Each look at it takes a second."""

    def __init__(self):
        self.now_s = 0.0

    def __call__(self):
        self.now_s += 1.0
        return self.now_s


def test_the_limit_of_time_ends_a_search_between_two_forwards(loaded):
    clock, plan = Clock(), TuningPlan(contexts=(64, 96, 128, 160), rows=1, pairs=1, steps=2, seconds_max=40.0)
    found = tune(loaded, CONFIG, plan, clock=clock)
    assert found.is_out_of_time
    assert clock.now_s <= 43.0
    assert [point.context_tokens for point in found.prefills] in ([64], [64, 96])
    assert any("The 40 seconds were over" in line for line in remarks(found, 40.0))


def test_no_time_for_a_single_length_is_told(loaded):
    with pytest.raises(ConfigError, match="2 seconds were over before one length"):
        tune(loaded, CONFIG, replace(PLAN, seconds_max=2.0), clock=Clock())


@pytest.mark.parametrize(
    ("plan", "settings", "complaint"),
    [
        ({"contexts": (4096,)}, {}, "4096 tokens does not fit"),
        ({"contexts": (), "rows": 32}, {}, "does not fit"),
        ({"contexts": (16,)}, {}, "leaves nothing out"),
        ({"rows": 64}, {}, "more than a batch takes"),
        ({}, {"prefill": replace(CONFIG.prefill, method="dense")}, "prefill.method is 'dense'"),
        ({}, {"decode": replace(CONFIG.decode, method="dense")}, "decode.method is 'dense'"),
    ],
)
def test_what_leaves_nothing_to_compare_is_refused(loaded, plan, settings, complaint):
    with pytest.raises(ConfigError, match=complaint):
        tune(loaded, replace(CONFIG, **settings), replace(PLAN, **plan))


@pytest.mark.parametrize("settings", [{"rows": 0}, {"contexts": (0,)}, {"seconds_max": 0.0}])
def test_a_plan_that_measures_nothing_is_refused(settings):
    with pytest.raises(ConfigError):
        TuningPlan(**settings)


def test_unnamed_lengths_double_and_end_with_the_longest_that_fits(loaded, told_speeds):
    lengths = (2048, 4096, 8192, 9952)
    measured = told_speeds(dict.fromkeys(lengths, (0.5, 0.5)))
    found = tune(replace(loaded, max_positions=10_000), replace(CONFIG, kv_blocks=1 << 14), TuningPlan(rows=4))
    assert tuple(context for phase, context in measured if phase == "prefill") == lengths
    assert found.longest_tokens == 10_000 - CHUNK


def test_made_dialogues_and_random_tokens_are_the_same_for_the_same_seed(loaded):
    assert dialogue_ids(loaded, 300, seed=1) == dialogue_ids(loaded, 300, seed=1) != dialogue_ids(loaded, 300, seed=2)
    assert random_ids(50, 300, seed=1) == random_ids(50, 300, seed=1) != random_ids(50, 300, seed=2)
    assert set(random_ids(50, 300, seed=1)) <= set(range(50))


def invoke(*arguments, **environ):
    return CliRunner().invoke(app, ["bench", *arguments], env=environ)


TOY = {
    "LOOPSERVE_ENGINE_PREFILL__CHUNK_TOKENS": "64",
    "LOOPSERVE_ENGINE_DECODE__BUDGET_TOKENS": "32",
    "LOOPSERVE_ENGINE_DECODE__BUDGET_FLOOR_TOKENS": "32",
}


def test_the_command_writes_a_table_that_the_engine_takes(tmp_path, loaded):
    out = tmp_path / "own.json"
    run = invoke("--tune", "--contexts", "64,128", "--rows", "1", "--device", "cpu", "--out", str(out), **TOY)
    assert run.exit_code == 0, run.output
    assert f"LOOPSERVE_ENGINE_CROSSOVER_FILE={out}" in run.output
    assert "made dialogues" in run.output and "cells" in run.output
    (entry,) = read_table(out)
    assert entry.device == cpu_model()
    engine = Engine(EngineConfig(device="cpu", kv_blocks=64, crossover_file=str(out)))
    place = Place(cpu_model(), "cpu", engine.model_shape)
    assert find_crossover(EngineConfig(crossover_file=str(out)), place).entry == entry


def test_the_command_does_not_begin_with_a_file_that_is_no_table(tmp_path):
    path = tmp_path / "notes.json"
    path.write_text("my notes")
    run = invoke("--tune", "--out", str(path))
    assert isinstance(run.exception, ConfigError) and str(path) in run.exception.message
    assert path.read_text() == "my notes"
    run = invoke("--tune", "--out", str(tmp_path / "nowhere" / "own.json"))
    assert isinstance(run.exception, InvalidRequest) and "no folder" in run.exception.message


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--tune", "--rate", "3"), "--rate is an option of a load"),
        (("--tune", "--json", "x"), "--json is an option of a load"),
        (("--contexts", "64"), "--contexts is an option of --tune"),
        (("--tune", "--contexts", "64;128"), "--contexts: '64;128' is no list"),
    ],
)
def test_options_without_effect_are_refused(arguments, complaint):
    run = invoke(*arguments)
    assert isinstance(run.exception, InvalidRequest)
    assert complaint in run.exception.message
