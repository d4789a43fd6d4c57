# SPDX-License-Identifier: Apache-2.0
"""Checks the installation of flashd's package: unit, polkit actions, group, and the engines' environments."""

from __future__ import annotations

import grp
import os
import pwd
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from flashd.config.interpreters import missing_in
from flashd.errors import Unavailable

UNIT = "flashd.service"
GROUP = "flashd"
ACTIONS = ("org.flashd1.use", "org.flashd1.manage", "org.flashd1.administer")
_TIMEOUT_S = 20.0
_NEEDED = {"torch": ("torch", "transformers", "uvicorn", "flashd"), "vllm": ("vllm", "flashd")}


class Verdict(StrEnum):
    """Verdict of flash doctor on one thing."""

    GOOD = "good"
    SLOW = "slow"  # works, but could be faster or better
    BAD = "bad"  # something will fail


@dataclass(frozen=True, slots=True)
class Finding:
    """A finding of flash doctor, with a remedy unless the verdict is good."""

    subject: str
    verdict: Verdict
    found: str
    remedy: str = ""


def examine(toml: str) -> Iterator[Finding]:
    """Yields all findings. `toml` is the configuration of the daemon, empty if it does not answer."""
    unit = unit_properties()
    if unit.get("LoadState") == "loaded":
        yield _unit(unit)
        yield _polkit()
        yield _group()
    yield from _engines(tomllib.loads(toml).get("engines", {}))


def unit_properties() -> Mapping[str, str]:
    """Returns the service manager's properties of the machine's daemon; empty on a machine without systemd."""
    names = "LoadState,ActiveState,SubState,Result,NRestarts,StatusText,MainPID,LimitMEMLOCK"
    said = output_of(["systemctl", "show", "-p", names, UNIT])
    return dict(line.split("=", 1) for line in said.splitlines() if "=" in line)


def output_of(command: Sequence[str]) -> str:
    """Runs a program and returns its output; empty if it is missing, fails or hangs."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=_TIMEOUT_S
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _unit(unit: Mapping[str, str]) -> Finding:
    state = f"{unit.get('ActiveState', '?')} ({unit.get('SubState', '?')})"
    restarts = int(unit.get("NRestarts") or 0)
    if unit.get("ActiveState") == "failed":
        reason = f"{state}, because of {unit.get('Result')}"
        return Finding(
            "service", Verdict.BAD, reason, f"find the cause with journalctl -b -u {UNIT}, then systemctl start flashd"
        )
    if restarts:
        found = f"{state}, restarted {restarts} times since its last manual start"
        return Finding("service", Verdict.SLOW, found, f"find the cause with journalctl -b -u {UNIT}")
    return Finding("service", Verdict.GOOD, state)


def _polkit() -> Finding:
    known = output_of(["pkaction"]).split()
    missing = [action for action in ACTIONS if action not in known]
    if not known:
        remedy = "apt install polkitd; without it only root may make changes"
        return Finding("polkit", Verdict.BAD, "it does not answer", remedy)
    if missing:
        remedy = "its policy is missing: apt install --reinstall flashd"
        return Finding("polkit", Verdict.BAD, f"it does not know {', '.join(missing)}", remedy)
    return Finding("polkit", Verdict.GOOD, "knows flashd's actions")


def _group() -> Finding:
    try:
        group = grp.getgrnam(GROUP)
    except KeyError:
        remedy = "systemd-sysusers, or apt install --reinstall flashd"
        return Finding("group", Verdict.BAD, f"there is no group {GROUP}", remedy)
    user = pwd.getpwuid(os.getuid()).pw_name
    if os.getuid() == 0 or group.gr_gid in {os.getgid(), *os.getgroups()}:
        return Finding("group", Verdict.GOOD, f"{user} may use and manage models")
    if user in group.gr_mem:
        return Finding("group", Verdict.SLOW, f"{user} has joined {GROUP} since logging in", "log out and in again")
    remedy = f"sudo adduser {user} {GROUP}, and log in again; not necessary when logged in at the machine itself"
    return Finding("group", Verdict.SLOW, f"{user} is not in the group {GROUP}", remedy)


def _engines(configured: Mapping[str, Any]) -> Iterator[Finding]:
    """Checks the default kind of engine, and the configured kinds."""
    default = configured.get("default", "auto")
    for kind, needed in _NEEDED.items():
        python = configured.get(kind, {}).get("python", "")
        if not python and kind != ("torch" if default == "auto" else default):
            continue
        yield _engine(kind, needed, python or sys.executable)


def _engine(kind: str, needed: Sequence[str], python: str) -> Finding:
    """Checks that an engine's packages can be found."""
    subject, setting = f"{kind} engine", f"engines.{kind}.python"
    try:
        missing = missing_in(python, needed)
    except Unavailable:
        remedy = f"select another one: flash config {setting} PATH"
        return Finding(subject, Verdict.BAD, f"{python} cannot be run", remedy)
    if missing:
        remedy = f"install them there, or set {setting} to an interpreter that has them"
        return Finding(subject, Verdict.BAD, f"{python} lacks {', '.join(missing)}", remedy)
    return Finding(subject, Verdict.GOOD, f"{python} has what it needs")
