# SPDX-License-Identifier: Apache-2.0
"""`flash report`: writes all facts about this machine that a bug report needs into one file, without private ones."""

from __future__ import annotations

import dataclasses
import grp
import json
import os
import platform
import pwd
import socket
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

from flashd._version import __version__
from flashd.cli import doctor, installation, output
from flashd.cli.parameters import Argument, Context
from flashd.cli.redaction import Redactor, numbered
from flashd.cli.session import session
from flashd.client.client import Client, connect
from flashd.errors import (
    AlreadyExists,
    EngineFailed,
    EngineOutOfMemory,
    FlashdError,
    Internal,
    TransferFailed,
    Unsupported,
)
from flashd.memory.device import memory_fields

_JOURNAL_LINES = 300
# Free text from users, which may contain anything.
_FREE = ("arguments", "environment", "adapters", "prewarm")
# These contain the last words of an engine, which may quote a prompt.
_ENGINES_WORDS = {cls.bus_name() for cls in (EngineFailed, EngineOutOfMemory, Unsupported, Internal)}
_ENGINES_LOGGERS = ("flashd.engines", "flashd.swap")
_SENTENCES = ("daemon", "doctor", "journal")  # sections whose sentences name what they happened to
_PRIVATE_PATHS = ("folders", "path", "python")


def report(
    context: Context,
    file: Annotated[Path | None, Argument(help="The file to create; - for standard output.")] = None,
) -> None:
    """Collects the facts for a bug report in one file, without secrets, names, home directories or prompts."""
    text = collect(session(context).bus)
    if str(file) == "-":
        print(text, end="")
        return
    target = file or Path(time.strftime("flashd-report-%Y%m%d-%H%M%S.txt"))
    try:
        descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise AlreadyExists(f"{target} exists", hint="name another file") from None
    except OSError as error:
        raise TransferFailed(f"cannot write {target}: {error.strerror}", hint="name a file in another folder") from None
    with os.fdopen(descriptor, "w", encoding="utf-8") as made:
        made.write(text)
    output.say(f"{target}: read it before you attach it to a bug report")


def collect(bus: str | None) -> str:
    journal = list(_journal())
    names = [entry["FLASHD_MODEL"] for entry in journal if entry.get("FLASHD_MODEL")]
    sections = [("versions", _versions()), ("machine", _machine())]
    try:
        with connect(bus) as client:
            names = [*_names(client), *names]
            for title, part in (("configuration", _configuration), ("daemon", _daemon)):
                sections.append((title, _or_why_not(part, client)))
    except FlashdError as error:
        sections.append(("daemon", str(error)))
    sections.append(("doctor", "\n".join(_doctor(bus))))
    if unit := installation.unit_properties():
        sections.append(("service", "\n".join(f"{name}={value}" for name, value in sorted(unit.items()))))
    sections.append(("journal", "\n".join(map(_line, journal)) or "empty, or readable only with sudo"))
    redactor = Redactor({**_people(), **numbered(names, "model")})
    cleaned = ((t, (redactor.clean_sentences if t in _SENTENCES else redactor.clean)(text)) for t, text in sections)
    return "".join(f"== {title} ==\n{text}\n\n" for title, text in cleaned)


def _people() -> dict[str, str]:
    """Returns substitutes for the names of this machine and its users."""
    known = {socket.gethostname(): "[machine]", socket.gethostname().split(".")[0]: "[machine]"}
    humans = [user for user in pwd.getpwall() if user.pw_uid >= 1000 or user.pw_uid == os.getuid() != 0]
    for user in humans:
        known |= {user.pw_name: "[user]", user.pw_dir: "[path]", user.pw_gecos.split(",")[0]: "[user]"}
    for group in grp.getgrall():
        known |= {group.gr_name: "[group]"} if group.gr_gid >= 1000 else {}
    known |= {str(Path.home()): "[path]"}
    return {word: meaning for word, meaning in known.items() if word not in {"", "/", "flashd", "localhost", "nobody"}}


def _names(client: Client) -> Iterator[str]:
    """Yields names that users have chosen."""
    for model in client.models():
        yield from (model.name, *model.aliases)
    yield from (job.subject for job in client.jobs() if job.subject)
    status = client.status()
    yield from (item.name for item in status.inbox_items)
    yield from (name for stray in status.inbox_strays for name in (stray.path, Path(stray.path).name))


def _versions() -> str:
    release = {}
    with suppress(OSError):
        release = platform.freedesktop_os_release()
    python = f"Python {platform.python_version()} ({platform.machine()})"
    return f"flashd {__version__}\n{python}\nLinux {platform.release()}\n{release.get('PRETTY_NAME', sys.platform)}"


def _machine() -> str:
    wanted = ("MemTotal", "MemAvailable", "Cached", "Shmem", "SwapTotal", "HugePages_Total", "AnonHugePages")
    fields = memory_fields()
    lines = [f"{os.cpu_count()} processors", *(f"{name}: {fields[name]}" for name in wanted if name in fields)]
    with suppress(OSError):
        lines.append("shmem_enabled: " + Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled").read_text().strip())
    gpus = installation.output_of(
        ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    )
    return "\n".join([*lines, *gpus.splitlines()])


def _or_why_not(part: Callable[[Client], str], client: Client) -> str:
    try:
        return part(client)
    except FlashdError as error:
        return str(error)


def _configuration(client: Client) -> str:
    """Formats the configuration without free text and paths."""
    found = tomllib.loads(client.config())
    models = {str(number): table for number, table in enumerate(found.get("models", {}).values(), start=1)}
    return "\n".join(_settings(found | {"models": models}, ""))


def _settings(table: dict[str, Any], prefix: str) -> Iterator[str]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _settings(value, f"{prefix}{key}.")
        elif key in _FREE or key in _PRIVATE_PATHS:
            yield f"{prefix}{key} = [{'set' if value else 'not set'}]"
        else:
            yield f"{prefix}{key} = {json.dumps(value)}"


def _daemon(client: Client) -> str:
    status = client.status()
    facts = [
        f"version {status.version}, {status.state}, store {status.store_bytes} of {status.store_quota_bytes or 'any'}"
    ]
    hidden = {"name", "aliases", "source", "path", "owner_uid", "model", "endpoint", "uuid", "checkpoint"}
    for title, things in (
        ("model", client.models()),
        ("engine", client.engines()),
        ("device", client.devices()),
        ("inbox item", status.inbox_items),
        ("inbox stray", status.inbox_strays),
    ):
        facts += [f"{title}: {_shown(thing, hidden)}" for thing in things]
    for job in client.jobs():
        words = "" if job.error_name in _ENGINES_WORDS else _one_line(job.error_message)
        facts.append(f"job {job.number}: {job.kind} {job.state} {job.error_name} {words}".rstrip())
    return "\n".join(facts)


def _shown(thing: Any, hidden: set[str]) -> str:
    return " ".join(
        f"{name}={_one_line(str(value))}" for name, value in dataclasses.asdict(thing).items() if name not in hidden
    )


def _doctor(bus: str | None) -> Iterator[str]:
    for finding in doctor.examine(bus):
        yield f"{finding.verdict} {finding.subject}: {finding.found}"


def _journal() -> Iterator[dict[str, str]]:
    """Yields the last entries of the daemon's journal, without those of engines, which may quote prompts."""
    command = ["journalctl", "-q", "-u", installation.UNIT, "-n", str(_JOURNAL_LINES), "-o", "json", "--no-pager"]
    for line in installation.output_of(command).splitlines():
        with suppress(ValueError):
            entry = json.loads(line)
            if entry.get("SYSLOG_IDENTIFIER") in {"flashd", "systemd"}:
                yield {name: value for name, value in entry.items() if isinstance(value, str)}


def _line(entry: dict[str, str]) -> str:
    at = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(int(entry.get("__REALTIME_TIMESTAMP", "0")) / 1e6))
    message = _one_line(entry.get("MESSAGE", ""))
    if entry.get("FLASHD_ERROR") in _ENGINES_WORDS or entry.get("LOGGER", "").startswith(_ENGINES_LOGGERS):
        logger, _, rest = message.partition(": ")
        message = f"{logger}: {rest.partition(': ')[0]} {entry.get('FLASHD_ERROR', '')}".rstrip()
    return f"{at} {message}"


def _one_line(text: str) -> str:
    return " / ".join(text.splitlines())
