"""The benchmarks of accelerators plan what the engine plans and count what they say they count; here at tiny size, on a CPU."""

import gzip
import importlib.machinery
import importlib.util
import json
import shlex
import sys
import types
from xml.etree import ElementTree

import pytest
import torch
from transformers import LlamaForCausalLM

from benchmarks.drive import drive
from benchmarks.engine import decode_step, device, profile, turns
from benchmarks.engine.activity import read_trace, record_steps
from benchmarks.engine.decode_step import Timed, side_of
from benchmarks.engine.random_model import ModelSize
from benchmarks.engine.shape import (
    LLAMA_8B,
    TINY,
    build_model,
    kv_bytes_a_token,
    llama_config,
    step_bytes,
    weight_bytes,
)
from benchmarks.engine.steps import Answers, FilledPool, StepKind, num_fitting
from benchmarks.engine.turns_sides import Collector, EngineSide, VllmSide, make_dialogues
from loopserve.config import BLOCK_TOKENS, DecodeSparsity, EngineConfig
from loopserve.dialogue import Mode, QualityContract, SamplingParams, SessionId, TurnRequest
from loopserve.engine import Engine
from loopserve.kernels import KeySketch, store_sketch
from loopserve.loading import describe
from loopserve.runner import ModelRunner

CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("same_threads")


@pytest.fixture(autouse=True)
def one_thread(same_threads):
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def loaded():
    return build_model(TINY, device=CPU, dtype=torch.float32)


@pytest.fixture
def plans(monkeypatch):
    """Every plan that any runner launches."""
    seen = []
    launch = ModelRunner.launch

    def recording(self, plan):
        seen.append(plan)
        return launch(self, plan)

    monkeypatch.setattr(ModelRunner, "launch", recording)
    return seen


def config_of(**decode):
    return EngineConfig(device="cpu", dtype="float32", decode=DecodeSparsity(budget_tokens=64, **decode))


def test_the_model_has_the_bytes_of_llama_8b():
    with torch.device("meta"):
        model = LlamaForCausalLM(llama_config(LLAMA_8B)).to(torch.bfloat16)
    large = describe(model, build_model(TINY, device=CPU, dtype=torch.float32).tokenizer, name="large")
    assert sum(parameter.numel() for parameter in model.parameters()) == 8_030_261_248
    assert weight_bytes(large) == 2 * (8_030_261_248 - 128_256 * 4096)  # no row but the tokens' own of the embedding
    assert kv_bytes_a_token(large) == 128 * 1024
    assert step_bytes(large, 1000.0) == weight_bytes(large) + 1000 * 128 * 1024


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_made_in_their_type_and_frequencies_in_full(dtype):
    model = build_model(TINY, device=CPU, dtype=dtype)
    assert model.dtype == dtype
    assert torch.get_default_dtype() == torch.float32
    frequencies = model.model.model.rotary_emb.inv_freq
    assert frequencies.dtype == torch.float32
    expected = 500_000.0 ** -(torch.arange(0, 16, 2) / 16)
    torch.testing.assert_close(frequencies, expected)
    weight = model.model.model.layers[1].mlp.up_proj.weight.detach().float()
    assert float(weight.std()) == pytest.approx(TINY.hidden**-0.5, rel=0.05)


@pytest.mark.parametrize("decode", [{}, {"scoring": "exact", "refresh_outputs": 16}])
def test_steps_are_ordered_as_the_scheduler_orders_them(loaded, plans, decode):
    config = config_of(**decode, auto_min_context_tokens=0)  # given: the engine asks no table for it
    prompt_tokens, outputs = 100, 70
    engine = Engine(EngineConfig(device="cpu", dtype="float32", kv_blocks=32, decode=config.decode), loaded=loaded)

    class Reader:
        asked = False

        def next_request(self):
            if self.asked:
                return None
            self.asked = True
            sampling = SamplingParams(max_tokens=outputs, temperature=0.0, ignore_eos=True)
            return TurnRequest(SessionId("a"), tuple(range(prompt_tokens)), sampling, QualityContract(mode=Mode.SPARSE))

        def turn_ended(self, ended):
            pass

    drive(engine, [Reader()])
    theirs = [segment for plan in plans for segment in plan.segments]
    plans.clear()
    pool = FilledPool(loaded, config, num_sequences=1, context_tokens=prompt_tokens, room_tokens=outputs + 2)
    answers = Answers(pool, sparse=True)
    for _ in range(outputs - 1):
        answers.step()
    ours = [segment for plan in plans for segment in plan.segments]
    assert [s.capture for s in ours if s.capture] == [s.capture for s in theirs if s.capture]
    orders = [(s.start, s.decode, s.sample.output_index) for s in theirs if s.decode]
    assert len(orders) == outputs - 1
    assert [(s.start, s.decode, s.sample.output_index) for s in ours if s.decode][: outputs - 1] == orders


def test_a_token_launched_ahead_is_the_token_waited_for(loaded):
    pool = FilledPool(loaded, config_of(), num_sequences=3, context_tokens=130, room_tokens=40)
    for sparse in (False, True):
        drawn = []
        for ahead in (0, 1):
            answers = Answers(pool, sparse=sparse, ahead=ahead)
            steps = [answers.step().result.tokens for _ in range(12)]
            drawn.append([[token.token_id for token in tokens] for tokens in steps])
        assert drawn[0] == drawn[1]


def test_sequences_lie_scattered_and_share_no_block(loaded, plans):
    pool = FilledPool(loaded, config_of(), num_sequences=3, context_tokens=160, room_tokens=32)
    answers = Answers(pool, sparse=False)
    for _ in range(20):
        answers.step()
    tables = [segment.block_table for segment in plans[-1].segments]
    blocks = [block for table in tables for block in table]
    assert len(set(blocks)) == len(blocks) == 3 * -(-(160 + 21) // BLOCK_TOKENS)
    assert 0 not in blocks
    assert all(list(table) != list(range(table[0], table[0] + len(table))) for table in tables)
    assert len({turn for plan in plans for turn in plan.ended_turns}) == 0
    Answers(pool, sparse=True)
    assert {turn for plan in plans for turn in plan.ended_turns} == {s.turn_id for s in plans[19].segments}


def test_the_filled_store_holds_finite_keys_and_their_sketches(loaded):
    pool = FilledPool(loaded, config_of(), num_sequences=1, context_tokens=64, room_tokens=16)
    store = pool._runner.store
    sketch = KeySketch.empty(*store.keys[1].shape, CPU)
    store_sketch(store.keys[1], sketch, torch.arange(store.num_slots))
    assert torch.equal(sketch.signs, store.sketches[1].signs)
    assert torch.equal(sketch.scales, store.sketches[1].scales)
    assert float(store.values[1].std()) == pytest.approx(1.0, rel=0.05)


def test_a_step_counts_what_it_must_read(loaded):
    pool = FilledPool(loaded, config_of(), num_sequences=2, context_tokens=200, room_tokens=20)
    assert Answers(pool, sparse=False).step().read_tokens == 2 * 201
    sparse = Answers(pool, sparse=True).step()
    assert sparse.kind == StepKind(choose=True, measure=False)
    kept = 4 + 64 + 1  # sinks, B, window
    sketches = 201 * (16 // 8 + 2) / (4 * 16)
    assert sparse.read_tokens == pytest.approx(2 * (kept + sketches + 0.5))


def test_as_many_sequences_fit_as_their_blocks_do(loaded):
    config = config_of()
    one = FilledPool(loaded, config, num_sequences=1, context_tokens=100, room_tokens=20)
    store = one._runner.store
    num_bytes = store.device_bytes
    a_sequence = num_bytes * 8 // 9  # the null block is nobody's
    for spare, fitting in ((-1, 2), (0, 3)):
        assert fitting == num_fitting(
            loaded, config, context_tokens=100, room_tokens=20, pool_bytes=3 * a_sequence + spare
        )


def seen_busy(busy_us):
    """Two steps of 1 ms in which the device was busy for so long each."""
    marks = [event("user_annotation", "loopserve step", at, 1000) for at in (0, 1000)]
    kernels = [event("kernel", "matmul", at + 100, busy_us, thread=9) for at in (0, 1000)]
    return read_trace([*marks, *kernels], on_device=True)


def test_a_dear_step_weighs_as_often_as_it_comes_and_a_hiccup_does_not(loaded):
    attend, choose = StepKind(), StepKind(choose=True)
    steps = [Timed(attend, 100.0, 0.001)] * 5 + [Timed(attend, 100.0, 1.0)] + [Timed(choose, 400.0, 0.005)] * 2
    side = side_of(steps, seen_busy(250), loaded=loaded, bandwidth=2e9)
    assert side.ms == pytest.approx((6 * 1.0 + 2 * 5.0) / 8)
    assert side.median_ms == pytest.approx(1.0)
    num_bytes = weight_bytes(loaded) + 175 * kv_bytes_a_token(loaded)
    assert side.floor_ms == pytest.approx(num_bytes / 2e6)
    assert side.over_floor == pytest.approx(side.ms / side.floor_ms)
    assert (side.busy_ms, side.idle_share) == pytest.approx((0.25, 0.75))
    assert side.kinds["chooses"] == {"steps": 2, "median_ms": pytest.approx(5.0)}


def test_a_profile_that_missed_kernels_is_not_believed(loaded):
    side = side_of([Timed(StepKind(), 100.0, 0.001)], seen_busy(50), loaded=loaded, bandwidth=2e9)
    assert side.floor_ms > 2 * 0.05  # in that time, memory would give less than half of it
    assert (side.busy_ms, side.idle_share) == (None, None)


def tiny(script, tmp_path, more=""):
    args = script.parse_arguments([*shlex.split(f"--device cpu --tiny {more}"), "--out", str(tmp_path / "out.json")])
    text = script.run_benchmark(args)
    return text, json.loads((tmp_path / "out.json").read_text())


def test_decode_step_writes_both_settings_of_every_batch(tmp_path):
    text, record = tiny(decode_step, tmp_path, "--commit abc")
    assert [(row["batch"], row["decode"]["scoring"]) for row in record["rows"]] == [
        (1, "sketch"),
        (2, "sketch"),
        (1, "exact"),
        (2, "exact"),
    ]
    for row in record["rows"]:
        assert row["dense"]["steps"] == row["sparse"]["steps"] == 16
        assert row["speedup"] == pytest.approx(row["dense"]["ms"] / row["sparse"]["ms"])
        assert 1.0 < row["ceiling"] == pytest.approx(row["dense"]["floor_ms"] / row["sparse"]["floor_ms"])
        assert row["share_of_ceiling"] == pytest.approx(row["speedup"] / row["ceiling"])
        assert row["sparse"]["busy_ms"] is None  # there is no device
    sketch, _, exact, _ = record["rows"]
    assert sketch["sparse"]["kinds"]["chooses"]["steps"] == 16
    assert exact["sparse"]["kinds"]["chooses and measures"]["steps"] == 3  # after 4, 8 and 16 outputs
    assert record["machine"]["commit"] == "abc"
    assert len(record["not_to_be_published"]) == 2
    assert "NOT TO BE PUBLISHED: measured on a CPU" in text


def test_decode_step_profiles_steps_of_both_sides(tmp_path, loaded):
    args = decode_step.parse_arguments(["--device", "cpu", "--tiny", "--out", str(tmp_path / "out.json")])
    found = decode_step.Measured(2, 2, "default", config_of(), (), ())
    seen = decode_step.profiled(loaded, found, args)
    assert set(seen) == {False, True}
    assert all(activity.num_steps == args.profile_steps for activity in seen.values())
    assert all(0.0 < activity.busy_us < activity.wall_us for activity in seen.values())


def test_decode_step_says_what_did_not_fit_in_memory_or_in_time(tmp_path, monkeypatch, loaded):
    a_sequence = num_bytes_of(loaded, config_of(), tokens=256 + 8)
    monkeypatch.setattr(decode_step, "free_bytes", lambda _: decode_step._RESERVE_BYTES + int(2.5 * a_sequence))
    _, record = tiny(decode_step, tmp_path, "--batches 4 --rounds 1")
    assert [(row["batch_asked"], row["batch"]) for row in record["rows"]] == [(4, 2), (4, 2)]
    assert all(row["note"] == "2 is the largest batch that fits" for row in record["rows"])
    text, record = tiny(decode_step, tmp_path, "--seconds-max 0")
    assert [row["skipped"] for row in record["rows"]] == ["no time was left"] * 4
    assert "4 rows were not measured" in text


def test_decode_step_tries_fewer_sequences_when_memory_runs_out(tmp_path, monkeypatch):
    class Small(FilledPool):
        def __init__(self, *args, num_sequences, **more):
            if num_sequences > 3:
                raise torch.OutOfMemoryError("too many")
            super().__init__(*args, num_sequences=num_sequences, **more)

    monkeypatch.setattr(decode_step, "FilledPool", Small)
    _, record = tiny(decode_step, tmp_path, "--batches 5")
    assert [(row["batch_asked"], row["batch"]) for row in record["rows"]] == [(5, 3), (5, 3)]


def num_bytes_of(loaded, config, *, tokens):
    """Of the pool that one sequence of so many tokens has."""
    store = FilledPool(loaded, config, num_sequences=1, context_tokens=tokens, room_tokens=0)._runner.store
    num_bytes = store.device_bytes
    blocks = store.num_slots // BLOCK_TOKENS
    return num_bytes * (blocks - 1) / blocks


def test_large_models_and_absent_devices_are_refused(tmp_path):
    out = ["--out", str(tmp_path / "out.json")]
    with pytest.raises(SystemExit, match="--tiny"):
        decode_step.run_benchmark(decode_step.parse_arguments(["--device", "cpu", *out]))
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="No CUDA device"):
            turns.run_benchmark(turns.parse_arguments(out))


def test_the_result_says_how_every_operation_runs():
    said = device.implementations(CPU)
    assert said.startswith("reference: ") and "paged_decode" in said


def event(category, name, start, length, thread=1):
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": length, "pid": 7, "tid": thread}


TRACE = [
    event("user_annotation", "loopserve step", 100, 100),
    event("user_annotation", "loopserve step", 210, 90),
    event("gpu_user_annotation", "loopserve step", 100, 300, thread=9),  # of the device's lane: no work
    event("kernel", "matmul", 50, 10, thread=9),  # before the steps
    event("kernel", "matmul", 120, 30, thread=9),
    event("kernel", "copy", 140, 20, thread=10),  # overlaps, on another stream
    event("gpu_memcpy", "to host", 280, 5, thread=9),
    event("cuda_runtime", "launch", 105, 10),
    event("python_function", "loopserve/runner.py(1): run", 101, 98),
    event("python_function", "loopserve/runner.py(1): run", 211, 88),
    event("python_function", "torch/nn/modules/module.py(1): call at 0x7f00", 160, 35),
    event("python_function", "loopserve/sampler.py(1): draw", 170, 20),
    event("cpu_op", "aten::other", 100, 200, thread=2),  # of another thread
    {"ph": "i", "cat": "cpu_op", "name": "instant", "ts": 1, "pid": 7, "tid": 1},
]


def test_overlapping_work_is_busy_once_and_what_lies_between_steps_is_counted():
    seen = read_trace(TRACE, on_device=True)
    assert seen.num_steps == 2
    assert seen.wall_us == 200  # from the first step's begin to the last one's end
    assert seen.busy_us == 40 + 5
    assert seen.idle_share == pytest.approx(1 - 45 / 200)
    assert seen.top_work(2) == [("matmul", 30.0, 1), ("copy", 20.0, 1)]


def test_gaps_are_told_by_size_with_what_the_host_did():
    seen = read_trace(TRACE, on_device=True)
    gaps = seen.gaps()
    assert [(gap.start_us, gap.length_us, gap.next_work) for gap in gaps] == [
        (110, 70, "to host"),
        (60, 50, ""),
        (0, 20, "matmul"),
        (185, 15, ""),
    ]
    assert sum(gap.length_us for gap in gaps) + seen.busy_us == seen.wall_us
    assert dict(gaps[2].host) == {
        "launch": 10.0,
        "loopserve/runner.py(1): run": 9.0,
        "Python, outside of torch": 1.0,
    }
    assert [(found["count"], found["total_us"]) for found in seen.gap_classes()] == [(0, 0), (4, 155), (0, 0), (0, 0)]
    functions = dict(seen.functions_while_idle(5))
    assert functions == {"loopserve/sampler.py(1): draw": 20, "loopserve/runner.py(1): run": 19 + 19 + 69 + 14}


def test_a_trace_without_steps_or_work_is_refused():
    with pytest.raises(ValueError, match="no step"):
        read_trace(TRACE[3:], on_device=True)
    with pytest.raises(ValueError, match="no work"):
        read_trace(TRACE[:3], on_device=True)


def test_recorded_steps_are_those_asked_for():
    calls = []

    def step():
        calls.append(torch.ones(64, 64) @ torch.ones(64, 64))

    seen = record_steps(step, 3, CPU, stacks=True)
    assert (len(calls), seen.num_steps) == (4, 3)  # one more, within the profiler, which is not counted
    assert {name: count for name, _, count in seen.top_work(99)}["aten::matmul"] == 3
    assert 0.0 < seen.idle_share < 1.0
    assert any("record_steps" in span.name for span in seen.functions)


def test_profile_writes_a_row_a_trace_and_a_lane_for_every_case(tmp_path):
    text, record = tiny(profile, tmp_path)
    cases = ["prefill sparse", "decode sparse", "decode dense", "prefill dense"]
    assert [row["case"] for row in record["rows"]] == cases
    for row in record["rows"]:
        assert 0.0 < row["busy_ms"] <= row["wall_ms"]
        gaps_ms = sum(found["total_us"] for found in row["gap_classes"]) / 1e3
        assert gaps_ms + row["busy_ms"] == pytest.approx(row["wall_ms"])
        assert sum(kernel["share_of_busy"] for kernel in row["top_kernels"]) <= 1.0 + 1e-9
        assert any("loopserve/" in found["name"] for found in row["functions_while_idle"])
        events = json.loads(gzip.decompress((tmp_path / row["trace"]).read_bytes()))["traceEvents"]
        assert sum(found.get("name") == "loopserve step" for found in events) == row["steps"]
    drawn = ElementTree.parse(tmp_path / record["picture"]).getroot()
    words = [element.text for element in drawn.iter() if element.tag.endswith("text")]
    assert [case for case in cases if any(word.startswith(f"{case}: ") for word in words)] == cases
    assert "decode sparse: the longest gaps" in text


def test_profile_drops_traces_that_are_too_large_and_cases_without_time(tmp_path, monkeypatch):
    monkeypatch.setattr(profile, "_TRACE_BYTES_MAX", 10)
    left = iter([False, True])  # over after the first case's first profile
    monkeypatch.setattr(device.Deadline, "is_over", property(lambda self: next(left, True)))
    _, record = tiny(profile, tmp_path)
    first, *others = record["rows"]
    assert (first["trace"], first["functions_while_idle"]) == (None, [])
    assert list(tmp_path.glob("*.gz")) == []
    assert [row["skipped"] for row in others] == ["no time was left"] * 3


def test_turns_pairs_every_turn_of_both_modes(tmp_path, monkeypatch):
    monkeypatch.setattr(turns.importlib.util, "find_spec", lambda name: None)
    text, record = tiny(turns, tmp_path, "--concurrency 2")
    by_turn = [row for row in record["rows"] if row["kind"] == "turn"]
    assert [(row["turn"], row["pairs"]) for row in by_turn] == [(1, 6), (2, 6), (3, 6)]
    assert by_turn[0]["context_tokens"] == by_turn[0]["new_tokens"] == 96
    for run in (*record["runs"]["loopserve, exact"], *record["runs"]["loopserve, sparse"]):
        assert len(run["turns"]) == 9
        assert all(turn["answer_tokens"] == 6 for turn in run["turns"])
        assert all(0.0 < turn["first_token_s"] <= turn["total_s"] <= run["seconds"] for turn in run["turns"])
    sides = {row["side"]: row for row in record["rows"] if row["kind"] == "throughput"}
    assert sides["vLLM"]["skipped"] == "not installed on this machine"
    assert sides["loopserve, sparse"]["turns_answered"] == [9, 9]
    assert len(record["paired_throughput_ratio"]) == 2
    assert "vLLM: not installed" in text


def test_modes_compute_as_they_are_called_and_find_nothing_of_each_other(loaded):
    dialogues = make_dialogues(2, 2, first_tokens=80, later_tokens=(20, 30), vocab=TINY.vocab, seed=5)
    collector = Collector()
    engine = Engine(EngineConfig(device="cpu", dtype="float32", kv_blocks=64), loaded=loaded, stats=collector)
    for mode in (Mode.EXACT, Mode.SPARSE, Mode.EXACT):
        run = EngineSide(engine, collector, mode, concurrency=2).run(dialogues, answer_tokens=4, is_over=lambda: False)
        assert len(run.turns) == 4
        for stats in collector.turns:
            assert stats.usage.quality.mode is mode
            assert (stats.usage.quality.refreshes > 0) == (mode is Mode.SPARSE)
            assert (stats.usage.cached_tokens > 0) == (stats.turn_number > 1)
    assert engine.sessions() == ()


def test_no_turn_begins_when_the_time_is_over(loaded):
    dialogues = make_dialogues(3, 3, first_tokens=40, later_tokens=(20, 30), vocab=TINY.vocab, seed=5)
    collector = Collector()
    engine = Engine(EngineConfig(device="cpu", dtype="float32", kv_blocks=64), loaded=loaded, stats=collector)
    side = EngineSide(engine, collector, Mode.EXACT, concurrency=1)
    run = side.run(dialogues, answer_tokens=4, is_over=lambda: len(collector.turns) >= 4)
    assert [(turn.dialogue, turn.turn) for turn in run.turns] == [(0, 1), (0, 2), (0, 3), (1, 1)]


def test_what_the_time_does_not_allow_is_left_away_and_said():
    args = turns.parse_arguments(["--out", "x"])  # 2 rounds, 16 dialogues, 10 turns of 1562 new tokens in the mean
    costs = [turns.Cost(first_token_s=0.4, decode_s=2.0), turns.Cost(first_token_s=0.8, decode_s=1.0)]
    share = (4096 + 9 * 1280) / 10 / 4096
    a_turn_s = 1.5 * (16 * share * 1.2 + 3.0)
    assert turns.plan_runs(args, costs, left_s=20.1 * a_turn_s) == turns.Plan(2, 16, 10, "")
    fits = turns.plan_runs(args, costs, left_s=10.1 * a_turn_s)
    assert (fits.rounds, fits.dialogues, fits.turns) == (1, 16, 10)
    assert "1 x 16 x 10 rounds, dialogues and turns instead of 2 x 16 x 10" in fits.cut
    assert turns.plan_runs(args, costs, left_s=5.1 * a_turn_s).turns == 5
    fewer = turns.plan_runs(args, costs, left_s=3.9 * a_turn_s)
    assert (fewer.rounds, fewer.dialogues, fewer.turns >= 4) == (1, 8, True)
    least = turns.plan_runs(args, costs, left_s=0.0)
    assert (least.rounds, least.dialogues, least.turns) == (1, 1, 1)


def fake_vllm(monkeypatch, *, answer_tokens):
    """A package with the part of vLLM's interface that is used: a request gives a token a step."""

    class FakeEngine:
        def __init__(self):
            self.requests, self.prompts = {}, {}

        def add_request(self, request_id, prompt, params):
            self.prompts[request_id] = prompt["prompt_token_ids"]
            self.requests[request_id] = []

        def step(self):
            outputs = []
            for request_id, ids in list(self.requests.items()):
                ids.append(len(ids))
                finished = len(ids) == answer_tokens
                if finished:
                    del self.requests[request_id]
                answer = types.SimpleNamespace(token_ids=list(ids))
                outputs.append(types.SimpleNamespace(request_id=request_id, outputs=[answer], finished=finished))
            return outputs

    made = []

    class LLM:
        def __init__(self, *, model, **settings):
            with open(f"{model}/config.json", encoding="utf-8") as file:  # noqa: PTH123 - as another project would
                self.config = json.load(file)
            self.settings, self.llm_engine = settings, FakeEngine()
            made.append(self)

    module = types.ModuleType("vllm")
    module.LLM, module.SamplingParams = LLM, dict
    module.__spec__ = importlib.machinery.ModuleSpec("vllm", loader=None)
    monkeypatch.setitem(sys.modules, "vllm", module)
    return made


def test_vllm_answers_the_same_dialogues_where_it_is_there(tmp_path, monkeypatch):
    made = fake_vllm(monkeypatch, answer_tokens=6)
    text, record = tiny(turns, tmp_path)
    sides = {row["side"]: row for row in record["rows"] if row["kind"] == "throughput"}
    assert sides["vLLM"]["turns_answered"] == [9, 9]
    assert all(row["vllm_first_token_ms"] >= 0.0 for row in record["rows"] if row["kind"] == "turn")
    (llm,) = made
    assert llm.config["architectures"] == ["LlamaForCausalLM"]
    assert llm.config["num_key_value_heads"] == TINY.kv_heads
    assert "loopserve" not in json.dumps(llm.config)
    assert "vLLM: version" in text


def test_vllm_gets_the_whole_conversation_with_every_turn(monkeypatch):
    made = fake_vllm(monkeypatch, answer_tokens=2)
    side = VllmSide(ModelSize(), max_tokens=99, concurrency=2, memory_share=0.5, max_batch_tokens=64)
    dialogues = make_dialogues(3, 2, first_tokens=5, later_tokens=(3, 4), vocab=50, seed=1)
    run = side.run(dialogues, answer_tokens=2, is_over=lambda: False)
    assert sorted((turn.dialogue, turn.turn) for turn in run.turns) == [(d, t) for d in range(3) for t in (1, 2)]
    assert made[0].llm_engine.prompts["1-2-2"] == [*dialogues[2][0], 0, 1, *dialogues[2][1]]


def test_vllm_that_fails_costs_none_of_our_numbers(tmp_path, monkeypatch):
    fake_vllm(monkeypatch, answer_tokens=5)  # one too few
    _, record = tiny(turns, tmp_path)
    sides = {row["side"]: row for row in record["rows"] if row["kind"] == "throughput"}
    assert sides["vLLM"]["skipped"].startswith("installed, but failed: ValueError: vLLM answered a turn with 5")
    assert sides["loopserve, exact"]["turns_answered"] == [9, 9]
