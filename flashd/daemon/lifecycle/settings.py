# SPDX-License-Identifier: Apache-2.0
"""The configuration in force in this process, and changes of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from flashd.config import loading
from flashd.config.paths import Paths
from flashd.config.settings import Config
from flashd.durable import clear
from flashd.errors import InvalidArgument, TransferFailed


class Settings:
    """The configuration of this daemon."""

    def __init__(self, paths: Paths, overrides: Mapping[str, Any]) -> None:
        self.paths = paths
        self._overrides = overrides
        clear(paths.drop_ins)
        self.current: Config = self.next()
        self.on_change: Callable[[], None] = lambda: None  # called when a setting was changed that takes effect at once

    def next(self) -> Config:
        """Returns what the next daemon would start with. Raises InvalidArgument or TransferFailed."""
        return loading.load(self.paths, self._overrides)

    def change(self, key: str, text: str) -> bool:
        """Changes a setting. Returns whether that requires a restart. Raises InvalidArgument."""
        if key in self._overrides:
            hint = "start the daemon without that option to change the setting"
            raise InvalidArgument(f"{key} was given on the command line, which overrides it", hint=hint)
        try:
            loading.set_value(self.paths, key, text)
        except TransferFailed:  # the file may be replaced even so; the settings that a restart would read are in force
            self._take_over(key)
            raise
        return self._take_over(key)

    def _take_over(self, key: str) -> bool:
        setting = loading.find(key)
        value = loading.value_of(self.next(), key)
        if value == loading.value_of(self.current, key):
            return False
        if setting.live:
            self.current = loading.with_value(self.current, key, value)
            self.on_change()
        return not setting.live
