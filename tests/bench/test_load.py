"""How a load is sent: under a fake clock, where times are exact, and over loopback, where connections really break."""

import asyncio
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from fake_openai import MODEL, Answer, Asked, FakeTransport, serve
from typer.testing import CliRunner

from loopserve.bench import (
    Distribution,
    Endpoint,
    FailureKind,
    Given,
    LoadResult,
    Script,
    ScriptTurn,
    Slo,
    Synthetic,
    TurnRecord,
    Workload,
    run_load,
    summarise,
)
from loopserve.bench.endpoint import Seen, ask
from loopserve.bench.records import Gaps
from loopserve.cli import app
from loopserve.errors import EngineUnavailable

URL = "http://server/v1/"


def scripts(num: int, *, turns: int = 3, think_s: float = 0.0, system: str | None = None) -> Given:
    """Dialogues that say `d0 t1`, `d0 t2`, ..."""
    return Given(
        [
            Script(f"d{d}", tuple(ScriptTurn(f"d{d} t{t}", 8, think_s) for t in range(1, turns + 1)), system)
            for d in range(num)
        ]
    )


def loaded(
    workload: Workload,
    transport: FakeTransport,
    *,
    on_turn: Callable[[TurnRecord], None] | None = None,
    **endpoint: Any,
) -> LoadResult:
    """Send a load to the fake; what was seen."""
    return asyncio.run(
        run_load(
            workload,
            Endpoint(URL, **endpoint),
            transport=transport,
            clock=transport.clock,
            on_turn=on_turn or (lambda turn: None),
        )
    )


def test_times_are_those_that_the_server_took() -> None:
    def plan(asked: Asked) -> Answer:
        return Answer(texts=("a", "b", "c", "d", "e"), first_s=0.2 * asked.number, gap_s=0.03, prompt_tokens=7)

    transport = FakeTransport(plan)
    result = loaded(Workload(scripts(2), num_dialogues=2, concurrency=1), transport)
    assert [turn.first_token_s for turn in result.turns] == pytest.approx([0.2, 0.4, 0.6] * 2)
    assert [turn.inter_token_s for turn in result.turns] == pytest.approx([0.03] * 6)
    assert [turn.total_s for turn in result.turns] == pytest.approx([0.32, 0.52, 0.72] * 2)
    assert [turn.sent_at_s for turn in result.turns] == pytest.approx([0, 0.32, 0.84, 1.56, 1.88, 2.4])
    assert result.wall_s == pytest.approx(3.12)
    report = summarise(result, Slo(first_token_s=0.45))
    assert [row.first_token_s.p50 for row in report.first_token_by_turn] == pytest.approx([0.2, 0.4, 0.6])
    assert report.chunk_gap_s.num == 24
    assert report.chunk_gap_s.p99 == pytest.approx(0.03, rel=0.01)
    assert report.throughput.output_tokens_per_s == pytest.approx(30 / 3.12)
    assert report.goodput is not None
    assert report.goodput.share == pytest.approx(4 / 6)


def test_several_tokens_in_a_chunk_share_its_wait() -> None:
    transport = FakeTransport(lambda asked: Answer(texts=("a", "b", "c"), gap_s=0.4, tokens_per_chunk=4))
    (turn,) = loaded(Workload(scripts(1, turns=1)), transport).turns
    assert turn.output_tokens == 12
    assert turn.inter_token_s == pytest.approx(0.8 / 11)


def test_history_is_what_the_server_answered() -> None:
    transport = FakeTransport(lambda asked: Answer(texts=("to ", asked.text)))
    loaded(Workload(scripts(1, system="Be brief.")), transport)
    assert transport.asked[-1].body["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "d0 t1"},
        {"role": "assistant", "content": "to d0 t1"},
        {"role": "user", "content": "d0 t2"},
        {"role": "assistant", "content": "to d0 t2"},
        {"role": "user", "content": "d0 t3"},
    ]


def test_a_request_is_plain_openai_with_what_was_asked_for() -> None:
    transport = FakeTransport(lambda asked: Answer())
    loaded(Workload(scripts(1, turns=1)), transport)
    assert transport.asked[0].body == {
        "model": MODEL,
        "messages": [{"role": "user", "content": "d0 t1"}],
        "max_tokens": 8,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    assert "authorization" not in transport.asked[0].headers
    loaded(
        Workload(scripts(2, turns=2), num_dialogues=2),
        transport,
        model="other",
        api_key="k-1",
        session_header="x-session-id",
        limit_field="max_completion_tokens",
        body={"temperature": 1, "ignore_eos": True},
    )
    asked = transport.asked[1:]
    assert all(a.headers["authorization"] == "Bearer k-1" for a in asked)
    assert {(a.text[:2], a.headers["x-session-id"][-3:]) for a in asked} == {("d0", "-d0"), ("d1", "-d1")}
    assert asked[0].body["model"] == "other"
    assert (asked[0].body["temperature"], asked[0].body["ignore_eos"]) == (1, True)
    assert asked[0].body["max_completion_tokens"] == 8
    assert "max_tokens" not in asked[0].body


def test_two_runs_never_share_a_session() -> None:
    transport = FakeTransport(lambda asked: Answer())
    for _ in range(2):
        loaded(Workload(scripts(1, turns=1)), transport, session_header="x-session-id")
    assert len({asked.headers["x-session-id"] for asked in transport.asked}) == 2


def test_the_warm_up_ends_before_the_measured_part_begins() -> None:
    transport = FakeTransport(lambda asked: Answer(first_s=1.0))
    result = loaded(Workload(scripts(5, turns=2), num_dialogues=3, num_warmup=2, concurrency=4), transport)
    assert [(turn.dialogue, turn.warm_up) for turn in result.turns[:4]] == [
        ("d0", True), ("d1", True), ("d0", True), ("d1", True),
    ]  # fmt: skip
    assert {asked.text[:2] for asked in transport.asked[:4]} == {"d0", "d1"}
    assert not any(turn.warm_up for turn in result.turns[4:])
    assert min(turn.sent_at_s for turn in result.turns[4:]) == 0
    assert (result.num_begun, result.num_completed) == (3, 3)
    assert result.gaps.num == 6  # one a turn, of the measured ones


def test_no_more_dialogues_are_held_than_asked() -> None:
    transport = FakeTransport(lambda asked: Answer())
    loaded(Workload(scripts(20), num_dialogues=20, concurrency=3), transport)
    assert transport.most_running == 3
    assert len(transport.asked) == 60


@pytest.mark.parametrize(
    ("answer", "kind", "label"),
    [
        (Answer(status=429, error="full"), FailureKind.REJECTED, "rejected_429_told_code"),
        (Answer(status=503, headers={"retry-after": "2"}), FailureKind.REJECTED, "rejected_503_told_code"),
        (Answer(status=503), FailureKind.HTTP, "http_503_told_code"),
        (Answer(status=400, error="too long"), FailureKind.HTTP, "http_400_told_code"),
        (Answer(error="replica died"), FailureKind.ERROR_EVENT, "error_event"),
        (Answer(breaks=True), FailureKind.BROKEN, "broken"),
        (Answer(garbage=True), FailureKind.MALFORMED, "malformed"),
    ],
)
def test_a_failed_turn_ends_its_dialogue_and_no_other(answer: Answer, kind: FailureKind, label: str) -> None:
    transport = FakeTransport(lambda asked: answer if asked.text == "d0 t2" else Answer())
    result = loaded(Workload(scripts(2), num_dialogues=2, concurrency=2), transport)
    assert [(t.dialogue, t.number) for t in result.turns if t.failure] == [("d0", 2)]
    (failure,) = (turn.failure for turn in result.turns if turn.failure)
    assert (failure.kind, failure.label) == (kind, label)
    assert sorted(t.number for t in result.turns if t.dialogue == "d1") == [1, 2, 3]
    assert (result.num_begun, result.num_completed) == (2, 1)


def test_an_answer_without_done_but_with_a_reason_is_whole() -> None:
    class WithoutDone(Answer):
        def events(self) -> Any:
            return ((wait_s, data) for wait_s, data in super().events() if b"DONE" not in data)

    result = loaded(Workload(scripts(1)), FakeTransport(lambda asked: WithoutDone()))
    assert [turn.failure for turn in result.turns] == [None] * 3


def test_a_rejected_turn_is_sent_again_as_often_as_allowed() -> None:
    def plan(asked: Asked) -> Answer:
        return Answer() if len(transport.asked) % 3 == 0 else Answer(status=429, headers={"retry-after": "0"})

    transport = FakeTransport(plan)
    report = summarise(loaded(Workload(scripts(1, turns=2)), transport, num_retries=2))
    assert (report.turns.answered, report.turns.rejected, report.rejections) == (2, 0, 4)
    transport.asked.clear()
    report = summarise(loaded(Workload(scripts(1, turns=2)), transport, num_retries=1))
    assert (report.turns.answered, report.turns.rejected, report.rejections) == (0, 1, 2)


@pytest.mark.parametrize(("told", "waited"), [("7", 7), ("0.5", 0.5), ("900", 60), (None, 1), ("Wed, 21 Oct", 1)])
def test_it_waits_as_long_as_the_server_says_and_never_longer_than_a_minute(told: str | None, waited: float) -> None:
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    transport = FakeTransport(lambda asked: Answer(status=429, headers={} if told is None else {"retry-after": told}))
    endpoint = Endpoint(URL, num_retries=1)

    async def asked() -> None:
        async with endpoint.client(transport=transport) as http:
            await ask(http, endpoint, {"messages": []}, Seen(0.0), session="s", gaps=Gaps(), sleep=sleep)

    asyncio.run(asked())
    assert waits == [waited]


def test_a_server_without_usage_has_its_chunks_counted() -> None:
    transport = FakeTransport(lambda asked: Answer(texts=("a", "b", "c"), prompt_tokens=None))
    result = loaded(Workload(scripts(1, turns=2)), transport)
    assert [(turn.output_tokens, turn.counted_by_usage, turn.prompt_tokens) for turn in result.turns] == [
        (3, False, None)
    ] * 2
    assert summarise(result).throughput.tokens_counted_by == "chunks"


def test_cached_tokens_and_replicas_are_those_of_the_server() -> None:
    def plan(asked: Asked) -> Answer:
        prompt = 50 * asked.number
        replica = f"r{asked.number % 2}" if asked.text.startswith("d0") else "r0"
        return Answer(
            prompt_tokens=prompt, cached_tokens=prompt - 20, headers={"x-loopserve-replica": replica}, texts=("a",)
        )

    report = summarise(loaded(Workload(scripts(2), num_dialogues=2), FakeTransport(plan)))
    assert report.cache.share_of_prompt == (80 + 130) / (100 + 150)
    assert report.cache.share_of_history == (51 + 101) / (51 + 101)
    assert report.stickiness.turns_by_replica == {"r0": 4, "r1": 2}
    assert report.stickiness.same_replica_share == 2 / 4
    assert report.stickiness.dialogues_on_one_replica == 1


def test_answers_are_marked_where_something_was_expected() -> None:
    turns = (
        ScriptTurn("a", 8, is_right=lambda answer: answer == "one two"),
        ScriptTurn("b", 8, is_right=lambda _: False),
    )
    result = loaded(Workload(Given([Script("d", turns)])), FakeTransport(lambda asked: Answer()))
    assert [turn.right for turn in result.turns] == [True, False]


def test_a_thinking_models_thoughts_are_tokens_but_no_history() -> None:
    class Thinks(Answer):
        def events(self) -> Any:
            thought = b'data: {"choices": [{"delta": {"reasoning_content": "hm"}}]}\n\n'
            return [(1.0, thought), *super().events()]

    transport = FakeTransport(lambda asked: Thinks(texts=("so",), gap_s=1.0, prompt_tokens=None))
    result = loaded(Workload(scripts(1, turns=2)), transport)
    assert [(turn.first_token_s, turn.output_tokens) for turn in result.turns] == [(1.0, 2)] * 2
    assert transport.asked[1].body["messages"][1] == {"role": "assistant", "content": "so"}


def test_the_same_seed_says_the_same_to_another_server() -> None:
    def said(answer: str) -> list[tuple[str, ...]]:
        transport = FakeTransport(lambda asked: Answer(texts=(answer,)))
        source = Synthetic(turns=Distribution.parse("uniform:1..4"), seed=5)
        loaded(Workload(source, num_dialogues=6, concurrency=2), transport)
        users = [tuple(m["content"] for m in a.body["messages"] if m["role"] == "user") for a in transport.asked]
        return sorted(users)

    assert said("one") == said("other")


def test_dialogues_arrive_at_the_rate_that_was_asked_for() -> None:
    transport = FakeTransport(lambda asked: Answer())

    async def held() -> LoadResult:
        return await run_load(
            Workload(scripts(40, turns=1), num_dialogues=40, concurrency=40, rate_per_s=400.0, seed=1),
            Endpoint(URL),
            transport=transport,
        )

    result = asyncio.run(held())
    arrivals, rng = [], Random("1/arrivals")
    for _ in range(40):
        arrivals.append((arrivals[-1] if arrivals else 0.0) + rng.expovariate(400.0))
    assert all(turn.sent_at_s >= at for turn, at in zip(sorted(result.turns, key=_sent), arrivals, strict=True))


def _sent(turn: TurnRecord) -> float:
    return turn.sent_at_s


def test_an_arrival_that_finds_no_place_is_late_and_not_lost() -> None:
    transport = FakeTransport(lambda asked: Answer(first_s=1.0))  # arrivals come every 0.1 s of the same clock
    result = loaded(Workload(scripts(5, turns=1), num_dialogues=5, concurrency=1, rate_per_s=1000.0, seed=1), transport)
    assert (result.num_begun, result.num_completed, result.num_late) == (5, 5, 4)


def test_stop_ends_a_load_at_once_and_tells_what_was_cut() -> None:
    release = threading.Event()

    class Hangs(Answer):
        def events(self) -> Any:
            yield next(iter(super().events()))
            while not release.is_set():
                yield 0.01, b": still here\n\n"

    async def held(url: str) -> LoadResult:
        stop = asyncio.Event()

        def on_turn(turn: TurnRecord) -> None:
            if turn.dialogue == "d1" and turn.number == 2:
                stop.set()

        workload = Workload(scripts(9), num_dialogues=9, concurrency=2, drain_s=600)
        return await run_load(workload, Endpoint(url), on_turn=on_turn, stop=stop)

    with serve(lambda asked: Hangs() if asked.text == "d0 t1" else Answer()) as server:
        result = asyncio.run(held(server.url))
        release.set()
    assert result.is_interrupted
    cut = [turn for turn in result.turns if turn.failure and turn.failure.kind is FailureKind.CUT]
    assert ("d0", 1, 1) in [(turn.dialogue, turn.number, turn.num_chunks) for turn in cut]
    assert result.num_begun < 9
    assert summarise(result).errors == ()


def test_time_ends_a_load_and_lets_what_is_being_answered_end() -> None:
    async def held(url: str) -> LoadResult:
        workload = Workload(scripts(1, turns=50), duration_s=0.3, drain_s=30)
        return await run_load(workload, Endpoint(url))

    with serve(lambda asked: Answer(first_s=0.1)) as server:
        result = asyncio.run(held(server.url))
    assert 1 <= len(result.turns) < 50
    assert all(turn.is_answered and turn.sent_at_s <= 0.5 for turn in result.turns)
    assert (result.num_begun, result.num_completed, result.is_interrupted) == (1, 0, False)


def test_the_drain_has_an_end_too() -> None:
    async def held(url: str) -> LoadResult:
        workload = Workload(scripts(2, turns=1), num_dialogues=2, duration_s=0.1, drain_s=0.1)
        return await run_load(workload, Endpoint(url))

    with serve(lambda asked: Answer(first_s=600.0)) as server:
        result = asyncio.run(held(server.url))
    assert [turn.failure and turn.failure.kind for turn in result.turns] == [FailureKind.CUT] * 2


def test_think_time_passes_between_turns() -> None:
    async def held(url: str) -> LoadResult:
        return await run_load(Workload(scripts(1, think_s=0.05)), Endpoint(url))

    with serve(lambda asked: Answer()) as server:
        turns = asyncio.run(held(server.url)).turns
    ends = [turn.sent_at_s + turn.total_s for turn in turns]
    assert turns[1].sent_at_s >= ends[0] + 0.05
    assert turns[2].sent_at_s >= ends[1] + 0.05


def test_a_mistake_of_the_listener_is_not_swallowed() -> None:
    def on_turn(turn: TurnRecord) -> None:
        raise RuntimeError("listener")

    with pytest.raises(ExceptionGroup) as raised:
        loaded(Workload(scripts(3), num_dialogues=3), FakeTransport(lambda asked: Answer()), on_turn=on_turn)
    assert raised.value.subgroup(RuntimeError) is not None


def test_over_loopback_the_report_agrees_with_what_the_server_did() -> None:
    def plan(asked: Asked) -> Answer:
        if asked.text == "d3 t2":
            return Answer(breaks=True)
        if asked.text == "d4 t1":
            return Answer(status=500)
        return Answer(texts=("a", "b", "c"), first_s=0.02, gap_s=0.01, prompt_tokens=50, cached_tokens=40)

    with serve(plan) as server:
        result = asyncio.run(
            run_load(Workload(scripts(6), num_dialogues=6, concurrency=3), Endpoint(server.url, model=MODEL))
        )
    report = summarise(result)
    assert report.turns.sent == len(server.asked) == 15
    assert (report.turns.answered, report.turns.failed) == (13, 2)
    assert {(error.kind, error.count) for error in report.errors} == {("broken", 1), ("http_500_told_code", 1)}
    assert sum(turn.num_chunks for turn in result.turns) == server.chunks_written
    assert report.throughput.output_tokens == 13 * 3 + 2  # the broken one's chunks are counted
    assert report.cache.share_of_prompt == 40 / 50
    assert all(turn.first_token_s is None or turn.first_token_s >= 0.02 for turn in result.turns if turn.is_answered)
    assert all(turn.total_s >= 0.04 for turn in result.turns if turn.is_answered)
    assert server.connections <= 3 + 1  # kept alive; a broken one is replaced


def test_nobody_there_is_a_failure_of_the_turn_or_of_the_start() -> None:
    with serve(lambda asked: Answer()) as server:
        url = server.url
    result = asyncio.run(run_load(Workload(scripts(1)), Endpoint(url, model=MODEL)))
    assert [turn.failure and turn.failure.kind for turn in result.turns] == [FailureKind.CONNECT]
    with pytest.raises(EngineUnavailable, match="nobody answers at"):
        asyncio.run(run_load(Workload(scripts(1)), Endpoint(url)))


def by_words(asked: Asked) -> Answer:
    """A model to which a word is two tokens, and 5 for the template."""
    words = sum(len(message["content"].split()) for message in asked.body["messages"])
    return Answer(prompt_tokens=2 * words + 5, cached_tokens=2, headers={"x-loopserve-replica": "r1"})


def test_the_command_measures_and_writes_tables_and_json(tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    options = [
        "-n",
        "4",
        "--warmup",
        "1",
        "--turns",
        "3",
        "--input",
        "40",
        "--output",
        "uniform:2..9",
        "--system",
        "20",
    ]
    with serve(by_words) as server:
        done = CliRunner(env={"COLUMNS": "160"}).invoke(
            app, ["bench", "--url", server.url, *options, "--slo-ttft", "9", "--json", str(out), "--api-key", "k-1"]
        )
    assert done.exit_code == 0, done.output
    for shown in ("12 of 12 answered", "100.0 % of turns", "counted by usage", "time to first token", "1 replicas"):
        assert shown in done.stdout
    record = json.loads(out.read_text(encoding="utf-8"))
    assert record["schema"] == "loopserve.bench/1"
    assert record["turns"]["answered"] == 12
    assert record["endpoint"]["model"] == MODEL
    assert "k-1" not in out.read_text(encoding="utf-8")
    assert record["workload"]["dialogues"]["tokens_per_word"] == 2.0
    assert record["workload"]["dialogues"]["output_tokens"] == "uniform:2..9"
    assert len(server.asked) == 2 + 15  # two to learn what a word is
    assert len(server.asked[2].body["messages"][1]["content"].split()) == 20


def test_the_command_plays_a_file_and_marks_its_answers(tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    lines = [
        {"id": f"d{n}", "turns": [{"user": "hi"}, {"user": "what?", "value": "two" if n else "three"}]}
        for n in range(3)
    ]
    file.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    with serve(lambda asked: Answer()) as server:
        done = CliRunner(env={"COLUMNS": "160"}).invoke(app, ["bench", "--url", server.url, "--dialogues", str(file)])
    assert done.exit_code == 0, done.output
    assert "6 of 6 answered" in done.stdout
    assert "2 of 3" in done.stdout


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--turns", "gauss:3"], "--turns"),
        (["--body", "{"], "--body is no JSON"),
        (["--body", "[]"], "no JSON object"),
        (["--dialogues", "none.jsonl"], "none.jsonl cannot be read"),
        (["--dialogues", "none.jsonl", "--system", "9"], "--system does not go with"),
    ],
)
def test_the_command_refuses_what_means_nothing(options: list[str], complaint: str) -> None:
    done = CliRunner(env={"COLUMNS": "160"}).invoke(app, ["bench", *options])
    assert complaint in str(done.exception)


def test_the_command_fails_where_turns_failed() -> None:
    with serve(lambda asked: Answer(status=500) if asked.number == 2 else by_words(asked)) as server:
        done = CliRunner(env={"COLUMNS": "160"}).invoke(app, ["bench", "--url", server.url, "-n", "2", "--turns", "2"])
    assert done.exit_code == 1
    assert "http_500" in done.stdout


def test_ctrl_c_tells_what_was_measured_so_far(tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    with serve(lambda asked: Answer(first_s=0.01, prompt_tokens=9)) as server:
        command = [sys.executable, "-m", "loopserve", "bench", "--url", server.url, "-n", "1000000", "--json", str(out)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        deadline_s = time.monotonic() + 60
        while len(server.asked) < 20 and time.monotonic() < deadline_s:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        stdout, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "Interrupted: what was measured so far" in stdout
    record = json.loads(out.read_text(encoding="utf-8"))
    assert record["is_interrupted"]
    turns = record["turns"]
    assert turns["sent"] == turns["answered"] + turns["cut"]
    assert 0 < turns["answered"] <= len(server.asked) - 2 <= turns["sent"]
