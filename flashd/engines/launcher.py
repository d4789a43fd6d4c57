# SPDX-License-Identifier: Apache-2.0
"""How does a zygote come to be in a unit of its own? This program becomes it (systemd/flashd-engine@.service).

The daemon connects to the unit's socket and says what to run; the connection is handed to us, and becomes the zygote's
control channel. What we may do, and as which user, is the unit's business: there is nothing here to decide.
"""

from __future__ import annotations

import os
import socket
import sys
import tempfile

from flashd import config
from flashd.engines.control import Channel


def main() -> None:
    ((control, _),) = config.inherited_fds()
    channel = Channel(socket.socket(fileno=control))
    try:
        frame = channel.receive()
    except (EOFError, ConnectionError):
        return  # the daemon has thought better of it
    os.set_inheritable(control, True)
    (words,) = frame.fds
    os.dup2(words, sys.stdout.fileno())
    os.dup2(words, sys.stderr.fileno())
    asked = frame.content
    python, environment = asked["python"], config.child_environment(asked["environment"])
    try:
        os.execve(python, [python, "-m", asked["module"], str(control), tempfile.gettempdir()], environment)
    except OSError as error:
        print(f"cannot run {python}: {error.strerror}", file=sys.stderr)  # the daemon reads it there
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
