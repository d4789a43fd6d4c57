# SPDX-License-Identifier: Apache-2.0
"""Which configuration is in force in this process, and how is it changed while it runs?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flashd import config as configuration
from flashd.config import Config, Paths
from flashd.errors import InvalidArgument


class Settings:
    """The configuration that this daemon runs with."""

    def __init__(self, paths: Paths, overrides: Mapping[str, Any]) -> None:
        self.paths = paths
        self._overrides = overrides
        self.current: Config = configuration.load(paths, overrides)

    def to_toml(self) -> str:
        return configuration.dump(self.current)

    def change(self, key: str, text: str) -> bool:
        """Writes a setting; returns whether the daemon must be restarted for it. Raises InvalidArgument."""
        if key in self._overrides:
            hint = "start the daemon without that option to configure it"
            raise InvalidArgument(f"{key} was given on the command line, which overrides it", hint=hint)
        setting = configuration.set_value(self.paths, key, text)
        after = configuration.load(self.paths, self._overrides)
        value = configuration.value_of(after, key)
        if value == configuration.value_of(self.current, key):
            return False
        if setting.live:
            self.current = configuration.with_value(self.current, key, value)
        return not setting.live
