"""Traces by OpenTelemetry: one span for a client's request and one for each leg (the `otel` extra).

A client's W3C trace context is continued, and engines get the span of their leg as parent. Names of attributes are
OpenTelemetry's semantic conventions for HTTP and generative AI where there are any.
"""

from collections.abc import Iterable
from typing import Any

from pdrouter.observe.record import Record

CONTEXT = frozenset((b"traceparent", b"tracestate"))


class TracesError(Exception):
    """Traces are asked for and cannot be made; the message says what to do."""


class LegSpan:
    """The span of one request to an engine."""

    __slots__ = ("_failed", "_span", "headers")

    def __init__(self, span: Any, headers: bytes, failed: Any) -> None:
        """Prepare.

        Args:
            span: of the SDK.
            headers: encoded lines that make the engine's spans children of this one.
            failed: the SDK's status for a failure.
        """
        self._span = span
        self._failed = failed
        self.headers = headers

    def ended(self, status: int) -> None:
        """The engine has answered."""
        self._span.set_attribute("http.response.status_code", status)
        if status >= 400:
            self._span.set_attribute("error.type", str(status))
            self._span.set_status(self._failed)
        self._span.end()

    def failed(self, reason: str) -> None:
        """The engine has not answered."""
        self._span.set_attribute("error.type", reason)
        self._span.set_status(self._failed)
        self._span.end()


class RequestSpan:
    """The span of a client's request."""

    __slots__ = ("_context", "_span", "_traces")

    def __init__(self, traces: "Traces", span: Any, context: Any) -> None:
        self._traces = traces
        self._span = span
        self._context = context

    def leg(self, role: str, host: str, port: int) -> LegSpan:
        """Begin the span of a leg."""
        told = {"pd.role": role, "server.address": host, "server.port": port}
        return self._traces.leg(role, self._context, told)

    def ended(self, record: Record) -> None:
        """The request is over."""
        span, first = self._span, record.first_byte_at
        span.set_attribute("http.response.status_code", record.status)
        span.set_attribute("pd.request_id", record.request_id)
        span.set_attribute("pd.reason", record.reason)
        if first is not None:
            span.set_attribute("pd.ttft_ms", (first - record.started) * 1000)
        if record.prompt_tokens is not None:
            span.set_attribute("gen_ai.usage.input_tokens", record.prompt_tokens)
        if record.completion_tokens is not None:
            span.set_attribute("gen_ai.usage.output_tokens", record.completion_tokens)
        if record.error_leg is not None:
            span.set_attribute("pd.error_leg", record.error_leg)
            span.set_attribute("error.type", record.error_reason or "")
            if record.status >= 500 or record.status == 200:
                span.set_status(self._traces.failed)
        span.end()


class Traces:
    """Makes spans and sends them, in a thread of the SDK, to a collector."""

    def __init__(self, endpoint: str) -> None:
        """Prepare; the environment variables of every OpenTelemetry program count (`OTEL_TRACES_SAMPLER` and the like).

        Args:
            endpoint: URL that takes OTLP over HTTP, with its path.

        Raises:
            TracesError: the packages are missing.
        """
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415
            from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
            from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
            from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415
            from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context  # noqa: PLC0415
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator  # noqa: PLC0415
        except ImportError:
            raise TracesError(
                "--otel-endpoint needs OpenTelemetry, which is not installed; pip install 'pd-router[otel]'"
            ) from None
        provider = TracerProvider(resource=Resource.create({"service.name": "pd-router"}))
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
        self._provider = provider
        self._tracer = provider.get_tracer("pdrouter")
        self._propagator = TraceContextTextMapPropagator()
        self._with_span = set_span_in_context
        self._server, self._client = SpanKind.SERVER, SpanKind.CLIENT
        self.failed = Status(StatusCode.ERROR)

    def request(self, method: str, path: str, headers: Iterable[tuple[bytes, bytes]]) -> RequestSpan:
        """Begin the span of a client's request, in the trace that its headers tell."""
        told = {name.decode(): value.decode("latin-1") for name, value in headers if name in CONTEXT}
        span = self._tracer.start_span(
            f"{method} {path}", self._propagator.extract(told), self._server,
            {"http.request.method": method, "url.path": path},
        )  # fmt: skip
        return RequestSpan(self, span, self._with_span(span))

    def leg(self, name: str, parent: Any, attributes: dict[str, Any]) -> LegSpan:
        """Begin the span of a leg."""
        span = self._tracer.start_span(name, parent, self._client, attributes)
        carrier: dict[str, str] = {}
        self._propagator.inject(carrier, self._with_span(span))
        lines = "".join(f"{header}: {value}\r\n" for header, value in carrier.items())
        return LegSpan(span, lines.encode(), self.failed)

    def close(self) -> None:
        """Send what is left; waits for the collector some seconds at most."""
        self._provider.shutdown()
