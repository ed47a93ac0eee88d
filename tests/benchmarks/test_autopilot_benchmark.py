"""The autopilot's live run: its device sleeps less under a tighter budget, each of its claims can fail, its record is Prometheus'."""

import asyncio
import http.server
import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer

from benchmarks.cluster.autopilot import Variant, Watch, _gauge, _view, outcome_of, service_settings, turns_of
from benchmarks.cluster.autopilot_load import Held, Part, Phases, Readers
from benchmarks.cluster.autopilot_plot import draw
from benchmarks.cluster.autopilot_record import (
    QUERIES,
    Limits,
    Outcome,
    Recording,
    View,
    checks_off,
    checks_on,
    checks_outage,
    moments,
    record,
)
from benchmarks.cluster.prometheus import Prometheus, PrometheusFailed
from benchmarks.cluster.sleeping_runner import THIRTEEN_BILLION, SleepingRunner, sleeping_model, word_tokens
from deploy.settings import DeploySettings
from loopserve.bench import Failure, FailureKind, LoadResult
from loopserve.chat import AnswerDelta, AnswerEnded, AnswerStarted, ChatRequest, ChatService
from loopserve.config import DecodeSparsity, EngineConfig
from loopserve.dialogue import Message, SamplingParams, SessionId, TokenId
from loopserve.engine import Engine
from loopserve.loading import shipped_model_dir
from monitoring import catalogue as c
from monitoring.tools import find_tool

LIMITS = Limits(high_ratio=0.85, queue_high_ratio=0.25)
FINE = Outcome(num_turns=10, num_failed=0, num_cut=0, failures=())
DECODE = DecodeSparsity(budget_tokens=2048, budget_floor_tokens=128, auto_min_context_tokens=64)


# ---- the sleeping device ----


class Naps:
    """Takes note of how long it was to sleep."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def __call__(self, seconds: float) -> None:
        self.seconds.append(seconds)


@pytest.fixture(scope="module")
def tokenizer() -> object:
    return AutoTokenizer.from_pretrained(str(shipped_model_dir()))


@contextmanager
def service(tokenizer: object, naps: Naps) -> Iterator[tuple[Engine, ChatService]]:
    """A real engine and chat service over a device that only notes its naps."""
    config = EngineConfig(kv_blocks=400, decode=DECODE)
    runner = SleepingRunner(THIRTEEN_BILLION, DECODE, word_tokens(tokenizer), sleep=naps)
    engine = Engine(config, loaded=sleeping_model(THIRTEEN_BILLION, tokenizer), runner=runner)
    engine.start()
    try:
        yield engine, ChatService(engine)
    finally:
        engine.stop()


async def answer(chat: ChatService, messages: list[Message], num_tokens: int) -> tuple[str, AnswerStarted, AnswerEnded]:
    """One turn."""
    request = ChatRequest(
        SessionId("s"), messages=tuple(messages), sampling=SamplingParams(max_tokens=num_tokens, temperature=0)
    )
    events = [event async for item in chat.stream(request) for event in item]
    text = "".join(event.text for event in events if isinstance(event, AnswerDelta))
    assert isinstance(events[0], AnswerStarted) and isinstance(events[-1], AnswerEnded)
    return text, events[0], events[-1]


def test_a_tighter_budget_makes_a_step_shorter_by_just_the_keys_and_values_that_it_spares(tokenizer: object) -> None:
    slept = {}
    document = [Message("user", "the morning opens a door " * 200)]
    for ceiling in (None, 128):
        naps = Naps()
        with service(tokenizer, naps) as (engine, chat):
            engine.set_budget(ceiling)
            _, _, ended = asyncio.run(answer(chat, document, 4))
        prompt = ended.usage.prompt_tokens
        slept[ceiling] = naps.seconds[-1]
    profile = THIRTEEN_BILLION
    assert 500 < prompt < 2048
    assert slept[None] == pytest.approx(profile.step_s + profile.read_s * (prompt + 3))
    kept = DECODE.sink_tokens + 128 + DECODE.window_tokens
    assert slept[128] == pytest.approx(profile.step_s + profile.read_s * kept)  # chosen anew for the step


def test_a_prefill_sleeps_for_its_rows_and_a_later_turn_for_its_new_ones_only(tokenizer: object) -> None:
    naps = Naps()
    with service(tokenizer, naps) as (_, chat):
        messages = [Message("user", "a letter " * 120)]
        text, _, first = asyncio.run(answer(chat, messages, 3))
        num_first = len(naps.seconds)
        messages += [Message("assistant", text), Message("user", "and then")]
        _, started, _ = asyncio.run(answer(chat, messages, 3))
    profile = THIRTEEN_BILLION
    prompt = first.usage.prompt_tokens
    assert naps.seconds[0] == pytest.approx(profile.step_s + prompt * (profile.row_s + profile.read_s))
    assert started.cached_tokens >= prompt - 16
    assert naps.seconds[num_first] < naps.seconds[0] / 2


def test_answers_are_the_same_every_time_and_read_back_as_they_were_written(tokenizer: object) -> None:
    answers = []
    for _ in range(2):
        with service(tokenizer, Naps()) as (_, chat):
            answers.append(asyncio.run(answer(chat, [Message("user", "hello")], 24))[0])
    assert answers[0] == answers[1]
    ids: list[TokenId] = list(word_tokens(tokenizer))
    assert len(ids) > 100
    assert tokenizer.decode(ids) == "".join(tokenizer.decode([token]) for token in ids)  # type: ignore[attr-defined]


# ---- the load ----


def test_readers_open_a_document_and_then_ask_briefly_and_the_same_every_time() -> None:
    readers = Readers("a", tokens_per_word=2.0, ramp_s=6.0, num_first=3)
    script = readers.script(0)
    assert script == readers.script(0) != readers.script(1)
    lengths = [len(turn.user.split()) for turn in script.turns]
    assert lengths == [650, 50, 50, 50, 50]
    assert 0 <= script.turns[0].think_s <= 6.0 and readers.script(3).turns[0].think_s == 0.0
    assert all(1.0 <= turn.think_s <= 3.0 for turn in script.turns[1:])
    assert readers.script(0).system == readers.script(9).system


def test_what_clients_saw_is_on_one_clock_and_a_turn_that_the_end_cut_off_is_no_failure() -> None:
    def turn(sent_at_s: float, failure: Failure | None = None) -> SimpleNamespace:
        return SimpleNamespace(sent_at_s=sent_at_s, failure=failure)

    cut, refused = Failure(FailureKind.CUT, "over"), Failure(FailureKind.HTTP, "no", 500)
    base = LoadResult(turns=[turn(1.0), turn(9.0, cut)])  # type: ignore[list-item]
    held = Held(0.0, base, LoadResult(), more_at_s=30.0)
    assert outcome_of(held) == Outcome(2, 0, 1, ())
    more = LoadResult(turns=[turn(2.0, refused)])  # type: ignore[list-item]
    found = outcome_of(replace(held, more=more))
    assert (found.num_turns, found.num_failed, found.num_cut) == (3, 1, 1)
    assert found.failures == ("http_500: no",)
    assert turns_of(Held(0.0, LoadResult(), LoadResult(), 30.0)) == ()
    assert [Phases().part(at_s) for at_s in (0.0, 30.0, 110.0)] == list(Part)


def test_the_settings_that_a_variant_gives_are_ones_that_the_service_takes() -> None:
    for variant in Variant:
        environ = service_settings(variant, "http://127.0.0.1:9090")
        settings = DeploySettings.from_env(environ)
        assert EngineConfig.from_env(environ).decode.budget_rungs == (128, 256, 512, 1024, 2048)
        assert settings.autopilot.mode == ("off" if variant is Variant.OFF else "on")
        assert (settings.autopilot.prometheus_url != "") == (variant is not Variant.OFF)


# ---- moments and claims ----


def recording(**series: list[float]) -> Recording:
    """A hundred seconds: crossed at 20, tightened at 22, replicas wanted at 22 and ready at 30, all back at 80."""

    def steps(*changes: tuple[int, float]) -> tuple[float, ...]:
        values = [0.0] * 100
        for at, value in changes:
            values[at:] = [value] * (100 - at)
        return tuple(values)

    made = {name: steps() for name in QUERIES}
    made |= {
        "active": steps((0, 0.4), (20, 0.95), (60, 0.4)),
        "compressed": steps((0, 0.4), (20, 1.9), (22, 0.6), (60, 0.3)),
        "full": steps((0, 0.4), (20, 1.9), (60, 0.4)),
        "ceiling": steps((0, 2048), (22, 512), (26, 256), (70, 512), (76, 2048)),
        "budget_max": steps((0, 2048)),
        "ready": steps((0, 1), (30, 3), (80, 1)),
        "wanted": steps((0, 1), (22, 3), (78, 1)),
        "holds": steps((0, 2), (40, 9)),
    }
    return Recording(made | {name: tuple(values) for name, values in series.items()})


def failed(found: tuple) -> list[str]:
    """Names of the claims that do not hold."""
    return [check.name for check in found if not check.passed]


def test_moments_are_found_in_the_series() -> None:
    found = moments(recording(), LIMITS)
    assert (found.crossed_s, found.crossed_by) == (20, "working sets")
    assert (found.tightened_s, found.tightest_tokens) == (22, 256)
    assert (found.wanted_s, found.ready_s, found.most_ready) == (22, 30, 3)
    assert (found.restored_s, found.shrunk_s) == (76, 80)


def test_the_first_of_the_three_signals_is_the_crossing() -> None:
    quiet = [0.4] * 100
    waits = [0.0] * 15 + [0.5] * 85
    found = moments(recording(compressed=quiet, waiting_ratio=waits), LIMITS)
    assert (found.crossed_s, found.crossed_by) == (15, "waiting turns")
    found = moments(recording(compressed=quiet), LIMITS)
    assert (found.crossed_s, found.crossed_by) == (20, "live bytes")


def test_a_run_as_it_should_be_holds_every_claim() -> None:
    assert failed(checks_on(recording(), LIMITS, FINE)) == []


@pytest.mark.parametrize(
    ("series", "claim"),
    [
        ({"ceiling": [2048.0] * 26 + [512.0] * 50 + [2048.0] * 24}, "budget tightens within 5 s"),
        ({"ceiling": [2048.0] * 10 + [512.0] * 50 + [2048.0] * 40}, "budget tightens within 5 s"),
        ({"ceiling": [2048.0] * 100}, "budget tightens within 5 s"),
        ({"ready": [1.0] * 100}, "replicas follow"),
        ({"wanted": [1.0] * 100}, "replicas follow"),
        ({"ceiling": [2048.0] * 22 + [512.0] * 78}, "budget comes back"),
        ({"ready": [1.0] * 30 + [3.0] * 50 + [2.0] * 20}, "replicas go again"),
        ({"failed": [0.0] * 50 + [1.0] * 50}, "no turn fails"),
    ],
)
def test_a_run_that_breaks_a_claim_is_told_from_one_that_holds_it(series: dict[str, list[float]], claim: str) -> None:
    assert claim in failed(checks_on(recording(**series), LIMITS, FINE))


def test_a_failure_that_only_a_client_saw_counts_and_so_does_a_run_without_turns() -> None:
    assert failed(checks_on(recording(), LIMITS, replace(FINE, num_failed=1, failures=("broken",)))) == [
        "no turn fails"
    ]
    assert failed(checks_on(recording(), LIMITS, replace(FINE, num_turns=0))) == ["no turn fails"]


def test_without_the_autopilot_a_threshold_is_crossed_and_nothing_follows() -> None:
    still = recording(ceiling=[2048.0] * 100, ready=[1.0] * 100, wanted=[math.nan] * 100)
    assert failed(checks_off(still, LIMITS, FINE)) == []
    assert failed(checks_off(recording(), LIMITS, FINE)) == ["nothing follows"]
    calm = recording(ceiling=[2048.0] * 100, ready=[1.0] * 100, compressed=[0.1] * 100, active=[0.1] * 100)
    assert failed(checks_off(calm, LIMITS, FINE)) == ["threshold is crossed"]


def views(**changes: object) -> list[View]:
    """A look a second; Prometheus was away from 40 to 70."""
    looks = []
    for at in range(100):
        is_away = 41 <= at <= 71
        view = View(float(at), 200, "source" if is_away else None, (256, 3), 1.0 if is_away else None)
        looks.append(replace(view, **changes) if at == 60 else view)
    return looks


def test_an_outage_that_was_held_through_holds_every_claim() -> None:
    assert failed(checks_outage(recording(), views(), (40.0, 70.0))) == []


@pytest.mark.parametrize(
    ("changes", "claim"),
    [
        ({"holding_cause": None}, "it says that it holds"),
        ({"status": 503}, "it says that it holds"),
        ({"holding_gauge": 0.0}, "its metrics say so"),
        ({"wanted": (2048, 3)}, "it holds"),
        ({"wanted": (256, 1)}, "it holds"),
        ({"wanted": None}, "it holds"),
    ],
)
def test_an_outage_that_was_acted_on_or_kept_quiet_about_is_found_out(changes: dict[str, object], claim: str) -> None:
    assert claim in failed(checks_outage(recording(), views(**changes), (40.0, 70.0)))


def test_an_autopilot_that_never_recovers_is_found_out() -> None:
    held = recording(holding=[0.0] * 40 + [1.0] * 60)
    assert failed(checks_outage(held, views(), (40.0, 70.0))) == ["it recovers"]
    silent = [view for view in views() if view.at_s < 70]
    assert failed(checks_outage(recording(), silent, (40.0, 70.0))) == ["it recovers"]
    uncounted = recording(holds=[2.0] * 100)
    assert failed(checks_outage(uncounted, views(), (40.0, 70.0))) == ["its metrics say so"]


def test_a_look_reads_the_page_as_it_is_and_survives_one_that_is_not_there() -> None:
    page = {"holding": {"cause": "source", "detail": "gone"}, "wanted": {"budget_ceiling_tokens": 256, "replicas": 3}}
    assert _view(1.0, 200, page, 1.0) == View(1.0, 200, "source", (256, 3), 1.0)
    assert _view(1.0, 200, {"holding": None, "wanted": None}, None) == View(1.0, 200, None, None, None)
    assert _view(1.0, 0, None, None) == View(1.0, 0, None, None, None)
    name = c.AUTOPILOT_HOLDING.name
    assert _gauge(f'# TYPE {name} gauge\n{name}{{autopilot="a"}} 1.0\n{name}_x 7\n', name) == 1.0
    assert _gauge("", name) is None


def test_prometheus_is_taken_away_for_as_long_as_was_planned() -> None:
    calls: list[str] = []
    prometheus = SimpleNamespace(stop=lambda: calls.append("stop"), start=lambda: calls.append("start"))

    async def watched() -> Watch:
        watch = Watch("http://127.0.0.1:9", prometheus, (0.05, 0.2))  # type: ignore[arg-type]
        task = asyncio.ensure_future(watch.go(time.time()))
        while watch.outage is None:
            await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return watch

    watch = asyncio.run(asyncio.wait_for(watched(), 30))
    assert calls == ["stop", "start"]
    assert watch.outage is not None and watch.outage[0] >= 0.05 and watch.outage[1] >= 0.2
    assert watch.views and watch.views[0].status == 0, "nobody answers there, and that is a view too"


# ---- Prometheus and the picture ----


@contextmanager
def metrics_page(text: Iterator[str]) -> Iterator[str]:
    """A target; HOST:PORT."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = next(text).encode()
            self.send_response(200)
            self.send_header("content-type", "text/plain; version=0.0.4")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def page() -> Iterator[str]:
    """Two replicas, the second with a lower ceiling."""
    while True:
        yield "".join(
            f'{c.KV_CAPACITY.name}{{replica="{name}"}} 100\n'
            f'{c.KV_WORKING_SET.name}{{replica="{name}",state="active"}} {active}\n'
            f'{c.BUDGET_CEILING.name}{{replica="{name}"}} {ceiling}\n'
            f'{c.REPLICA_UP.name}{{replica="{name}"}} 1\n'
            for name, active, ceiling in (("a", 30, 2048), ("b", 50, 256))
        )


@pytest.mark.skipif(find_tool("prometheus") is None, reason="needs prometheus: make tools")
def test_a_recording_is_what_prometheus_scraped_with_a_hole_where_it_was_away(tmp_path: Path) -> None:
    with metrics_page(page()) as target, Prometheus(tmp_path, targets=[target], scrape_s=0.5) as prometheus:
        begin = time.time()

        def until_scraped(since: float) -> None:
            deadline = time.monotonic() + 30
            query = f"max(timestamp({c.REPLICA_UP.name}))"
            while not prometheus.one(query, start=time.time(), num_steps=1)[0] > since:
                assert time.monotonic() < deadline, "nothing is scraped"
                time.sleep(0.2)

        until_scraped(begin)
        time.sleep(1)
        prometheus.stop()
        stopped = time.time()
        time.sleep(4)
        prometheus.start()
        until_scraped(stopped + 4)
        time.sleep(3)
        found = record(prometheus, start=begin, num_s=math.floor(time.time() - begin))
        with pytest.raises(PrometheusFailed, match="parse error"):
            prometheus.one("nonsense(", start=begin, num_steps=1)
        with pytest.raises(PrometheusFailed, match="2 series"):
            prometheus.one(c.REPLICA_UP.name, start=time.time(), num_steps=1)
    seen = [index for index, ready in enumerate(found["ready"]) if not math.isnan(ready)]
    assert {found["ready"][index] for index in seen} == {2.0}
    assert {found["compressed"][index] for index in seen} == {0.4}
    assert {found["ceiling"][index] for index in seen} == {256.0}
    hole = math.ceil(stopped - begin + 3)
    assert hole not in seen and min(seen) < hole < max(seen)
    assert all(math.isnan(value) for value in found["wanted"]), "there is no autopilot on that page"


def test_every_metric_that_is_asked_for_is_in_the_catalogue() -> None:
    known = {series for metric in c.CATALOGUE for series in metric.series}
    asked = {word for query in QUERIES.values() for word in _words(query) if word.startswith("loopserve_")}
    assert len(asked) > 10
    assert asked <= known


def _words(text: str) -> list[str]:
    return "".join(char if char.isalnum() or char == "_" else " " for char in text).split()


def test_the_picture_is_drawn_with_holes_and_is_small(tmp_path: Path) -> None:
    holed = recording(ready=[1.0] * 40 + [math.nan] * 30 + [3.0] * 30)
    path = tmp_path / "run.svg"
    draw(
        path,
        title="a run",
        recording=holed,
        moments=moments(recording(), LIMITS),
        phases=Phases(),
        limits=LIMITS,
        outage=(40.0, 70.0),
        without=recording(),
    )
    text = path.read_text(encoding="utf-8")
    assert len(text) < 400_000
    for label in ("a run", "working sets (compressed)", "lowest ceiling in force", "Prometheus stopped", "p95"):
        assert label in text
