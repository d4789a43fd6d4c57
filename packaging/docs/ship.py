# SPDX-License-Identifier: Apache-2.0
"""Copies the README, the pages and what they link to into a folder, where all links between them work.

    python packaging/docs/ship.py FOLDER

    FOLDER/README.md
    FOLDER/docs/...         packaging/docs
    FOLDER/tour/..., ...    the pictures and programs beside it that pages link to

A link to anything else in the repository becomes plain text. The Debian package and the site are made of such a folder.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGING = ROOT / "packaging"
# A link or a picture outside of code: [words](target#anchor), ![words](target).
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]*)(#[^)\s]*)?\)")
_CODE = re.compile(r"(^```.*?^```$|`[^`\n]*`)", re.MULTILINE | re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    ship(parser.parse_args().folder)


def pages() -> list[Path]:
    """The README, and every page."""
    return [ROOT / "README.md", *sorted((PACKAGING / "docs").glob("*.md"))]


def ship(folder: Path) -> None:
    wanted: set[Path] = set()
    for page in pages():
        target = _place(page, folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(_moved(page, folder, wanted), encoding="utf-8")
    for file in wanted - set(pages()):
        target = _place(file, folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)


def links(text: str) -> list[re.Match[str]]:
    """Every link of a page, except in code."""
    return [match for prose in _CODE.split(text)[::2] for match in LINK.finditer(prose)]


def _place(file: Path, folder: Path) -> Path:
    return folder / (file.relative_to(PACKAGING) if file.is_relative_to(PACKAGING) else file.relative_to(ROOT))


def _moved(page: Path, folder: Path, wanted: set[Path]) -> str:
    """The text of a page with its links as they are in the folder; adds the files they lead to."""

    def relinked(match: re.Match[str]) -> str:
        mark, words, target, anchor = match.groups()
        if not target or "://" in target:
            return match[0]
        file = (page.parent / target).resolve()
        if file != ROOT / "README.md" and not file.is_relative_to(PACKAGING):
            return words
        wanted.add(file)
        place = os.path.relpath(_place(file, folder), _place(page, folder).parent)
        return f"{mark}[{words}]({place}{anchor or ''})"

    parts = _CODE.split(page.read_text(encoding="utf-8"))
    parts[::2] = [LINK.sub(relinked, prose) for prose in parts[::2]]
    return "".join(parts)


if __name__ == "__main__":
    main()
