# SPDX-License-Identifier: Apache-2.0
"""Windows of the tray: an error in full, information about flashd, and a model found by typing.

All functions here belong in the main loop. GTK 3, because the indicator library is bound to it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from flashd._version import __version__
from flashd.client.results import Model
from flashd_tray.menu import (
    SERVING_MARK,
    Action,
    Verb,
    instead_of_models,
    model_details,
    model_label,
    most_used_first,
)
from flashd_tray.plain import line, paragraph
from flashd_tray.snapshot import Snapshot
from flashd_tray.words import Words

WIDTH, HEIGHT = 460, 420
_IN_THE_MIDDLE = 2  # Pango.EllipsizeMode: names of fine-tunes differ at their ends


def gtk() -> Any:
    import gi

    gi.require_version("Gtk", "3.0")
    from gi.repository import Gtk

    return Gtk


def begin(icon: Path) -> None:
    """Ends the desktop's busy pointer, and gives windows an icon, even if the theme has none for us."""
    from gi.repository import Gdk

    gtk().Window.set_default_icon_from_file(str(icon))
    Gdk.notify_startup_complete()


def copy(text: str) -> None:
    """Copies to the clipboard, where it stays when we end."""
    import gi

    gi.require_version("Gdk", "3.0")
    from gi.repository import Gdk

    clipboard = gtk().Clipboard.get(Gdk.SELECTION_CLIPBOARD)
    clipboard.set_text(text, -1)
    clipboard.store()


def show_error(title: str, text: str, _: Words) -> None:
    """Shows an error and, separately, its remedy, as text that can be selected and copied."""
    Gtk = gtk()
    title, text = line(title), paragraph(text)
    apart = text.replace("\n", "\n\n", 1)
    dialog = Gtk.MessageDialog(message_type=Gtk.MessageType.ERROR, text=title, secondary_text=apart)
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
        version=__version__,
        comments=_("Keeps a hundred models in memory and switches between them in moments.")
        + (("\n" + _("The daemon has version {version}.", version=line(daemon_version))) if daemon_version else ""),
        license_type=Gtk.License.APACHE_2_0,
        logo=GdkPixbuf.Pixbuf.new_from_file(str(icon)),
    )
    dialog.connect("response", lambda *_args: dialog.destroy())
    dialog.present()


class Finder:
    """A window with a search entry and the matching models. Return or a double click swaps to one.

    If there are no models, it says why, and offers actions.
    """

    def __init__(self, on_action: Callable[[Action], None], words: Words) -> None:
        self._on_action = on_action
        self._words = words
        self._window: Any = None
        self._snapshot = Snapshot()

    def show(self, snapshot: Snapshot, startup_id: str = "") -> None:
        """Opens the window, or brings it to the front. `startup_id` is the desktop's id of the click."""
        self.update(snapshot)
        if self._window is None:
            self._build()
        if startup_id:
            self._window.set_startup_id(startup_id)
        self._window.present()

    def update(self, snapshot: Snapshot) -> None:
        """Updates the window, if it is open."""
        before, self._snapshot = self._snapshot, snapshot
        if self._window is not None and _shown(before) != _shown(snapshot):
            self._fill()

    def _build(self) -> None:
        Gtk, _ = gtk(), self._words
        self._window = Gtk.Window(title=_("flashd: find a model"))
        self._window.set_default_size(WIDTH, HEIGHT)
        self._search = Gtk.SearchEntry(placeholder_text=_("Part of a name"))
        self._search.get_accessible().set_name(_("Part of a name"))
        self._list = Gtk.ListBox(activate_on_single_click=False)
        self._list.get_accessible().set_name(_("Models"))
        self._list.set_filter_func(self._matches)
        self._list.set_placeholder(Gtk.Label(label=_("No model has this in its name"), visible=True, margin=24))
        self._scrolled = Gtk.ScrolledWindow(vexpand=True, shadow_type=Gtk.ShadowType.IN)
        self._scrolled.add(self._list)
        vertical, centre = Gtk.Orientation.VERTICAL, Gtk.Align.CENTER
        self._instead = Gtk.Box(orientation=vertical, spacing=12, margin=24, vexpand=True, valign=centre)
        box = Gtk.Box(orientation=vertical, spacing=6, margin=6)
        for part in (self._search, self._scrolled, self._instead):
            box.add(part)
        self._window.add(box)
        self._search.connect("search-changed", lambda _entry: self._narrow())
        self._search.connect("activate", lambda _entry: self._choose(self._first()))
        self._search.connect("stop-search", lambda _entry: self._window.destroy())
        self._list.connect("row-activated", lambda _list, row: self._choose(row))
        self._window.connect("destroy", lambda _window: self._forget())
        box.show_all()
        self._fill()

    def _fill(self) -> None:
        Gtk = gtk()
        selected = self._list.get_selected_row()
        for shown in (*self._list.get_children(), *self._instead.get_children()):
            shown.get_parent().remove(shown)
        for model in most_used_first(self._snapshot.models):
            row = self._row(model)
            self._list.add(row)
            if selected is not None and model.name == selected.model_name:
                self._list.select_row(row)
        for entry in instead_of_models(self._snapshot, self._words):
            self._instead.add(self._button(entry.label, entry.action) if entry.action else self._sentence(entry.label))
        self._list.show_all()
        self._instead.show_all()
        some = bool(self._snapshot.models)
        self._scrolled.set_visible(some)
        self._instead.set_visible(not some)
        if self._search.get_sensitive() != some:
            self._search.set_sensitive(some)
            (self._search if some else self._instead).child_focus(Gtk.DirectionType.TAB_FORWARD)

    def _row(self, model: Model) -> Any:
        """Makes a row: a mark if the model is active, its name, and at the other end its details as in the menu."""
        Gtk, _ = gtk(), self._words
        mark = Gtk.Label(label=SERVING_MARK if model.active else "", width_chars=2)
        name = Gtk.Label(label=line(model.name), xalign=0.0, hexpand=True, ellipsize=_IN_THE_MIDDLE)
        details = Gtk.Label(label=model_details(model, _))
        details.get_style_context().add_class("dim-label")
        box = Gtk.Box(spacing=6, margin=6)
        for widget in (mark, name, details):
            box.add(widget)
        row = Gtk.ListBoxRow()
        row.add(box)
        said = line(_("{model} answers", model=model.name)) if model.active else model_label(model, _)
        row.get_accessible().set_name(said)
        row.model_name = model.name
        row.sought = " ".join((model.name, *model.aliases, model.architecture)).casefold()
        return row

    def _sentence(self, text: str) -> Any:
        return gtk().Label(label=text, wrap=True, justify=gtk().Justification.CENTER)

    def _button(self, label: str, action: Action) -> Any:
        button = gtk().Button(label=label, halign=gtk().Align.CENTER)
        button.connect("clicked", lambda _button: self._on_action(action))
        return button

    def _matches(self, row: Any) -> bool:
        return all(part in row.sought for part in self._search.get_text().casefold().split())

    def _narrow(self) -> None:
        """Shows the matching models, and selects the one that Return would choose."""
        self._list.invalidate_filter()
        self._list.select_row(self._first())

    def _first(self) -> Any:
        selected = self._list.get_selected_row()
        if selected is not None and self._matches(selected):
            return selected
        return next((row for row in self._list.get_children() if self._matches(row)), None)

    def _choose(self, row: Any) -> None:
        if row is not None:
            self._window.destroy()
            self._on_action(Action(Verb.SWAP, row.model_name))

    def _forget(self) -> None:
        self._window = None


def _shown(snapshot: Snapshot) -> tuple[bool, tuple[Model, ...]]:
    """Selects the part of a snapshot that the window shows: most snapshots only move a percentage."""
    return snapshot.status is None, snapshot.models
