# SPDX-License-Identifier: Apache-2.0
"""How do we get a bus where there is none? A D-Bus daemon of our own, for one user, on a Unix socket in a folder.

For the quick start, for tests, and for machines without a session bus. It activates nothing and reads none of the
machine's bus configuration. Its limits are those of a session bus, so that signal floods and many file descriptors
behave as they do on a desktop (dbus-daemon(1), session.conf).
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import TracebackType
from typing import Self
from xml.sax.saxutils import escape

from flashd.errors import Unavailable

_CONFIGURATION = """\
<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>session</type>
  <listen>unix:path={socket}</listen>
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
    """A running dbus-daemon that listens in `folder`; ends with `stop`, or with its context.

    Raises Unavailable if dbus-daemon is not installed or does not start.
    """

    def __init__(self, folder: Path) -> None:
        socket = folder / "bus"
        configuration = folder / "bus.conf"
        configuration.write_text(_CONFIGURATION.format(socket=escape(str(socket))))
        command = ["dbus-daemon", f"--config-file={configuration}", "--nofork", "--nopidfile", "--print-address=1"]
        try:
            # A session of its own, so that Ctrl-C in a terminal ends our programs before the bus they speak over.
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
                f"dbus-daemon did not start in {folder}", hint="is the path shorter than 100 bytes, and writable?"
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()
