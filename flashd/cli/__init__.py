# SPDX-License-Identifier: Apache-2.0
"""The `flash` command."""

from __future__ import annotations

import signal
import sys


def main() -> None:
    if sys.argv[1:] == ["--version"]:  # which needs no commands, so their modules are not imported
        from flashd._version import __version__

        print(f"flash {__version__}")
        return
    # Ctrl-C during imports, and after the command, ends the process at once: there is nothing to undo then.
    is_interruptible = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if is_interruptible:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from flashd.cli.run import run

    try:
        if is_interruptible:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        run()
    finally:
        if is_interruptible:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
