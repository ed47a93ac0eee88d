"""The benchmarks of memory count what they say they count; here at tiny size."""

import json
import shlex
from dataclasses import replace
from xml.etree import ElementTree

import pytest
import torch
from transformers import AttentionInterface

from benchmarks import gpu_session
from benchmarks.engine.shape import TINY, build_model
from benchmarks.kernels.gate import Outcome
from benchmarks.memory import budget_live, capacity, refresh, warm_return
from benchmarks.memory.at_once import AtOnce, Load, NoModel, answer, settings_for
from benchmarks.memory.capacity import DENSE, VARIANTS, Sizes, largest
from benchmarks.memory.copies import computed_once, give_to_each
from benchmarks.memory.kept import kept, most_blocks
from benchmarks.memory.samples import Phase, Sample
from benchmarks.memory.warm_return import Place, Row, crossovers
from benchmarks.memory.watch import judge, watch_reads, watch_traffic
from loopserve.attention import SOCKET_NAME, plan_attention
from loopserve.config import BLOCK_TOKENS, DecodeSparsity, EngineConfig, PrefillSparsity
from loopserve.dialogue import FinishReason, Mode, QualityContract, SamplingParams, SessionId, TurnEnded, TurnRequest
from loopserve.engine import Engine
from loopserve.loading import load_model
from loopserve.tuning import random_ids

LOAD = Load(3, context_tokens=256, question_tokens=16, answer_tokens=32, warm_steps=2, counted_steps=4)
COMPACT = VARIANTS[2]


@pytest.fixture(autouse=True)
def one_thread(same_threads):
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def loaded():
    return build_model(TINY, device=torch.device("cpu"), dtype=torch.float32)


@pytest.fixture(scope="module")
def shipped():
    return load_model(EngineConfig(device="cpu", dtype="float32"))


@pytest.fixture(scope="module")
def history(loaded):
    return computed_once(loaded, random_ids(loaded.vocab_size, LOAD.history_tokens, seed=1))


def config_of(load=LOAD, **settings):
    settings = {"prefill": PrefillSparsity(chunk_tokens=32), "decode": DecodeSparsity(budget_tokens=64)} | settings
    return settings_for(EngineConfig(dtype="float32", **settings), load)


def asked(loaded, history, load=LOAD, *, mode=Mode.SPARSE, runner=None, **settings) -> AtOnce:
    ids = random_ids(loaded.vocab_size, load.conversations * load.question_tokens, seed=2)
    questions = [ids[at : at + load.question_tokens] for at in range(0, len(ids), load.question_tokens)]
    config = config_of(load, **settings)
    return answer(loaded, config, load, history, mode=mode, questions=questions, runner=runner)


# What is kept.


@pytest.mark.parametrize("is_compact", [False, True])
def test_planned_bytes_are_those_that_an_engine_keeps_while_it_answers(loaded, history, is_compact):
    settings = {"kv_blocks": 70, "host_blocks": 60 if is_compact else 0, "compact_above_ratio": 1.0 - is_compact}
    found = asked(loaded, history, **settings)
    assert not found.why_not and found.compact_turns == (3 if is_compact else 0)
    planned = kept(loaded, config_of(**settings), sparse=True, longest_tokens=LOAD.context_tokens)
    assert found.device_bytes == planned.total
    assert (planned.stage > 0, planned.host_sketches > 0) == (is_compact, is_compact)
    assert planned.selections > 0


def test_a_dense_engine_keeps_no_selection_and_no_sketch(loaded, history):
    settings = {"kv_blocks": 70, "host_blocks": 0, "decode": DENSE.decode(256)}
    planned = kept(loaded, config_of(**settings), sparse=False, longest_tokens=256)
    assert asked(loaded, history, mode=Mode.EXACT, **settings).device_bytes == planned.total
    assert planned.pool == 70 * BLOCK_TOKENS * 2 * 2 * 2 * 16 * 4  # keys and values of 2 layers, 2 heads, 16 channels
    assert planned.selections == planned.host_sketches == 0


def test_one_block_more_than_the_most_does_not_fit(loaded):
    config = config_of(host_blocks=100)
    most = most_blocks(loaded, config, sparse=True, longest_tokens=256, bytes_max=600_000)
    totals = [
        kept(loaded, replace(config, kv_blocks=most + more), sparse=True, longest_tokens=256).total for more in (0, 1)
    ]
    assert totals[0] <= 600_000 < totals[1]
    assert most_blocks(loaded, config, sparse=True, longest_tokens=256, bytes_max=100_000) is None


# Copied histories.


def test_a_copied_history_is_answered_as_a_computed_one_and_shares_no_block(loaded, history):
    prompt = (*history.branches[0].token_ids, *random_ids(loaded.vocab_size, 16, seed=3))
    answers = []
    for has_copies in (False, True):
        engine = Engine(config_of(kv_blocks=70, host_blocks=0, decode=DENSE.decode(256)), loaded=loaded)
        names = ["one", "two", "three"]
        if has_copies:
            assert give_to_each(engine, history, names)
            held = [block for session in engine._sessions for block in session.branches[0].table.blocks]
            assert len(set(held)) == len(held) == 3 * history.num_blocks
        ended: list[TurnEnded] = []

        def listen(events, ended=ended):
            ended.extend(event for event in events if isinstance(event, TurnEnded))

        sampling = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
        for name in names:
            request = TurnRequest(SessionId(name), prompt, sampling, QualityContract(Mode.EXACT), cache_salt=name)
            engine.submit(request, listen)
        while engine.step():
            pass
        answers.append([each.token_ids for each in ended])
        assert {each.usage.cached_tokens for each in ended} == {history.num_tokens if has_copies else 0}
        engine.check()
    assert answers[0] == answers[1]


def test_histories_that_do_not_all_fit_are_told(loaded, history):
    engine = Engine(config_of(kv_blocks=30, host_blocks=0), loaded=loaded)
    assert not give_to_each(engine, history, ["one", "two", "three"])


# All at once.


@pytest.mark.parametrize("has_model", [False, True])
def test_a_preempting_engine_does_not_answer_at_once(loaded, history, has_model):
    load = replace(LOAD, answer_tokens=48, counted_steps=40)
    settings = {"host_blocks": 0, "mode": Mode.EXACT, "decode": DENSE.decode(256)}
    image = computed_once(loaded, random_ids(loaded.vocab_size, load.history_tokens, seed=1))
    for blocks, why_not in ((49, ""), (47, "a turn was preempted")):  # all are admitted; the answers outgrow the pool
        found = asked(loaded, image, load, kv_blocks=blocks, runner=None if has_model else NoModel(), **settings)
        assert (found.why_not, found.is_at_once) == (why_not, not why_not)
        assert len(found.step_s) == (40 if not why_not else 0)


def test_an_engine_that_lets_one_wait_does_not_answer_at_once(loaded, history):
    found = asked(loaded, history, kv_blocks=44, host_blocks=0, mode=Mode.EXACT)
    assert "at most 2 were in decode together" in found.why_not


def test_an_engine_that_lowers_budgets_does_not_answer_at_once(loaded, history):
    """With impatience the third turn gets in, because the others read less than was asked about."""
    settings = {
        "kv_blocks": 36,
        "host_blocks": 60,
        "compact_above_ratio": 0.0,
        "decode": DecodeSparsity(budget_tokens=128, budget_floor_tokens=16),
    }
    load = replace(LOAD, answer_tokens=48)
    image = computed_once(loaded, random_ids(loaded.vocab_size, load.history_tokens, seed=1))
    patient = asked(loaded, image, load, runner=NoModel(), **settings)
    assert "at most 2 were in decode together" in patient.why_not
    impatient = replace(config_of(load, **settings), lower_after_s=0.0)
    questions = [random_ids(loaded.vocab_size, 16, seed=seed) for seed in range(3)]
    found = answer(loaded, impatient, load, image, mode=Mode.SPARSE, questions=questions, runner=NoModel())
    assert found.why_not == "budgets were lowered"


def test_a_conversation_longer_than_the_pool_is_told_not_raised(loaded, history):
    found = asked(loaded, history, kv_blocks=10, host_blocks=60, compact_above_ratio=0.0, runner=NoModel())
    assert "refused" in found.why_not


def test_the_largest_number_is_found_by_halves():
    for most in range(8):
        for limit in range(most + 1):
            assert largest(lambda number, limit=limit: number <= limit, most) == limit


# Capacity.


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    directory = tmp_path_factory.mktemp("capacity")
    arguments = f"--tiny --force --threads 1 --contexts 512 --dense-tokens 2048 --steps 4 --answer-tokens 24 --results {directory}"
    text = capacity.run_benchmark(capacity.parse_arguments(shlex.split(arguments)), shlex.split(arguments))
    return json.loads((directory / "memory_capacity.json").read_text()), text


def test_dense_answers_as_many_as_arithmetic_allows_and_compact_turns_more(measured):
    record, text = measured
    rows = {row["variant"]: row for row in record["rows"]}
    assert list(rows) == [variant.name for variant in VARIANTS] and not record["not_measured"]
    dense = rows["dense"]
    assert dense["at_once"] == dense["byte_ceiling"] == 2048 // 512 and dense["ratio"] == 1.0
    pool = (1 + 4 * 512 // BLOCK_TOKENS) * BLOCK_TOKENS * 512  # a token takes 512 bytes
    assert dense["bytes_max"] == dense["device_bytes"] == pool + dense["kept"]["tables"]
    for name, row in rows.items():
        assert row["device_bytes"] <= row["bytes_max"] == dense["bytes_max"]
        assert row["at_once"] <= row["byte_ceiling"]
        assert row["compact_turns"] == (row["at_once"] if "compact" in name else 0)
        assert row["tokens_per_s"] > 0 and row["steps"] == 4
        assert row["coverage"] is None, "no answer came to its 64th output, and what prefill covers is not meant"
    assert (
        rows["resident, B 10 %"]["at_once"]
        <= 4
        < rows["compact, B 10 %"]["at_once"]
        < rows["compact, B 5 %"]["at_once"]
    )
    assert "FORCED" in text


def test_the_command_of_a_result_is_the_one_that_was_run(measured):
    record, _ = measured
    program, *arguments = shlex.split(record["command"])[2:]
    assert program == "benchmarks.memory.capacity"
    args = capacity.parse_arguments(arguments)
    assert capacity.settings_of(args) == record["settings"]


def test_one_more_than_dense_answers_does_not_fit_its_bytes(loaded):
    sizes = Sizes(loaded, LOAD, num_dense=3, host_bytes_max=1 << 30, chunk_tokens=32)
    assert sizes.sized(DENSE, 3).config.kv_blocks == 1 + 3 * 16
    assert sizes.sized(DENSE, 4).config.kv_blocks < 1 + 4 * 16
    assert sizes.ceiling(DENSE) == 3


def test_host_memory_limits_too_and_pinned_tensors_are_powers_of_two(loaded):
    sizes = Sizes(loaded, LOAD, num_dense=3, host_bytes_max=5 * 256 * 512, chunk_tokens=32)
    assert sizes.host_max == 5
    on_cuda = replace(loaded, device=torch.device("cuda"))
    pinned = Sizes.__new__(Sizes)
    pinned._loaded = on_cuda
    assert pinned.host_bytes(5 * 16) == 4 * (1 << 18)  # four tensors of 163,840 bytes


def test_a_run_that_keeps_more_than_it_may_does_not_count(loaded):
    sizes = Sizes(loaded, LOAD, num_dense=3, host_bytes_max=1 << 30, chunk_tokens=32)
    good = AtOnce("", (0.1,), sizes.bytes_max, None, 3, LOAD.history_tokens, None)
    assert capacity._faults(good, sizes, COMPACT, LOAD, 3) == ""
    for bad, why in (
        ({"device_bytes": sizes.bytes_max + 1}, "it kept"),
        ({"compact_turns": 2}, "only 2 turns were compact"),
        ({"cached_tokens_min": LOAD.history_tokens - 16}, "computed again"),
    ):
        assert why in capacity._faults(replace(good, **bad), sizes, COMPACT, LOAD, 3)


def test_a_session_on_a_gpu_asks_for_twelve_gibibytes_and_a_tiny_one_for_a_toy(tmp_path):
    (part,) = [part for part in gpu_session.PARTS if part.name == "capacity"]
    for flags in ((), ("--tiny",)):
        seen = []

        def program(command, seen=seen, **_):
            seen.append(command)
            return Outcome(0, "", 1.0)

        args = gpu_session.parse_arguments(["--device", "cpu", "--force", "--out", str(tmp_path), *flags])
        gpu_session.Session(args, program)._benchmark(part, 100.0)
        at = seen[0].index("benchmarks.memory.capacity") + 1
        parsed = capacity.parse_arguments([word for word in seen[0][at:] if word != "--force"])
        if flags:
            assert parsed.model_shape == "tiny" and parsed.dense_tokens == 1024
        else:
            assert parsed.dense_tokens * 128 * 1024 == 12 << 30
        assert parsed.out.name == "capacity.json" and parsed.seconds_max < 100.0


def test_a_part_of_a_session_writes_one_file(tmp_path):
    file = tmp_path / "capacity.json"
    arguments = f"--tiny --contexts 256 --dense-tokens 512 --steps 2 --answer-tokens 16 --seconds-max 0 --out {file}"
    capacity.run_benchmark(capacity.parse_arguments(shlex.split(arguments)))
    record = json.loads(file.read_text())
    assert record["rows"] == [] and len(record["not_measured"]) == 4  # no time was given
    assert record["not_to_be_published"]
    assert [path.name for path in tmp_path.iterdir()] == ["capacity.json"]


# Sessions that come back.


def test_only_what_is_computed_again_finds_nothing_cached(loaded, tmp_path):
    arguments = f"--force --random-text --histories 96 160 --repeats 1 --new-tokens 8 --threads 1 --results {tmp_path}"
    text = warm_return.run_benchmark(warm_return.parse_arguments(shlex.split(arguments)), loaded=loaded)
    record = json.loads((tmp_path / "memory_warm_return.json").read_text())
    cached = {(row["history_tokens"], row["place"]): row["cached_tokens"] for row in record["rows"]}
    assert cached == {
        (length, place.value): 0 if place is Place.NOWHERE else length for length in (96, 160) for place in Place
    }
    assert all(row["first_token_ms"] > 0 and row["samples"] == 1 for row in record["rows"])
    assert {each["place"] for each in record["crossovers"]} == {"on the device", "in host memory", "on disk"}
    assert "computed all the same" not in text


def returns(place, **times):
    return [Row(int(length[1:]), place, ms, ms, ms, 1, 0) for length, ms in times.items()]


def test_the_crossover_is_where_the_lines_meet_and_holds_from_there_on():
    again = returns(Place.NOWHERE, t100=10.0, t200=20.0, t400=40.0)
    rows = [
        *again,
        *returns(Place.DEVICE, t100=5.0, t200=6.0, t400=7.0),  # everywhere
        *returns(Place.HOST, t100=5.0, t200=30.0, t400=30.0),  # sooner at 100, but not at 200
        *returns(Place.DISK, t100=50.0, t200=60.0, t400=70.0),  # never
    ]
    device, host, disk = crossovers(rows)
    assert (device.tokens, device.is_everywhere) == (100, True)
    assert (host.tokens, host.is_everywhere) == (300.0, False)
    assert disk.tokens is None
    assert "at every length" in device.sentence() and "about 300 tokens" in host.sentence()
    assert "not sooner" in disk.sentence()


# Refresh policies.


def test_what_is_read_is_judged_against_the_heaviest():
    decode = DecodeSparsity(sink_tokens=1, window_tokens=1)
    weights = torch.tensor([[0.30, 0.05, 0.20, 0.10, 0.15, 0.20]])  # a sink, four candidates, the newest
    columns = torch.tensor([[0, 2, 4, 5]])
    recall, weight = judge(weights, columns, None, budget_tokens=2, decode=decode)
    assert recall.tolist() == [1.0] and weight.tolist() == pytest.approx([0.85])
    late = torch.tensor([[True, True, False, True]])
    recall, weight = judge(weights, columns, late, budget_tokens=2, decode=decode)
    assert recall.tolist() == [0.5] and weight.tolist() == pytest.approx([0.70])
    recall, _ = judge(weights, torch.tensor([[0, 1, 3, 5]]), None, budget_tokens=2, decode=decode)
    assert recall.tolist() == [0.0]


@pytest.fixture(scope="module")
def conversations(loaded):
    arguments = "--conversations 2 --context-tokens 300 --budget 32 --steps 6 --random-text --question-tokens 8"
    args = refresh.parse_arguments(shlex.split(arguments))
    texts = [random_ids(loaded.vocab_size, 300, seed=seed) for seed in range(2)]
    return refresh.Conversations(loaded, [computed_once(loaded, ids) for ids in texts], args=args)


def test_ranking_by_keys_at_every_output_reads_exactly_the_heaviest(conversations):
    recalls = {
        name: conversations.reads(refresh.Policy(*name))[0]
        for name in (("exact", "wait", 1), ("sketch", "wait", 1), ("exact", "late", 1), ("exact", "wait", 16))
    }
    assert recalls.pop(("exact", "wait", 1)) == 1.0
    assert all(0.0 < recall < 1.0 for recall in recalls.values())
    assert AttentionInterface()[SOCKET_NAME] is plan_attention, "the watch is over"


def test_bytes_are_counted_by_the_way_they_take(loaded, conversations):
    resident = conversations.decode(refresh.RESIDENT)
    assert (resident.traffic.recalled_bytes, resident.traffic.staged_bytes, resident.compact_turns) == (0, 0, 0)
    sketch, often = (
        conversations.decode(refresh.Policy(*name)) for name in (("sketch", "wait", 1), ("exact", "wait", 1))
    )
    head_bytes = 2 * 16 * 4
    assert sketch.traffic.staged_bytes == 0 < sketch.traffic.recalled_bytes
    assert sketch.traffic.recalled_bytes % head_bytes == sketch.first.recalled_bytes % head_bytes == 0
    assert sketch.first.recalled_bytes <= (2 + sketch.tokens) * 2 * 2 * (32 + 4) * head_bytes
    # Every step reads the keys of both histories in both layers, but for the newest tokens, which are on the device.
    whole = 6 * 2 * 2 * 300 * 2 * (head_bytes // 2)
    assert 0.8 * whole < often.traffic.staged_bytes < 1.1 * whole
    assert sketch.tokens == 12 and 0.0 < sketch.traffic.seconds < sum(sketch.step_s)


def test_watching_changes_no_answer(loaded, history):
    tokens = []
    for watch in (None, watch_traffic(), watch_reads(32, DecodeSparsity())):
        engine = Engine(config_of(kv_blocks=70, host_blocks=60, compact_above_ratio=0.0), loaded=loaded)
        give_to_each(engine, history, ["one"])
        ended: list[TurnEnded] = []

        def listen(events, ended=ended):
            ended.extend(event for event in events if isinstance(event, TurnEnded))

        prompt = (*history.branches[0].token_ids, *range(16))
        sampling = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
        contract = QualityContract(Mode.SPARSE)
        engine.submit(TurnRequest(SessionId("one"), prompt, sampling, contract, cache_salt="one"), listen)
        if watch is None:
            while engine.step():
                pass
        else:
            with watch:
                while engine.step():
                    pass
        tokens.append(ended[0].token_ids)
    assert tokens[0] == tokens[1] == tokens[2] and len(tokens[0]) == 20


def test_policies_are_told_with_their_answers(shipped, tmp_path):
    arguments = (
        "--force --threads 1 --scorings sketch --recalls wait --refreshes 1 --conversations 1 --context-tokens 256 --budget 32 --steps 3 "
        f"--rounds 1 --quality-dialogues 1 --quality-tokens 512 --quality-budget 32 --results {tmp_path} --work {tmp_path / 'work'}"
    )
    refresh.run_benchmark(refresh.parse_arguments(shlex.split(arguments)), loaded=shipped)
    record = json.loads((tmp_path / "memory_refresh.json").read_text())
    resident, compact = record["rows"]
    assert compact["policy"] == "sketch, wait, every 1"
    assert (resident["compact_turns"], compact["compact_turns"]) == (0, 1)
    assert resident["recalled_kib_an_answer"] == 0.0 < compact["recalled_kib_an_answer"]
    assert resident["score"] == compact["score"], "where KV lies changes no answer"
    assert compact["to_dense"]["num"] == 3 and resident["topb_recall"] is None
    assert 0.0 < compact["topb_recall"] < 1.0


# A budget that changes.


@pytest.fixture(scope="module")
def live(shipped, tmp_path_factory):
    directory = tmp_path_factory.mktemp("live")
    arguments = (
        "--force --threads 1 --budgets 256 64 256 --phase-steps 30 --readers 2 --dialogues 2 --context-tokens 512 --answer-tokens 12 "
        f"--measure-outputs 4 --results {directory}"
    )
    budget_live.run_benchmark(budget_live.parse_arguments(shlex.split(arguments)), loaded=shipped)
    return directory, json.loads((directory / "memory_budget_live.json").read_text())


def test_occupancy_follows_the_budget_and_no_turn_breaks(live):
    _, record = live
    before, lowered, after = record["phases"]
    assert [row["budget_tokens"] for row in record["phases"]] == [256, 64, 256]
    assert lowered["active_blocks_a_turn"] < 0.6 * before["active_blocks_a_turn"]
    assert after["active_blocks_a_turn"] > 0.8 * before["active_blocks_a_turn"]
    assert record["broken_turns"] == [] and record["pressure"]["lowered_budgets"] == 0
    samples = record["samples"]
    assert samples["ceiling_tokens"][:90] == [256] * 30 + [64] * 30 + [256] * 30
    assert all(active <= total for active, total in zip(samples["active_blocks"], samples["total_blocks"], strict=True))
    assert max(samples["compact"]) == 2


def test_turns_are_told_by_the_budget_that_they_were_answered_under(live):
    _, record = live
    by_budget = {row["budget"]: row["turns"] for row in record["quality"]}
    assert sum(by_budget.values()) == len(record["turns"]) and by_budget["256"] > 0
    for turn in record["turns"]:
        same = turn["ceiling_first"] == turn["ceiling_last"]
        assert not same or turn["budget_tokens"] == turn["ceiling_last"]
    assert all(0.0 <= row["coverage"] <= 1.0 for row in record["quality"])


def test_the_picture_is_drawn(live):
    directory, _ = live
    root = ElementTree.parse(directory / "memory_budget_live.svg").getroot()
    assert root.tag.endswith("svg")
    text = " ".join(root.itertext())
    assert "turns in the batch" in text and "ceiling, tokens" in text
    assert "memory_budget_live.svg" in (directory / "memory_budget_live.md").read_text()


def turn_result(**changes):
    usual = budget_live.TurnResult("s", FinishReason.LENGTH, True, 1.0, 512, 512, 512, 0.9, 100, 0)
    return replace(usual, **changes)


def test_a_turn_that_ends_short_is_broken_and_one_that_met_two_budgets_is_apart():
    short = turn_result(is_whole=False, reason=FinishReason.ERROR)
    turns = [
        turn_result(),
        turn_result(score=0.0),
        turn_result(ceiling_last=128),
        turn_result(ceiling_first=128, ceiling_last=128),
        short,
    ]
    assert budget_live.broken(turns) == [short]
    rows = {row.budget: row for row in budget_live.quality_rows(turns)}
    assert list(rows) == ["512", "128", "changed"]
    assert (rows["512"].turns, rows["512"].score, rows["changed"].turns) == (3, pytest.approx(2 / 3), 1)


def test_a_budget_is_followed_when_a_turns_blocks_are_nearer_to_where_they_come_to():
    def samples(phase, blocks):
        return [Sample(0, 0.0, phase, 0, active, active, 100, 0, 2, 0, 2, 2, 0, 0, 0, 0.01) for active in blocks]

    phases = [Phase(512, 6), Phase(128, 6)]
    first, second = budget_live.phase_rows([*samples(0, [80] * 6), *samples(1, [80, 62, 40, 20, 20, 20])], phases)
    assert (first.followed_after_steps, second.followed_after_steps) == (None, 3)
    assert (first.active_blocks_a_turn, second.active_blocks_a_turn) == (40.0, 10.0)
    assert second.tokens_per_s == pytest.approx(200.0)
