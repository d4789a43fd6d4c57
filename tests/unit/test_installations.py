# SPDX-License-Identifier: Apache-2.0
"""Wheels sent for an installation that fails to begin are closed."""

from __future__ import annotations

import errno
import os
from unittest.mock import MagicMock

import pytest

from flashd.daemon.events import Events
from flashd.daemon.serving.installations import Installations
from flashd.errors import LimitExceeded

CALLER = MagicMock(peer=":1.1", uid=0)


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Which numbers were closed, of descriptors that are only said to be duplicated: from 1001 on."""
    found: list[int] = []
    monkeypatch.setattr("flashd.dbus.collected_files.close_all", found.extend)
    return found


def refused(monkeypatch: pytest.MonkeyPatch, jobs: MagicMock, error: type[Exception], most: int) -> None:
    given = iter(range(1001, 1001 + most))

    def dup(_: int) -> int:
        try:
            return next(given)
        except StopIteration:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE)) from None

    monkeypatch.setattr("flashd.dbus.collected_files.os.dup", dup)
    installations = Installations(MagicMock(), jobs, Events(), on_change=MagicMock())
    with pytest.raises(error):
        installations.begin(CALLER, "torch", {"a.whl": 3, "b.whl": 4}, more=True)


def test_wheels_of_a_job_that_is_refused_are_closed(monkeypatch: pytest.MonkeyPatch, closed: list[int]) -> None:
    jobs = MagicMock()
    jobs.create.side_effect = LimitExceeded("no more")
    refused(monkeypatch, jobs, LimitExceeded, most=2)
    assert closed == [1001, 1002]


def test_wheels_that_came_before_the_descriptors_ran_out_are_closed(
    monkeypatch: pytest.MonkeyPatch, closed: list[int]
) -> None:
    refused(monkeypatch, MagicMock(), OSError, most=1)
    assert closed == [1001]
