"""Spans out of turn stats, what a client's traceparent does, and that no collector, dead or slow, holds anything up."""

import http.server
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from loopserve.dialogue import FinishReason, Mode, QualityReport, SessionId, TurnUsage
from loopserve.errors import ConfigError
from loopserve.stats import TurnStats
from monitoring.tracing import Tracing, TracingSettings, TurnTracer, open_tracing, session_hash

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED, NOT_SAMPLED = f"00-{TRACE}-{SPAN}-01", f"00-{TRACE}-{SPAN}-00"
ON = TracingSettings(endpoint="http://127.0.0.1:4318")
SECRET = "the-name-of-a-session"

STATS = TurnStats(
    session_id=SessionId(SECRET),
    turn_number=7,
    reason=FinishReason.STOP,
    usage=TurnUsage(900, 850, 40, QualityReport(Mode.AUTO, 0.93, 0.81, 128.0, 920.0)),
    queue_s=0.5,
    first_token_s=2.0,
    total_s=6.0,
    num_preemptions=1,
    trace_parent=SAMPLED,
    budget_tokens=128,
)


@pytest.fixture
def memory() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def tracing(memory: InMemorySpanExporter) -> Iterator[Tracing]:
    made = Tracing(ON, memory, instance="here")
    yield made
    made.close()


def spans_of(tracing: Tracing, memory: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    """Everything that was made, by name; ends the tracing."""
    tracing.close()
    spans = memory.get_finished_spans()
    assert len({span.name for span in spans}) == len(spans)
    return {span.name: span for span in spans}


def seconds(span: ReadableSpan, since: ReadableSpan) -> tuple[float, float]:
    assert span.start_time and span.end_time and since.start_time
    return (span.start_time - since.start_time) / 1e9, (span.end_time - since.start_time) / 1e9


def test_a_turn_becomes_its_parts_with_the_times_that_the_engine_measured(
    tracing: Tracing, memory: InMemorySpanExporter
) -> None:
    before_ns = time.time_ns()
    TurnTracer(tracing, replica="r1").on_turn(STATS)
    after_ns = time.time_ns()
    spans = spans_of(tracing, memory)
    assert set(spans) == {"turn", "queue", "prefill", "decode"}
    turn = spans["turn"]
    assert before_ns <= (turn.end_time or 0) <= after_ns
    assert seconds(turn, turn) == pytest.approx((0.0, 6.0))
    assert seconds(spans["queue"], turn) == pytest.approx((0.0, 0.5))
    assert seconds(spans["prefill"], turn) == pytest.approx((0.5, 2.0))
    assert seconds(spans["decode"], turn) == pytest.approx((2.0, 6.0))
    assert turn.parent is not None and f"{turn.parent.span_id:016x}" == SPAN
    for name in ("queue", "prefill", "decode"):
        assert spans[name].parent is not None and spans[name].parent.span_id == turn.context.span_id
    assert {f"{span.context.trace_id:032x}" for span in spans.values()} == {TRACE}
    assert {span.status.status_code for span in spans.values()} == {StatusCode.UNSET}


def test_a_turns_span_says_how_far_the_conversation_is_and_what_sparsity_did(
    tracing: Tracing, memory: InMemorySpanExporter
) -> None:
    TurnTracer(tracing, replica="r1").on_turn(STATS)
    assert spans_of(tracing, memory)["turn"].attributes == {
        "gen_ai.usage.input_tokens": 900,
        "gen_ai.usage.output_tokens": 40,
        "loopserve.budget_tokens": 128,
        "loopserve.cached_tokens": 850,
        "loopserve.coverage_mean": 0.93,
        "loopserve.coverage_worst_head": 0.81,
        "loopserve.finish_reason": "stop",
        "loopserve.kept_tokens": 128.0,
        "loopserve.mode": "auto",
        "loopserve.preemptions": 1,
        "loopserve.replica": "r1",
        "loopserve.session": session_hash(SECRET),
        "loopserve.turn": 7,
    }


def test_a_session_is_told_by_a_hash_that_its_turns_share(tracing: Tracing, memory: InMemorySpanExporter) -> None:
    TurnTracer(tracing, replica="r1").on_turn(STATS)
    tracing.close()
    assert SECRET not in "".join(span.to_json() for span in memory.get_finished_spans())
    assert session_hash(SECRET) == session_hash(SECRET) != session_hash("another")


@pytest.mark.parametrize(
    ("queue_s", "first_token_s", "parts"),
    [
        (None, None, {"queue": (0.0, 6.0)}),
        (0.5, None, {"queue": (0.0, 0.5), "prefill": (0.5, 6.0)}),
        (0.5, 2.0, {"queue": (0.0, 0.5), "prefill": (0.5, 2.0), "decode": (2.0, 6.0)}),
    ],
)
def test_a_turn_that_failed_has_its_error_on_the_part_that_it_came_to(
    tracing: Tracing,
    memory: InMemorySpanExporter,
    queue_s: float | None,
    first_token_s: float | None,
    parts: dict[str, tuple[float, float]],
) -> None:
    failed = replace(STATS, reason=FinishReason.ERROR, queue_s=queue_s, first_token_s=first_token_s)
    TurnTracer(tracing, replica="r1").on_turn(failed)
    spans = spans_of(tracing, memory)
    turn = spans.pop("turn")
    assert turn.status.status_code is StatusCode.ERROR
    assert {name: seconds(span, turn) for name, span in spans.items()} == {
        name: pytest.approx(times) for name, times in parts.items()
    }
    last = list(parts)[-1]
    for name, span in spans.items():
        assert (span.status.status_code is StatusCode.ERROR) == (name == last)


@pytest.mark.parametrize("trace_parent", ["", "nonsense", NOT_SAMPLED])
def test_a_turn_whose_request_is_not_traced_makes_no_span_of_that_trace(
    tracing: Tracing, memory: InMemorySpanExporter, trace_parent: str
) -> None:
    TurnTracer(tracing, replica="r1").on_turn(replace(STATS, trace_parent=trace_parent))
    tracing.close()
    assert all(f"{span.context.trace_id:032x}" != TRACE for span in memory.get_finished_spans())
    if trace_parent != "nonsense":
        assert not memory.get_finished_spans()


def test_a_failing_tracer_does_not_reach_the_engine(caplog: pytest.LogCaptureFixture) -> None:
    tracer = TurnTracer(None, replica="r1")  # type: ignore[arg-type]
    tracer.on_turn(STATS)
    tracer.on_turn(STATS)
    assert [record.message for record in caplog.records] == ["turns are not traced"]


def test_the_clients_trace_goes_on_and_is_handed_down(tracing: Tracing, memory: InMemorySpanExporter) -> None:
    assert tracing.here() == ""
    with tracing.request(SAMPLED, "vendor=1", {}):
        below = tracing.here()
    spans = spans_of(tracing, memory)
    context = spans["ingress"].context
    assert below == f"00-{TRACE}-{context.span_id:016x}-01"
    assert spans["ingress"].parent is not None and f"{spans['ingress'].parent.span_id:016x}" == SPAN
    assert context.trace_state.get("vendor") == "1"


@pytest.mark.parametrize(
    "malformed",
    [
        "",
        "nonsense",
        f"00-{TRACE}-{SPAN}",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{TRACE.upper()}-{SPAN}-01x",
        "00-" + "a" * 100_000,
        "00-\u00e9\u00e9-01",
    ],
)
def test_a_malformed_traceparent_begins_a_new_trace(
    tracing: Tracing, memory: InMemorySpanExporter, malformed: str
) -> None:
    with tracing.request(malformed, "", {}):
        assert tracing.here()
    span = spans_of(tracing, memory)["ingress"]
    assert span.parent is None
    assert f"{span.context.trace_id:032x}" != TRACE


@pytest.mark.parametrize(
    ("sample_ratio", "given", "is_traced"), [(0.0, "", 0), (0.0, SAMPLED, 1), (1.0, NOT_SAMPLED, 0)]
)
def test_the_client_decides_whether_its_trace_is_recorded_and_the_ratio_decides_for_the_others(
    memory: InMemorySpanExporter, sample_ratio: float, given: str, is_traced: int
) -> None:
    tracing = Tracing(replace(ON, sample_ratio=sample_ratio), memory, instance="here")
    with tracing.request(given, "", {}):
        assert bool(tracing.here()) == bool(is_traced)
    tracing.close()
    assert len(memory.get_finished_spans()) == is_traced


@pytest.mark.parametrize(("status", "is_error"), [(200, False), (404, False), (429, False), (500, True), (503, True)])
def test_what_is_the_servers_fault_is_an_error(
    tracing: Tracing, memory: InMemorySpanExporter, status: int, is_error: bool
) -> None:
    with tracing.request("", "", {}):
        tracing.note_status(status)
    span = spans_of(tracing, memory)["ingress"]
    assert (span.status.status_code is StatusCode.ERROR) == is_error
    assert (span.attributes or {})["http.response.status_code"] == status


def test_off_means_nothing_is_made_and_the_sdk_is_not_even_loaded() -> None:
    assert open_tracing(TracingSettings(), instance="here") is None
    program = (
        "import sys; from monitoring.tracing import *;"
        "assert open_tracing(TracingSettings(), instance='here') is None;"
        "print([name for name in sys.modules if name.startswith('opentelemetry')])"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "wrong",
    [
        {"endpoint": "collector:4318"},
        {"endpoint": "ftp://collector"},
        {"endpoint": "http://"},
        {"sample_ratio": 1.5},
        {"sample_ratio": -0.1},
        {"queue_spans_max": 0},
        {"export_timeout_s": 0.0},
    ],
)
def test_settings_that_cannot_work_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        TracingSettings(**wrong)  # type: ignore[arg-type]


def test_an_endpoint_without_a_path_gets_the_one_of_otlp() -> None:
    assert replace(ON, endpoint="http://c:4318").traces_url == "http://c:4318/v1/traces"
    assert replace(ON, endpoint="http://c:4318/").traces_url == "http://c:4318/v1/traces"
    assert replace(ON, endpoint="https://c/otlp/v1/traces").traces_url == "https://c/otlp/v1/traces"


@dataclass
class Collector:
    """A stub of an OTLP collector on loopback."""

    url: str = ""
    requests: list[tuple[str, ExportTraceServiceRequest]] = field(default_factory=list)
    answering: threading.Event = field(default_factory=threading.Event)
    status: int = 200


@contextmanager
def collector() -> Iterator[Collector]:
    stub = Collector()
    stub.answering.set()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            stub.requests.append((self.path, ExportTraceServiceRequest.FromString(body)))
            stub.answering.wait(20)
            self.send_response(stub.status)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    stub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield stub
    finally:
        stub.answering.set()
        server.shutdown()
        server.server_close()


def test_spans_reach_a_collector_over_otlp_with_the_service_they_come_from() -> None:
    with collector() as stub:
        tracing = open_tracing(replace(ON, endpoint=stub.url, service_name="chat"), instance="replica-1")
        assert tracing is not None
        TurnTracer(tracing, replica="replica-1").on_turn(STATS)
        tracing.close()
        assert [path for path, _ in stub.requests] == ["/v1/traces"]
        resource_spans = stub.requests[0][1].resource_spans
    resource = {item.key: item.value.string_value for item in resource_spans[0].resource.attributes}
    assert (resource["service.name"], resource["service.instance.id"]) == ("chat", "replica-1")
    spans = [span for scope in resource_spans[0].scope_spans for span in scope.spans]
    assert {span.name for span in spans} == {"turn", "queue", "prefill", "decode"}
    assert {span.trace_id.hex() for span in spans} == {TRACE}


@pytest.mark.parametrize("fault", ["hangs", "refuses", "is absent"])
def test_a_collector_that_fails_holds_up_neither_a_turn_nor_the_end(fault: str) -> None:
    """The engine thread passes thousands of turns on while nothing can be exported; nothing of it waits for the network."""
    with collector() as stub:
        if fault == "hangs":
            stub.answering.clear()
        stub.status = 503 if fault == "refuses" else 200
        url = "http://127.0.0.1:9" if fault == "is absent" else stub.url
        tracing = open_tracing(replace(ON, endpoint=url, queue_spans_max=16, export_timeout_s=15.0), instance="here")
        assert tracing is not None
        passed = threading.Event()

        def turns() -> None:
            tracer = TurnTracer(tracing, replica="r1")
            for _ in range(500):
                tracer.on_turn(STATS)
            passed.set()

        threading.Thread(target=turns, daemon=True).start()
        assert passed.wait(10), "making spans waits for the collector"
        closed = threading.Event()
        threading.Thread(target=lambda: (tracing.close(), closed.set()), daemon=True).start()
        assert closed.wait(10), "the end waits for the collector's whole timeout"


class Counting(SpanExporter):
    """Counts spans, slowly: nothing is taken until `go`."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.num_spans = 0

    def export(self, spans: object) -> SpanExportResult:
        self.go.wait(20)
        self.num_spans += len(spans)  # type: ignore[arg-type]
        return SpanExportResult.SUCCESS

    def shutdown(self) -> None:
        pass


def test_what_waits_for_a_slow_collector_is_bounded() -> None:
    exporter = Counting()
    tracing = Tracing(replace(ON, queue_spans_max=8), exporter, instance="here")
    tracer = TurnTracer(tracing, replica="r1")
    for _ in range(100):  # 400 spans
        tracer.on_turn(STATS)
    exporter.go.set()
    tracing.close()
    assert 0 < exporter.num_spans <= 8 + 8  # one batch in flight, one queue
