# SPDX-License-Identifier: Apache-2.0
"""Traces of requests through the gateway, as a collector receives them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from conftest import Daemon, Remote, import_model
from gateways import WHO, Gateway, running_gateway
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from waiting import PATIENCE_S, eventually

CHAT = "/v1/chat/completions"


@dataclass(slots=True)
class Collector:
    """An OTLP receiver, with what it has received."""

    url: str
    spans: list[Span] = field(default_factory=list)
    services: set[str] = field(default_factory=set)

    def take(self, path: str, body: bytes) -> None:
        assert path == "/v1/traces"
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            self.services |= {each.value.string_value for each in resource.resource.attributes if "name" in each.key}
            self.spans += [span for scope in resource.scope_spans for span in scope.spans]

    def trace(self, trace_id: bytes) -> dict[str, Span]:
        """The spans of a trace, by name."""
        return {span.name: span for span in self.spans if span.trace_id == trace_id}


def attributes(span: Span) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in span.attributes}


@contextlib.contextmanager
def collecting() -> Iterator[Collector]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.take(self.path, self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    received = Collector(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield received
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def collector() -> Iterator[Collector]:
    with collecting() as running:
        yield running


@pytest.fixture
async def gateway(daemon: Daemon, collector: Collector, tmp_path: Path, short_path: Path) -> AsyncIterator[Gateway]:
    environment = {
        **{"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, "OTEL_BSP_SCHEDULE_DELAY": "50"},
        **{"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"},
    }
    log, socket_path = tmp_path / "gateway.log", short_path / "gateway.sock"
    async with running_gateway(daemon, log, socket_path, environment=environment) as running:
        yield running


async def test_a_request_is_traced_through_queue_swap_and_engine(
    remote: Remote, gateway: Gateway, collector: Collector, sources: Path
) -> None:
    await import_model(remote, sources / "ada", "ada")
    clients = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    trace_id, parent = (bytes.fromhex(each) for each in clients.split("-")[1:3])
    async with gateway.openai() as client:
        answers = [
            await client.chat.completions.create(
                model="ada", messages=WHO, temperature=0, max_tokens=40, extra_headers=headers
            )
            for headers in ({"traceparent": clients}, {})
        ]
        with pytest.raises(openai.NotFoundError):
            await client.chat.completions.create(model="nobody", messages=WHO)

    async def has_come() -> bool:
        return len([span for span in collector.spans if span.name == f"POST {CHAT}"]) == 3

    await eventually(has_come)
    assert "flashd-gateway" in collector.services
    first = collector.trace(trace_id)
    assert first.keys() == {f"POST {CHAT}", "queue", "bring", "engine"}
    whole, queue, bring, engine = (first[name] for name in (f"POST {CHAT}", "queue", "bring", "engine"))
    assert whole.parent_span_id == parent and whole.kind == Span.SPAN_KIND_SERVER
    assert queue.parent_span_id == engine.parent_span_id == whole.span_id and bring.parent_span_id == queue.span_id
    said = attributes(whole)
    assert answers[0].usage is not None
    assert said["gen_ai.request.model"] == "ada" and said["http.response.status_code"] == 200
    assert said["gen_ai.usage.output_tokens"] == answers[0].usage.completion_tokens
    brought = attributes(bring)
    assert (brought["flashd.job.kind"], brought["flashd.how"], brought["flashd.from_tier"]) == (
        "serve",
        "start",
        "stored",
    )
    assert 0 < brought["flashd.phase.switching_s"] < (bring.end_time_unix_nano - bring.start_time_unix_nano) / 1e9
    assert whole.start_time_unix_nano <= queue.start_time_unix_nano <= bring.end_time_unix_nano
    assert bring.end_time_unix_nano <= engine.start_time_unix_nano <= engine.end_time_unix_nano
    assert engine.end_time_unix_nano <= whole.end_time_unix_nano
    others = [span for span in collector.spans if span.name == f"POST {CHAT}" and span is not whole]
    second = collector.trace(next(each.trace_id for each in others if attributes(each).get("gen_ai.request.model")))
    assert second.keys() == {f"POST {CHAT}", "queue", "engine"}, "it served already"
    unknown = next(each for each in others if attributes(each)["http.response.status_code"] == 404)
    assert attributes(unknown)["error.type"] == "NotFound" and unknown.status.code == Status.STATUS_CODE_UNSET
    assert collector.trace(unknown.trace_id).keys() == {f"POST {CHAT}"}


async def test_a_client_that_asks_for_no_trace_gets_none(gateway: Gateway, collector: Collector) -> None:
    unsampled = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"
    async with httpx.AsyncClient(base_url=gateway.url, timeout=PATIENCE_S) as client:
        await client.get("/v1/models", headers={"traceparent": unsampled})
        await client.get("/v1/models", headers={"traceparent": "nonsense"})

    async def has_come() -> bool:
        return any(span.name == "GET /v1/models" for span in collector.spans)

    await eventually(has_come)
    assert len([span for span in collector.spans if span.name == "GET /v1/models"]) == 1
    assert not collector.trace(bytes.fromhex(unsampled.split("-")[1]))
