#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Lends programs of this machine to a root for arm64, where the kernel runs them beside what is emulated.

    lent.py ROOT     as a hook of mmdebstrap, when essential packages are extracted and none is installed

They unpack packages, run scripts, and compile for arm64, with the same results as the root's own in a tenth of the
time. The root's own are diverted (dpkg-divert(1)), also those of packages that are installed later. Nothing is lent to
a root of another release than this machine's, as Perl's modules and the compiler's headers are of their version.
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

_CROSS, _NATIVE = Path("/usr/lib/gcc-cross/aarch64-linux-gnu"), Path("/usr/lib/gcc/aarch64-linux-gnu")
# By the names that packages have for them, which diversions go by. Not uname, dpkg and others that name the processor.
_SAME = (
    *("/usr/bin/dpkg-deb", "/usr/bin/perl", "/usr/bin/aarch64-linux-gnu-as", "/usr/bin/file", "/bin/dash", "/bin/sed"),
    *("/bin/grep", "/bin/tar", "/bin/gzip", "/usr/bin/find", "/usr/bin/xargs", "/usr/bin/mawk", "/bin/rm", "/bin/cp"),
    *("/bin/mv", "/bin/ln", "/bin/cat", "/bin/chmod", "/bin/chown", "/bin/mkdir", "/bin/readlink", "/usr/bin/basename"),
    *("/usr/bin/dirname", "/usr/bin/cut", "/usr/bin/sort", "/usr/bin/tr", "/usr/bin/install"),
)
# Programs here, and where they are in the root.
_LENT = {
    **{Path(name): Path(name) for name in _SAME},
    **{_CROSS / "12" / name: _NATIVE / "12" / name for name in ("cc1", "cc1plus")},
}
_LIBRARIES = Path("/usr/lib/x86_64-linux-gnu")
_LOADERS = Path("/lib64")  # what programs name as their interpreter is there
_LINKS = {
    _LOADERS: "usr/lib64",
    # Where the compiler looks.
    _CROSS: "../gcc/aarch64-linux-gnu",
    Path("/usr/aarch64-linux-gnu/include"): "../include",
    Path("/usr/include/c++/12/aarch64-linux-gnu"): "../../aarch64-linux-gnu/c++/12",
}


def lend(root: Path) -> None:
    """Lends the programs, with the libraries and modules that they load."""
    if not _is_possible(root):
        return
    for path, target in _LINKS.items():
        _below(root, path).parent.mkdir(parents=True, exist_ok=True)
        _below(root, path).symlink_to(target)
    (root / "usr/lib64").mkdir(exist_ok=True)
    _divert(root, _LOADERS, "--no-rename")  # else usr-is-merged removes it, as a link of no package
    for ours, theirs in _LENT.items():
        _divert(root, theirs, "--rename")
        _copy(ours, _below(root, theirs))
        listed = subprocess.run(["ldd", ours], capture_output=True, text=True, check=True).stdout
        for library in map(Path, re.findall(r"(/\S+) \(0x", listed)):
            folder = _LOADERS if library.parent == _LOADERS else _LIBRARIES
            _copy(library, _below(root, folder) / library.name)
    for modules in _LIBRARIES.glob("perl*"):
        shutil.copytree(modules, _below(root, modules), symlinks=True, dirs_exist_ok=True)


def _divert(root: Path, path: Path, *options: str) -> None:
    command = ["dpkg-divert", "--quiet", f"--root={root}", "--local", "--divert", f"{path}.own", *options]
    subprocess.run([*command, "--add", path], check=True)


def _is_possible(root: Path) -> bool:
    if platform.machine() != "x86_64" or not all(ours.exists() for ours in _LENT):
        return False
    ours, theirs = (release.read_text() for release in (Path("/etc/os-release"), root / "usr/lib/os-release"))
    codename = re.compile(r"^VERSION_CODENAME=.*$", re.MULTILINE)
    return codename.findall(ours) == codename.findall(theirs) != []


def _copy(ours: Path, theirs: Path) -> None:
    theirs.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(ours, theirs)


def _below(root: Path, path: Path) -> Path:
    return root / path.relative_to("/")


if __name__ == "__main__":
    lend(Path(sys.argv[1]))
