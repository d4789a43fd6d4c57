# SPDX-License-Identifier: Apache-2.0
"""Icon and menu in the panel: pystray's indicator, with workarounds for its bugs.

Import it through `shell.load`. The bugs, each with a test in tests/desktop/test_pystray_faults.py (0.19.4, 0.19.5), and
their workarounds:
- `update_menu`, also called after each click, makes a new menu and renumbers all items, so that a panel closes an open
  menu, or clicks the wrong item: `_adjust` changes the existing menu item by item;
- starting and quitting raise GLib.Error without a notification daemon: `_initialize`, `_finalize`;
- it resets SIGINT, and its main loop handles no other signal: `run`;
- each change of the icon is written to a temporary file of one size: `_update_icon`;
- there is no default action on a click: we do not rely on one.

And one of libayatana-appindicator: if the panel refuses us because it is still starting, as at login, it never tries
again: `_look_again`.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import gi
import pystray

gi.require_version("AyatanaAppIndicator3", "0.1")
from gi.repository import Gio, GLib, Gtk  # noqa: E402 -- versions are chosen before
from gi.repository.AyatanaAppIndicator3 import Indicator as Indicator3  # noqa: E402
from gi.repository.AyatanaAppIndicator3 import IndicatorCategory, IndicatorStatus  # noqa: E402

from flashd_tray.menu import Action, Entry, Kind, Menu  # noqa: E402

_WATCHER, _WATCHER_PATH = "org.kde.StatusNotifierWatcher", "/StatusNotifierWatcher"
_LOOK_AGAIN_S = 2
_LOOKS = 5
_PANEL_MS = 3000

Identity = tuple[str, Kind, bool, str]


class _Item(pystray.MenuItem):  # type: ignore[misc]
    """A menu item that knows which entry it shows."""

    def __init__(self, entry: Entry, on_click: Callable[[Entry], None]) -> None:
        super().__init__(
            entry.label,
            lambda: on_click(entry),
            checked=None if entry.kind is Kind.ITEM else lambda _item: entry.checked,
            radio=entry.kind is Kind.RADIO,
            enabled=entry.enabled,
        )


@dataclass(slots=True)
class _Row:
    """An entry as it is shown now, with the rows of its submenu."""

    entry: Entry
    widget: Any
    rows: list[_Row]
    submenu: Any = None

    @property
    def identity(self) -> Identity:
        return _identity(self.entry)


class Indicator(pystray.Icon):  # type: ignore[misc]
    """The indicator. Created and run in the main thread; `show`, `later` and `stop` may be called from any thread."""

    def __init__(
        self, name: str, icons: Path, on_action: Callable[[Action], None], on_no_panel: Callable[[], None]
    ) -> None:
        """`on_no_panel` is called if no panel shows the icon at the start."""
        self._icons = icons
        self._on_action = on_action
        self._on_no_panel: Callable[[], None] | None = on_no_panel
        self._wanted: Menu = ()
        self._entries: dict[str, Entry] = {}
        self._rows: list[_Row] = []
        self._changing = False
        self._title = name
        self._menu_handle: Any = None
        self._appindicator: Any = None
        super().__init__(name)
        if self._appindicator is None:  # 0.19.4, which Debian 12 has, would make it only when it is shown
            self._appindicator = Indicator3.new(name, "", IndicatorCategory.APPLICATION_STATUS)

    def show(self, icon_name: str, title: str, menu: Menu) -> None:
        GLib.idle_add(self._show_now, icon_name, title, menu)

    def later(self, function: Callable[[], object]) -> None:
        """Calls a function in the main loop, where windows may be opened."""

        def once() -> bool:
            function()
            return False

        GLib.idle_add(once)

    def run(self) -> None:
        """Runs until `stop`, Ctrl-C, or the end of the session."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            GLib.unix_signal_add(GLib.PRIORITY_HIGH, number, self._on_signal)
        self._watch_panel()
        super().run(lambda _icon: None)  # it becomes visible with the first `show`

    def _watch_panel(self) -> None:
        Gio.bus_watch_name(
            Gio.BusType.SESSION,
            _WATCHER,
            Gio.BusNameWatcherFlags.NONE,
            self._on_panel,
            self._on_panel_away,
        )

    def _on_panel(self, bus: Any, _name: str, _owner: str) -> None:
        self._on_no_panel = None
        GLib.timeout_add_seconds(_LOOK_AGAIN_S, self._look_again, bus, _LOOKS)

    def _on_panel_away(self, _bus: Any, _name: str) -> None:
        tell, self._on_no_panel = self._on_no_panel, None
        if tell is not None:
            tell()

    def _look_again(self, bus: Any, looks_left: int) -> bool:
        """Checks whether a newly started panel lists us, and otherwise sets the menu again, which registers us."""

        def answered(_bus: Any, result: Any) -> None:
            try:
                (items,) = bus.call_finish(result).unpack()
            except GLib.Error:
                items = []
            if not any(str(item).startswith(bus.get_unique_name()) for item in items) and self._menu_handle is not None:
                self._appindicator.set_menu(self._menu_handle)
                if looks_left > 1:
                    GLib.timeout_add_seconds(_LOOK_AGAIN_S, self._look_again, bus, looks_left - 1)

        asked = GLib.Variant("(ss)", (_WATCHER, "RegisteredStatusNotifierItems"))
        properties = "org.freedesktop.DBus.Properties"
        bus.call(_WATCHER, _WATCHER_PATH, properties, "Get", asked, None, 0, _PANEL_MS, None, answered)
        return False

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
        """Carries out the current action of the entry, which may have changed since its widget was made."""
        action = self._entries.get(entry.key, entry).action
        if action is not None and not self._changing:
            self._on_action(action)

    def _update_menu_now(self) -> None:
        if not self._wanted:
            return
        if self._menu_handle is None:
            self._menu_handle = Gtk.Menu()
            self._adjust(self._menu_handle, self._rows, self._wanted)
            self._appindicator.set_menu(self._menu_handle)  # for good
        else:
            self._adjust(self._menu_handle, self._rows, self._wanted)

    def _adjust(self, shown: Any, rows: list[_Row], wanted: Menu) -> None:
        """Changes a menu to the wanted entries. Existing items keep their numbers; others are removed or added."""
        matched = SequenceMatcher(None, [row.identity for row in rows], [_identity(e) for e in wanted], autojunk=False)
        after: list[_Row] = []
        for operation, start, stop, first, last in matched.get_opcodes():
            if operation == "equal":
                kept = rows[start:stop]
                for row, entry in zip(kept, wanted[first:last], strict=True):
                    self._refresh(row, entry)
                after += kept
                continue
            for row in rows[start:stop]:
                shown.remove(row.widget)
            for entry in wanted[first:last]:
                row = self._made(entry)
                shown.insert(row.widget, len(after))
                after.append(row)
        rows[:] = after

    def _made(self, entry: Entry) -> _Row:
        separator = entry.kind is Kind.SEPARATOR
        widget = self._create_menu_item(pystray.Menu.SEPARATOR if separator else _Item(entry, self._clicked))
        row = _Row(entry, widget, [])
        if entry.children:
            row.submenu = Gtk.Menu()
            self._adjust(row.submenu, row.rows, entry.children)
            widget.set_submenu(row.submenu)
        widget.show()
        return row

    def _refresh(self, row: _Row, entry: Entry) -> None:
        """Updates the differences to the displayed row.

        A click has toggled its check mark, even if the action failed.
        """
        row.entry = entry
        if entry.kind is Kind.SEPARATOR:
            return
        self._changing = True
        try:
            if row.widget.get_label() != entry.label:
                row.widget.set_label(entry.label)
            if row.widget.get_sensitive() != entry.enabled:
                row.widget.set_sensitive(entry.enabled)
            if entry.kind is not Kind.ITEM and row.widget.get_active() != entry.checked:
                row.widget.set_active(entry.checked)
        finally:
            self._changing = False
        if row.submenu is not None:
            self._adjust(row.submenu, row.rows, entry.children)

    # -- what pystray calls, in place of its own ---------------------------------------------------------------------

    def _initialize(self) -> None:
        self._mark_ready()

    def _finalize(self) -> None:
        self._appindicator.set_status(IndicatorStatus.PASSIVE)
        del self._appindicator

    def _update_menu(self) -> None:
        GLib.idle_add(self._update_menu_now)

    def _show(self) -> None:
        self._update_icon()
        self._appindicator.set_status(IndicatorStatus.ACTIVE)

    def _hide(self) -> None:
        """Does nothing: `_finalize` hides the indicator while it exists."""

    def _update_icon(self) -> None:
        if self._icon:
            self._appindicator.set_icon_theme_path(str(self._icons))
            self._appindicator.set_icon_full(self._icon, self._title)  # the title is what screen readers say
            self._appindicator.set_title(self._title)
            self._icon_valid = True


def _all(menu: Menu) -> list[Entry]:
    return [found for entry in menu for found in (entry, *_all(entry.children))]


def _identity(entry: Entry) -> Identity:
    """Identifies the part of an entry that cannot be changed in place.

    A label with an underscore is among that: libdbusmenu doubles it for a new item (where a single one would stand
    before an access key) and forgets to when a label changes, so that my_model would be shown as mymodel.
    """
    return entry.key, entry.kind, bool(entry.children), entry.label if "_" in entry.label else ""
