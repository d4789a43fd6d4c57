# SPDX-License-Identifier: Apache-2.0
"""Runs a private D-Bus daemon for one user, on a Unix socket in a folder.

It is for the quick start, for tests, and for machines without a session bus. It activates no services, and ignores the
machine's bus configuration. Its limits are those of a session bus, so that floods of signals and many file descriptors
have the same effects as on a desktop (dbus-daemon(1), session.conf).
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self
from xml.sax.saxutils import escape

from flashd.dbus import address
from flashd.errors import Unavailable

_LOOK_S = 1.0
_STOP_S = 5.0
_CREDENTIALS = struct.Struct("iII")  # struct ucred

_CONFIGURATION = """\
<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>session</type>
  <listen>{address}</listen>
  <auth>EXTERNAL</auth>
  <policy context="default">
    <allow send_destination="*" eavesdrop="true"/>
    <allow eavesdrop="true"/>
    <allow own="*"/>
  </policy>
  <limit name="max_incoming_bytes">1000000000</limit>
  <limit name="max_incoming_unix_fds">250000000</limit>
  <limit name="max_outgoing_bytes">1000000000</limit>
  <limit name="max_outgoing_unix_fds">250000000</limit>
  <limit name="max_message_size">1000000000</limit>
  <limit name="max_connections_per_user">100000</limit>
  <limit name="max_pending_service_starts">10000</limit>
  <limit name="max_names_per_connection">50000</limit>
  <limit name="max_match_rules_per_connection">50000</limit>
  <limit name="max_replies_per_connection">50000</limit>
</busconfig>
"""


class PrivateBus:
    """A running dbus-daemon that listens in `folder`, until `stop` or the end of its context.

    Raises Unavailable if dbus-daemon is not installed or does not start.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / "bus"
        configuration = folder / "bus.conf"
        configuration.write_text(_CONFIGURATION.format(address=escape(address.of_socket(path))))
        command = ["dbus-daemon", f"--config-file={configuration}", "--nofork", "--nopidfile", "--print-address=1"]
        try:
            # In a new session, so that Ctrl-C in a terminal does not end the bus before the programs that use it.
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        except FileNotFoundError:
            raise Unavailable(
                "dbus-daemon is not installed", hint="on Debian and Ubuntu: apt install dbus-daemon"
            ) from None
        assert self._process.stdout is not None
        with self._process.stdout as printed:
            self.address = printed.readline().decode().strip()
        if not self.address:
            self._process.wait()
            raise Unavailable(
                f"dbus-daemon did not start in {folder}",
                hint="check that the folder is writable, and its path shorter than 100 bytes",
            )

        self._files = (path, configuration)

    @property
    def pid(self) -> int:
        return self._process.pid

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait()
        for file in self._files:
            file.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()


@dataclass(frozen=True, slots=True)
class FoundBus:
    """A running private bus that an earlier daemon has started."""

    pid: int
    folder: Path

    @property
    def address(self) -> str:
        return address.of_socket(self.folder / "bus")

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            process = os.pidfd_open(self.pid)
            try:
                signal.pidfd_send_signal(process, signal.SIGTERM)
                select.select([process], [], [], _STOP_S)
            finally:
                os.close(process)
        for name in ("bus", "bus.conf"):
            (self.folder / name).unlink(missing_ok=True)


def found(folder: Path) -> FoundBus | None:
    """Returns the private bus that listens in `folder`, if there is one."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as looking:
        looking.settimeout(_LOOK_S)
        looking.connect(str(folder / "bus"))
        # The process that listens (SO_PEERCRED, unix(7)); only we can use the folder, so the bus is ours.
        pid, _, _ = _CREDENTIALS.unpack(looking.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
        return FoundBus(pid, folder)
    return None
