# SPDX-License-Identifier: Apache-2.0
"""How do icon and menu get into the panel? pystray's indicator, with its faults closed in one place.

Import it through `shell.load`. Closed here, each with a test in tests/desktop/test_pystray_faults.py (pystray 0.19.5):
- `update_menu`, which it calls after each click too, makes a new menu, renumbers every item and closes what somebody
  has open: `_update_menu_now`;
- beginning and quitting raise GLib.Error where there is no notification daemon: `_initialize`, `_finalize`;
- it resets SIGINT, and its main loop hears no other signal: `run`;
- each change of the icon is written to a temporary file of one size: `_update_icon`;
- there is no default action on a click: nothing of ours relies on one.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gi
import pystray

gi.require_version("AyatanaAppIndicator3", "0.1")
from gi.repository import GLib  # noqa: E402 -- versions are chosen before
from gi.repository.AyatanaAppIndicator3 import IndicatorStatus  # noqa: E402

from flashd_tray.menu import Action, Entry, Kind, Menu  # noqa: E402


class _Item(pystray.MenuItem):  # type: ignore[misc]
    """A menu item that knows which entry it shows."""

    def __init__(self, entry: Entry, children: list[Any], on_click: Callable[[Entry], None]) -> None:
        super().__init__(
            entry.label,
            pystray.Menu(*children) if children else lambda: on_click(entry),
            checked=None if entry.kind is Kind.ITEM else lambda _item: entry.checked,
            radio=entry.kind is Kind.RADIO,
            enabled=entry.enabled,
        )
        self.entry = entry


class Indicator(pystray.Icon):  # type: ignore[misc]
    """Made and run in the main thread. `show`, `later` and `stop` may be called from any."""

    def __init__(self, name: str, icons: Path, on_action: Callable[[Action], None]) -> None:
        self._icons = icons
        self._on_action = on_action
        self._wanted: Menu = ()
        self._entries: dict[str, Entry] = {}
        self._widgets: dict[str, Any] = {}
        self._shown_shape: object = None
        self._changing = False
        self._title = name
        super().__init__(name)

    def show(self, icon_name: str, title: str, menu: Menu) -> None:
        GLib.idle_add(self._show_now, icon_name, title, menu)

    def later(self, function: Callable[[], object]) -> None:
        """Calls a function in the main loop, where windows may be opened."""

        def once() -> bool:
            function()
            return False

        GLib.idle_add(once)

    def run(self) -> None:
        """Returns after `stop`, Ctrl-C, or the session's end."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            GLib.unix_signal_add(GLib.PRIORITY_HIGH, number, self._on_signal)
        super().run(lambda _icon: None)  # it becomes visible with the first `show`

    def _on_signal(self) -> bool:
        self.stop()
        return True

    def _show_now(self, icon_name: str, title: str, menu: Menu) -> None:
        self._wanted = menu
        self._entries = {entry.key: entry for entry in _all(menu)}
        self._update_menu_now()
        if (self._icon, self._title) != (icon_name, title):
            self._title = title
            self.icon = icon_name  # a name in our theme where pystray has an image: it only asks whether there is one
        self.visible = True

    def _clicked(self, entry: Entry) -> None:
        """What the entry does by now, which may be other than when its widget was made."""
        action = self._entries.get(entry.key, entry).action
        if action is not None and not self._changing:
            self._on_action(action)

    def _items(self, menu: Menu) -> list[Any]:
        return [
            pystray.Menu.SEPARATOR
            if entry.kind is Kind.SEPARATOR
            else _Item(entry, self._items(entry.children), self._clicked)
            for entry in menu
        ]

    def _update_menu_now(self) -> None:
        shape = _shape(self._wanted)
        if shape == self._shown_shape:
            self._change_in_place()
            return
        self._shown_shape = shape
        self._widgets = {}
        self._menu = pystray.Menu(*self._items(self._wanted))
        self._menu_handle = self._create_menu(self._menu)
        self._appindicator.set_menu(self._menu_handle)

    def _change_in_place(self) -> None:
        """Only what differs from what is shown: a click has ticked its item, whether or not it came true."""
        self._changing = True
        try:
            for key, widget in self._widgets.items():
                entry = self._entries[key]
                if widget.get_label() != entry.label:
                    widget.set_label(entry.label)
                if widget.get_sensitive() != entry.enabled:
                    widget.set_sensitive(entry.enabled)
                if entry.kind is not Kind.ITEM and widget.get_active() != entry.checked:
                    widget.set_active(entry.checked)
        finally:
            self._changing = False

    # -- what pystray calls, in place of its own ---------------------------------------------------------------------

    def _initialize(self) -> None:
        self._mark_ready()

    def _finalize(self) -> None:
        self._appindicator.set_status(IndicatorStatus.PASSIVE)
        del self._appindicator

    def _update_menu(self) -> None:
        if self._wanted:
            GLib.idle_add(self._update_menu_now)

    def _create_menu_item(self, item: Any) -> Any:
        widget = super()._create_menu_item(item)
        if isinstance(item, _Item):
            self._widgets[item.entry.key] = widget
        return widget

    def _show(self) -> None:
        self._update_icon()
        self._appindicator.set_status(IndicatorStatus.ACTIVE)

    def _hide(self) -> None:
        """Done by `_finalize`, while there is an indicator to hide."""

    def _update_icon(self) -> None:
        if self._icon:
            self._appindicator.set_icon_theme_path(str(self._icons))
            self._appindicator.set_icon_full(self._icon, self._title)  # the title is what screen readers say
            self._appindicator.set_title(self._title)
            self._icon_valid = True


def _all(menu: Menu) -> list[Entry]:
    return [found for entry in menu for found in (entry, *_all(entry.children))]


def _shape(menu: Menu) -> object:
    """What cannot be changed in place: which entries there are, of which kind, in which order."""
    return tuple((entry.key, entry.kind, _shape(entry.children)) for entry in menu)
