# SPDX-License-Identifier: Apache-2.0
"""Loads pystray with its indicator backend, or reports what is missing.

pystray 0.19.5 chooses a backend at import. One of them has no menu, and is never used. If GTK's binding is installed
without the indicator library, the import raises ValueError; without a display, ImportError.
"""

from __future__ import annotations

import importlib
import os
import sys
from types import ModuleType

from flashd.errors import Unavailable

_PACKAGES = "python3-gi gir1.2-gtk-3.0 gir1.2-ayatanaappindicator3-0.1"
_HOW_TO_GET_THEM = (
    f"on Debian and Ubuntu: apt install {_PACKAGES}; on Fedora: dnf install python3-gobject gtk3"
    " libayatana-appindicator-gtk3; or use flash list and flash swap instead of the tray"
)


def load() -> ModuleType:
    """`flashd_tray.indicator`. Raises Unavailable, with what to install."""
    if not os.environ.get("DISPLAY") and not os.environ.get("WAYLAND_DISPLAY"):
        raise Unavailable(
            "there is no desktop to show the tray",
            hint="start it in a desktop session, or use flash list and flash swap in a terminal",
        )
    try:
        importlib.import_module("gi")
    except ImportError:
        raise Unavailable(
            f"GTK's binding for Python is not installed for {sys.executable}", hint=_HOW_TO_GET_THEM
        ) from None
    os.environ["PYSTRAY_BACKEND"] = "appindicator"  # the library's only way to select a backend
    try:
        return importlib.import_module("flashd_tray.indicator")
    except ValueError as error:  # gi.require_version: the library itself is not there
        raise Unavailable(f"the desktop's indicator library is missing: {error}", hint=_HOW_TO_GET_THEM) from None
    except ImportError as error:
        if "initialised" in str(error):
            hint = "check that it is running, that this user may use it, and DISPLAY and WAYLAND_DISPLAY"
            raise Unavailable("the desktop cannot be reached", hint=hint) from None
        raise Unavailable(f"the tray's library cannot be used: {error}", hint=_HOW_TO_GET_THEM) from None


def startup_id() -> str:
    """Returns the desktop's id of the click that started us (Startup Notification; XDG Activation where that is)."""
    return os.environ.get("XDG_ACTIVATION_TOKEN") or os.environ.get("DESKTOP_STARTUP_ID", "")
