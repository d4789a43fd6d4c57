# SPDX-License-Identifier: Apache-2.0
"""GET /metrics: what a client may read of the metrics.

A client that may not see a model does not see the series that name it: see `Dispatcher.directory`.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.samples import Sample
from starlette.requests import Request
from starlette.responses import Response

from flashd._version import __version__
from flashd.gateway.directory import Directory
from flashd.gateway.dispatch import Dispatcher
from flashd.gateway.exchange import BodyBudget
from flashd.gateway.metrics import names
from flashd.gateway.metrics.daemon_news import HOST, DaemonNews, tiers_of
from flashd.gateway.metrics.measures import Measures
from flashd.gateway.metrics.names import Metric

_STORED, _DEVICE = "stored", "device"
_AT_ONCE = 32  # samples: a third of a millisecond
_PAUSE_S = 1e-6  # as long as it takes to hand over the interpreter


class MetricsPage:
    """The endpoint."""

    def __init__(self, dispatcher: Dispatcher, measures: Measures, news: DaemonNews, budget: BodyBudget) -> None:
        self._dispatcher = dispatcher
        self._measures = measures
        self._news = news
        self._budget = budget
        self._one_at_a_time = asyncio.Lock()

    async def answer(self, request: Request) -> Response:
        known = self._dispatcher.directory
        waiting = {(name,): self._dispatcher.waiting(name) for name in known.models}
        in_progress = {(name,): self._dispatcher.in_progress(name) for name in known.models}
        queue = [_gauge(names.WAITING, waiting), _gauge(names.IN_PROGRESS, in_progress)]
        encode, content_type = choose_encoder(request.headers.get("accept", ""))

        def text() -> bytes:
            families: Any = _Collected([*self._counted(known), *queue, *self._state(known)])
            return encode(families)

        # Thousands of series take tens of milliseconds, in which answers go on; swaps use threads of the same pool.
        async with self._one_at_a_time:
            body = await asyncio.to_thread(text)
        return Response(body, headers={"content-type": content_type, "cache-control": "no-store"})

    def _counted(self, known: Directory) -> Iterator[Family]:
        """What has been counted, without the series of models that the client may not see."""
        for family in self._measures.families():
            shown = Family(family.name, family.documentation, family.type, family.unit)
            shown.samples = _Unhurried(
                sample
                for sample in family.samples
                if (not sample.labels.get("model") or sample.labels["model"] in known.models)
                and not sample.name.endswith("_created")  # twice as many series, which say little
            )
            yield shown

    def _state(self, known: Directory) -> Iterator[Family]:
        """What is so now."""
        models = sorted(known.models.items())
        yield _gauge(names.SERVING, {(name,): name in known.serving for name, _ in models})
        tiers = {
            (name, tier): model.size_bytes for name, model in models for tier in (_STORED, *tiers_of(model.devices))
        }
        yield _gauge(names.MODEL_BYTES, tiers)
        memory, caches = Counter[tuple[str, str]](), Counter[tuple[str]]()
        for engine in self._news.engines:
            if engine.model in known.models:
                memory[engine.model, HOST] += engine.memory_bytes
                memory[engine.model, _DEVICE] += engine.device_bytes
                caches[engine.model,] += engine.kv_cache_bytes
        yield _gauge(names.ENGINE_BYTES, memory)
        yield _gauge(names.KV_CACHE, caches)
        yield _gauge(names.ENGINES, Counter((engine.kind, engine.state) for engine in known.engines.values()))
        devices = self._news.devices
        yield _gauge(names.DEVICE_TOTAL, {(device.name,): device.total_bytes for device in devices})
        yield _gauge(names.DEVICE_BUDGET, {(device.name,): device.budget_bytes for device in devices})
        yield _gauge(names.DEVICE_USED, {(device.name,): device.used_bytes for device in devices})
        yield _gauge(names.DEVICE_LEASED, {(device.name,): device.leased_bytes for device in devices})
        if (status := self._news.status) is not None:
            yield _gauge(names.STORE, {(): status.store_bytes})
            yield _gauge(names.STORE_QUOTA, {(): status.store_quota_bytes})
            yield _gauge(names.STORE_FREE, {(): status.store_free_bytes})
        yield _gauge(names.BODIES_HELD, {(): self._budget.held_bytes})
        yield _gauge(names.BODIES_MOST, {(): self._budget.most_bytes})
        yield _gauge(names.CONNECTED, {(): known.is_connected})
        yield _gauge(names.BUILD, {(__version__,): 1})


class _Unhurried(list[Sample]):
    """Samples that let the event loop run now and then while a thread writes them.

    Python itself would do so only every 5 ms (sys.getswitchinterval), in which the tokens of all answers would wait.
    """

    def __iter__(self) -> Iterator[Sample]:
        for number, sample in enumerate(super().__iter__()):
            if number % _AT_ONCE == 0:
                time.sleep(_PAUSE_S)
            yield sample


class _Collected:
    """Families as the encoders take them."""

    def __init__(self, families: list[Family]) -> None:
        self._families = families

    def collect(self) -> list[Family]:
        return self._families


def _gauge(metric: Metric, values: dict[Any, int] | dict[Any, bool] | Counter[Any]) -> Family:
    family = GaugeMetricFamily(metric.name, metric.meaning, labels=metric.labels)
    for labels, value in values.items():
        family.add_metric(labels, value)
    return family
