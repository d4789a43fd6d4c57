# SPDX-License-Identifier: Apache-2.0
"""What every test may rely on, and the rule that CI skips nothing for want of a package."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "packaging" / "tour"))  # the small chat models of the quick start serve the tests too


# Shells have what they run in the background ignore it, and so would all that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """In CI a skip is a failure: what CI lacks, tests/run must install. Only a GPU cannot be had there."""
    report = yield
    wants_gpu = item.path.is_relative_to(ROOT / "tests" / "gpu")
    if report.skipped and not hasattr(report, "wasxfail") and os.environ.get("CI") and not wants_gpu:
        report.outcome = "failed"
        report.longrepr = f"skipped in CI: {report.longrepr}"
    return report
