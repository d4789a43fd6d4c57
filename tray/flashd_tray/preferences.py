# SPDX-License-Identifier: Apache-2.0
"""Choices of this person for the tray, and the file that keeps them.

Notifications: `tray.toml` beside flashd's own configuration. Start at login: an entry in the desktop's autostart folder
(XDG Desktop Application Autostart Specification), where any settings program sees it and may change it as well.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import tomli_w

log = logging.getLogger(__name__)

DESKTOP_FILE = "flashd-tray.desktop"


class Topic(StrEnum):
    """Subjects of notifications."""

    READY = "ready"
    FAILED = "failed"
    SWAPPED = "swapped"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Preferences:
    topics: frozenset[Topic] = frozenset(Topic)
    autostart: bool = False


class PreferencesFile:
    """Reads and saves preferences. Unreadable values count as the default, and are logged."""

    def __init__(self, config_home: Path, system_autostart: Sequence[Path], command: Sequence[str]) -> None:
        """`command` starts the tray; `system_autostart` are folders whose entries a file of the same name overrides."""
        self._file = config_home / "flashd" / "tray.toml"
        self._autostart = config_home / "autostart" / DESKTOP_FILE
        self._system_autostart = system_autostart
        self._command = command

    def read(self) -> Preferences:
        return Preferences(self._topics(), self._autostarts())

    def toggle(self, topic: Topic) -> Preferences:
        before = self.read()
        after = dataclasses.replace(before, topics=before.topics ^ {topic})
        document = self._document()
        document["notifications"] = {str(known): known in after.topics for known in Topic}
        _publish(self._file, tomli_w.dumps(document))
        return after

    def toggle_autostart(self) -> Preferences:
        """Enables start at login (by our entry) or disables it (by no entry, or one that hides the machine's)."""
        if not self._autostarts():
            _publish(self._autostart, self._entry())
        elif any((folder / DESKTOP_FILE).exists() for folder in self._system_autostart):
            _publish(self._autostart, "[Desktop Entry]\nType=Application\nName=flashd\nHidden=true\n")
        else:
            self._autostart.unlink(missing_ok=True)
        return self.read()

    def _topics(self) -> frozenset[Topic]:
        chosen = self._document().get("notifications", {})
        if not isinstance(chosen, dict):
            return frozenset(Topic)
        return frozenset(topic for topic in Topic if chosen.get(topic, True))

    def _document(self) -> dict[str, object]:
        try:
            return tomllib.loads(self._file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            log.warning("%s is not read: %s", self._file, error)
            return {}

    def _autostarts(self) -> bool:
        """Tells whether the tray starts at login: the first file of this name counts, and Hidden=true disables it."""
        for folder in (self._autostart.parent, *self._system_autostart):
            try:
                lines = (folder / DESKTOP_FILE).read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError):
                continue
            return not {"Hidden=true", "X-GNOME-Autostart-enabled=false"} & {line.replace(" ", "") for line in lines}
        return False

    def _entry(self) -> str:
        command = " ".join(_exec_argument(word) for word in self._command)
        return (
            "[Desktop Entry]\nType=Application\nName=flashd\nComment=Switch between language models\n"
            f"Exec={command}\nIcon=flashd\nX-GNOME-Autostart-enabled=true\n"
        )


def _exec_argument(word: str) -> str:
    """Desktop Entry Specification, The Exec key: quoted for it, and then for a value of type string."""
    quoted = '"' + re.sub(r'(["`$\\])', r"\\\1", word) + '"' if re.search(r"[^\w@%+=:,./-]", word) else word
    return quoted.replace("\\", "\\\\").replace("%", "%%")  # a lone % would be a field code


def config_home() -> Path:
    """XDG Base Directory Specification: relative paths are to be ignored."""
    path = Path(os.environ.get("XDG_CONFIG_HOME", ""))
    return path if path.is_absolute() else Path.home() / ".config"


def system_autostart() -> list[Path]:
    return [Path(folder) / "autostart" for folder in os.environ.get("XDG_CONFIG_DIRS", "/etc/xdg").split(":") if folder]


def _publish(path: Path, text: str) -> None:
    """Replaces a file by rename: a crash leaves the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)
