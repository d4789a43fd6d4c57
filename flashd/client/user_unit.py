# SPDX-License-Identifier: Apache-2.0
"""Runs the daemon as a transient unit of the user's systemd: `flashd.service` (systemd-run(1)).

Like the machine's unit (systemd/flashd.service), it has a descriptor store, and is restarted after each failure. There
is no unit file, so nothing remains after the daemon's end.
"""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Sequence
from pathlib import Path

from flashd.config.environment import ENGINE_UNITS, for_unit, user_manager_socket
from flashd.errors import Unavailable

UNIT = "flashd.service"
_OLDEST = 250  # whose --setenv can take values from the environment: on a command line, every user could read them
_PROPERTIES = {
    "Description": "Keeps language models in memory and switches between them, for one user",
    "Type": "notify",
    "NotifyAccess": "main",
    "Restart": "on-failure",
    "RestartSec": "100ms",
    # The status with which flashd/daemon/lifecycle/ending.py requests a restart.
    "SuccessExitStatus": "75",
    "RestartForceExitStatus": "75",
    "TimeoutStartSec": "60",
    "TimeoutStopSec": "60",
    "WatchdogSec": "30",
    "FileDescriptorStoreMax": "4096",
    # Engines have their own units. Our private bus has to outlive a restart of the daemon, but not its final stop, as
    # which the daemon takes SIGINT.
    "KillMode": "process",
    "KillSignal": "SIGINT",
    "RestartKillSignal": "SIGTERM",
    "OOMPolicy": "continue",
    "RuntimeDirectory": "flashd",
    "RuntimeDirectoryMode": "0700",
    "RuntimeDirectoryPreserve": "restart",
}


def is_possible() -> bool:
    """Tells whether this user has a systemd, and a recent enough one."""
    if not user_manager_socket().is_socket():
        return False
    with contextlib.suppress(OSError, ValueError, IndexError):
        said = _run("systemd-run", "--version").stdout
        return int(said.split()[1].split("~")[0].split(".")[0]) >= _OLDEST
    return False


def start(command: Sequence[str], log: Path) -> None:
    """Starts the daemon and waits until it is ready. Raises Unavailable if systemd or the daemon fails."""
    properties = {**_PROPERTIES, "StandardOutput": f"append:{log}", "StandardError": f"append:{log}"}
    options = ["--user", "--quiet", "--collect", f"--unit={UNIT}"]
    options += [f"--property={name}={value}" for name, value in properties.items()]
    options += [f"--setenv={name}" for name in for_unit()] + [f"--setenv={ENGINE_UNITS}=1"]
    try:
        done = _run("systemd-run", *options, "--", *command)
    except BaseException:
        _run("systemctl", "--user", "stop", UNIT)  # these would not keep it from starting
        raise
    if done.returncode:
        hint = f"see systemctl --user status {UNIT}"
        raise Unavailable(f"systemd failed to start {UNIT}: {done.stderr.strip()}", hint=hint)


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
