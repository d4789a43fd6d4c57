# SPDX-License-Identifier: Apache-2.0
"""Counts and times of what has happened, since the gateway began.

Labels are bounded: models are those of the directory, and the series of a model that was removed go with it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.metrics_core import Metric as Family

from flashd.client.results import Model
from flashd.gateway.metrics import names
from flashd.gateway.metrics.names import METRICS, Metric
from flashd.gateway.metrics.observed import Observed

CLIENT_LEFT = 499  # as nginx writes it
_BY_STATUS = {401: "NotAuthorized", 403: "NotAuthorized", 404: "NotFound", 405: "NotFound", 503: "Unavailable"}

_HEALTH = "/health"  # whose status is no refusal, but the answer


class Measures:
    """The counters and histograms. Jobs and evictions may be noted by any thread."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        ProcessCollector(registry=self._registry)
        self._counters = {each: self._counter(each) for each in METRICS if each.kind == "counter"}
        self._histograms = {each: self._histogram(each) for each in METRICS if each.kind == "histogram"}
        self._models: Mapping[str, Model] = {}

    def ended(self, request: Observed) -> None:
        """Notes a request whose answer has ended."""
        now = time.monotonic()
        model = request.model if request.model in self._models else ""
        status = request.status or CLIENT_LEFT
        self._counters[names.REQUESTS].labels(request.endpoint, model, status).inc()
        self._histograms[names.DURATION].labels(request.endpoint).observe(now - request.arrived)
        if (request.error or request.status >= 400) and request.endpoint != _HEALTH:
            error = request.error or ("engine" if request.first_byte else _BY_STATUS.get(status, "Internal"))
            self._counters[names.REFUSALS].labels(error).inc()
        if not model:
            return
        if request.was_admitted:
            self._histograms[names.WAIT].labels(model).observe(request.wait_s)
        if request.first_byte is not None:
            self._histograms[names.FIRST_BYTE].labels(model).observe(request.first_byte - request.arrived)
        if (tokens := request.usage.tokens()) is not None:
            self._counters[names.TOKENS].labels(model, "prompt").inc(tokens.prompt)
            self._counters[names.TOKENS].labels(model, "completion").inc(tokens.completion)

    def job_ended(self, kind: str, state: str) -> None:
        self._counters[names.JOBS].labels(kind, state).inc()

    def swapped(self, how: str, tier: str, seconds: float) -> None:
        self._histograms[names.SWAPS].labels(how, tier).observe(seconds)

    def evicted(self, tier: str) -> None:
        self._counters[names.EVICTIONS].labels(tier).inc()

    def models_are(self, models: Mapping[str, Model]) -> None:
        """Notes which models there are, and forgets those that are gone."""
        if models is self._models:
            return
        gone = self._models.keys() - models.keys()
        self._models = models
        for name in gone:
            for metric, values in (*self._counters.items(), *self._histograms.items()):
                if "model" in metric.labels:
                    values.remove_by_labels({"model": name})

    def families(self) -> Iterator[Family]:
        """What Prometheus reads, of all models."""
        return iter(self._registry.collect())

    def _counter(self, metric: Metric) -> Counter:
        return Counter(metric.name, metric.meaning, metric.labels, registry=self._registry)

    def _histogram(self, metric: Metric) -> Histogram:
        return Histogram(metric.name, metric.meaning, metric.labels, buckets=metric.buckets, registry=self._registry)
