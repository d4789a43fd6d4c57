# SPDX-License-Identifier: Apache-2.0
"""The store: names, versions, sharing, and the old state or the new one whatever happens."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from sources import entry, forge
from waiting import PATIENCE_S

from flashd import durable
from flashd.checkpoint.convert import convert
from flashd.checkpoint.files import WEIGHTS, verify
from flashd.checkpoint.source.reader import SourceFiles
from flashd.durable import discard, read_bytes, write_new
from flashd.errors import AlreadyExists, Busy, CorruptCheckpoint, InvalidArgument, NotFound, StoreFull, TransferFailed
from flashd.store import catalog as catalog_module
from flashd.store import names
from flashd.store.catalog import Catalog, Model, Origin, versions_to_keep
from flashd.units import MiB

ORIGIN = Origin("import", "a test")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Catalog]:
    with Catalog(tmp_path / "store") as catalog:
        yield catalog


def source(folder: Path, seed: int, **files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    weights = {"w": np.random.default_rng(seed).standard_normal((64, 64), np.float32)}
    safetensors.numpy.save_file(weights, folder / "model.safetensors")
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(content)
    return folder


def add(catalog: Catalog, name: str, path: Path, **options: object) -> Model:
    with SourceFiles.from_path(path) as files, catalog.draft(MiB) as draft:
        manifest = convert(files, draft.directory, python=sys.executable)
        return draft.publish(name, manifest, ORIGIN, **options)  # type: ignore[arg-type]


def test_a_published_model_is_there_after_a_restart(tmp_path: Path) -> None:
    with Catalog(tmp_path / "store") as catalog:
        model = add(catalog, "Qwen/Qwen3-0.6B", source(tmp_path / "s", 1), aliases=("tiny",))
        catalog.set_pinned(model.name, True)
        catalog.touch(model.name, swapped=True)
        before = catalog.models()
    with Catalog(tmp_path / "store") as catalog:
        assert catalog.models() == before
        assert (before[0].pinned, before[0].use_count, before[0].aliases) == (True, 1, ("tiny",))
        verify(catalog.checkpoint(before[0].checkpoint_id))


def test_names_are_found_as_people_write_them(store: Catalog, tmp_path: Path) -> None:
    for number, name in enumerate(("Qwen/Qwen3-0.6B", "other/qwen3-0.6b", "My Model (v2)")):
        add(store, name, source(tmp_path / str(number), number))
    store.set_aliases("My Model (v2)", ["mine"])
    assert store.resolve("mine").name == store.resolve("my model (V2)").name == "My Model (v2)"
    assert store.resolve("qwen/qwen3-0.6B").name == "Qwen/Qwen3-0.6B"
    with pytest.raises(InvalidArgument) as several:
        store.resolve("qwen3-0.6b")
    assert "Qwen/Qwen3-0.6B, other/qwen3-0.6b" in several.value.hint
    with pytest.raises(NotFound) as missing:
        store.resolve("my model v2")
    assert "My Model (v2)" in missing.value.hint


def test_an_alias_can_mean_one_thing_only(store: Catalog, tmp_path: Path) -> None:
    add(store, "a", source(tmp_path / "a", 1))
    add(store, "b", source(tmp_path / "b", 2))
    store.set_aliases("a", ["x"])
    for taken in (["x"], ["a"]):
        with pytest.raises(AlreadyExists):
            store.set_aliases("b", taken)
    with pytest.raises(AlreadyExists):
        add(store, "x", source(tmp_path / "c", 3))
    with pytest.raises(AlreadyExists):
        add(store, "a", source(tmp_path / "d", 4), replace=False)
    with pytest.raises(AlreadyExists, match="'x' already means 'a'"):
        add(store, "new", source(tmp_path / "e", 5), aliases=("x",))
    assert store.get("new") is None, "refused before anything became visible"


def test_a_collection_leaves_a_record_that_is_being_written(
    store: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(store, "a", source(tmp_path / "a", 1))
    (store.root / "partial" / "leftover").mkdir()
    written, failures = threading.Event(), []

    def slowly(path: Path, content: bytes) -> None:
        write_new(path, content)
        written.set()
        time.sleep(0.2)  # the collection waits for the rename

    def change() -> None:
        try:
            store.set_aliases("a", ["x"])
        except TransferFailed as error:
            failures.append(error)

    def remove(path: Path) -> bool:
        changing.start()
        assert written.wait(PATIENCE_S)
        return discard(path)

    changing = threading.Thread(target=change)
    monkeypatch.setattr(durable, "write_new", slowly)
    monkeypatch.setattr(catalog_module, "discard", remove)
    store.collect(())
    changing.join()
    assert not failures
    assert store.resolve("x").name == "a"


def test_the_same_bytes_are_stored_once(store: Catalog, tmp_path: Path) -> None:
    one = add(store, "one", source(tmp_path / "1", 1))
    size_bytes = store.size_bytes()
    two = add(store, "two", source(tmp_path / "2", 1))
    assert one.checkpoint_id == two.checkpoint_id
    assert abs(store.size_bytes() - size_bytes) < 100, "but for when the manifest was written"
    templated = add(store, "three", source(tmp_path / "3", 1, chat_template__jinja="hello"))
    assert templated.checkpoint_id != one.checkpoint_id
    inodes = {store.checkpoint(m.checkpoint_id).weights_path.stat().st_ino for m in (one, templated)}
    assert len(inodes) == 1, "equal weights with other side files are hard links"
    assert store.size_bytes() < size_bytes + 10_000
    store.remove("one"), store.remove("two")
    store.collect(())
    verify(store.checkpoint(templated.checkpoint_id))


def test_converting_again_mends_what_the_disk_has_spoiled(store: Catalog, tmp_path: Path) -> None:
    """Also where equal weights are shared with a checkpoint of other side files."""
    add(store, "a", source(tmp_path / "a", 1))
    twin = add(store, "b", source(tmp_path / "b", 1, chat_template__jinja="hello"))
    size_bytes = store.size_bytes()
    spoiled = store.checkpoint(twin.checkpoint_id)
    with spoiled.weights_path.open("r+b") as file:
        file.seek(spoiled.manifest.data_offset)
        file.write(b"rotten")
    spoiled.side_files()["chat_template.jinja"].write_text("jello")
    for model in store.models():
        with pytest.raises(CorruptCheckpoint):
            verify(store.checkpoint(model.checkpoint_id))
    add(store, "b", tmp_path / "b")
    for model in store.models():
        verify(store.checkpoint(model.checkpoint_id))
    assert abs(store.size_bytes() - size_bytes) < 100


def test_shared_weights_are_freed_with_the_last_who_uses_them(store: Catalog, tmp_path: Path) -> None:
    add(store, "a", source(tmp_path / "a", 1))
    add(store, "b", source(tmp_path / "b", 1, chat_template__jinja="hello"))
    weights_bytes = 64 * 64 * 4
    store.remove("a")
    assert store.collect(()).freed_bytes < weights_bytes < store.size_bytes()
    store.remove("b")
    assert store.collect(()).freed_bytes > weights_bytes
    assert store.size_bytes() == 0


def test_without_hard_links_each_keeps_its_own_copy(
    store: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise PermissionError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", refused)
    models = [
        add(store, "a", source(tmp_path / "a", 1)),
        add(store, "b", source(tmp_path / "b", 1, chat_template__jinja="hello")),
    ]
    assert len({store.checkpoint(m.checkpoint_id).weights_path.stat().st_ino for m in models}) == 2
    assert store.size_bytes() > 2 * 64 * 64 * 4


def test_reading_never_waits_for_the_disk(store: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An fsync beside a conversion may take seconds; the daemon's loop lists models meanwhile."""
    model = add(store, "a", source(tmp_path / "a", 1))
    in_fsync, may_go_on, fsync = threading.Event(), threading.Event(), os.fsync

    def slow_fsync(fd: int) -> None:
        in_fsync.set()
        assert may_go_on.wait(PATIENCE_S)
        fsync(fd)

    monkeypatch.setattr(os, "fsync", slow_fsync)
    writer = threading.Thread(target=store.set_pinned, args=("a", True))
    writer.start()
    assert in_fsync.wait(PATIENCE_S)
    started = time.monotonic()
    assert store.models() == [model] == [store.resolve("A")]
    assert (
        store.size_bytes() > 0 and store.free_bytes() > 0 and store.check_free("b", replace=False, owner_uid=0) == "b"
    )
    assert time.monotonic() - started < 30, "it waited for the disk"
    may_go_on.set()
    writer.join()
    assert store.models()[0].pinned


def test_a_saved_again_fine_tune_is_a_new_version_and_the_old_one_stays_while_used(
    store: Catalog, tmp_path: Path
) -> None:
    ids = [add(store, "tune", source(tmp_path / "s", seed)).checkpoint_id for seed in range(4)]
    model = store.get("tune")
    assert model is not None and model.checkpoint_id == ids[3] and model.previous == (ids[2], ids[1], ids[0])
    collected = store.collect({ids[0]})
    assert collected.checkpoint_ids == (ids[1],) and collected.freed_bytes > 0
    verify(store.checkpoint(ids[0]))
    assert set(store.collect(()).checkpoint_ids) == {ids[0]}


def test_removal_waits_for_whoever_uses_it(store: Catalog, tmp_path: Path) -> None:
    model = add(store, "a", source(tmp_path / "a", 1))
    store.remove("a")
    assert store.collect({model.checkpoint_id}).checkpoint_ids == ()
    assert store.checkpoint(model.checkpoint_id).weights_path.exists()
    assert store.collect(()).checkpoint_ids == (model.checkpoint_id,)
    with pytest.raises(NotFound):
        store.remove("a")


def test_one_daemon_a_store(store: Catalog) -> None:
    with pytest.raises(Busy):
        Catalog(store.root)


def test_the_quota_is_asked_before_anything_is_written(tmp_path: Path) -> None:
    with Catalog(tmp_path / "store", quota_bytes=100_000) as catalog:
        add_small = 20_000
        with pytest.raises(StoreFull, match="quota") as caught, catalog.draft(200_000):
            pytest.fail("a draft was given")
        assert "flash rm" in caught.value.hint
        with (
            catalog.draft(add_small),
            catalog.draft(add_small),
            pytest.raises(StoreFull),
            catalog.draft(80_000),
        ):
            pytest.fail("drafts under way were not counted")
        assert list((catalog.root / "partial").iterdir()) == []


def test_a_disk_that_fills_up_leaves_everything_as_it_was(store: Catalog, tmp_path: Path) -> None:
    """A real small file system where we may mount one, else the kernel's limit on the size of files."""
    add(store, "old", source(tmp_path / "s", 1))
    big = forge(tmp_path / "big.safetensors", {"a": entry("U8", [64 * MiB], 0, 64 * MiB)}, bytes(64 * MiB))
    code = (
        "import sys, resource, pathlib, signal\n"
        "from flashd.checkpoint.convert import convert\n"
        "from flashd.checkpoint.source.reader import SourceFiles\n"
        "from flashd.errors import StoreFull\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (16 << 20, 16 << 20))\n"
        "out = pathlib.Path(sys.argv[2]); out.mkdir()\n"
        "try:\n"
        "    with SourceFiles.from_path(pathlib.Path(sys.argv[1])) as files:\n"
        "        convert(files, out, python=sys.executable)\n"
        "except StoreFull as error:\n"
        "    print('full', error.hint)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, big, tmp_path / "out"], capture_output=True, text=True, check=False
    )
    assert done.stdout.startswith("full free some space"), done.stderr
    assert [m.name for m in store.models()] == ["old"]


@contextlib.contextmanager
def small_file_system(mount: Path, options: str) -> Iterator[Path]:
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", mount], check=True)
    try:
        yield mount
    finally:
        subprocess.run(["umount", mount], check=True)


def fill(path: Path) -> None:
    """Writes until the disk refuses."""
    with pytest.raises(OSError) as caught, path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    assert caught.value.errno == errno.ENOSPC


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small file system")


@needs_root
def test_a_full_file_system(tmp_path: Path) -> None:
    with small_file_system(tmp_path / "small", "size=80m") as mount, Catalog(mount / "store") as catalog:
        add(catalog, "old", source(tmp_path / "s", 1))
        before = catalog.models()
        big = forge(tmp_path / "big.safetensors", {"a": entry("U8", [96 * MiB], 0, 96 * MiB)}, bytes(96 * MiB))
        with pytest.raises(StoreFull), SourceFiles.from_path(big) as files, catalog.draft(1) as draft:
            convert(files, draft.directory, python=sys.executable)
        assert catalog.models() == before and list((catalog.root / "partial").iterdir()) == []
        verify(catalog.checkpoint(before[0].checkpoint_id))


@needs_root
def test_on_a_full_disk_nothing_changes_but_removal_works(tmp_path: Path) -> None:
    with small_file_system(tmp_path / "small", "size=80m") as mount:
        with Catalog(mount / "store", keep_versions=0) as catalog:
            for seed in (1, 2):
                tune = add(catalog, "tune", source(tmp_path / "s", seed))
            other = add(catalog, "other", source(tmp_path / "o", 3))
            fill(mount / "filler")
            for change in (
                lambda: catalog.set_pinned("tune", True),
                lambda: catalog.touch("tune"),
                lambda: catalog.set_aliases("tune", ["x"]),
            ):
                with pytest.raises(StoreFull):
                    change()
                assert catalog.models() == [other, tune]
            assert [len(catalog.collect(()).checkpoint_ids) for _ in range(2)] == [1, 0], "the version not kept"
            catalog.remove("other")
            assert catalog.collect(()).checkpoint_ids == (other.checkpoint_id,)
            expected = catalog.models()
            assert [model.previous for model in expected] == [()]
        with Catalog(mount / "store") as catalog:
            assert catalog.models() == expected
            verify(catalog.checkpoint(tune.checkpoint_id))


@needs_root
def test_no_inode_left(tmp_path: Path) -> None:
    with small_file_system(tmp_path / "small", "size=80m,nr_inodes=40") as mount, Catalog(mount / "store") as catalog:
        old = add(catalog, "old", source(tmp_path / "s", 1))
        second = source(tmp_path / "t", 2)
        for number in itertools.count():
            try:
                (mount / f"filler-{number}").touch()
            except OSError:
                break
        for inodes_free in range(12):  # the refusal comes ever later: folder, weights, digests, manifest, record
            if inodes_free:
                (mount / f"filler-{inodes_free - 1}").unlink()
            try:
                new = add(catalog, "new", second)
            except StoreFull:
                assert catalog.models() == [old] and list((catalog.root / "partial").iterdir()) == []
            else:
                break
        else:
            pytest.fail("it never succeeded")
        assert inodes_free > 3
        assert catalog.models() == [new, old]


_VICTIM = """
import sys, pathlib
from flashd.checkpoint.convert import convert
from flashd.checkpoint.source.reader import SourceFiles
from flashd.store.catalog import Catalog, Origin
print("ready", flush=True)
sys.stdin.readline()
with Catalog(pathlib.Path(sys.argv[1])) as catalog:
    for name, source in (("new", sys.argv[2]), ("tune", sys.argv[3])):
        with SourceFiles.from_path(pathlib.Path(source)) as files, catalog.draft(1 << 20) as draft:
            manifest = convert(files, draft.directory, python=sys.executable)
            draft.publish(name, manifest, Origin("import", source))
    catalog.remove("gone")
    catalog.collect(())
print("done", flush=True)
"""


@pytest.mark.timeout(300)
def test_killed_at_any_moment_the_store_is_the_old_one_or_the_new_one(tmp_path: Path) -> None:
    """kill -9 at 40 moments of adding a model, replacing another, and removing a third."""
    first, second, third = (source(tmp_path / name, seed) for seed, name in enumerate(("one", "two", "three")))
    large = forge(tmp_path / "large.safetensors", {"a": entry("U8", [32 * MiB], 0, 32 * MiB)}, bytes(32 * MiB))
    rng = random.Random(4)
    seen: set[tuple[bool, bool, bool]] = set()
    for attempt in range(40):
        root = tmp_path / f"store-{attempt}"
        with Catalog(root) as catalog:
            old = add(catalog, "tune", first).checkpoint_id
            add(catalog, "gone", third)
        child = subprocess.Popen(
            [sys.executable, "-c", _VICTIM, root, large, second], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        with child:
            assert child.stdin and child.stdout and child.stdout.readline() == b"ready\n"
            child.stdin.write(b"\n")
            child.stdin.flush()
            time.sleep(rng.uniform(0, 0.12))
            child.send_signal(signal.SIGKILL)
        with Catalog(root) as catalog:
            assert list((root / "partial").iterdir()) == []
            for model in catalog.models():
                verify(catalog.checkpoint(model.checkpoint_id))
            present = {model.name: model.checkpoint_id for model in catalog.models()}
            assert "tune" in present and set(present) <= {"new", "tune", "gone"}
            catalog.collect(())
            stored = {path.name for path in (root / "checkpoints").iterdir()}
            kept = {i for m in catalog.models() for i in (m.checkpoint_id, *m.previous)}
            assert stored == kept, "nothing unreachable is left"
        seen.add(("new" in present, present["tune"] != old, "gone" not in present))
    assert len(seen) >= 2, "the kills all came at the same moment: change the delays"


_DAMAGES: dict[str, Callable[[str], str]] = {
    "no TOML": lambda text: "not = [toml " + text,
    "cut off": lambda text: text[: text.index("created_at")],
    "of a later version": lambda text: "rating = 5\n" + text,
    "another type": lambda text: text.replace("pinned = false", 'pinned = "no"'),
    "a list of numbers": lambda text: text.replace("aliases = []", "aliases = [1]"),
    "another name": lambda text: text.replace('name = "bad"', 'name = "good"'),
    "no name": lambda text: text.replace('name = "bad"', 'name = "../bad"'),
    "no UTF-8": lambda text: text.replace("a test", "a t\udcffst"),
}


@pytest.mark.parametrize("damage", _DAMAGES.values(), ids=_DAMAGES.keys())
def test_a_damaged_record_costs_no_weights_and_no_other_model(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[str], str]
) -> None:
    with Catalog(tmp_path / "store") as catalog:
        good = add(catalog, "good", source(tmp_path / "g", 1))
        bad = add(catalog, "bad", source(tmp_path / "b", 2))
    record = tmp_path / "store/models/bad.toml"
    intact = record.read_text()
    assert damage(intact) != intact
    record.write_text(damage(intact), errors="surrogateescape")
    for _ in range(2):
        with Catalog(tmp_path / "store") as catalog:
            assert catalog.models() == [good]
            assert catalog.collect(()).checkpoint_ids == ()
            verify(catalog.checkpoint(bad.checkpoint_id))
    assert "bad.damaged" in caplog.text
    (tmp_path / "store/models/bad.damaged").rename(record).write_text(intact)
    with Catalog(tmp_path / "store") as catalog:
        assert catalog.models() == [bad, good]


def test_a_model_whose_checkpoint_is_gone_is_not_listed(tmp_path: Path) -> None:
    with Catalog(tmp_path / "store") as catalog:
        lost = add(catalog, "lost", source(tmp_path / "l", 1))
    shutil.rmtree(tmp_path / "store/checkpoints" / lost.checkpoint_id)
    with Catalog(tmp_path / "store") as catalog:
        assert catalog.models() == []
        assert add(catalog, "lost", tmp_path / "l").checkpoint_id == lost.checkpoint_id


def test_what_others_put_into_the_store_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "store/checkpoints/lost+found").mkdir(parents=True)
    (tmp_path / "store/checkpoints/notes").write_text("mine")
    with Catalog(tmp_path / "store") as catalog:
        add(catalog, "a", source(tmp_path / "a", 1))
        assert catalog.collect(()).checkpoint_ids == ()
    assert sorted(p.name for p in (tmp_path / "store/checkpoints").iterdir())[1:] == ["lost+found", "notes"]


def test_a_store_that_cannot_be_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(TransferFailed, match="file") as caught:
        Catalog(tmp_path / "file" / "store")
    assert "store.path" in caught.value.hint


def test_a_checkpoint_folder_is_not_writable_by_accident_of_names(store: Catalog, tmp_path: Path) -> None:
    for evil in ("../x", "a//b", "/etc", "a/../b", "-rf", "a\nb", "", "  ", "x" * 300, "a/ b"):
        with pytest.raises(InvalidArgument):
            add(store, evil, source(tmp_path / "s", 1))
    assert store.models() == []
    assert not (tmp_path / "x").exists()


@given(st.text(max_size=40), st.text(max_size=40))
def test_different_names_have_different_safe_files(one: str, other: str) -> None:
    files = []
    for text in (one, other):
        try:
            files.append((names.check_name(text), names.file_name(names.check_name(text))))
        except InvalidArgument:
            return
    assert (files[0][0] == files[1][0]) == (files[0][1] == files[1][1])
    for _, file in files:
        assert "/" not in file and not file.startswith(".") and len(file.encode()) <= 255


def test_retention_keeps_the_newest_and_the_used() -> None:
    assert versions_to_keep(["c", "b", "a"], 1, {"a"}) == ("c", "a")
    assert versions_to_keep(["c"], 0, ()) == ()


def test_weights_are_opened_under_their_own_name(store: Catalog, tmp_path: Path) -> None:
    model = add(store, "a", source(tmp_path / "s", 1))
    assert store.checkpoint(model.checkpoint_id).weights_path.name == WEIGHTS


def test_a_folder_in_place_of_a_file_of_state_leaves_no_descriptor_open(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ValueError, match="not a regular file"):
        read_bytes(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == before
