# SPDX-License-Identifier: Apache-2.0
"""The gateway's metrics and who may read them, without a daemon."""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.requests import Request

from flashd.client.results import Device, Event, Model, Status
from flashd.dbus import wire
from flashd.gateway.directory import Directory
from flashd.gateway.exchange import BodyBudget
from flashd.gateway.metrics.daemon_news import DaemonNews
from flashd.gateway.metrics.measures import Measures
from flashd.gateway.metrics.names import LABELS, METRICS
from flashd.gateway.metrics.observed import Observed
from flashd.gateway.metrics.page import MetricsPage
from flashd.gateway.metrics.usage import Tokens, UsageWatch

ROOT = Path(__file__).parents[2]


def model(name: str, *, private: bool = False, devices: tuple[str, ...] = ()) -> Model:
    return Model(
        name, (), "c", "A", "bf16", 7, 1, "host", devices, False, False, 0, 0, 0, 0, "", f"/m/{name}", 0, private, False
    )


def listed(*models: Model) -> Mapping[str, Model]:
    return {each.name: each for each in models}


# -- tokens ----------------------------------------------------------------------------------------------------------

_DECOY = {
    "tools": [{"parameters": {"usage": {"type": "string"}, "kind": "usage"}}],
    "text": '"usage":{"prompt_tokens":9}',
}
_ANSWERS = [
    ({**_DECOY, "usage": {"prompt_tokens": 3, "completion_tokens": 5, "details": {"cached": 1}}}, Tokens(3, 5)),
    ({**_DECOY, "usage": {"input_tokens": 4, "output_tokens": 6}}, Tokens(4, 6)),
    ({"usage": {"prompt_tokens": 8, "total_tokens": 8}, "data": [0.5] * 3000}, Tokens(8, 0)),
    ({"usage": {"prompt_tokens": -1, "completion_tokens": 10**30}}, Tokens(0, 0)),
    ({"usage": {"prompt_tokens": True, "completion_tokens": "5"}}, Tokens(0, 0)),
    ({"text": "usage", "usage": None}, None),
    ({"content": "usage"}, None),
]


@pytest.mark.parametrize(("answer", "tokens"), _ANSWERS)
@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": ")])
def test_tokens_are_read_however_an_answer_is_split(
    answer: Mapping[str, Any], tokens: Tokens | None, separators: tuple[str, str]
) -> None:
    whole = json.dumps(answer, separators=separators).encode()
    splits = random.Random(1)
    for most in (1, 2, 7, 40, 300, len(whole)):
        watch, left = UsageWatch(), whole
        while left:
            size = splits.randint(1, most)
            watch.feed(left[:size])
            left = left[size:]
        assert watch.tokens() == tokens, most


def test_the_last_usage_of_a_stream_counts() -> None:
    watch = UsageWatch()
    for count in range(1, 30):
        chunk = {"choices": [{"delta": {"content": "a"}}], "usage": {"prompt_tokens": 2, "completion_tokens": count}}
        watch.feed(f"data: {json.dumps(chunk)}\n\n".encode())
    watch.feed(b"data: [DONE]\n\n")
    assert watch.tokens() == Tokens(2, 29)


def test_a_usage_that_is_cut_or_endless_counts_nothing() -> None:
    for said in (b'{"usage":{"prompt_tokens":3', b'{"usage":{"a":"' + b"b" * 10_000 + b'","prompt_tokens":3}}'):
        watch = UsageWatch()
        for at in range(0, len(said), 64):
            watch.feed(said[at : at + 64])
        assert watch.tokens() is None


def test_watching_a_stream_costs_next_to_nothing() -> None:
    piece = b"data: " + json.dumps({"choices": [{"index": 0, "delta": {"content": " word"}}], "id": "x" * 40}).encode()
    watch, began = UsageWatch(), time.process_time()
    for _ in range(10_000):
        watch.feed(piece)
    assert (time.process_time() - began) / 10_000 < 50e-6, "seconds of the processor a piece, many times what it takes"


# -- the page --------------------------------------------------------------------------------------------------------


class Room:
    """A dispatcher as the page sees it."""

    def __init__(self, directory: Directory) -> None:
        self.directory = directory

    def waiting(self, model: str) -> int:
        return 2 if model == "ada" else 0

    def in_progress(self, model: str) -> int:
        return 0


async def read(
    measures: Measures, directory: Directory, news: DaemonNews | None = None, accept: str = ""
) -> dict[tuple[str, ...], float]:
    """The samples: name and labels' values, to value."""
    page = MetricsPage(Room(directory), measures, news or DaemonNews(measures), BodyBudget(100))  # type: ignore[arg-type]
    headers = [(b"accept", accept.encode())]
    answer = await page.answer(Request({"type": "http", "method": "GET", "path": "/metrics", "headers": headers}))
    text = bytes(answer.body).decode()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {(sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value for sample in samples}


def asked(measures: Measures, name: str, *, status: int = 200, endpoint: str = "/v1/completions") -> None:
    request = Observed(endpoint)
    request.queued(name)
    request.admitted()
    request.received(b'{"usage":{"prompt_tokens":2,"completion_tokens":3}}')
    request.status = status
    measures.ended(request)


async def test_requests_are_counted_by_endpoint_model_and_status() -> None:
    measures, models = Measures(), listed(model("ada"), model("bob"))
    measures.models_are(models)
    for name, status in (("ada", 200), ("ada", 200), ("bob", 400)):
        asked(measures, name, status=status)
    found = await read(measures, Directory(models=models, is_connected=True))
    assert found["flashd_requests_total", "/v1/completions", "ada", "200"] == 2
    assert found["flashd_requests_total", "/v1/completions", "bob", "400"] == 1
    assert found["flashd_refusals_total", "engine"] == 1
    assert found["flashd_tokens_total", "prompt", "ada"] == 4 and found["flashd_tokens_total", "completion", "ada"] == 6
    assert found["flashd_queue_wait_seconds_count", "ada"] == 2
    assert found["flashd_time_to_first_byte_seconds_count", "bob"] == 1
    assert found["flashd_request_duration_seconds_bucket", "/v1/completions", "+Inf"] == 3
    assert found["flashd_queue_length", "ada"] == 2 and found["flashd_queue_length", "bob"] == 0
    assert found["flashd_model_bytes", "ada", "stored"] == 7 and found["flashd_daemon_connected",] == 1


async def test_a_name_that_a_client_made_up_is_no_label() -> None:
    measures, models = Measures(), listed(model("ada"))
    measures.models_are(models)
    asked(measures, "made up")
    request = Observed("other")
    request.status = 404
    measures.ended(request)
    found = await read(measures, Directory(models=models))
    assert found["flashd_requests_total", "/v1/completions", "", "200"] == 1
    assert found["flashd_refusals_total", "NotFound"] == 1
    assert not [labels for labels in found if "made up" in labels]


async def test_private_models_are_in_no_series_of_those_who_may_not_see_them() -> None:
    measures, models = Measures(), listed(model("ada"), model("secret", private=True, devices=("host",)))
    measures.models_are(models)
    asked(measures, "ada")
    asked(measures, "secret")
    known = Directory(models=models)
    assert ("flashd_requests_total", "/v1/completions", "secret", "200") in await read(measures, known)
    shown = await read(measures, known.public())
    assert ("flashd_requests_total", "/v1/completions", "ada", "200") in shown
    assert not [labels for labels in shown if "secret" in labels]
    assert not [labels for labels in await read(measures, known.only(["secret"])) if {"secret", "ada"} & set(labels)]


async def test_the_series_of_a_removed_model_go_with_it() -> None:
    measures, models = Measures(), listed(model("ada"), model("bob"))
    measures.models_are(models)
    asked(measures, "ada")
    measures.models_are(listed(model("bob")))
    measures.models_are(models)
    found = await read(measures, Directory(models=models))
    assert not [labels for labels, value in found.items() if labels[0] == "flashd_requests_total" and value]


async def test_a_client_that_leaves_before_the_answer_is_counted_as_499() -> None:
    measures = Measures()
    measures.ended(Observed("/v1/embeddings"))
    assert (await read(measures, Directory()))["flashd_requests_total", "/v1/embeddings", "", "499"] == 1


async def test_answers_go_on_while_metrics_are_written() -> None:
    measures, models = Measures(), listed(*(model(f"m{number}") for number in range(50)))
    measures.models_are(models)
    for name in models:
        asked(measures, name)
    turns = 0

    async def answer_others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    others = asyncio.create_task(answer_others())
    assert ("flashd_queue_wait_seconds_count", "m49") in await read(measures, Directory(models=models))
    others.cancel()
    assert turns > 20


async def test_what_is_shown_is_what_the_table_says() -> None:
    measures, models = Measures(), listed(model("ada"))
    news = DaemonNews(measures)
    news._devices = {"/d": Device("host", "host", "", "", 9, 8, 7, 6, 0, "none", False, False, True, True, "/d")}
    news.status = Status("1", "ready", "", "", (), "/s", 5, 4, 3, ())
    measures.models_are(models)
    asked(measures, "ada")
    page = MetricsPage(Room(Directory(models=models)), measures, news, BodyBudget(1))  # type: ignore[arg-type]
    scope = {"type": "http", "method": "GET", "path": "/metrics"}
    for accept in (b"", b"application/openmetrics-text; version=1.0.0"):
        answer = await page.answer(Request({**scope, "headers": [(b"accept", accept)]}))
        text = bytes(answer.body).decode()
        shown = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")}
        named = {each.name.removesuffix("_total") if accept else each.name for each in METRICS}
        assert {each for each in shown if each.startswith("flashd_")} == named
        assert "_created" not in text and ("# EOF" in text) == bool(accept)
    assert {label for each in METRICS for label in each.labels} == LABELS.keys()


# -- the daemon's signals --------------------------------------------------------------------------------------------


def changed(path: str, interface: str, **properties: object) -> Event:
    return Event("changed", path, interface, properties)


ENGINE: Mapping[str, object] = {
    **{"Kind": "torch", "State": "serving", "Architecture": "", "Endpoint": "", "Pid": 1, "ActiveRequests": 0},
    **{"StartedAt": 0, "DeviceBytes": 0, "KvCacheBytes": 0},
}


async def test_swaps_evictions_engines_and_devices_come_from_signals() -> None:
    measures = Measures()
    news = DaemonNews(measures)
    news._devices = {"/d": Device("host", "host", "", "", 9, 8, 7, 6, 0, "none", False, False, True, True, "/d")}
    job = {"Kind": "serve", "Subject": "ada", "State": "queued", "CreatedAt": 1.0}
    result = {"how": "rebind", "from_tier": "host", "seconds": 0.03, "phases": {"binding": 0.02}}
    ended = {"State": "done", "FinishedAt": 2.0, "Result": result}
    for event in (
        Event("added", "/j/1", wire.JOB, job),
        changed("/j/1", wire.JOB, DoneBytes=3),
        changed("/j/1", wire.JOB, **ended),
        Event("finished", "/j/1", wire.JOB, {"State": "done"}),
        Event("added", "/j/2", wire.JOB, {**job, "Kind": "import", "State": "failed"}),
        changed("/j/3", wire.JOB, **ended),  # began before the gateway
        changed("/m/ada", wire.MODEL, Devices=["host", "cuda:0"]),
        changed("/m/ada", wire.MODEL, Devices=["host", "cuda:1"]),
        changed("/m/ada", wire.MODEL, Devices=["host"]),
        changed("/m/ada", wire.MODEL, Devices=[], Checkpoint="new"),
        changed("/d", wire.DEVICE, UsedBytes=5),
        Event("added", "/e/1", wire.ENGINE, {**ENGINE, "Model": wire.model_path("ada"), "MemoryBytes": 1}),
        Event("added", "/e/2", wire.ENGINE, {**ENGINE, "Model": wire.model_path("bob"), "MemoryBytes": 2}),
        Event("added", "/e/3", wire.ENGINE, {**ENGINE, "Model": wire.model_path("ada"), "MemoryBytes": 4}),
        changed("/e/1", wire.ENGINE, MemoryBytes=8, DeviceBytes=16, KvCacheBytes=32),
        changed("/e/2", wire.ENGINE, Model=wire.model_path("ada")),
        changed("/e/4", wire.ENGINE, MemoryBytes=64),  # of which nothing is known
        Event("removed", "/e/3", wire.ENGINE, {}),
        Event("added", "/e/5", wire.ENGINE, {**ENGINE, "Model": wire.model_path("hidden"), "MemoryBytes": 128}),
    ):
        news.happened(event)
    found = await read(measures, Directory(models=listed(model("ada"))), news)
    assert {
        key: value for key, value in found.items() if key[0] in ("flashd_engine_bytes", "flashd_kv_cache_bytes")
    } == {
        ("flashd_engine_bytes", "ada", "host"): 10,
        ("flashd_engine_bytes", "ada", "device"): 16,
        ("flashd_kv_cache_bytes", "ada"): 32,
    }
    assert found["flashd_jobs_total", "serve", "done"] == 1 and found["flashd_jobs_total", "import", "failed"] == 1
    assert found["flashd_swap_duration_seconds_count", "rebind", "host"] == 1
    assert found["flashd_swap_duration_seconds_bucket", "rebind", "0.03", "host"] == 1
    assert {key: value for key, value in found.items() if key[0] == "flashd_evictions_total"} == {
        ("flashd_evictions_total", "device"): 1
    }
    assert found["flashd_device_used_bytes", "host"] == 5 and found["flashd_device_budget_bytes", "host"] == 8
    brought = news.last_brought("ada")
    assert brought is not None and (brought.kind, brought.created_at, brought.finished_at) == ("serve", 1.0, 2.0)


# -- the dashboard ---------------------------------------------------------------------------------------------------

_QUERIED = re.compile(r"\b((?:flashd|process)_\w+)(?:\{([^}]*)\})?")
_GROUPED = re.compile(r"\bby \(([^)]*)\)")
_OF_THE_PROCESS = {"process_resident_memory_bytes"}


def test_the_dashboard_asks_for_metrics_and_labels_that_there_are() -> None:
    dashboard = json.loads((ROOT / "packaging" / "grafana" / "flashd.json").read_text())
    targets = [target for panel in dashboard["panels"] for target in panel.get("targets", [])]
    by_name = {each.name: each for each in METRICS}
    by_name |= {each.name + end: each for each in METRICS if each.buckets for end in ("_bucket", "_count", "_sum")}
    asked_for = set()
    for expression, legend in [(target["expr"], target["legendFormat"]) for target in targets]:
        labels = {name for names in _GROUPED.findall(expression) for name in names.split(", ")} - {"le"}
        labels |= set(re.findall(r"\{\{(\w+)\}\}", legend))
        known: set[str] = set()
        for name, selector in _QUERIED.findall(expression):
            assert name in by_name or name in _OF_THE_PROCESS, f"{name} of {expression}"
            if (metric := by_name.get(name)) is not None:
                assert not metric.buckets or name != metric.name, f"a histogram has no values of its own: {expression}"
                labels |= set(re.findall(r"(\w+)=", selector))
                known |= set(metric.labels)
                asked_for.add(metric.name)
        assert labels <= known, expression
        assert expression.count("rate(") == len(re.findall(r"_(?:total|bucket|count)\b", expression)), expression
    assert asked_for == {each.name for each in METRICS}, "each metric is to be seen"
    queries = [each["query"]["query"] for each in dashboard["templating"]["list"] if each["type"] == "query"]
    assert all(name in by_name for query in queries for name, _ in _QUERIED.findall(query))
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
