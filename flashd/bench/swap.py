# SPDX-License-Identifier: Apache-2.0
"""`flash bench swap`: measures the time from a swap to the first token of the new model.

Swaps back and forth between two models of a running daemon. For comparison, it measures the first token without a swap.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable

from flashd.bench.report import Report, Row, cost_row, report
from flashd.client import openai
from flashd.client.client import Client

_QUESTION = [{"role": "user", "content": "Hello"}]


def run(
    client: Client,
    models: tuple[str, str],
    *,
    runs: int,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Measures swaps. Rows are named after the way of the swap: `swap.rebind`, `swap.wake`, `swap.start`."""
    swaps: defaultdict[str, list[float]] = defaultdict(list)
    floor: list[float] = []

    def first_token_ms(model: str, *, swap: bool) -> tuple[str, float]:
        started = time.perf_counter()
        how = client.swap(model).how if swap else ""
        openai.chat(client.endpoint(), model, _QUESTION, max_tokens=1, temperature=0)
        return how, (time.perf_counter() - started) * 1e3

    for model in models:
        first_token_ms(model, swap=True)  # engines started, weights loaded
    for done in range(runs):
        on_progress(done, runs)
        for model in models:
            how, took_ms = first_token_ms(model, swap=True)
            swaps[how].append(took_ms)
            floor.append(first_token_ms(model, swap=False)[1])
    on_progress(runs, runs)
    rows: list[Row] = [cost_row("first_token", floor, "ms")]
    rows += [cost_row(f"swap.{how}", figures, "ms", rows[0].value) for how, figures in sorted(swaps.items())]
    return report("swap", f"flash bench swap {' '.join(models)} --runs {runs}", rows)
