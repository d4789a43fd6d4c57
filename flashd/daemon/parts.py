# SPDX-License-Identifier: Apache-2.0
"""What do bus objects need of the daemon? Its parts, each built once by flashd/daemon/service.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from flashd.daemon.arrivals import Arrivals
from flashd.daemon.authorization import Authority
from flashd.daemon.driver_usage import DriverUsage
from flashd.daemon.engine_stats import EngineStatsBook
from flashd.daemon.imports import Imports
from flashd.daemon.installations import Installations
from flashd.daemon.jobs import Jobs
from flashd.daemon.models import Models
from flashd.daemon.ownership import Ownership
from flashd.daemon.pulls import Pulls
from flashd.daemon.serving import Serving
from flashd.daemon.settings import Settings
from flashd.daemon.shared_images import SharedImages
from flashd.memory.lease import LeaseBook
from flashd.memory.residency import Residency
from flashd.store.catalog import Catalog
from flashd.swap import Swapper


@dataclass(frozen=True, slots=True)
class Parts:
    """`stop` asks the daemon to end; `is_stopping` tells whether somebody did."""

    settings: Settings
    authority: Authority
    ownership: Ownership
    catalog: Catalog
    jobs: Jobs
    imports: Imports
    pulls: Pulls
    installations: Installations
    arrivals: Arrivals
    models: Models
    residency: Residency
    leases: LeaseBook
    swapper: Swapper
    driver_usage: DriverUsage
    serving: Serving
    shared_images: SharedImages
    engine_kinds: tuple[str, ...]
    engine_stats: EngineStatsBook
    endpoint: Path
    stop: Callable[[], None]
    is_stopping: Callable[[], bool]
