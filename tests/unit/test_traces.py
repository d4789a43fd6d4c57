# SPDX-License-Identifier: Apache-2.0
"""Traces: the headers that an engine gets, and the spans of a request that has to wait again."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from gateway_alone import Hears, gateway, serving
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from flashd.gateway.exchange import Message
from flashd.gateway.metrics.daemon_news import Brought, DaemonNews
from flashd.gateway.metrics.measures import Measures
from flashd.gateway.metrics.observed import Observed
from flashd.gateway.tracing import RequestTrace

SCOPE: dict[str, Any] = {
    "method": "POST",
    "headers": [(b"traceparent", b"00-" + b"a" * 32 + b"-" + b"b" * 16 + b"-01")],
}


def traced(news: DaemonNews) -> tuple[Observed, InMemorySpanExporter]:
    provider, spans = TracerProvider(shutdown_on_exit=False), InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    trace = RequestTrace(provider.get_tracer("test"), news, SCOPE, "/v1/completions")
    return Observed("/v1/completions", trace), spans


def named(spans: InMemorySpanExporter, name: str) -> list[ReadableSpan]:
    return [span for span in spans.get_finished_spans() if span.name == name]


def id_of(span: ReadableSpan) -> str:
    assert span.context is not None
    return f"{span.context.span_id:016x}"


def end(request: Observed, status: int = 200) -> None:
    request.status = status
    assert request.trace is not None
    request.trace.ended(request)


def test_each_engine_continues_the_trace_under_its_own_span() -> None:
    request, spans = traced(DaemonNews(Measures()))
    told = []
    for _ in range(2):  # the first had another model by then
        request.queued("ada")
        request.admitted()
        told.append(request.asked({"accept": "*/*", "Traceparent": "the client's", "tracestate": "the client's"}))
    end(request)
    engines = named(spans, "engine")
    assert [each["traceparent"] for each in told] == [f"00-{'a' * 32}-{id_of(span)}-01" for span in engines]
    assert [each.keys() for each in told] == [{"accept", "traceparent"}] * 2
    assert len(named(spans, "queue")) == 2 and len(named(spans, "POST /v1/completions")) == 1


def test_a_swap_before_or_after_the_wait_is_not_its_cause() -> None:
    news = DaemonNews(Measures())
    for created_at, finished_at in ((1.0, 2.0), (9e9, 9e9 + 1)):
        news._brought["ada"] = Brought("swap", "rebind", "host", created_at, finished_at, {})
        request, spans = traced(news)
        request.queued("ada")
        request.admitted()
        end(request)
        assert not named(spans, "bring")


def test_a_request_that_leaves_the_queue_ends_its_spans() -> None:
    request, spans = traced(DaemonNews(Measures()))
    request.queued("ada")
    request.failed("OutOfMemory")
    end(request, 503)
    (whole,) = named(spans, "POST /v1/completions")
    assert not whole.status.is_ok and named(spans, "queue") and not named(spans, "engine")


async def test_the_engine_hears_of_the_span_that_waits_for_it() -> None:
    news, begun = DaemonNews(Measures()), []

    def begin(_: Message, endpoint: str) -> RequestTrace:
        request, spans = traced(news)
        begun.append((endpoint, spans))
        assert isinstance(request.trace, RequestTrace)
        return request.trace

    engine = Hears()
    with tempfile.TemporaryDirectory(prefix="fd-") as folder:
        path = Path(folder) / "e.sock"
        async with serving(engine, path), gateway(path, begin_trace=begin) as client:
            data, files = {"model": "whisper"}, {"file": ("a.wav", b"RIFF")}
            headers = {"traceparent": "00-" + "c" * 32 + "-" + "d" * 16 + "-01"}
            answer = await client.post("/v1/audio/transcriptions", data=data, files=files, headers=headers)
    assert answer.status_code == 200
    ((endpoint, spans),) = begun
    assert endpoint == "/v1/audio/transcriptions"
    (span,) = named(spans, "engine")
    assert engine.headers[0]["traceparent"] == f"00-{'a' * 32}-{id_of(span)}-01"
