# SPDX-License-Identifier: Apache-2.0
"""Reads the listings of the post that flashd began with; seed_listings.txt has them word for word.

    python3 tests/engines/seed.py TEXT            compares that file with the post's text; the status is 1 if it differs
    python3 tests/engines/seed.py TEXT --write    makes it anew

The post is somebody else's, so only its code is here.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Iterator
from pathlib import Path

KEPT = Path(__file__).with_name("seed_listings.txt")
_HEADING = "== "
_CODE = ("pip ", "# ", "import ", "from ")  # beginnings that only listings have
_PROSE_ENDS = (".", ":", ",")


def extract(text: str) -> Iterator[tuple[str, str]]:
    """Every listing of the post and the heading above it. A listing is a paragraph, as the text has no other marks."""
    heading = ""
    for paragraph in text.split("\n\n"):
        lines = paragraph.strip().splitlines()
        if paragraph.strip().startswith(_CODE):
            yield heading, "\n".join(lines) + "\n"
        elif len(lines) == 1 and not lines[0].endswith(_PROSE_ENDS):
            heading = lines[0].replace("\xa0", " ")


def listings() -> dict[str, str]:
    """The listings by heading, in the order of the post."""
    parts = KEPT.read_text().split(_HEADING)[1:]
    return {heading: listing.strip("\n") + "\n" for heading, _, listing in (part.partition("\n") for part in parts)}


def indented(listing: str) -> str:
    """With the indentation that the page had lost: a loop's body is one line, a function's all that follows. That is
    all the structure these listings have."""
    lines = []
    loop = function = False
    for line in listing.splitlines():
        lines.append(("    " if loop or function else "") + line)
        loop = line.startswith("for ") and line.endswith(":")
        function = function or line.startswith("def ")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    found = list(extract(options.text.read_text()))
    written = "\n".join(f"{_HEADING}{heading}\n{listing}" for heading, listing in found)
    if options.write:
        KEPT.write_text(written)
    differences = list(difflib.unified_diff(KEPT.read_text().splitlines(), written.splitlines(), lineterm=""))
    lines = sum(len(listing.splitlines()) for _, listing in found)
    print("\n".join(differences) or f"{len(found)} listings, {lines} lines")
    return 1 if differences else 0


if __name__ == "__main__":
    sys.exit(main())
