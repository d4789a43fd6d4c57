# SPDX-License-Identifier: Apache-2.0
"""On file systems that share extents, two fine-tunes take the space of one plus their differences."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_sharing import LAYERS, tune, weights_of

from flashd.checkpoint.files import verify
from flashd.store.reflinks import share_blocks
from flashd.units import MiB

LAYER_BYTES = 16 * MiB


@pytest.fixture(params=["btrfs", "xfs"])
def reflinking(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A small file system of a kind that can share extents, in a file."""
    maker = shutil.which(f"mkfs.{request.param}", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    if maker is None or os.geteuid() != 0:
        pytest.skip(f"needs mkfs.{request.param}, and to be root")
    image, mounted = tmp_path / "image", tmp_path / "mounted"
    mounted.mkdir()
    with image.open("wb") as file:
        file.truncate(1024 * MiB)
    subprocess.run([maker, "-q", image], check=True)
    if subprocess.run(["mount", "-o", "loop", image, mounted], check=False, capture_output=True).returncode:
        pytest.skip(f"{request.param} cannot be mounted here")
    try:
        yield mounted
    finally:
        subprocess.run(["umount", mounted], check=True)


def used_bytes(folder: Path) -> int:
    os.sync()
    status = os.statvfs(folder)
    return (status.f_blocks - status.f_bfree) * status.f_frsize


def test_two_fine_tunes_take_the_room_of_one_and_of_what_differs(reflinking: Path) -> None:
    base, tuned = tune(reflinking / "base", []), tune(reflinking / "tuned", [2])
    wanted = weights_of(tuned)
    before = used_bytes(reflinking)
    assert share_blocks(tuned, [base]) == (LAYERS - 1) * LAYER_BYTES
    saved = before - used_bytes(reflinking)
    assert abs(saved - (LAYERS - 1) * LAYER_BYTES) < MiB
    assert weights_of(tuned) == wanted
    verify(tuned)
    shutil.rmtree(base.directory)  # shared extents belong to both
    verify(tuned)
    assert weights_of(tuned) == wanted


def test_changing_one_of_them_never_changes_the_other(reflinking: Path) -> None:
    base, tuned = tune(reflinking / "base", []), tune(reflinking / "tuned", [2])
    share_blocks(tuned, [base])
    with base.weights_path.open("r+b") as file:
        file.seek(base.extent.offset)
        file.write(b"spoiled!" * 1000)
    verify(tuned)


def test_bytes_that_differ_though_their_digests_do_not_are_not_shared(reflinking: Path) -> None:
    """A block that the disk has spoiled: the kernel compares, and our digests need not be believed."""
    base, tuned = tune(reflinking / "base", []), tune(reflinking / "tuned", [])
    with base.weights_path.open("r+b") as file:
        file.seek(base.extent.offset)
        file.write(b"spoiled!" * 1000)
    share_blocks(tuned, [base])
    verify(tuned)


def test_where_nothing_can_be_shared_all_stays_as_it_was(tmp_path: Path) -> None:
    base, tuned = tune(tmp_path / "base", []), tune(tmp_path / "tuned", [2])
    share_blocks(tuned, [base])
    (base.directory / "digests.b3").unlink()
    assert share_blocks(tuned, [base]) == 0
    verify(tuned)
