"""The streaming benchmark: its client reads what was sent, its verdict pairs within rounds, and a tiny run of the least server holds."""

import json
import os
import time
from pathlib import Path

import pytest

from benchmarks.cluster.fake_engine import StepEngine, bare_api
from benchmarks.cluster.own_network import ROOT, why_not
from benchmarks.cluster.stream_client import MODEL, TOKEN
from benchmarks.cluster.streaming import Sample, main, verdict_table, verdicts
from benchmarks.cluster.streaming_arm import server_cpu_s
from deploy.answers import AnswerShape, AnswerWriter
from deploy.protocol import Endpoint
from loopserve.chat import AnswerDelta


def sample(arm: str, round_: int, tokens_per_s: float, *, streams: int = 64) -> Sample:
    return Sample(arm, round_, streams, tokens_per_s, 30.0, 1.0, 2.0, 9.0, 1.0)


def test_a_token_of_our_own_chunks_is_found_by_the_client() -> None:
    shape = AnswerShape(Endpoint.CHAT, "id", 0, MODEL, 1, False, False)
    written = AnswerWriter(shape).stream(
        [AnswerDelta(0, " 123456789012", 1, ()), AnswerDelta(0, " 123456789013", 1, ())]
    )
    assert TOKEN.findall(written) == [b"123456789012", b"123456789013"]
    assert StepEngine.model_name == MODEL


def test_ratios_are_taken_within_rounds() -> None:
    speeds = {"bare": (10_000, 5_000, 10_000), "direct": (9_500, 4_750, 8_000), "two_hop": (5_000, 2_500, 9_000)}
    samples = [sample(arm, n, speed) for arm, speeds_of in speeds.items() for n, speed in enumerate(speeds_of)]
    direct, two_hop = verdicts(samples)
    assert (direct.arm, direct.passed, two_hop.passed) == ("direct", True, False)
    assert (direct.ratio, direct.ratio_min) == pytest.approx((0.95, 0.8))
    assert two_hop.ratio == pytest.approx(0.5)
    assert [row[-1] for row in verdict_table([direct, two_hop]).rows] == ["yes", "NO"]


def test_cpu_time_is_that_of_all_processes_but_the_client_and_oneself(tmp_path: Path) -> None:
    ticks = {7: (100, 20, 3, 4), 8: (1000, 0, 0, 0), os.getpid(): (5000, 0, 0, 0), 9: (1, 1, 0, 0)}
    for process, (user, system, childrens_user, childrens_system) in ticks.items():
        (tmp_path / str(process)).mkdir()
        fields = f"{process} (ray::Serve) x) S 1 1 1 0 -1 4194560 9 9 0 0 {user} {system} {childrens_user} {childrens_system} 20 0"
        (tmp_path / str(process) / "stat").write_text(fields, encoding="utf-8")
    assert server_cpu_s(8, proc=tmp_path) == pytest.approx((127 + 2) / os.sysconf("SC_CLK_TCK"))


def test_cpu_time_of_this_machine_can_be_read() -> None:
    assert server_cpu_s(0) > 0


def test_the_bare_server_has_nothing_but_the_stream() -> None:
    served = {route.path for route in bare_api().routes if hasattr(route, "path")}
    assert {"/v1/chat/completions", "/ready"} <= served


def test_an_engine_steps_for_all_streams_until_they_leave() -> None:
    class Inbox:
        def __init__(self) -> None:
            self.tokens: list[AnswerDelta] = []

        def put(self, tokens: list[AnswerDelta]) -> None:
            self.tokens += tokens

    engine, streams = StepEngine(), [Inbox(), Inbox()]
    engine.start()
    for stream in streams:
        engine.add(stream)  # type: ignore[arg-type]
    deadline_s = time.monotonic() + 30
    while min(len(stream.tokens) for stream in streams) < 5 and time.monotonic() < deadline_s:
        time.sleep(0.01)
    engine.remove(streams[0])  # type: ignore[arg-type]
    left = len(streams[0].tokens)
    others = len(streams[1].tokens)
    while len(streams[1].tokens) < others + 5 and time.monotonic() < deadline_s:
        time.sleep(0.01)
    engine.stop()
    assert 5 <= left <= len(streams[0].tokens) <= left + 1  # a step may have been under way
    assert len(streams[1].tokens) >= others + 5
    assert int(streams[1].tokens[0].text) <= time.monotonic_ns() // 1000


@pytest.mark.serve
@pytest.mark.parametrize("way", ["direct", "two_hop"])
def test_a_tiny_run_reads_tokens_of_both_ways_and_writes_them_down(tmp_path: Path, way: str) -> None:
    reason = why_not()
    if reason is not None:
        pytest.skip(f"the streaming benchmark is NOT tested: {reason}")
    sizes = f"--arms bare {way} --streams 2 --rounds 1 --window-s 0.5 --warm-up-s 0.2 --force"
    status = main([*sizes.split(), "--out", str(tmp_path), "--name", "tiny"])
    result = json.loads((tmp_path / "tiny.json").read_text(encoding="utf-8"))
    assert status == (0 if result["passed"] else 1)
    assert [measured["arm"] for measured in result["samples"]] == ["bare", way]
    for measured in result["samples"]:
        assert measured["tokens_per_s"] > 10 and measured["cpu_us_per_token"] > 0
        assert 0 < measured["latency_ms_p50"] <= measured["latency_ms_p99"]
    assert f"| 2 | {way} |" in (tmp_path / "tiny.md").read_text(encoding="utf-8")
    assert str(ROOT) not in (tmp_path / "tiny.json").read_text(encoding="utf-8")
