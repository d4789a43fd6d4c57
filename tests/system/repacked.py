# SPDX-License-Identifier: Apache-2.0
"""Packs installed distributions into wheels again, as a user without a network would carry to a machine.

Nothing is downloaded, and the machine gets the PyTorch of these tests. Scripts, which installers make from entry
points, and bytecode are left out.
"""

from __future__ import annotations

import csv
import io
import zipfile
from collections.abc import Iterator, Sequence
from importlib.metadata import Distribution, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.tags import parse_tag
from packaging.utils import canonicalize_name

_NOT_OF_THE_WHEEL = {"INSTALLER", "RECORD", "REQUESTED", "direct_url.json"}


def repack(wanted: Sequence[str], folder: Path) -> None:
    """Wheels of these requirements and all that they need."""
    for found in _closure(wanted).values():
        _pack(found, folder)


def _closure(wanted: Sequence[str]) -> dict[str, Distribution]:
    found: dict[str, Distribution] = {}
    open_ = [Requirement(text) for text in wanted]
    while open_:
        requirement = open_.pop()
        name = canonicalize_name(requirement.name)
        if name not in found:
            found[name] = distribution(name)
        needed = [Requirement(text) for text in found[name].requires or []]
        extras = requirement.extras or {""}
        open_ += [
            r for r in needed
            if (r.marker is None or any(r.marker.evaluate({"extra": extra}) for extra in extras))
            and (canonicalize_name(r.name) not in found)
        ]  # fmt: skip
    return found


def _pack(found: Distribution, folder: Path) -> None:
    tags = [
        line.partition(": ")[2] for line in (found.read_text("WHEEL") or "").splitlines() if line.startswith("Tag:")
    ]
    parts = zip(*((t.interpreter, t.abi, t.platform) for tag in tags for t in parse_tag(tag)), strict=True)
    name = found.metadata["Name"].replace("-", "_").replace(".", "_")
    tag = "-".join(".".join(sorted(set(part))) for part in parts)
    rows = io.StringIO()
    with zipfile.ZipFile(folder / f"{name}-{found.version}-{tag}.whl", "w", zipfile.ZIP_STORED) as archive:
        record = csv.writer(rows, lineterminator="\n")
        for path, digest, size in _files(found):
            archive.write(found.locate_file(path), path)
            record.writerow((path, digest, size))
        info = next(path for path in archive.namelist() if path.endswith(".dist-info/METADATA")).rpartition("/")[0]
        record.writerow((f"{info}/RECORD", "", ""))
        archive.writestr(f"{info}/RECORD", rows.getvalue())


def _files(found: Distribution) -> Iterator[tuple[str, str, str]]:
    """As its RECORD has them."""
    for path, digest, size in csv.reader((found.read_text("RECORD") or "").splitlines()):
        parts = Path(path).parts
        is_info = parts[0].endswith(".dist-info") and parts[-1] in _NOT_OF_THE_WHEEL
        if parts[0] != ".." and "__pycache__" not in parts and not is_info:
            yield path, digest, size
