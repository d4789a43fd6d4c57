# SPDX-License-Identifier: Apache-2.0
"""What the bus says of an engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

from flashd.daemon.bus.objects import EngineObject
from flashd.engines.engine import EngineState, EngineStats


def test_a_parked_engine_has_no_kv_cache() -> None:
    engine = SimpleNamespace(
        number=1, kind="vllm", state=EngineState.SERVING, socket_path="/run/1.sock", cache_bytes=64
    )
    engine.pid, engine.started_at = 1, 0.0
    checkpoint = SimpleNamespace(manifest=SimpleNamespace(architecture="Ada"))
    slot = SimpleNamespace(engine=engine, target=SimpleNamespace(model_name="ada", checkpoint=checkpoint), supply=None)
    stats = SimpleNamespace(of=lambda number: EngineStats(0, 0, 0), device_bytes=lambda number: 0)
    catalog = SimpleNamespace(get=lambda name: None)
    shown = EngineObject(*cast(Any, (slot, catalog, None, stats, None)))
    assert shown.properties()["KvCacheBytes"] == 64
    engine.state = EngineState.PARKED
    assert shown.properties()["KvCacheBytes"] == 0
