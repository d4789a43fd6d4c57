# SPDX-License-Identifier: Apache-2.0
"""Metrics of the gateway and of its daemon, in Prometheus' text format at /metrics.

names.py        the metrics: their names, labels and meanings
measures.py     counts and times of what has happened
observed.py     a request as it goes on: what its metrics and its trace are made of
observing.py    the layer around the application that begins and ends it
usage.py        numbers of tokens, read from answers that are passed through
daemon_news.py  swaps, evictions, memory and the store, from the daemon's signals
page.py         what a client may read
"""
