# SPDX-License-Identifier: Apache-2.0
"""Tests on a real GPU (`tests/gpu/run`). Elsewhere they are skipped with the reason."""

from __future__ import annotations

import gc
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import tomli_w
import torch

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS / "bus"), str(TESTS / "unit"), str(TESTS)]

from machine import Machine, used_bytes  # noqa: E402
from manager import Manager  # noqa: E402
from running import CONFIG, Daemon  # noqa: E402

from flashd.dbus.private_bus import PrivateBus  # noqa: E402
from flashd.io import cuda  # noqa: E402
from flashd.units import MiB  # noqa: E402


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = [item for item in items if item.path.is_relative_to(Path(__file__).parent)]
    reason = cuda.why_none() if here else ""
    for item in here if reason else []:
        item.add_marker(pytest.mark.skip(reason=f"no GPU: {reason}"))


@pytest.fixture
def nothing_leaks() -> Iterator[None]:
    """The card has as much memory free after a test as before it; contexts of processes that ended count too."""
    torch.ones(1000, device="cuda").to(torch.uint8).eq(1).cpu()  # kernels are loaded, and stay
    torch.cuda.empty_cache()
    before = used_bytes()
    yield
    deadline = time.monotonic() + 10
    while True:
        gc.collect()
        torch.cuda.empty_cache()
        more = used_bytes() - before
        if more < 32 * MiB:  # kernels that a test was the first to use
            return
        assert time.monotonic() < deadline, f"{more} bytes of the card are still in use"
        time.sleep(0.05)


def settings(lines: str) -> str:
    """What every daemon of these tests is told, and these lines."""
    tables = tomllib.loads(CONFIG)
    for name, table in tomllib.loads("[memory]\n" + lines).items():
        tables.setdefault(name, {}).update(table)
    return tomli_w.dumps(tables)


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What vLLM compiles, which takes most of a minute: one daemon's engines find what another's did."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture
def machine(request: pytest.FixtureRequest, nothing_leaks: None, compiled: Path, tmp_path: Path) -> Iterator[Machine]:
    """Parametrize it with lines of the configuration: of its [memory] section, until they say otherwise."""
    with tempfile.TemporaryDirectory(prefix="fd-") as short, PrivateBus(Path(short)) as bus:
        daemon = Daemon(bus.address, tmp_path, Path(short))
        daemon.config.write_text(settings(getattr(request, "param", "")))
        daemon.share_compiled(compiled)
        manager = Manager(Path(short) / "manager")
        manager.open()
        sources = tmp_path / "sources"
        sources.mkdir()
        made = Machine(daemon, manager, sources)
        made.start()
        try:
            yield made
        finally:
            assert daemon.process is not None
            status = daemon.stop() if daemon.process.poll() is None else 0
            manager.close()
        words = daemon.log.read_text()
        assert status == 0 and "Traceback" not in words, words
