# SPDX-License-Identifier: Apache-2.0
"""How do icon and menu get into the panel? pystray's indicator backend, with its faults closed in one place.

Closed here, each with its test in tests/desktop/test_pystray_faults.py (pystray 0.19.5):
- the library chooses its backend at import: one has no menu at all, and where GTK's binding is there without the
  indicator library ValueError escapes. We ask for the indicator, and say in a sentence what is missing: `load`;
- `update_menu` makes a new menu, renumbers every item, and closes what somebody has open: `_update_menu`;
- quitting, and beginning, raise GLib.Error where there is no notification daemon or bus: `_initialize`, `_finalize`;
- it resets SIGINT, and the main loop hears no other signal: `run`;
- each change of the icon is written to a temporary file without a size of its own: `_update_icon`;
- there is no default action on a click: nothing of ours relies on one.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flashd.errors import Unavailable
from flashd_tray.menu import Action, Entry, Kind, Menu

_PACKAGES = "python3-gi gir1.2-gtk-3.0 gir1.2-ayatanaappindicator3-0.1"
_HOW_TO_GET_THEM = (
    f"on Debian and Ubuntu: apt install {_PACKAGES}; on Fedora: dnf install python3-gobject gtk3"
    " libayatana-appindicator-gtk3; everything can be done without the tray as well: flash list, flash swap"
)


def load() -> Any:
    """The pystray module with its indicator backend. Raises Unavailable, with what to install."""
    if not os.environ.get("DISPLAY") and not os.environ.get("WAYLAND_DISPLAY"):
        raise Unavailable(
            "there is no desktop here to show the tray on",
            hint="start it in a desktop session; in a terminal, flash list and flash swap do the same",
        )
    try:
        importlib.import_module("gi")
    except ImportError:
        raise Unavailable(
            f"GTK's binding for Python is not installed for {sys.executable}", hint=_HOW_TO_GET_THEM
        ) from None
    os.environ["PYSTRAY_BACKEND"] = "appindicator"  # the library's only way to be told
    try:
        return importlib.import_module("pystray")
    except ValueError as error:  # gi.require_version: the library itself is not there
        raise Unavailable(f"the desktop's indicator library is missing: {error}", hint=_HOW_TO_GET_THEM) from None
    except ImportError as error:
        if "initialised" in str(error):
            hint = "is it running, and may this user use it? DISPLAY and WAYLAND_DISPLAY say where it should be"
            raise Unavailable("the desktop cannot be reached", hint=hint) from None
        raise Unavailable(f"the tray's library cannot be used: {error}", hint=_HOW_TO_GET_THEM) from None


def make(name: str, icons: Path, on_action: Callable[[Action], None], on_end: Callable[[], None]) -> Any:
    """A `Tray`; its class can only be made once pystray has been loaded.

    `show(icon_name, title, menu)` may be called from any thread; `run()` returns after `stop()` or a signal.
    """
    pystray = load()
    from gi.repository import GLib

    class Item(pystray.MenuItem):  # type: ignore[misc]
        """A menu item that knows which entry it shows."""

        def __init__(self, tray: Tray, entry: Entry) -> None:
            does = pystray.Menu(*tray.items(entry.children)) if entry.children else lambda: tray.clicked(entry)
            checked = None if entry.kind is Kind.ITEM else lambda _: entry.checked
            super().__init__(
                entry.label, does, checked=checked, radio=entry.kind is Kind.RADIO, enabled=entry.enabled
            )
            self.entry = entry

    class Tray(pystray.Icon):  # type: ignore[misc]
        def __init__(self) -> None:
            self._entries: dict[str, Entry] = {}
            self._widgets: dict[str, Any] = {}
            self._shape: object = None
            self._changing = False
            super().__init__(name)

        def show(self, icon_name: str, title: str, menu: Menu) -> None:
            GLib.idle_add(self._show_now, icon_name, title, menu)

        def run(self) -> None:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                GLib.unix_signal_add(GLib.PRIORITY_HIGH, number, self._on_signal)
            super().run(lambda tray: None)  # it becomes visible with the first `show`

        def later(self, function: Callable[[], object]) -> None:
            """Calls a function in the main loop, where windows may be opened."""
            GLib.idle_add(lambda: function() and False)

        def items(self, menu: Menu) -> list[Any]:
            return [pystray.Menu.SEPARATOR if e.kind is Kind.SEPARATOR else Item(self, e) for e in menu]

        def clicked(self, entry: Entry) -> None:
            """The entry as it is by now: what it does may have changed since its widget was made."""
            now = self._entries.get(entry.key, entry)
            if not self._changing and now.action is not None:
                on_action(now.action)

        def _show_now(self, icon_name: str, title: str, menu: Menu) -> None:
            self._entries = {entry.key: entry for entry in _all(menu)}
            if self.icon != icon_name or self.title != title:
                self._title = title
                self.icon = icon_name  # the name in our theme; pystray only asks whether there is one
            self._menu_wanted = menu
            self._update_menu_now()
            if not self.visible:
                self.visible = True

        def _on_signal(self) -> bool:
            self.stop()
            return True

        # -- what pystray calls ------------------------------------------------------------------------------------

        def _initialize(self) -> None:
            self._mark_ready()

        def _finalize(self) -> None:
            on_end()
            super_finalize = vars(pystray.Icon).get("_finalize")
            assert super_finalize is not None
            del self._appindicator

        def _update_menu(self) -> None:
            GLib.idle_add(self._update_menu_now)

        def _update_menu_now(self) -> None:
            menu = getattr(self, "_menu_wanted", None)
            if menu is None:
                return
            shape = _shape(menu)
            if shape == self._shape:
                self._change_in_place()
                return
            self._shape = shape
            self._widgets = {}
            self._menu = pystray.Menu(*self.items(menu))
            self._menu_handle = self._create_menu(self._menu)
            self._appindicator.set_menu(self._menu_handle)

        def _create_menu_item(self, item: Any) -> Any:
            widget = super()._create_menu_item(item)
            if isinstance(item, Item):
                self._widgets[item.entry.key] = widget
            return widget

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

        def _show(self) -> None:
            from gi.repository.AyatanaAppIndicator3 import IndicatorStatus

            self._update_icon()
            self._appindicator.set_status(IndicatorStatus.ACTIVE)

        def _update_icon(self) -> None:
            if self.icon:
                self._appindicator.set_icon_theme_path(str(icons))
                self._appindicator.set_icon_full(self.icon, self.title)  # the title is what screen readers say
                self._appindicator.set_title(self.title)
                self._icon_valid = True

    return Tray()


def _all(menu: Menu) -> list[Entry]:
    return [found for entry in menu for found in (entry, *_all(entry.children))]


def _shape(menu: Menu) -> object:
    """What cannot be changed in place: which entries there are, of which kind, in which order."""
    return tuple((entry.key, entry.kind, _shape(entry.children)) for entry in menu)
