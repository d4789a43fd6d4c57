# SPDX-License-Identifier: Apache-2.0
"""Generates documentation from the code, so that the two cannot disagree.

python packaging/reference man FOLDER        the manual pages, into FOLDER
python packaging/reference docs              the generated parts of packaging/docs, of the README and of its figures
python packaging/reference docs --check      fails if any of them is out of date
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import manual
import pages

ROOT = Path(__file__).parents[2]
PUBLISH = ROOT / "tests" / "bench" / "publish.py"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python packaging/reference", description="Generates documentation.")
    commands = parser.add_subparsers(dest="command", required=True)
    man = commands.add_parser("man", help="write the manual pages")
    man.add_argument("folder", type=Path)
    docs = commands.add_parser("docs", help="write the generated parts of README.md and packaging/docs")
    docs.add_argument("--check", action="store_true", help="write nothing; fail if a page is out of date")
    options = parser.parse_args()
    if options.command == "man":
        write_manual(options.folder)
    else:
        write_docs(is_check=options.check)


def write_manual(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in manual.pages().items():
        (folder / name).write_text(text, encoding="utf-8")


def write_docs(*, is_check: bool) -> None:
    outdated = []
    for page, text in pages.generated(ROOT / "packaging" / "docs").items():
        if page.read_text(encoding="utf-8") == text:
            continue
        outdated.append(str(page.relative_to(ROOT)))
        if not is_check:
            page.write_text(text, encoding="utf-8")
    if is_check and outdated:
        sys.exit(f"{', '.join(outdated)}: out of date; run python packaging/reference docs")
    subprocess.run([sys.executable, PUBLISH, *(["--check"] if is_check else [])], check=True)


if __name__ == "__main__":
    main()
