# SPDX-License-Identifier: Apache-2.0
"""The store on a disk that fails, confirms nothing, holds other data, or is missing.

`tests/campaigns/faults.py` and `damage.py` try everything; these are the cases they once found.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_catalog import add, needs_root, source

from flashd import durable
from flashd.checkpoint.files import MANIFEST, WEIGHTS, verify
from flashd.daemon.events import Events
from flashd.daemon.lifecycle.problems import Problems
from flashd.errors import CorruptCheckpoint, StoreFull, TransferFailed
from flashd.store.catalog import Catalog
from flashd.store.known_sources import KnownSources
from flashd.store.names import check_name, file_name
from flashd.store.records import Model, Origin


@pytest.fixture
def refuse_sync(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Has the sync of a folder fail, until it is called with another one."""
    refused: list[Path] = []
    fsync = os.fsync

    def failing(fd: int) -> None:
        if Path(os.readlink(f"/proc/self/fd/{fd}")) in refused:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", failing)

    def refuse(folder: Path) -> None:
        refused[:] = [folder]

    return refuse


def test_a_replace_that_the_disk_does_not_confirm_loses_no_model(
    tmp_path: Path, refuse_sync: Callable[[Path], None]
) -> None:
    """Memory had the old model and the disk the new one, whose checkpoint the next collection took."""
    root = tmp_path / "store"
    with Catalog(root, keep_versions=0) as catalog:
        old = add(catalog, "a", source(tmp_path / "old", 1))
        records = shutil.copytree(root / "models", tmp_path / "records")
        refuse_sync(root / "models")
        with pytest.raises(TransferFailed, match="did not confirm") as caught:
            add(catalog, "a", source(tmp_path / "new", 2))
        assert "repeat the change" in caught.value.hint
        assert catalog.collect(()).checkpoint_ids == (), "a power cut may bring the old record back"
        after = catalog.models()
        assert after[0].checkpoint_id != old.checkpoint_id
    shutil.copytree(root, tmp_path / "cut")
    with Catalog(root, keep_versions=0) as catalog:
        assert catalog.models() == after
        verify(catalog.checkpoint(after[0].checkpoint_id))
        assert catalog.collect(()).checkpoint_ids == (old.checkpoint_id,)
    shutil.rmtree(tmp_path / "cut" / "models")
    shutil.copytree(records, tmp_path / "cut" / "models")
    with Catalog(tmp_path / "cut", keep_versions=0) as catalog:
        assert catalog.models() == [old]
        verify(catalog.checkpoint(old.checkpoint_id))


def test_what_a_removal_left_is_kept_until_the_disk_confirms_it(
    tmp_path: Path, refuse_sync: Callable[[Path], None]
) -> None:
    with Catalog(tmp_path / "store") as catalog:
        model = add(catalog, "a", source(tmp_path / "a", 1))
        refuse_sync(tmp_path / "store/models")
        with pytest.raises(TransferFailed, match="did not confirm"):
            catalog.remove("a")
        assert catalog.models() == []
        assert catalog.collect(()).checkpoint_ids == ()
        refuse_sync(tmp_path / "nothing")
        assert catalog.collect(()).checkpoint_ids == (model.checkpoint_id,)


def test_a_checkpoint_that_no_record_came_to_name_counts_and_is_collected(
    tmp_path: Path, refuse_sync: Callable[[Path], None]
) -> None:
    with Catalog(tmp_path / "store") as catalog:
        refuse_sync(tmp_path / "store/checkpoints")
        with pytest.raises(TransferFailed):
            add(catalog, "a", source(tmp_path / "a", 1))
        assert catalog.models() == []
        assert catalog.size_bytes() == taken_bytes(tmp_path / "store/checkpoints") > 0
        refuse_sync(tmp_path / "nothing")
        assert len(catalog.collect(()).checkpoint_ids) == 1
        assert catalog.size_bytes() == 0


def test_what_cannot_be_removed_counts_until_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quota_bytes = 1 << 30
    with Catalog(tmp_path / "store", quota_bytes=quota_bytes) as catalog:
        with monkeypatch.context() as refusing, catalog.draft(1000) as draft:
            (draft.directory / "half").write_bytes(bytes(5000))
            refusing.setattr(shutil, "rmtree", lambda path, ignore_errors=False: None)
            refusing.setattr("flashd.store.catalog.discard", lambda path: False)
            draft_directory = draft.directory
            raised = pytest.raises(StoreFull)
            with raised, catalog.draft(quota_bytes):
                pass
        draft_directory.mkdir(exist_ok=True)
        (draft_directory / "half").write_bytes(bytes(5000))
        assert catalog.free_bytes() == quota_bytes - 5000
        assert catalog.collect(()).failure is None
        assert catalog.free_bytes() == quota_bytes
        assert list((tmp_path / "store/partial").iterdir()) == []


def test_a_checkpoint_that_cannot_be_taken_away_is_told_and_keeps_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Catalog(tmp_path / "store") as catalog:
        stays = add(catalog, "a", source(tmp_path / "a", 1)).checkpoint_id
        goes = add(catalog, "b", source(tmp_path / "b", 2)).checkpoint_id
        catalog.remove("a")
        catalog.remove("b")
        rename = Path.rename

        def refused(path: Path, target: Path) -> Path:
            if path.name == stays:
                raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return rename(path, target)

        monkeypatch.setattr(Path, "rename", refused)
        collected = catalog.collect(())
        assert collected.checkpoint_ids == (goes,)
        assert isinstance(collected.failure, TransferFailed) and stays in collected.failure.message
        monkeypatch.undo()
        assert catalog.collect(()).checkpoint_ids == (stays,)


@pytest.mark.parametrize("what", ["the folder", "the manifest"])
def test_a_checkpoint_exchanged_for_another_is_refused_before_a_byte_is_read(tmp_path: Path, what: str) -> None:
    with Catalog(tmp_path / "store") as catalog:
        ids = [add(catalog, name, source(tmp_path / name, seed)).checkpoint_id for seed, name in enumerate("ab")]
        one, other = (tmp_path / "store/checkpoints" / checkpoint_id for checkpoint_id in ids)
        assert durable.exchange(*((one, other) if what == "the folder" else (one / MANIFEST, other / MANIFEST)))
        for checkpoint_id in ids:
            with pytest.raises(CorruptCheckpoint, match="another checkpoint"):
                catalog.checkpoint(checkpoint_id)
        for seed, name in enumerate("ab"):  # and converting the source again mends it
            verify(catalog.checkpoint(add(catalog, name, source(tmp_path / name, seed)).checkpoint_id))


def test_a_side_file_that_changed_is_refused_at_every_look(tmp_path: Path) -> None:
    with Catalog(tmp_path / "store") as catalog:
        model = add(catalog, "a", source(tmp_path / "a", 1, config__json='{"rope_theta": 1}'))
        checkpoint = catalog.checkpoint(model.checkpoint_id)
        checkpoint.check_side_files()
        (checkpoint.directory / "config.json").write_text('{"rope_theta": 2}')
        for _ in range(2):
            with pytest.raises(CorruptCheckpoint, match=r"config\.json"):
                checkpoint.check_side_files()


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _folder(path: Path) -> None:
    path.unlink()
    (path / "inside").mkdir(parents=True)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("damage", [_pipe, _folder, lambda path: path.write_bytes(b"[" * 9999)])
@pytest.mark.parametrize("name", ["models/b.toml", f"checkpoints/ID/{MANIFEST}", f"checkpoints/ID/{WEIGHTS}", "lock"])
def test_it_starts_whatever_lies_in_the_place_of_a_file(
    tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    root = tmp_path / "store"
    with Catalog(root) as catalog:
        good, bad = (add(catalog, name, source(tmp_path / name, seed)) for seed, name in enumerate("ab"))
    damage(root / name.replace("ID", bad.checkpoint_id))
    with Catalog(root) as catalog:
        verify(catalog.checkpoint(good.checkpoint_id))
        if name.startswith("checkpoints"):
            with pytest.raises(CorruptCheckpoint):
                verify(catalog.checkpoint(bad.checkpoint_id))
        elif name.startswith("models"):
            assert catalog.models() == [good] and catalog.collect(()).checkpoint_ids == ()
            ((what, remedy),) = Problems(catalog, tmp_path, Events()).all(with_names=True)
            assert "b.damaged" in what and "repair" in remedy
            ((hidden, _),) = Problems(catalog, tmp_path, Events()).all(with_names=False)
            assert "b.damaged" not in hidden and "1 damaged file" in hidden
        mended = add(catalog, "b", source(tmp_path / "b", 1))
        verify(catalog.checkpoint(mended.checkpoint_id))


@pytest.mark.parametrize("name", ["models", "checkpoints", "images", "partial"])
def test_a_file_in_the_place_of_a_folder_is_set_aside(tmp_path: Path, name: str) -> None:
    root = tmp_path / "store"
    with Catalog(root) as catalog:
        add(catalog, "a", source(tmp_path / "a", 1))
    shutil.rmtree(root / name)
    (root / name).write_text("x")
    with Catalog(root) as catalog:
        assert catalog.damaged()[0].name == f"{name}.damaged"
        verify(catalog.checkpoint(add(catalog, "a", source(tmp_path / "a", 1)).checkpoint_id))
    assert stat.S_IMODE((root / name).stat().st_mode) == 0o700


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    mount = tmp_path / "disk"
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", mount], check=True)
    yield mount
    subprocess.run(["umount", "-l", mount], check=False, stderr=subprocess.DEVNULL)


@needs_root
def test_a_store_that_was_unmounted_says_so_and_advises_nothing_else(tmp_path: Path, mounted: Path) -> None:
    with Catalog(mounted / "store") as catalog:
        model = add(catalog, "a", source(tmp_path / "a", 1))
        subprocess.run(["umount", "-l", mounted], check=True)
        for use in (
            lambda: catalog.checkpoint(model.checkpoint_id),
            lambda: catalog.set_pinned("a", True),
            lambda: catalog.remove("a"),
            lambda: catalog.collect(()),
            lambda: add(catalog, "b", source(tmp_path / "b", 2)),
        ):
            with pytest.raises(TransferFailed, match="is missing") as caught:
                use()
            assert "mount" in caught.value.hint
        assert catalog.free_bytes() == 0
        ((what, remedy),) = Problems(catalog, tmp_path, Events()).all(with_names=False)
        assert "is missing" in what and "mount" in remedy
        assert catalog.models() == [model]


@needs_root
def test_models_of_a_store_mounted_read_only_can_be_used(tmp_path: Path, mounted: Path) -> None:
    with Catalog(mounted / "store") as catalog:
        model = add(catalog, "a", source(tmp_path / "a", 1))
    subprocess.run(["mount", "-o", "remount,ro", mounted], check=True)
    with Catalog(mounted / "store") as catalog:
        verify(catalog.checkpoint(model.checkpoint_id))
        with pytest.raises(TransferFailed, match="read-only"):
            catalog.set_pinned("a", True)
        ((what, _),) = Problems(catalog, tmp_path, Events()).all(with_names=False)
        assert "read-only" in what


TEXTS = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=30)
IDS = st.text("0123456789abcdef", min_size=64, max_size=64)
COUNTS = st.integers(0, 2**63 - 1)
TIMES = st.floats(0, 253_402_300_799)
MODELS = st.builds(
    Model,
    name=TEXTS, checkpoint_id=IDS, origin=st.builds(Origin, TEXTS, TEXTS, TEXTS), created_at=TIMES,
    size_bytes=COUNTS, tensor_count=COUNTS, dtype=TEXTS, architecture=TEXTS, architecture_key=TEXTS,
    aliases=st.lists(st.sampled_from(["a", "Owner/b", "c (v2)"])).map(tuple), previous=st.lists(IDS).map(tuple),
    pinned=st.booleans(), last_used_at=TIMES, use_count=COUNTS, owner_uid=st.integers(0, 2**32 - 1),
    private=st.booleans(),
)  # fmt: skip
STRANGE = (
    *("nan", "-inf", "-1", "9" * 4400, "9" * 30, "true", '""', "[]", "{}", "[" * 3000, '"\\u0000"', "1979-05-27"),
    *("[[]]", '["-x"]', '"../x"', "1e999"),
)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS | st.binary(max_size=9).map(repr),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)


@given(MODELS)
def test_a_record_is_read_as_it_was_written(model: Model) -> None:
    assert Model.from_toml(model.to_toml()) == model


@given(MODELS, st.data())
def test_a_record_with_a_strange_value_is_refused_in_one_way_or_is_usable(model: Model, data: st.DataObject) -> None:
    """What is read can go over the bus: whatever is wrong with it is a ValueError."""
    lines = model.to_toml().split("\n")
    number = data.draw(st.sampled_from([n for n, line in enumerate(lines) if " = " in line]))
    strange = st.sampled_from(STRANGE)
    lines[number] = f"{lines[number].partition(' = ')[0]} = {data.draw(strange)}"
    try:
        read = Model.from_toml("\n".join(lines))
    except ValueError:
        return
    assert Model.from_toml(read.to_toml()) == read
    assert 0 <= int(read.created_at) < 2**63 and 0 <= int(read.last_used_at) < 2**63
    assert all(0 <= number < 2**63 for number in (read.size_bytes, read.tensor_count, read.use_count))
    assert 0 <= read.owner_uid < 2**32
    assert all(check_name(alias) == alias for alias in read.aliases)


@given(st.text(max_size=300) | st.dictionaries(TEXTS, ANYTHING, max_size=4).map(repr))
def test_text_that_is_no_record_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError):
        Model.from_toml(text)


def test_aliases_of_two_records_that_clash_mean_one_model(tmp_path: Path) -> None:
    with Catalog(tmp_path / "store") as catalog:
        a, b = (add(catalog, name, source(tmp_path / name, seed)) for seed, name in enumerate("ab"))
    for model, aliases in ((a, ("b", "x")), (b, ("x", "y"))):
        path = tmp_path / "store/models" / f"{file_name(model.name)}.toml"
        path.write_text(replace(model, aliases=aliases).to_toml())
    with Catalog(tmp_path / "store") as catalog:
        assert [model.aliases for model in catalog.models()] == [("x",), ("y",)]
        assert catalog.resolve("b").name == "b"


def test_nothing_beyond_a_link_is_touched_though_the_link_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = tmp_path / "elsewhere" / "inner"
    inner.mkdir(parents=True)
    (inner / "file").touch()
    inner.chmod(0o555)
    (tmp_path / "link").symlink_to("elsewhere")
    with monkeypatch.context() as refusing:
        refusing.setattr(os, "unlink", refuse)
        assert not durable.discard(tmp_path / "link")
    assert stat.S_IMODE(inner.stat().st_mode) == 0o555
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "link").symlink_to(inner)
    for removed in ("link", "folder"):
        assert durable.discard(tmp_path / removed)
    assert (inner / "file").exists() and stat.S_IMODE(inner.stat().st_mode) == 0o555


def refuse(*_: object, **__: object) -> None:
    raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))


def taken_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_a_known_source_that_could_not_be_written_is_written_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flashd.store.known_sources._AGAIN_S", 0.0)
    removed = known_sources(tmp_path / "state/dismissed.toml")
    (tmp_path / "state").symlink_to("nowhere")
    removed.add("/models/a", "1")
    assert known_sources(tmp_path / "state/dismissed.toml").holds("/models/a", "1") is False
    (tmp_path / "state").unlink()
    assert removed.holds("/models/a", "1"), "and the disk is tried again"
    assert known_sources(tmp_path / "state/dismissed.toml").holds("/models/a", "1")


def known_sources(path: Path) -> KnownSources:
    return KnownSources(path, "removed models may come back")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("damage", [b"[" * 5000, b'"/a" = 5', b"\xff", None])
def test_a_damaged_file_of_known_sources_is_set_aside(tmp_path: Path, damage: bytes | None) -> None:
    path = tmp_path / "dismissed.toml"
    if damage is None:
        os.mkfifo(path)
    else:
        path.write_bytes(damage)
    known_sources(path).add("/models/a", "1")
    assert known_sources(path).holds("/models/a", "1")
    assert (tmp_path / "dismissed.damaged").exists()
