# SPDX-License-Identifier: Apache-2.0
"""Records the quick start as the picture in the README: runs it on a pseudo-terminal and draws the final screen.

.venv/bin/python packaging/tour/record.py            writes packaging/tour/quickstart.svg
"""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

HERE = Path(__file__).parent
COLUMNS = 100


def record(command: list[str]) -> str:
    """Returns everything that the command writes to a terminal of 100 columns, including escape sequences."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(COLUMNS), "LINES": "40", "TERM": "xterm-256color"}
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    written = bytearray()
    while True:
        try:
            chunk = os.read(ours, 65536)
        except OSError:  # EIO: the last writer closed the terminal (pty(7))
            break
        if not chunk:
            break
        written += chunk
    os.close(ours)
    if process.wait() != 0:
        sys.exit(f"{command} failed:\n{written.decode()}")
    return written.decode()


def settled_lines(terminal_output: str) -> list[str]:
    """Returns the screen after progress was erased, by the few sequences that rich and steps.sh write for that."""
    lines: list[str] = [""]
    for token in re.split(r"(\x1b\[\d*A|\x1b\[2?K|\x1b\[\?25[lh]|\r|\n)", terminal_output):
        if token.endswith("A") and token.startswith("\x1b["):
            del lines[max(1, len(lines) - int(token[2:-1] or 1)) :]
        elif token in {"\x1b[2K", "\x1b[K"}:
            lines[-1] = ""
        elif token == "\n":
            lines.append("")
        elif token == "\r" or token.startswith("\x1b[?25"):
            continue
        else:
            lines[-1] += token
    return lines


def main() -> None:
    lines = settled_lines(record([str(HERE.parent / "quickstart")]))
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    console.print("[bold]$ packaging/quickstart[/]", highlight=False)
    for line in lines:
        console.print(Text.from_ansi(line))
    console.save_svg(str(HERE / "quickstart.svg"), title="flashd quick start")


if __name__ == "__main__":
    main()
