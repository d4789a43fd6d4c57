# SPDX-License-Identifier: Apache-2.0
"""An engine may have copied the checkpoint that it serves, so that nothing in our memory keeps it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from test_catalog import add, source
from test_memory import FakeMover, host_of

from flashd.daemon.changing_models import Changes
from flashd.daemon.events import Events
from flashd.daemon.library.models import Models
from flashd.daemon.lifecycle.ending import Ending
from flashd.errors import CorruptCheckpoint
from flashd.memory.residency import Residency
from flashd.store.catalog import Catalog
from flashd.tasks import Background


async def test_an_old_version_is_deleted_when_it_no_longer_serves(tmp_path: Path) -> None:
    with Catalog(tmp_path / "store", keep_versions=0) as catalog:
        old = add(catalog, "ada", source(tmp_path / "1", 1))
        serving = {old.checkpoint_id}
        background, events = Background(), Events()
        residency, settings = Residency(host_of(1), FakeMover()), cast(Any, SimpleNamespace())
        models = Models(
            *(catalog, residency, background, Changes(), settings, Ending(), events),
            is_wanted=lambda name: True,
            serving_checkpoints=lambda: set(serving),
            end_preparing=cast(Any, None),
        )
        events.engines_changed()
        new = add(catalog, "ada", source(tmp_path / "2", 2))
        events.checkpoint_changed(old.checkpoint_id)  # its arena is evicted
        await models.collect()
        assert catalog.checkpoint(old.checkpoint_id), "the next daemon finds what serves"

        serving.clear()
        events.engines_changed()
        await background.close()
        assert catalog.checkpoint(new.checkpoint_id)
        with pytest.raises(CorruptCheckpoint):
            catalog.checkpoint(old.checkpoint_id)
