# SPDX-License-Identifier: Apache-2.0
"""Which windows does the tray open? Few: an error in full, who we are, and a model found by typing.

All functions here belong in the main loop. GTK 3, because the indicator library is bound to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import flashd
from flashd.client import Model
from flashd_tray.menu import model_label, most_used_first
from flashd_tray.words import Words

WIDTH, HEIGHT = 460, 420


def gtk() -> Any:
    import gi

    gi.require_version("Gtk", "3.0")
    from gi.repository import Gtk

    return Gtk


def copy(text: str) -> None:
    """To the clipboard, where it stays when we end."""
    import gi

    gi.require_version("Gdk", "3.0")
    from gi.repository import Gdk

    clipboard = gtk().Clipboard.get(Gdk.SELECTION_CLIPBOARD)
    clipboard.set_text(text, -1)
    clipboard.store()


def show_error(title: str, text: str, _: Words) -> None:
    """What went wrong, in words that can be selected and copied."""
    Gtk = gtk()
    dialog = Gtk.MessageDialog(message_type=Gtk.MessageType.ERROR, text=title, secondary_text=text)
    dialog.set_title("flashd")
    dialog.add_button(_("Copy"), Gtk.ResponseType.APPLY)
    dialog.add_button(_("Close"), Gtk.ResponseType.CLOSE)
    dialog.set_default_response(Gtk.ResponseType.CLOSE)
    for label in dialog.get_message_area().get_children():
        label.set_selectable(True)

    def respond(_dialog: Any, response: int) -> None:
        if response == Gtk.ResponseType.APPLY:
            copy(f"{title}\n{text}")
        dialog.destroy()

    dialog.connect("response", respond)
    dialog.present()


def show_about(daemon_version: str, icon: Path, _: Words) -> None:
    Gtk = gtk()
    from gi.repository import GdkPixbuf

    dialog = Gtk.AboutDialog(
        program_name="flashd",
        version=flashd.__version__,
        comments=_("Holds a hundred models and switches between them while you watch.")
        + (("\n" + _("The daemon has version {version}.", version=daemon_version)) if daemon_version else ""),
        license_type=Gtk.License.APACHE_2_0,
        logo=GdkPixbuf.Pixbuf.new_from_file(str(icon)),
    )
    dialog.connect("response", lambda *_args: dialog.destroy())
    dialog.present()


class Finder:
    """One window with a search entry and the models that match; Return or a double click swaps to one."""

    def __init__(self, on_chosen: Callable[[str], None], words: Words) -> None:
        self._on_chosen = on_chosen
        self._words = words
        self._window: Any = None
        self._models: list[Model] = []

    def show(self, models: Sequence[Model]) -> None:
        """Opens the window, or brings it to the front."""
        self.update(models)
        if self._window is None:
            self._build()
        self._window.present()

    def update(self, models: Sequence[Model]) -> None:
        """What the window shows from now on, if it is open."""
        changed = most_used_first(models)
        if changed != self._models:
            self._models = changed
            if self._window is not None:
                self._fill()

    def _build(self) -> None:
        Gtk, _ = gtk(), self._words
        self._window = Gtk.Window(title=_("flashd: find a model"), icon_name="flashd")
        self._window.set_default_size(WIDTH, HEIGHT)
        self._search = Gtk.SearchEntry(placeholder_text=_("Part of a name"))
        self._search.get_accessible().set_name(_("Part of a name"))
        self._list = Gtk.ListBox(activate_on_single_click=False)
        self._list.get_accessible().set_name(_("Models"))
        self._list.set_filter_func(self._matches)
        self._list.set_placeholder(Gtk.Label(label=_("No model has that in its name"), visible=True, margin=24))
        scrolled = Gtk.ScrolledWindow(vexpand=True)
        scrolled.add(self._list)
        box = Gtk.Box(orientation=Gtk.Orientation.VERTICAL, spacing=6, margin=6)
        box.add(self._search)
        box.add(scrolled)
        self._window.add(box)
        self._search.connect("search-changed", lambda _entry: self._list.invalidate_filter())
        self._search.connect("activate", lambda _entry: self._choose(self._first()))
        self._search.connect("stop-search", lambda _entry: self._window.destroy())
        self._list.connect("row-activated", lambda _list, row: self._choose(row))
        self._window.connect("destroy", lambda _window: self._forget())
        self._fill()
        box.show_all()

    def _fill(self) -> None:
        Gtk = gtk()
        for row in self._list.get_children():
            self._list.remove(row)
        for model in self._models:
            label = Gtk.Label(label=model_label(model, self._words), xalign=0.0, margin=6, ellipsize=3)
            row = Gtk.ListBoxRow()
            row.add(label)
            row.model_name = model.name
            row.sought = " ".join((model.name, *model.aliases, model.architecture)).casefold()
            self._list.add(row)
        self._list.show_all()

    def _matches(self, row: Any) -> bool:
        return all(part in row.sought for part in self._search.get_text().casefold().split())

    def _first(self) -> Any:
        selected = self._list.get_selected_row()
        if selected is not None and self._matches(selected):
            return selected
        return next((row for row in self._list.get_children() if self._matches(row)), None)

    def _choose(self, row: Any) -> None:
        if row is not None:
            name = row.model_name
            self._window.destroy()
            self._on_chosen(name)

    def _forget(self) -> None:
        self._window = None
