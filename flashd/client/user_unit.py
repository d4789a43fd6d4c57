# SPDX-License-Identifier: Apache-2.0
"""Runs programs of a user as transient units of the user's systemd (systemd-run(1)).

Like the machine's units (systemd/), they are restarted after each failure, and the daemon's has a descriptor store.
There are no unit files, so nothing remains after their end.
"""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from flashd.config.environment import ENGINE_UNITS, for_unit, user_manager_socket
from flashd.errors import Unavailable

_OLDEST = 250  # whose --setenv can take values from the environment: on a command line, every user could read them
_ALL = {"Type": "notify", "NotifyAccess": "main", "Restart": "on-failure", "RestartSec": "100ms", "WatchdogSec": "30"}
DAEMON = {
    **_ALL,
    "Description": "Keeps language models in memory and switches between them, for one user",
    # The status with which flashd/daemon/lifecycle/ending.py requests a restart.
    "SuccessExitStatus": "75",
    "RestartForceExitStatus": "75",
    "TimeoutStartSec": "60",
    "TimeoutStopSec": "60",
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
GATEWAY = {
    **_ALL,
    "Description": "One HTTP address for all models of flashd, for one user",
    "PartOf": "flashd.service",  # so that systemctl stop ends both
    "TimeoutStartSec": "60",
    "TimeoutStopSec": "20",
}


def is_possible() -> bool:
    """Tells whether this user has a systemd, and a recent enough one."""
    if not user_manager_socket().is_socket():
        return False
    with contextlib.suppress(OSError, ValueError, IndexError):
        said = _run("systemd-run", "--version").stdout
        return int(said.split()[1].split("~")[0].split(".")[0]) >= _OLDEST
    return False


def start(unit: str, of_unit: Mapping[str, str], command: Sequence[str], log: Path) -> None:
    """Starts a program and waits until it is ready. Raises Unavailable if systemd or the program fails."""
    properties = {**of_unit, "StandardOutput": f"append:{log}", "StandardError": f"append:{log}"}
    options = ["--user", "--quiet", "--collect", f"--unit={unit}"]
    options += [f"--property={name}={value}" for name, value in properties.items()]
    options += [f"--setenv={name}" for name in for_unit()] + [f"--setenv={ENGINE_UNITS}=1"]
    try:
        done = _run("systemd-run", *options, "--", *command)
    except BaseException:
        stop(unit)  # it would go on starting
        raise
    if done.returncode:
        hint = f"see systemctl --user status {unit}"
        raise Unavailable(f"systemd failed to start {unit}: {done.stderr.strip()}", hint=hint)


def stop(unit: str) -> None:
    """Stops a unit, if it runs."""
    _run("systemctl", "--user", "stop", unit)


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
