# SPDX-License-Identifier: Apache-2.0
"""Starting other programs: a terminal for a chat, the file manager, the daemon."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from flashd.errors import NotFound, Unavailable

# Each with the arguments before the command. The first two are the desktop's choice, the others in order of popularity.
TERMINALS = (
    ("xdg-terminal-exec",),
    ("x-terminal-emulator", "-e"),
    ("gnome-terminal", "--"),
    ("ptyxis", "--"),
    ("konsole", "-e"),
    ("xfce4-terminal", "-x"),
    ("kitty",),
    ("foot",),
    ("alacritty", "-e"),
    ("xterm", "-e"),
)
START_S = 60.0

Which = Callable[[str], str | None]


def flash() -> str:
    """Returns the path of this installation's flash command."""
    beside = Path(sys.executable).with_name("flash")
    found = str(beside) if beside.exists() else shutil.which("flash")
    if found is None:
        raise NotFound("the flash command is not installed", hint="reinstall flashd with its command line")
    return found


def in_terminal(command: Sequence[str], which: Which = shutil.which) -> list[str]:
    """Returns the command line that runs a command in a terminal window. Raises NotFound if there is no terminal."""
    for program, *before in TERMINALS:
        if (path := which(program)) is not None:
            return [path, *before, *command]
    said = " ".join(command)
    raise NotFound("there is no terminal program", hint=f"install one (apt install xterm), or run: {said}")


def start(command: Sequence[str]) -> None:
    """Starts a program that outlives us."""
    try:
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    except OSError as error:
        raise NotFound(f"cannot start {command[0]}: {error.strerror}") from None


def start_daemon(bus: str | None) -> None:
    """Starts the daemon and waits until it answers. Raises Unavailable with its error."""
    given = ["--bus", bus] if bus else []
    try:
        done = subprocess.run(
            [flash(), *given, "start"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=START_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise Unavailable(f"flashd did not start in {START_S:.0f} s", hint="see flash doctor for the reason") from None
    if done.returncode:
        lines = [line.strip() for line in done.stderr.strip().removeprefix("flash: ").splitlines()]
        said = "\n".join(lines) or f"flash start ended with {done.returncode}"
        raise Unavailable(said, hint="see flash doctor for the reason")
