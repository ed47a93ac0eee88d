"""Spans of a turn, for an OpenTelemetry collector: what took how long, from the request's arrival to its last token.

    ingress                      from the request to the last byte of its answer
      router                     until the replica has the call
      turn                       in the engine; one a branch
        queue  prefill  decode   its parts, as far as it came

The one file that knows OpenTelemetry, whose SDK is loaded only where an endpoint is configured. Spans carry counts and hashes: no text of a
conversation, no key, no name of a session. Exporting has its own thread and a bounded queue; what does not fit is dropped.
"""

import hashlib
import logging
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from loopserve.dialogue import FinishReason
from loopserve.errors import ConfigError
from loopserve.stats import StepStats, TurnStats

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span

_log = logging.getLogger(__name__)

_NS = 1_000_000_000
_TRACES_PATH = "/v1/traces"  # OTLP over HTTP
_EXPORT_EVERY_S = 1.0
_CLOSE_S = 2.0  # for the spans that still wait; a collector that does not answer is not waited for
_SERVER_ERROR = 500  # from here on a status is the server's fault, by OpenTelemetry's conventions

Attributes = Mapping[str, "str | bool | int | float"]


@dataclass(frozen=True, slots=True)
class TracingSettings:
    """Where spans go, and of how many requests."""

    endpoint: str = ""  # OTLP over HTTP, as http://collector:4318; empty: nothing is traced
    sample_ratio: float = 1.0  # of requests whose client does not decide itself, in its traceparent
    service_name: str = "loopserve"
    queue_spans_max: int = 2048  # that wait to be exported; more are dropped
    export_timeout_s: float = 5.0  # for one batch, retries included

    def __post_init__(self) -> None:
        url = urlsplit(self.endpoint)
        if self.endpoint and not (url.scheme in ("http", "https") and url.hostname):
            raise ConfigError(f"tracing.endpoint is {self.endpoint!r}; give http://HOST:PORT of an OTLP/HTTP collector")
        if not 0.0 <= self.sample_ratio <= 1.0:
            raise ConfigError(f"tracing.sample_ratio is {self.sample_ratio}; it is a share, 0 to 1")
        if self.queue_spans_max < 1 or self.export_timeout_s <= 0:
            raise ConfigError("tracing.queue_spans_max must be at least 1 and tracing.export_timeout_s positive")

    @property
    def traces_url(self) -> str:
        """Where spans are posted: the endpoint itself if it has a path, else OTLP's path below it."""
        return self.endpoint if urlsplit(self.endpoint).path.strip("/") else self.endpoint.rstrip("/") + _TRACES_PATH


def session_hash(session_id: str) -> str:
    """What stands for a session in spans: the same for all turns of it, and not its name."""
    return hashlib.blake2b(session_id.encode(), digest_size=8).hexdigest()


def open_tracing(settings: TracingSettings, *, instance: str) -> "Tracing | None":
    """Tracing of one process; None, and nothing loaded, where it is off. `instance` names the process."""
    if not settings.endpoint:
        return None
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    exporter = OTLPSpanExporter(settings.traces_url, timeout=settings.export_timeout_s)
    return Tracing(settings, exporter, instance=instance)


class Tracing:
    """Makes spans and hands them to an exporter, from any thread. Nothing here waits for the collector but `close`, shortly."""

    def __init__(self, settings: TracingSettings, exporter: "SpanExporter", *, instance: str) -> None:
        from opentelemetry import trace
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._api = trace
        self._propagator = TraceContextTextMapPropagator()
        self._provider = TracerProvider(
            resource=Resource.create({"service.name": settings.service_name, "service.instance.id": instance}),
            sampler=ParentBased(TraceIdRatioBased(settings.sample_ratio)),
            shutdown_on_exit=False,  # would wait for the collector; `close` waits shortly
        )
        self._provider.add_span_processor(
            BatchSpanProcessor(
                exporter,
                max_queue_size=settings.queue_spans_max,
                schedule_delay_millis=_EXPORT_EVERY_S * 1000,
                max_export_batch_size=min(512, settings.queue_spans_max),
            )
        )
        self._tracer = self._provider.get_tracer("loopserve")

    @contextmanager
    def request(self, trace_parent: str, trace_state: str, attributes: Attributes) -> Iterator[None]:
        """The span `ingress`: of the request that is answered inside, below the client's own where it named a well-formed one."""
        carrier = {"traceparent": trace_parent, "tracestate": trace_state}
        span = self._tracer.start_span(
            "ingress", self._propagator.extract(carrier), self._api.SpanKind.SERVER, attributes=dict(attributes)
        )
        try:
            with self._api.use_span(span, record_exception=False, set_status_on_exception=False):
                yield
        finally:
            span.end()

    def here(self) -> str:
        """The traceparent of the span around the caller; empty where nothing is recorded."""
        carrier: dict[str, str] = {}
        if self._api.get_current_span().is_recording():
            self._propagator.inject(carrier)
        return carrier.get("traceparent", "")

    def note(self, **attributes: str | bool | int | float) -> None:
        """Add `loopserve.<name>` to the span around the caller."""
        span = self._api.get_current_span()
        for name, value in attributes.items():
            span.set_attribute(f"loopserve.{name}", value)

    def note_status(self, status: int) -> None:
        """The HTTP status of the request around the caller; from 500 on it is an error."""
        span = self._api.get_current_span()
        span.set_attribute("http.response.status_code", status)
        if status >= _SERVER_ERROR:
            self._set_error(span, str(status))

    def fail(self, kind: str) -> None:
        """The request around the caller failed after its status was sent, or without one. `kind` names the error, it does not quote it."""
        self._set_error(self._api.get_current_span(), kind)

    def add_span(
        self,
        name: str,
        *,
        parent: str,
        start_ns: int,
        end_ns: int,
        attributes: Attributes | None = None,
        error: str = "",
    ) -> str:
        """A span that is already over; its traceparent, for spans below it. `parent` is a traceparent."""
        context = self._propagator.extract({"traceparent": parent})
        span = self._tracer.start_span(name, context, start_time=start_ns, attributes=dict(attributes or {}))
        if error:
            self._set_error(span, error)
        carrier: dict[str, str] = {}
        self._propagator.inject(carrier, self._api.set_span_in_context(span))
        span.end(max(start_ns, end_ns))
        return carrier.get("traceparent", "")

    def close(self) -> None:
        """Export what waits, for two seconds at most."""
        closing = threading.Thread(target=self._provider.shutdown, name="loopserve-tracing-close", daemon=True)
        closing.start()
        closing.join(_CLOSE_S)

    def _set_error(self, span: "Span", kind: str) -> None:
        span.set_attribute("error.type", kind)
        span.set_status(self._api.StatusCode.ERROR, kind)


class TurnTracer:
    """Makes the engine's part of a trace out of the stats of ended turns. A `StatsSink`: runs on the engine thread."""

    def __init__(self, tracing: Tracing, *, replica: str) -> None:
        self._tracing = tracing
        self._replica = replica
        self._has_failed = False

    def on_step(self, stats: StepStats) -> None:
        """Steps belong to many turns and have no span."""

    def on_turn(self, stats: TurnStats) -> None:
        """Spans of one turn, if the request that brought it is traced."""
        if not stats.trace_parent:
            return
        try:
            self._trace(stats, end_ns=time.time_ns())
        except Exception:  # a sink does not raise, and there is no turn left that could be told
            if not self._has_failed:
                self._has_failed = True
                _log.exception("turns are not traced")

    def _trace(self, stats: TurnStats, *, end_ns: int) -> None:
        """The engine knows durations only, so all of them are counted back from now: the turn has ended this moment."""
        start_ns = end_ns - round(stats.total_s * _NS)
        error = "engine" if stats.reason is FinishReason.ERROR else ""
        turn = self._tracing.add_span(
            "turn",
            parent=stats.trace_parent,
            start_ns=start_ns,
            end_ns=end_ns,
            attributes=_attributes(stats, self._replica),
            error=error,
        )
        parts = _parts(stats)
        for index, (name, begin_s, end_s) in enumerate(parts):
            self._tracing.add_span(
                name,
                parent=turn,
                start_ns=start_ns + round(begin_s * _NS),
                end_ns=start_ns + round(end_s * _NS),
                attributes={"loopserve.replica": self._replica},
                error=error if index == len(parts) - 1 else "",  # it failed in the part it came to
            )


def _parts(stats: TurnStats) -> list[tuple[str, float, float]]:
    """Name, begin and end, in seconds from submission, of the parts that a turn came to."""
    parts = [("queue", 0.0, stats.total_s if stats.queue_s is None else stats.queue_s)]
    if stats.queue_s is not None:
        parts.append(("prefill", stats.queue_s, stats.total_s if stats.first_token_s is None else stats.first_token_s))
    if stats.first_token_s is not None:
        parts.append(("decode", stats.first_token_s, stats.total_s))
    return parts


def _attributes(stats: TurnStats, replica: str) -> dict[str, Any]:
    usage, quality = stats.usage, stats.usage.quality
    found = {
        "gen_ai.usage.input_tokens": usage.prompt_tokens,
        "gen_ai.usage.output_tokens": usage.completion_tokens,
        "loopserve.budget_tokens": stats.budget_tokens,
        "loopserve.cached_tokens": usage.cached_tokens,
        "loopserve.coverage_mean": quality.coverage_mean,
        "loopserve.coverage_worst_head": quality.coverage_worst_head,
        "loopserve.finish_reason": stats.reason.value,
        "loopserve.kept_tokens": quality.kept_tokens,
        "loopserve.mode": quality.mode.value,
        "loopserve.preemptions": stats.num_preemptions,
        "loopserve.replica": replica,
        "loopserve.session": session_hash(stats.session_id),
        "loopserve.turn": stats.turn_number,
    }
    return {name: value for name, value in found.items() if value is not None}
