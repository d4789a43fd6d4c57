# SPDX-License-Identifier: Apache-2.0
"""The sources of llama.cpp are those of one release, or nothing is built."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from flashd.cli import llama_source
from flashd.cli.wheels import Supply
from flashd.errors import InvalidSource, TransferFailed, Unavailable


def test_other_sources_are_not_built(tmp_path: Path) -> None:
    (tmp_path / "llama_cpp_python-0.3.36.tar.gz").write_bytes(b"another")
    with pytest.raises(InvalidSource, match="is not the release that is known"):
        llama_source.fetch(tmp_path, Supply(tmp_path))


def test_a_folder_without_the_sources_says_what_to_download(tmp_path: Path) -> None:
    with pytest.raises(TransferFailed, match=r"lacks llama_cpp_python-0\.3\.36\.tar\.gz") as missing:
        llama_source.fetch(tmp_path, Supply(tmp_path))
    assert "pip download --no-deps --no-binary :all: llama-cpp-python==0.3.36" in missing.value.hint


def test_missing_tools_are_named_before_anything_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Unavailable, match=r"no cmake and no g\+\+") as missing:
        llama_source.wheel(tmp_path, Supply())
    assert "apt install cmake g++" in missing.value.hint and not list(tmp_path.iterdir())


def test_a_wheel_lists_what_is_in_it(tmp_path: Path) -> None:
    (tmp_path / "llama-server").write_bytes(b"\x7fELF")
    with zipfile.ZipFile(llama_source.pack(tmp_path / "llama-server", tmp_path)) as archive:
        (record,) = (name for name in archive.namelist() if name.endswith("/RECORD"))
        listed = {line.partition(",")[0] for line in archive.read(record).decode().splitlines()}
        assert listed == set(archive.namelist())
