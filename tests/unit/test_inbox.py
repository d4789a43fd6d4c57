# SPDX-License-Identifier: Apache-2.0
"""Every source that arrives in the models folder, in whatever way, is passed on once and complete."""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import subprocess
import threading
import unicodedata
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import silent_files
from silent_files import SilentFiles
from sources import entry, forge
from waiting import PATIENCE_S, eventually
from watchdog.observers.api import BaseObserver

from flashd.checkpoint.source.reader import SourceFiles
from flashd.errors import InvalidSource
from flashd.store import inbox as inboxes
from flashd.store.folder_watch import Changes
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
        self.displaced_items: list[Item] = []

    def is_known(self, item: Item) -> bool:
        return item.fingerprint in self.known

    async def settled(self, item: Item) -> None:
        self.handed_on.append(item)

    async def removed(self, item: Item) -> None:
        self.gone.append(item)

    def displaced(self, item: Item) -> None:
        self.displaced_items.append(item)

    def waiting(self, items: Sequence[Item]) -> None:
        self.unsettled = items

    def shown(self) -> dict[str, tuple[str, str]]:
        return {item.name: (item.state.value, item.detail) for item in self.unsettled}

    @property
    def names(self) -> list[str]:
        return [item.name for item in self.handed_on]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "models"


@pytest.fixture(autouse=True)
def _watches_end() -> Iterator[None]:
    """Waits until watches that were closed are gone, which an inbox does not: other tests count descriptors."""
    yield
    for thread in threading.enumerate():
        if thread.name == "end of a watch":
            thread.join(PATIENCE_S)
            assert not thread.is_alive()


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


async def test_a_folder_that_vanishes_is_missing_until_it_is_made_again(folder: Path) -> None:
    inbox = Inbox([folder], Recorder(), settle_s=SETTLE_S, rescan_s=30)
    inbox.start()
    await eventually(folder.exists)
    assert not inbox.missing()
    folder.rmdir()
    await eventually(lambda: inbox.missing() == {folder: "it does not exist"})
    await quiet()
    assert not folder.exists(), "its disk may have been unmounted"
    folder.touch()  # as by: cp model.safetensors ~/models
    await eventually(lambda: inbox.missing() == {folder: "it is not a folder"})
    folder.unlink()
    folder.mkdir()
    await eventually(lambda: not inbox.missing())
    await inbox.close()


async def test_entries_that_are_no_sources_are_named_with_the_reason(folder: Path, tmp_path: Path) -> None:
    made(folder / "tune")
    made(folder / "owner" / "tune")
    made(folder / ".hidden")
    for name in ("empty", "notes/more"):
        (folder / name).mkdir(parents=True)
    for name in ("todo.txt", "config.json", "model.safetensors.index.json", "other.safetensors.part"):
        (folder / name).touch()
    (folder / "nowhere").symlink_to(tmp_path / "nothing")
    inbox = Inbox([folder], Recorder(), settle_s=SETTLE_S, rescan_s=30)
    inbox.start()
    await eventually(inbox.strays)
    assert {stray.path.name: stray.why for stray in inbox.strays()} == {
        "empty": "an empty folder",
        "notes": "a folder without weights",
        "todo.txt": "not a file of weights",
        "config.json": "a file that belongs into the folder of its model",
        "model.safetensors.index.json": "a file that belongs into the folder of its model",
        "other.safetensors.part": "a download that has not finished",
        "nowhere": "a link that leads nowhere",
    }
    shutil.rmtree(folder)
    await eventually(lambda: not inbox.strays())
    await inbox.close()


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.pt"])
async def test_a_file_named_as_in_every_model_is_refused_in_words(recorder: Recorder, folder: Path, name: str) -> None:
    forge(folder / name, HEADER, b"data")
    forge(folder / "tune.safetensors", HEADER, b"data")
    await eventually(lambda: recorder.names == ["tune"])
    ((shown, (state, detail)),) = recorder.shown().items()
    assert (shown, state) == (name, "failed") and "many models" in detail and "into a folder" in detail


ENDS: dict[str, Callable[[BaseObserver], None]] = {
    "the observer": lambda observer: observer.stop(),
    "its emitter": lambda observer: next(emitter.stop() for emitter in observer.emitters),
    "what reads the events": lambda observer: observer._inotify_fd.stop(),  # type: ignore[attr-defined]
    "its watches": lambda observer: observer.unschedule_all(),
}


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
async def test_a_watch_that_has_ended_is_made_anew(folder: Path, end: Callable[[BaseObserver], None]) -> None:
    recorder = Recorder()
    inbox = Inbox([folder], recorder, settle_s=SETTLE_S, rescan_s=3600)
    inbox.start()
    made(folder / "one")
    await eventually(lambda: recorder.names == ["one"])
    assert inbox._changes is not None
    watches = inbox._changes._watches
    ended = watches[folder].observer
    await asyncio.to_thread(end, ended)
    inbox.look()
    await eventually(lambda: folder in watches and watches[folder].observer is not ended)
    made(folder / "owner" / "two")
    await eventually(lambda: "owner/two" in recorder.names)
    assert [(each.how, each.why_not) for each in inbox.watched()] == [("events", "")]
    await inbox.close()
    assert not watches


async def test_a_look_for_room_while_the_watches_end_is_no_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`close` stops observers in threads of their own, so it may come between the two steps of the look."""
    folder.mkdir()
    changes = Changes(lambda: None)
    changes.watch(folder)
    watch = changes._watches[folder]
    schedule = watch.observer.schedule

    def ended_meanwhile(*arguments: Any, **options: Any) -> Any:
        scheduled = schedule(*arguments, **options)
        watch.observer.unschedule_all()
        return scheduled

    monkeypatch.setattr(watch.observer, "schedule", ended_meanwhile)
    watch.check_room()
    changes.close()


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
    """Ignoring it would leave its owner wondering; flashd/checkpoint/source/reader.py says what to do instead."""
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
    await eventually(lambda: len(recorder.names) == 300)
    await inbox.close()


APPLE_DOUBLE = bytes.fromhex("0005160700020000") + b"Mac OS X        " + bytes(4072)


@pytest.mark.parametrize(
    "name",
    ["._model.safetensors", ".model.bin.icloud", ".hidden.gguf", "._checkpoint_0_0.distcp", ".x.safetensors.part"],
)
async def test_a_hidden_file_is_nobodys_weights(recorder: Recorder, folder: Path, name: str) -> None:
    target = made(folder / "tune")
    (target / name).write_bytes(APPLE_DOUBLE)
    (folder / name).write_bytes(APPLE_DOUBLE)
    (folder / "empty").mkdir()
    (folder / "empty" / name).write_bytes(APPLE_DOUBLE)
    await eventually(lambda: recorder.names == ["tune"])
    assert recorder.unsettled == []
    with SourceFiles.from_path(target) as files:
        assert list(files) == ["model.safetensors"]


@pytest.mark.parametrize("name", ["__MACOSX", "lost+found", "@eaDir", "$RECYCLE.BIN", "System Volume Information"])
async def test_folders_that_systems_leave_hold_no_models(recorder: Recorder, folder: Path, name: str) -> None:
    made(folder / name / "x")
    made(folder / "owner" / name)
    made(folder / "owner" / "tune")
    await eventually(lambda: recorder.names == ["owner/tune"])


async def test_what_does_not_answer_holds_up_nothing_else(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(inboxes, "_PATIENCE_S", 0.5)
    made(folder / "before")
    weights = (folder / "before" / "model.safetensors").read_bytes()
    recorder = Recorder()
    with SilentFiles(folder / "remote", {"model.safetensors": weights}) as remote:
        inbox = Inbox([folder, tmp_path / "other"], recorder, settle_s=SETTLE_S, rescan_s=0.5)
        inbox.start()
        await eventually(lambda: sorted(recorder.names) == ["before", "remote"])
        for silent in (silent_files.GETATTR, silent_files.OPENDIR, silent_files.READDIR):
            remote.silent = {silent}
            await eventually(remote.waits.is_set)
            for parent in (folder, tmp_path / "other"):
                made(parent / f"{parent.name}-{silent}")
            wanted = {f"models-{silent}", f"other-{silent}"}
            await eventually(lambda wanted=wanted: wanted <= set(recorder.names))
            remote.answer()
        assert recorder.gone == [], "what does not answer is not taken for removed"
        await eventually(lambda: not inbox._stuck and not inbox._arming)
        await inbox.close()
    assert recorder.names.count("remote") == 1
    assert "remote is skipped for now: its file system does not answer" in caplog.text


async def test_what_never_answered_is_shown_and_becomes_a_model_once_it_does(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inboxes, "_PATIENCE_S", 0.5)
    weights = (made(tmp_path / "elsewhere") / "model.safetensors").read_bytes()
    made(folder / "local")
    recorder = Recorder()
    with SilentFiles(folder / "remote", {"model.safetensors": weights}) as remote:
        remote.silent = {silent_files.OPENDIR, silent_files.GETATTR}
        inbox = Inbox([folder], recorder, settle_s=SETTLE_S, rescan_s=0.5)
        inbox.start()
        await eventually(lambda: recorder.names == ["local"])
        await eventually(lambda: [item.name for item in recorder.unsettled] == ["remote"])
        assert "does not answer" in recorder.unsettled[0].detail
        remote.answer()
        await eventually(lambda: recorder.names == ["local", "remote"])
        remote.silent = {silent_files.GETATTR}
        await eventually(remote.waits.is_set)
        await inbox.close()  # must not wait


async def test_what_no_engine_reads_is_handed_on_to_be_refused_in_words(recorder: Recorder, folder: Path) -> None:
    """Nothing that was dropped is passed over in silence, and no part of a pipeline is taken for a model."""
    pipeline = folder / "pipeline"
    for part in ("unet", "vae"):
        made(pipeline / part)
    (pipeline / "model_index.json").write_text("{}")
    (folder / "models--Qwen--Qwen3-8B" / "snapshots").mkdir(parents=True)
    (folder / "models--Qwen--Qwen3-8B" / "blobs").mkdir()
    (folder / "whisper.onnx").write_bytes(b"x")
    for path in (folder / "flax" / "flax_model.msgpack", folder / "owner" / "keras" / "tf_model.h5"):
        path.parent.mkdir(parents=True)
        path.write_bytes(b"x")
    (folder / "bare").mkdir()
    (folder / "bare" / "config.json").write_text("{}")
    made(folder / "owner" / "model")
    expected = {"pipeline", "models--Qwen--Qwen3-8B", "whisper", "flax", "owner/keras", "bare", "owner/model"}
    await eventually(lambda: set(recorder.names) >= expected)
    await quiet()
    assert sorted(recorder.names) == sorted(expected)


SERIES = {
    "transformers": ("model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors"),
    "pytorch": ("pytorch_model-00001-of-00003.bin", "pytorch_model-00003-of-00003.bin"),
    "underscores": ("model_1_of_3.safetensors", "model_3_of_3.safetensors"),
    "from zero": ("weights.00-of-03.safetensors", "weights.02-of-03.safetensors"),
    "tight": ("part1of3.safetensors", "part2of3.safetensors"),
    "with an ending of its own": ("model-00001-of-00003.fp16.safetensors", "model-00002-of-00003.fp16.safetensors"),
    "Mistral": ("consolidated-00001-of-00003.safetensors", "consolidated-00002-of-00003.safetensors"),
    "Meta": ("consolidated.00.pth", "consolidated.02.pth"),
    "torchtune": ("hf_model_0001_0.pt", "hf_model_0003_0.pt"),
}
MISSING = [
    "model-00003-of-00003.safetensors", "pytorch_model-00002-of-00003.bin", "model_2_of_3.safetensors",
    "weights.01-of-03.safetensors", "part3of3.safetensors", "model-00003-of-00003.fp16.safetensors",
    "consolidated-00003-of-00003.safetensors", "consolidated.01.pth", "hf_model_0002_0.pt",
]  # fmt: skip


@pytest.mark.parametrize(("there", "missing"), list(zip(SERIES.values(), MISSING, strict=True)), ids=SERIES)
async def test_shards_by_any_numbering_wait_for_those_that_are_missing(
    recorder: Recorder, folder: Path, there: tuple[str, ...], missing: str
) -> None:
    (folder / "tune").mkdir()
    for name in there:
        forge(folder / "tune" / name, HEADER, b"data")
    await eventually(
        lambda: recorder.shown().get("tune") == ("incomplete", f"1 files are missing, the first is {missing}")
    )
    forge(folder / "tune" / missing, HEADER, b"data")
    await eventually(lambda: recorder.names == ["tune"])


async def test_one_shard_alone_is_no_model(recorder: Recorder, folder: Path) -> None:
    forge(folder / "model-00001-of-00002.safetensors", HEADER, b"data")
    await eventually(lambda: "model-00001-of-00002.safetensors" in recorder.shown())
    assert recorder.unsettled[0].state == "failed" and "one folder" in recorder.unsettled[0].detail
    assert recorder.names == []


@pytest.mark.parametrize(
    ("where", "twin"),
    [("", "x.safetensors.part"), ("", "x.safetensors.aria2"), ("", "x.safetensors.!qB"), ("", "x.part"),
     ("", "x.k3JdQ-_a.safetensors.part"), ("", "x.safetensors.PART"), ("", "x.safetensors.crdownload"),
     ("x", "x.safetensors.part")],
)  # fmt: skip
async def test_a_file_beside_its_unfinished_twin_waits(recorder: Recorder, folder: Path, twin: str, where: str) -> None:
    place = folder / where
    place.mkdir(exist_ok=True)
    forge(place / "other.safetensors", HEADER, b"data")
    (place / twin).write_bytes(b"da")
    (place / "x.safetensors").write_bytes(b"")
    await eventually(lambda: recorder.shown().get("x", ("", ""))[0] == "incomplete")
    if not where:
        await eventually(lambda: recorder.names == ["other"])
    assert "is still being downloaded" in recorder.shown()["x"][1]
    forge(place / "x.safetensors", HEADER, b"data")
    (place / twin).unlink()
    await eventually(lambda: "x" in recorder.names)


async def test_a_folder_that_safari_downloads_into_is_waited_for(recorder: Recorder, folder: Path) -> None:
    made(folder / "tune")
    (folder / "tune" / "tokenizer.json.download").mkdir()
    (folder / "tune" / "runs.tmp").mkdir()
    await eventually(
        lambda: recorder.shown() == {"tune": ("incomplete", "tokenizer.json.download is still being downloaded")}
    )
    (folder / "tune" / "tokenizer.json.download").rmdir()
    await eventually(lambda: recorder.names == ["tune"])


NFC, NFD = unicodedata.normalize("NFC", "caf\u00e9"), unicodedata.normalize("NFD", "caf\u00e9")
# Two items, the winner first, and their common name.
RIVALS = {
    "a folder and a file": (["same", "same.safetensors"], "same"),
    "two kinds of file": (["same.bin", "same.safetensors"], "same"),
    "two spellings of Unicode": ([NFD, NFC], NFC),
    "a trailing blank": (["same", "same "], "same"),
    "a training": (["same/checkpoint-10", "same.safetensors"], "same"),
}


def dropped(path: Path, data: bytes) -> None:
    if path.suffix:
        path.parent.mkdir(exist_ok=True)
        forge(path, HEADER, data)
    else:
        made(path, data)


def deleted(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


@pytest.mark.parametrize(("places", "name"), RIVALS.values(), ids=RIVALS)
async def test_of_two_sources_of_one_name_the_disk_says_which_is_used(
    folder: Path, places: list[str], name: str
) -> None:
    winner, loser = folder / places[0], folder / places[1]
    loser.parent.mkdir(parents=True, exist_ok=True)
    for first in (winner, loser):  # in any order of arrival, and at every start
        recorder = Recorder()
        inbox = Inbox([folder], recorder, settle_s=SETTLE_S, rescan_s=30)
        if first is loser:
            deleted(winner)
            deleted(loser)
        dropped(first, b"1234")
        inbox.start()
        try:
            await eventually(lambda recorder=recorder, first=first: [i.path for i in recorder.handed_on] == [first])
            dropped(loser if first is winner else winner, b"5678")
            await eventually(lambda recorder=recorder: recorder.handed_on[-1].path == winner)
            await eventually(lambda recorder=recorder: "unused" in dict(recorder.shown().values()))
            (row,) = recorder.unsettled
            assert row.path == loser and str(winner.relative_to(folder)).split("/checkpoint")[0] in row.detail
            assert name in row.detail and "rename one of the two" in row.detail
            deleted(winner)
            await eventually(lambda recorder=recorder: recorder.handed_on[-1].path == loser)
            assert set(recorder.names) == {name} and recorder.gone == [] and not recorder.unsettled
            handed_on = 2 if first is winner else 3
            assert len(recorder.handed_on) == handed_on
            dropped(winner, b"1234")
            await eventually(lambda recorder=recorder: recorder.handed_on[-1].path == winner)
            assert recorder.displaced_items[-1].path == loser
        finally:
            await inbox.close()


async def test_names_that_differ_in_case_are_two_models(recorder: Recorder, folder: Path) -> None:
    made(folder / "Tune")
    made(folder / "tune")
    await eventually(lambda: sorted(recorder.names) == ["Tune", "tune"])


BAD_NAMES = {
    r"mod\xe8le": b"mod\xe8le", r"new\nline": b"new\nline", r"esc\x1b[31m": b"esc\x1b[31m", "-dash": b"-dash",
    r"bidi\u202e": "bidi\u202e".encode(), "owner /x": b"owner /x",
}  # fmt: skip


async def test_a_name_that_no_model_may_have_is_refused_in_words(recorder: Recorder, folder: Path) -> None:
    for raw in BAD_NAMES.values():
        made(folder / os.fsdecode(raw))
    made(folder / "good")
    shown = set(BAD_NAMES)
    await eventually(lambda: recorder.names == ["good"] and set(recorder.shown()) == shown)
    assert all(state == "failed" and "\nrename it: " in detail for state, detail in recorder.shown().values())
    for raw in BAD_NAMES.values():
        shutil.rmtree(folder / os.fsdecode(raw.split(b"/")[0]))
    await eventually(lambda: not recorder.shown())
    assert recorder.gone == []


async def test_any_bytes_may_be_a_name(folder: Path) -> None:
    """Whatever lies there, nothing raises, everything shown can be sent, and what has a good name becomes a model."""
    random.seed(17)
    alphabet = [
        b"a",
        b".",
        b" ",
        b"-",
        b"\xff",
        b"\xc3\xa9",
        b"e\xcc\x81",
        b"\n",
        b"\x1b",
        b"\xe2\x80\xae",
        b"\\",
        b"[",
    ]
    for number in range(300):
        raw = b"".join(random.choices(alphabet, k=random.randrange(1, 12))) + str(number).encode()
        ending = random.choice([b"", b".safetensors", b".part", b"/x", b"/_1_of_2.bin"])
        target = folder / os.fsdecode(raw + ending)
        if target.suffix in {".safetensors", ".part", ".bin"}:
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(b"x")
        else:
            target.mkdir(parents=True)
            (target / os.fsdecode(raw + b".safetensors")).write_bytes(b"x")
    made(folder / "good")
    recorder = Recorder()
    inbox = Inbox([folder], recorder, settle_s=SETTLE_S, rescan_s=30)
    inbox.start()
    await eventually(lambda: "good" in recorder.names and len(recorder.unsettled) > 10)
    await inbox.close()
    for item in [*recorder.handed_on, *recorder.unsettled]:
        item.name.encode()
        item.detail.encode()
        assert item.name.isprintable() and item.detail.replace("\n", "").isprintable()


async def test_a_folder_that_cannot_be_read_keeps_nothing_else_out(recorder: Recorder, folder: Path) -> None:
    broken = folder / "broken"
    broken.symlink_to(broken)
    (folder / "owner").mkdir()
    (folder / "owner" / "loop.safetensors").symlink_to(folder / "owner" / "loop.safetensors")
    made(folder / "tune")
    await eventually(lambda: "tune" in recorder.names)


async def test_a_folder_exchanged_for_a_link_is_not_followed(recorder: Recorder, folder: Path, tmp_path: Path) -> None:
    """Neither itself nor one above it: whoever may drop could have others' models read with the daemon's rights."""
    secret = made(tmp_path / "others" / "tune", b"mine").parent
    made(folder / "tune")
    made(folder / "owner" / "tune")
    await eventually(lambda: sorted(recorder.names) == ["owner/tune", "tune"])
    for item in recorder.handed_on:
        with item.open() as files:
            assert list(files) == ["model.safetensors"]
    for place, target in (("tune", secret / "tune"), ("owner", secret)):
        (folder / place).rename(tmp_path / f"was-{place}")
        (folder / place).symlink_to(target)
    for item in recorder.handed_on:
        with pytest.raises(InvalidSource, match="symbolic link"):
            item.open()


async def test_a_defect_in_one_look_is_not_the_end_of_all(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failures = [RuntimeError("can't start new thread")]
    make = inboxes.Look

    def failing_at_first(*arguments: Any) -> Any:
        if failures:
            raise failures.pop()
        return make(*arguments)

    monkeypatch.setattr(inboxes, "Look", failing_at_first)
    made(folder / "ada")
    recorder = Recorder()
    inbox = Inbox([folder], recorder, settle_s=SETTLE_S, rescan_s=SETTLE_S)
    inbox.start()
    try:
        await eventually(lambda: recorder.names == ["ada"])
    finally:
        await inbox.close()
    assert not failures and "bug" in caplog.text
