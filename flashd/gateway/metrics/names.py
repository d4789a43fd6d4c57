# SPDX-License-Identifier: Apache-2.0
"""The metrics: their names, labels and meanings. The page of the documentation is made from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

_ANSWER_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_WAIT_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_SWAP_S = (0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.4, 0.8, 1.5, 3.0, 6.0, 12.0, 30.0, 60.0, 120.0, 300.0)


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric. `buckets` are the upper bounds of a histogram, in the unit of its name."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    meaning: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


REQUESTS = Metric(
    "flashd_requests_total", "counter", "Requests whose answer has ended.", ("endpoint", "model", "status")
)
REFUSALS = Metric(
    "flashd_refusals_total",
    "counter",
    "Requests that were refused, or failed, before or during the answer.",
    ("error",),
)
DURATION = Metric(
    "flashd_request_duration_seconds",
    "histogram",
    "Time from a request's arrival to the end of its answer.",
    ("endpoint",),
    _ANSWER_S,
)
FIRST_BYTE = Metric(
    "flashd_time_to_first_byte_seconds",
    "histogram",
    "Time from a request's arrival to the first byte of its engine's answer, with the queue and the swap. In a stream "
    "this is about the time to the first token.",
    ("model",),
    _ANSWER_S,
)
WAIT = Metric(
    "flashd_queue_wait_seconds",
    "histogram",
    "Time that a request waited for its model's turn; next to nothing if the model serves.",
    ("model",),
    _WAIT_S,
)
WAITING = Metric("flashd_queue_length", "gauge", "Requests that wait for their model's turn now.", ("model",))
IN_PROGRESS = Metric(
    "flashd_requests_in_progress", "gauge", "Requests that engines are answering for the gateway now.", ("model",)
)
TOKENS = Metric(
    "flashd_tokens_total",
    "counter",
    "Tokens of prompts and answers, as the engines state them in usage. OpenAI's streams have it only if the client "
    "asks for it with stream_options.include_usage; streams of Ollama's and Anthropic's interfaces always have it.",
    ("model", "kind"),
)
SWAPS = Metric(
    "flashd_swap_duration_seconds",
    "histogram",
    "Time that the daemon took to have a model serve, whoever asked for it.",
    ("how", "tier"),
    _SWAP_S,
)
JOBS = Metric("flashd_jobs_total", "counter", "The daemon's jobs that ended.", ("kind", "state"))
EVICTIONS = Metric(
    "flashd_evictions_total",
    "counter",
    "Times that a model left the memory of a tier and stayed in the store.",
    ("tier",),
)
MODEL_BYTES = Metric(
    "flashd_model_bytes",
    "gauge",
    "Size of the weights of a model, for each tier that holds them. Fine-tunes may share some of it in the store.",
    ("model", "tier"),
)
ENGINE_BYTES = Metric(
    "flashd_engine_bytes",
    "gauge",
    "Memory of the engines that hold a model, or held it when they were parked: of the host, without weights in its "
    "tier, and of GPUs, where mapped weights count.",
    ("model", "tier"),
)
KV_CACHE = Metric(
    "flashd_kv_cache_bytes",
    "gauge",
    "KV cache of the engines that hold a model, on each GPU if one uses several; 0 for an engine that has none or has "
    "chosen the size itself.",
    ("model",),
)
SERVING = Metric("flashd_model_serving", "gauge", "1 if the model serves, else 0.", ("model",))
ENGINES = Metric("flashd_engines", "gauge", "Engines.", ("engine", "state"))
DEVICE_TOTAL = Metric("flashd_device_total_bytes", "gauge", "Memory of the host or a GPU.", ("device",))
DEVICE_BUDGET = Metric("flashd_device_budget_bytes", "gauge", "Most bytes that its pool may use.", ("device",))
DEVICE_USED = Metric("flashd_device_used_bytes", "gauge", "Bytes that its pool uses for weights.", ("device",))
DEVICE_LEASED = Metric(
    "flashd_device_leased_bytes", "gauge", "Bytes of these that cannot be evicted: leased or pinned.", ("device",)
)
STORE = Metric("flashd_store_bytes", "gauge", "Bytes of the checkpoints in the store.")
STORE_QUOTA = Metric("flashd_store_quota_bytes", "gauge", "Most bytes that the store may take; 0 for no limit.")
STORE_FREE = Metric("flashd_store_free_bytes", "gauge", "Bytes that are free in the store's file system.")
BODIES_HELD = Metric("flashd_request_bodies_bytes", "gauge", "Memory that the bodies of requests take now.")
BODIES_MOST = Metric("flashd_request_bodies_budget_bytes", "gauge", "Most memory that they may take.")
CONNECTED = Metric("flashd_daemon_connected", "gauge", "1 while the gateway is connected to the daemon, else 0.")
BUILD = Metric("flashd_build_info", "gauge", "Always 1.", ("version",))

METRICS: tuple[Metric, ...] = (
    *(REQUESTS, REFUSALS, DURATION, FIRST_BYTE, WAIT, WAITING, IN_PROGRESS, TOKENS),
    *(SWAPS, JOBS, EVICTIONS, MODEL_BYTES, ENGINE_BYTES, KV_CACHE, SERVING, ENGINES),
    *(DEVICE_TOTAL, DEVICE_BUDGET, DEVICE_USED, DEVICE_LEASED, STORE, STORE_QUOTA, STORE_FREE),
    *(BODIES_HELD, BODIES_MOST, CONNECTED, BUILD),
)

LABELS: Mapping[str, str] = {
    "endpoint": "path of the request, such as `/v1/chat/completions`; `other` for one that the gateway lacks",
    "model": "name of the model; empty for a request that came to none, such as one with an unknown name",
    "status": "HTTP status of the answer; 499 if the client left before it began",
    "error": "name of the error, as on D-Bus, without `org.flashd1.Error.`; `engine` if the engine itself refused",
    "kind": "`prompt` or `completion`; kind of a job",
    "how": "`already-active`, `rebind`, `wake` or `start`: what the engine had to do",
    "tier": "`stored`, `host` or `device`; for a swap, where the weights were before",
    "state": "end of a job: `done`, `failed` or `cancelled`; state of an engine",
    "engine": "kind of the engine: `torch` or `vllm`",
    "device": "`host`, or a GPU such as `cuda:0`",
    "version": "version of the gateway",
}
