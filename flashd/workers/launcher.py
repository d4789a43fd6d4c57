# SPDX-License-Identifier: Apache-2.0
"""The program of an engine unit, which becomes a zygote by exec (systemd/flashd-engine@.service).

The daemon connects to the unit's socket and sends the program to run; systemd passes the connection to us, and it
becomes the zygote's control channel. Privileges and user are defined by the unit, not here.
"""

from __future__ import annotations

import os
import socket
import sys
import tempfile

from flashd.config.environment import child_environment, inherited_fds
from flashd.engines import codec
from flashd.engines.control import Channel
from flashd.engines.messages import Launch


def main() -> None:
    ((control, _),) = inherited_fds()
    channel = Channel(socket.socket(fileno=control))
    try:
        frame = channel.receive()
    except (EOFError, ConnectionError):
        return  # the daemon has closed the connection
    os.set_inheritable(control, True)
    (words,) = frame.fds
    os.dup2(words, sys.stdout.fileno())
    os.dup2(words, sys.stderr.fileno())
    launch = codec.from_json(Launch, frame.content, "the order to launch a program")
    environment = child_environment(launch.environment)
    try:
        os.execve(launch.python, [launch.python, "-m", launch.module, str(control), tempfile.gettempdir()], environment)
    except OSError as error:
        print(f"cannot run {launch.python}: {error.strerror}", file=sys.stderr)  # where the daemon looks for errors
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
