# SPDX-License-Identifier: Apache-2.0
"""Whatever way a source arrives in the models folder, it is handed on once, whole."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
from sources import entry, forge
from waiting import eventually

from flashd.checkpoint.source import SourceFiles
from flashd.errors import InvalidSource
from flashd.store.inbox import Inbox, Item

SETTLE_S = 0.3
HEADER = {"a": entry("U8", [4], 0, 4)}


class Recorder:
    """A handler that remembers; `known` are fingerprints of an earlier run."""

    def __init__(self) -> None:
        self.handed_on: list[Item] = []
        self.gone: list[Item] = []
        self.unsettled: Sequence[Item] = ()
        self.known: set[str] = set()

    def is_known(self, item: Item) -> bool:
        return item.fingerprint in self.known

    async def settled(self, item: Item) -> None:
        self.handed_on.append(item)

    async def removed(self, item: Item) -> None:
        self.gone.append(item)

    def waiting(self, items: Sequence[Item]) -> None:
        self.unsettled = items

    @property
    def names(self) -> list[str]:
        return [item.name for item in self.handed_on]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "models"


@pytest.fixture
async def recorder(folder: Path) -> AsyncIterator[Recorder]:
    found = Recorder()
    inbox = Inbox([folder], found, settle_s=SETTLE_S, rescan_s=30)
    inbox.start()
    await asyncio.sleep(0.1)
    yield found
    await inbox.close()


async def quiet(seconds: float = 3 * SETTLE_S) -> None:
    await asyncio.sleep(seconds)


def made(folder: Path, data: bytes = b"data") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    forge(folder / "model.safetensors", HEADER, data)
    return folder


async def test_a_copied_folder(recorder: Recorder, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(made(tmp_path / "elsewhere"), folder / "tune")
    await eventually(lambda: recorder.names == ["tune"])
    await quiet()
    assert recorder.names == ["tune"]


async def test_a_folder_moved_in(recorder: Recorder, folder: Path, tmp_path: Path) -> None:
    made(tmp_path / "tune").rename(folder / "tune")
    await eventually(lambda: recorder.names == ["tune"])


async def test_a_file_moved_hard_linked_and_copied_in(recorder: Recorder, folder: Path, tmp_path: Path) -> None:
    outside = made(tmp_path / "outside") / "model.safetensors"
    shutil.copy(outside, folder / "copied.safetensors")
    os.link(outside, folder / "linked.safetensors")
    outside.rename(folder / "moved.safetensors")
    await eventually(lambda: sorted(recorder.names) == ["copied", "linked", "moved"])


async def test_a_download_under_another_name_waits_for_its_end(recorder: Recorder, folder: Path) -> None:
    target = folder / "tune"
    target.mkdir()
    forge(target / "model.safetensors.part", HEADER, b"da")
    await eventually(lambda: [item.state for item in recorder.unsettled] == ["incomplete"])
    await quiet()
    assert recorder.names == []
    assert "still being downloaded" in recorder.unsettled[0].detail
    forge(target / "model.safetensors.part", HEADER, b"data")
    (target / "model.safetensors.part").rename(target / "model.safetensors")
    await eventually(lambda: recorder.names == ["tune"])


async def test_rsync(recorder: Recorder, folder: Path, tmp_path: Path) -> None:
    if shutil.which("rsync") is None:
        pytest.skip("needs rsync")
    command = ["rsync", "-a", str(made(tmp_path / "tune")), f"{folder}/"]
    await asyncio.to_thread(subprocess.run, command, check=True)
    await eventually(lambda: recorder.names == ["tune"])


async def test_slow_writes_are_waited_for(recorder: Recorder, folder: Path) -> None:
    target = folder / "tune"
    target.mkdir()
    with (target / "model.safetensors").open("wb") as file:
        for _ in range(8):
            file.write(b"x" * 100)
            file.flush()
            await asyncio.sleep(SETTLE_S / 2)
            assert recorder.names == []
    await eventually(lambda: recorder.names == ["tune"])


async def test_shards_that_appear_one_by_one(recorder: Recorder, folder: Path) -> None:
    target = folder / "tune"
    target.mkdir()
    shards = [f"model-{n:05d}-of-00003.safetensors" for n in (1, 2, 3)]
    for shard in shards[:2]:
        forge(target / shard, HEADER, b"data")
        await quiet(2 * SETTLE_S)
        assert recorder.names == []
    assert shards[2] in recorder.unsettled[0].detail
    forge(target / shards[2], HEADER, b"data")
    await eventually(lambda: recorder.names == ["tune"])


async def test_an_index_before_its_shards(recorder: Recorder, folder: Path) -> None:
    target = folder / "tune"
    target.mkdir()
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    forge(target / "one.safetensors", HEADER, b"data")
    await quiet()
    assert recorder.names == []
    forge(target / "two.safetensors", {"b": entry("U8", [4], 0, 4)}, b"data")
    await eventually(lambda: recorder.names == ["tune"])


async def test_a_fine_tune_saved_again_is_handed_on_again(recorder: Recorder, folder: Path) -> None:
    made(folder / "tune", b"old!")
    await eventually(lambda: recorder.names == ["tune"])
    made(folder / "tune", b"new!")
    await eventually(lambda: recorder.names == ["tune", "tune"])
    assert recorder.handed_on[0].fingerprint != recorder.handed_on[1].fingerprint


async def test_a_removed_source_is_told_of(recorder: Recorder, folder: Path) -> None:
    made(folder / "tune")
    await eventually(lambda: recorder.names == ["tune"])
    shutil.rmtree(folder / "tune")
    await eventually(lambda: [item.name for item in recorder.gone] == ["tune"])


async def test_the_folder_deleted_and_made_again(recorder: Recorder, folder: Path) -> None:
    made(folder / "one")
    await eventually(lambda: recorder.names == ["one"])
    shutil.rmtree(folder)
    await quiet()
    assert recorder.gone == [], "a folder that went away is no wish to remove models"
    made(folder / "two")
    await eventually(lambda: "two" in recorder.names)
    made(folder / "three")
    await eventually(lambda: "three" in recorder.names)


async def test_an_owner_and_a_name(recorder: Recorder, folder: Path) -> None:
    made(folder / "Qwen" / "Qwen3-0.6B")
    await eventually(lambda: recorder.names == ["Qwen/Qwen3-0.6B"])


async def test_what_is_no_model_is_left_alone(recorder: Recorder, folder: Path) -> None:
    made(folder / ".hidden")
    (folder / "notes").mkdir()
    (folder / "notes" / "readme.txt").write_text("hello")
    await quiet()
    assert recorder.names == [] and recorder.unsettled == ()


async def test_a_link_is_handed_on_for_the_conversion_to_refuse(
    recorder: Recorder, folder: Path, tmp_path: Path
) -> None:
    """Ignoring it would leave its owner wondering; flashd/checkpoint/source.py says what to do instead."""
    (folder / "linked").symlink_to(made(tmp_path / "outside"))
    await eventually(lambda: recorder.names == ["linked"])
    with pytest.raises(InvalidSource, match="symbolic link"):
        SourceFiles.from_path(folder / "linked")


async def test_what_an_earlier_run_handled_is_not_handed_on_again(folder: Path) -> None:
    first, second = Recorder(), Recorder()
    made(folder / "tune")
    for recorder in (first, second):
        second.known = {item.fingerprint for item in first.handed_on}
        inbox = Inbox([folder], recorder, settle_s=SETTLE_S, rescan_s=30)
        inbox.start()
        if recorder is first:
            await eventually(lambda: first.names == ["tune"])
        else:
            await quiet()
        await inbox.close()
    assert second.names == []


async def test_a_thousand_entries_are_looked_at_quickly(folder: Path) -> None:
    for number in range(300):
        made(folder / f"m{number}")
    recorder = Recorder()
    inbox = Inbox([folder], recorder, settle_s=SETTLE_S, rescan_s=30)
    inbox.start()
    await eventually(lambda: len(recorder.names) == 300, 20)
    await inbox.close()
