# SPDX-License-Identifier: Apache-2.0
"""Set-up for all tests, and the rule that a test skipped in CI has failed."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import imported
import parallel
import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "packaging" / "tour"))  # the small chat models of the quick start serve the tests too


# Shells make background jobs ignore it, and programs that tests start and interrupt would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    return parallel.workers(config)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    return parallel.make_scheduling(config, log)


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """For tests/run --fast."""
    if not os.environ.get("FLASHD_TESTS_FAST") or collection_path.is_dir():
        return None
    return None if parallel.is_fast(str(collection_path.relative_to(ROOT))) else True


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if parallel.is_one_of_several(config):
        items[:] = parallel.ordered(items)
        parallel.be_patient(items, float(config.getini("timeout")))


@pytest.fixture(scope="session")
def imported_torch() -> Iterator[Path]:
    """A Python that imports torch once for all tests; running daemons run engines by it."""
    with imported.python() as program, pytest.MonkeyPatch.context() as patched:
        patched.setenv(imported.TORCH_PYTHON, str(program))
        yield program


def pytest_report_header() -> list[str]:
    seed = os.environ.get("FLASHD_CAMPAIGN_SEED")
    return [f"campaigns: FLASHD_CAMPAIGN_SEED={seed}"] if seed else []


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """In CI a skip is a failure: what CI lacks, tests/run must install. Only a GPU cannot be had there."""
    report = yield
    wants_gpu = item.path.is_relative_to(ROOT / "tests" / "gpu")
    if report.skipped and not hasattr(report, "wasxfail") and os.environ.get("CI") and not wants_gpu:
        report.outcome = "failed"
        report.longrepr = f"skipped in CI: {report.longrepr}"
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if os.environ.get("FLASHD_TESTS_WITHOUT_VLLM"):
        terminalreporter.write_line("The tests of vLLM were left out: tests/run without --without-vllm runs them")
