# SPDX-License-Identifier: Apache-2.0
"""Traces of requests, for an OpenTelemetry collector.

    POST /v1/chat/completions       from a request's arrival to the end of its answer
    ├ queue                         until its model's turn has come
    │ └ bring                       the daemon's job that had the model serve, if the request waited for it
    └ engine                        from the engine's request on; a vLLM engine that is traced too continues it

A trace that the client began is continued (https://www.w3.org/TR/trace-context). The daemon has no network and few
dependencies, so its part is told by what its job's result says. Imported only where an endpoint is configured.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from flashd._version import __version__
from flashd.gateway.exchange import Message
from flashd.gateway.metrics.daemon_news import Brought, DaemonNews
from flashd.gateway.metrics.observed import Observed

_PROPAGATOR = TraceContextTextMapPropagator()
_NAMES = frozenset(_PROPAGATOR.fields)  # traceparent and tracestate


class Tracing:
    """Sends traces to where the standard variables say (https://opentelemetry.io/docs/specs/otel/protocol/exporter)."""

    def __init__(self, news: DaemonNews, service_name: str) -> None:
        resource = Resource.create({SERVICE_NAME: service_name, SERVICE_VERSION: __version__})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("flashd.gateway", __version__)
        self._news = news

    def begin(self, scope: Message, endpoint: str) -> RequestTrace:
        return RequestTrace(self._tracer, self._news, scope, endpoint)

    def close(self) -> None:
        """Sends what has not been sent yet."""
        self._provider.shutdown()


class RequestTrace:
    """The spans of one request."""

    def __init__(self, tracer: Tracer, news: DaemonNews, scope: Message, endpoint: str) -> None:
        self._tracer = tracer
        self._news = news
        said = {name.decode(): value.decode("latin-1") for name, value in scope["headers"] if name.decode() in _NAMES}
        attributes = {"http.request.method": scope["method"], "http.route": endpoint}
        self._whole = tracer.start_span(
            f"{scope['method']} {endpoint}", _PROPAGATOR.extract(said), SpanKind.SERVER, attributes
        )
        self._inside = set_span_in_context(self._whole, Context())
        self._queue: Span | None = None
        self._queued_at = self._admitted_at = 0.0  # since the epoch, as the daemon's jobs have it
        self._bring_parent = self._inside
        self._engine: Span | None = None

    def queued(self, model: str) -> None:
        self._end_engine()  # it has to wait again
        self._queue = self._tracer.start_span("queue", self._inside, attributes={"gen_ai.request.model": model})
        if not self._queued_at:
            self._queued_at = time.time()
        self._bring_parent = set_span_in_context(self._queue, Context())

    def admitted(self) -> None:
        if self._queue is not None:
            self._queue.end()
            self._queue = None
            self._admitted_at = time.time()

    def asked(self, headers: Mapping[str, str]) -> Mapping[str, str]:
        self._engine = self._tracer.start_span("engine", self._inside, SpanKind.CLIENT)
        found = {name: value for name, value in headers.items() if name.lower() not in _NAMES}
        _PROPAGATOR.inject(found, set_span_in_context(self._engine, Context()))  # vLLM continues it
        return found

    def ended(self, observed: Observed) -> None:
        self._end_engine()
        self.admitted()  # or it never was
        if observed.model:
            self._whole.set_attribute("gen_ai.request.model", observed.model)
            self._bring(observed.model)
        if (tokens := observed.usage.tokens()) is not None:
            self._whole.set_attribute("gen_ai.usage.input_tokens", tokens.prompt)
            self._whole.set_attribute("gen_ai.usage.output_tokens", tokens.completion)
        if observed.status:
            self._whole.set_attribute("http.response.status_code", observed.status)
        if observed.error:
            self._whole.set_attribute("error.type", observed.error)
        if observed.status >= 500 or (observed.error and observed.status < 400):  # else it is the client's fault
            self._whole.set_status(Status(StatusCode.ERROR))
        self._whole.end()

    def _end_engine(self) -> None:
        if self._engine is not None:
            self._engine.end()
            self._engine = None

    def _bring(self, model: str) -> None:
        """The job that had the model serve, if this request waited for it. Only now all signals of it have come."""
        brought = self._news.last_brought(model)
        if brought is None or brought.finished_at < self._queued_at or brought.created_at > self._admitted_at:
            return
        begins = int(brought.created_at * 1e9)
        span = self._tracer.start_span("bring", self._bring_parent, start_time=begins, attributes=_described(brought))
        span.end(int(brought.finished_at * 1e9))


def _described(brought: Brought) -> Mapping[str, str | float]:
    phases = {f"flashd.phase.{phase.replace(' ', '_')}_s": seconds for phase, seconds in brought.phases.items()}
    return {"flashd.job.kind": brought.kind, "flashd.how": brought.how, "flashd.from_tier": brought.tier, **phases}
