# SPDX-License-Identifier: Apache-2.0
"""Images as a cache: found by their key, never partial, and the first to be evicted."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from sources import converted

from flashd.checkpoint.files import Checkpoint
from flashd.errors import FlashdError, InvalidSource, TransferFailed
from flashd.io.streamer import blake3
from flashd.store.catalog import Catalog, Origin
from flashd.store.images import Images

KEY, OTHER = "a" * 64, "b" * 64
DATA = np.arange(6000, dtype=np.float32).tobytes()
LAYOUT = json.dumps({"model.qkv": {"dtype": "F32", "shape": [60, 100], "data_offsets": [0, len(DATA)]}})


def save(images: Images, image: Checkpoint) -> None:
    with images.draft(image) as draft:
        os.pwrite(draft.file.fd, DATA, image.manifest.data_offset)
        draft.publish(blake3(DATA))


def saved(images: Images, key: str = KEY, made_of: str = "c" * 64) -> Checkpoint:
    save(images, images.describe(key, LAYOUT, len(DATA), made_of))
    found = images.get(key)
    assert found is not None
    return found


def test_what_an_engine_made_is_found_at_once_and_after_a_restart(tmp_path: Path) -> None:
    images = Images(tmp_path)
    made = images.describe(KEY, LAYOUT, len(DATA), "c" * 64)
    assert images.get(KEY) == made and not images.is_stored(KEY)
    assert json.loads(images.layout_json(made)) == json.loads(LAYOUT)
    assert Images(tmp_path).get(KEY) is None, "nothing is on the disk yet"
    save(images, made)
    again = Images(tmp_path)
    found = again.get(KEY)
    assert found is not None and again.is_stored(KEY) and again.get(OTHER) is None
    assert json.loads(again.layout_json(found)) == json.loads(LAYOUT)
    assert found.digests().table == blake3(DATA)
    loaded = safetensors.numpy.load_file(found.weights_path)
    assert loaded["model.qkv"].tobytes() == DATA, "and any other tool opens it"


def test_an_image_that_only_one_engine_can_map_is_gone_with_it(tmp_path: Path) -> None:
    images = Images(tmp_path)
    saved(images, OTHER)
    save(images, images.describe(KEY, LAYOUT, len(DATA), "c" * 64, maker="one"))
    assert images.drop_unless(lambda maker: maker == "one") == []
    again = Images(tmp_path)
    assert again.get(KEY) is not None and again.drop_unless(lambda maker: maker == "one") == []
    assert again.drop_unless(lambda maker: maker != "one") == [KEY]
    assert again.get(KEY) is None and again.get(OTHER) is not None, "others are for all"
    unsaved = again.describe(KEY, LAYOUT, len(DATA), "c" * 64, maker="two")
    assert again.get(KEY) == unsaved and again.drop_unless(lambda maker: False) == [KEY]
    assert [path.name for path in tmp_path.iterdir()] == [OTHER]


def test_a_save_that_fails_leaves_nothing(tmp_path: Path) -> None:
    images = Images(tmp_path)
    made = images.describe(KEY, LAYOUT, len(DATA), "c" * 64)
    with pytest.raises(TransferFailed), images.draft(made):
        raise TransferFailed("the disk is broken")
    assert list(tmp_path.iterdir()) == [] and images.get(KEY) == made
    with images.draft(made) as draft:
        images.drop(KEY)  # its model was removed meanwhile
        draft.publish(blake3(DATA))
    assert list(tmp_path.iterdir()) == [] and images.get(KEY) is None
    (tmp_path / f"{KEY}.partial").mkdir()
    assert Images(tmp_path).get(KEY) is None and list(tmp_path.iterdir()) == []


def test_what_is_damaged_or_of_another_key_is_not_found(tmp_path: Path) -> None:
    images = Images(tmp_path)
    directory = saved(images).directory
    directory.rename(tmp_path / OTHER)
    assert Images(tmp_path).get(OTHER) is None and not (tmp_path / OTHER).exists()
    saved(images)
    (directory / "manifest.toml").write_text("nonsense = 1")
    assert Images(tmp_path).get(KEY) is None


@pytest.mark.parametrize("layout", ["{}", "[]", "nonsense", LAYOUT.replace("100", "101"), LAYOUT.replace("F32", "F3")])
def test_a_layout_that_does_not_fit_is_refused(layout: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidSource):
        Images(tmp_path).describe(KEY, layout, len(DATA), "c" * 64)
    with pytest.raises(FlashdError):
        Images(tmp_path).describe("../x", LAYOUT, len(DATA), "c" * 64)


def test_images_go_before_a_model_finds_no_room_and_with_their_checkpoint(tmp_path: Path) -> None:
    safetensors.numpy.save_file({"w": np.zeros(64, dtype=np.float32)}, tmp_path / "w.safetensors")
    with Catalog(tmp_path / "store") as catalog:
        with catalog.draft(1000) as draft:
            checkpoint = converted(tmp_path / "w.safetensors", draft.directory / "x")
            for file in list(checkpoint.directory.iterdir()):
                file.rename(draft.directory / file.name)
            checkpoint.directory.rmdir()
            draft.publish("m", checkpoint.manifest, Origin("import", "w"))
        saved(catalog.images, KEY, checkpoint.id)
        saved(catalog.images, OTHER, checkpoint.id)
        catalog.images.get(KEY)  # used last
        taken = catalog.images.size_bytes()
        catalog.quota_bytes = catalog.size_bytes() + taken
        assert catalog.free_bytes() == 0
        with catalog.draft(taken // 3):  # their sizes differ by the digits of their times
            assert catalog.images.get(OTHER) is None and catalog.images.get(KEY) is not None
        catalog.remove("m")
        catalog.collect(())
        assert catalog.images.get(KEY) is None and list((tmp_path / "store" / "images").iterdir()) == []
