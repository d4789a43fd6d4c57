# SPDX-License-Identifier: Apache-2.0
"""The environment of this process and its inherited descriptors. No other module reads them."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

# Set if the daemon is a unit of a user's systemd: its engines then have their own units too.
ENGINE_UNITS = "FLASHD_ENGINE_UNITS"
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_NO_TEXT = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")  # control characters, and bytes that are not UTF-8
_OF_UNITS = {
    *("INVOCATION_ID", "JOURNAL_STREAM", "LISTEN_FDNAMES", "LISTEN_FDS", "LISTEN_PID", "MAINPID", "MANAGERPID"),
    *("NOTIFY_SOCKET", "RUNTIME_DIRECTORY", "SYSTEMD_EXEC_PID", "WATCHDOG_PID", "WATCHDOG_USEC"),
}
_OF_FRAMEWORKS = ("CUDA_", "NCCL_", "OMP_", "PYTORCH_", "TORCH", "TRITON_", "VLLM_")


def given_bus_address() -> str | None:
    """Returns the bus address in the environment, if any."""
    return os.environ.get("FLASHD_BUS_ADDRESS") or None


def has_session_bus() -> bool:
    """Tells whether this process belongs to a login session with a session bus."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return bool(os.environ.get("DBUS_SESSION_BUS_ADDRESS")) or bool(runtime and user_bus_socket().exists())


def user_bus_socket() -> Path:
    """Returns the path of the session bus's socket where systemd runs that bus."""
    return Path(os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.getuid()}") / "bus"


def user_manager_socket() -> Path:
    """Returns the path of the private socket of the user's systemd, if there is one."""
    return Path(os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.getuid()}") / "systemd" / "private"


def session_bus_address() -> str:
    return os.environ.get("DBUS_SESSION_BUS_ADDRESS") or "unix:runtime=yes"


def system_bus_address() -> str:
    return os.environ.get("DBUS_SYSTEM_BUS_ADDRESS") or "unix:path=/run/dbus/system_bus_socket"


def traces_are_wanted() -> bool:
    """Tells whether OpenTelemetry's variables name a place for traces (their names are those of its specification)."""
    names = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    return any(map(os.environ.get, names)) and os.environ.get("OTEL_SDK_DISABLED", "").lower() != "true"


def trace_service_name() -> str:
    """Returns the name under which traces show the gateway."""
    return os.environ.get("OTEL_SERVICE_NAME") or "flashd-gateway"


def notify_socket() -> str | None:
    """Returns the socket on which the service manager waits for our readiness (sd_notify(3)), if any."""
    return os.environ.get("NOTIFY_SOCKET") or None


def state_directory() -> Path | None:
    """Returns the folder that the service manager gives us for our state (StateDirectory=), if any."""
    first, _, _ = os.environ.get("STATE_DIRECTORY", "").partition(":")
    return Path(first) if first else None


def watchdog_s() -> float | None:
    """Returns the seconds that the service manager waits for a keep-alive (sd_watchdog_enabled(3)), if it does."""
    told, pid = os.environ.get("WATCHDOG_USEC", ""), os.environ.get("WATCHDOG_PID", "")
    is_ours = told.isdecimal() and pid in {"", str(os.getpid())}
    return int(told) / 1e6 if is_ours else None


def is_journal(fd: int) -> bool:
    """Tells whether a descriptor is a stream to the journal (systemd.exec(5), JOURNAL_STREAM)."""
    with contextlib.suppress(OSError):
        status = os.fstat(fd)
        return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"
    return False


def inherited_fds() -> list[tuple[int, str]]:
    """Returns the descriptors that the service manager kept for us, with their names (sd_listen_fds(3)).

    The variables are removed from the environment, lest child processes take the descriptors for theirs. Numbers that
    are not open descriptors are skipped.
    """
    pid, count = os.environ.pop("LISTEN_PID", ""), os.environ.pop("LISTEN_FDS", "")
    names = os.environ.pop("LISTEN_FDNAMES", "").split(":")
    if pid != str(os.getpid()) or not count.isdecimal():
        return []
    first = 3
    found = []
    for fd in range(first, first + min(int(count), os.sysconf("SC_OPEN_MAX"))):
        with contextlib.suppress(OSError):
            os.set_inheritable(fd, False)
            found.append((fd, names[fd - first] if fd - first < len(names) else ""))
    return found


def show_gpus(ordinals: Sequence[int]) -> None:
    """Restricts this process and its children to these of its visible GPUs."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = visible.split(",") if visible else None
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(names[ordinal] if names else str(ordinal) for ordinal in ordinals)


def child_environment(changes: Mapping[str, str]) -> Mapping[str, str]:
    """Returns our environment with changes, for child processes."""
    return {**os.environ, **changes}


def llama_environment(changes: Mapping[str, str]) -> Mapping[str, str]:
    """Returns our environment for llama-server, with changes, and without a user's own variables for one."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("LLAMA_")}
    return {**ours, **changes}


def for_engines() -> Mapping[str, str]:
    """Returns the variables that configure frameworks, for engines in their own units.

    The order of GPUs and options of compilers, for example, must be the same for them. Cache folders are left out,
    because engines of the machine's daemon run as another user.
    """
    return {
        name: value
        for name, value in os.environ.items()
        if name.startswith(_OF_FRAMEWORKS) and not name.endswith("_CACHE_DIR")
    }


def for_unit() -> Iterator[str]:
    """Yields the names of our variables for a unit of the user's systemd that shall have our environment.

    Variables of units themselves, and those that systemd does not accept (systemd.exec(5), Environment=), are left out.
    """
    for name, value in os.environ.items():
        if name not in _OF_UNITS and _VARIABLE.fullmatch(name) and not _NO_TEXT.search(value):
            yield name


def unit_of_its_own(name: str) -> Sequence[str]:
    """Returns the command prefix that runs a program in its own unit; empty unless we are a unit of the user."""
    if not os.environ.get(ENGINE_UNITS):
        return ()
    return ("systemd-run", "--user", "--scope", "--quiet", "--collect", f"--unit={name}", "--")


def xdg_folder(variable: str, default: Path) -> Path:
    """Returns a folder of the XDG base directory specification, which says to ignore relative paths."""
    path = Path(os.environ.get(variable, ""))
    return path if path.is_absolute() else default


def runtime_folder() -> Path:
    """Returns the user's private folder that exists while the user is logged in."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return Path(runtime) / "flashd" if runtime else Path(f"/tmp/flashd-{os.getuid()}")
