# SPDX-License-Identifier: Apache-2.0
"""Default locations of files, for a user's daemon and for the machine's daemon."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from pathlib import Path

from flashd.config.environment import runtime_folder, xdg_folder


class Scope(enum.Enum):
    """The two kinds of daemon: a user's own, and the machine's."""

    USER = "user"
    SYSTEM = "system"


# For the machine's engines, which run in their own units (systemd/flashd-engine@.service): the socket that starts them,
# and the folder for compiled code.
ENGINE_SOCKET = Path("/run/flashd-engine.socket")
ENGINE_STATE = Path("/var/lib/flashd-engine")


@dataclass(frozen=True, slots=True)
class Paths:
    """Locations of files, unless settings override them."""

    config: Path  # flashd.toml
    state: Path
    runtime: Path
    models: Path

    @property
    def drop_ins(self) -> Path:
        return self.config.with_name(self.config.name + ".d")


def default_paths(scope: Scope) -> Paths:
    """Follows the XDG base directory specification for a user, the file system hierarchy for the machine."""
    if scope is Scope.SYSTEM:
        state = Path("/var/lib/flashd")
        return Paths(Path("/etc/flashd/flashd.toml"), state, Path("/run/flashd"), state / "models")
    home = Path.home()
    return Paths(
        config=xdg_folder("XDG_CONFIG_HOME", home / ".config") / "flashd" / "flashd.toml",
        state=xdg_folder("XDG_STATE_HOME", home / ".local/state") / "flashd",
        runtime=runtime_folder(),
        models=home / "models",
    )


def cache_folder() -> Path:
    """Returns the folder for files that can be recreated, such as unfinished downloads."""
    return xdg_folder("XDG_CACHE_HOME", Path.home() / ".cache") / "flashd"
