# SPDX-License-Identifier: Apache-2.0
"""The actions of the menu. Actions that wait for the daemon run in separate threads."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from flashd.client.client import Client
from flashd.errors import FlashdError, InvalidArgument, NotAuthorized, NotFound, Unavailable
from flashd_tray import programs
from flashd_tray.menu import Action, Verb, explain
from flashd_tray.preferences import Preferences, Topic
from flashd_tray.snapshot import JobView, Snapshot
from flashd_tray.words import Words

log = logging.getLogger(__name__)


class Desktop(Protocol):
    """The desktop functions that actions need. All threads may call them."""

    def copy(self, text: str) -> None: ...
    def open_folder(self, folder: Path) -> None: ...
    def show_error(self, title: str, text: str) -> None: ...
    def show_about(self, daemon_version: str) -> None: ...
    def find(self) -> None: ...
    def quit(self) -> None: ...


class Choices(Protocol):
    """A store of preferences."""

    def toggle(self, topic: Topic) -> Preferences: ...
    def toggle_autostart(self) -> Preferences: ...


class Actions:
    def __init__(
        self,
        *,
        bus: str | None,
        connect: Callable[[], Client],
        desktop: Desktop,
        choices: Choices,
        snapshot: Callable[[], Snapshot],
        on_dismissed: Callable[[], None],
        on_chosen: Callable[[], None],
        on_started: Callable[[], None],
        words: Words,
    ) -> None:
        """Callbacks: `on_dismissed` when errors were seen, `on_chosen` when preferences changed, `on_started` when the
        daemon was started.
        """
        self._bus = bus
        self._connect = connect
        self._desktop = desktop
        self._choices = choices
        self._snapshot = snapshot
        self._on_dismissed = on_dismissed
        self._on_chosen = on_chosen
        self._on_started = on_started
        self._words = words

    def do(self, action: Action) -> None:
        """Begins an action and returns at once. A failure is shown in a window, because a person has clicked."""
        threading.Thread(target=self._explained, args=(action,), name=f"tray {action.verb}", daemon=True).start()

    def import_paths(self, paths: Sequence[Path]) -> None:
        """Makes models from files and folders, like `flash import`. Returns when flashd has the files.

        Starts the daemon if necessary, because users of the file manager do not expect to have to.
        """
        for path in paths:
            try:
                with self._connected() as client:
                    client.begin_import(path, name_for(path))
            except FlashdError as error:
                title = self._words("{model} could not be converted", model=path.name)
                self._desktop.show_error(self._title(error, title), self._why(error))

    def _connected(self) -> Client:
        try:
            return self._connect()
        except Unavailable:
            programs.start_daemon(self._bus)
            self._on_started()
            return self._connect()

    def _explained(self, action: Action) -> None:
        try:
            self._do(action)
        except FlashdError as error:
            title = self._words("That did not work")
            if action.verb is Verb.SWAP:
                title = self._words("No swap to {model}", model=action.subject)
            self._desktop.show_error(self._title(error, title), self._why(error))
        except Exception:
            log.exception("bug in %s", action.verb)

    def _title(self, error: FlashdError, otherwise: str) -> str:
        return self._words("Not permitted") if isinstance(error, NotAuthorized) else otherwise

    def _why(self, error: FlashdError) -> str:
        return explain(error.bus_name(), error.message, error.hint, self._words)

    def _do(self, action: Action) -> None:  # noqa: PLR0912 -- one case a verb
        subject = action.subject
        match action.verb:
            case Verb.SWAP:
                self._ask(lambda client: client.begin_swap(subject))
            case Verb.CANCEL:
                self._cancel(int(subject))
            case Verb.PARK:
                self._ask(lambda client: client.park())
            case Verb.PIN:
                self._ask(lambda client: client.pin(subject))
            case Verb.UNPIN:
                self._ask(lambda client: client.unpin(subject))
            case Verb.FIND:
                self._desktop.find()
            case Verb.OPEN_FOLDER:
                self._open_folder()
            case Verb.COPY_ENDPOINT:
                status = self._snapshot().status
                self._desktop.copy(status.endpoint if status else "")
            case Verb.CHAT:
                self._chat()
            case Verb.SHOW_ERROR:
                self._show_error(int(subject))
            case Verb.DISMISS_ERRORS:
                self._on_dismissed()
            case Verb.START:
                programs.start_daemon(self._bus)
                self._on_started()
            case Verb.TOGGLE_TOPIC:
                self._choose(lambda: self._choices.toggle(Topic(subject)))
            case Verb.TOGGLE_AUTOSTART:
                self._choose(self._choices.toggle_autostart)
            case Verb.ABOUT:
                status = self._snapshot().status
                self._desktop.show_about(status.version if status else "")
            case Verb.QUIT:
                self._desktop.quit()

    def _ask(self, call: Callable[[Client], object]) -> None:
        with self._connect() as client:
            call(client)

    def _cancel(self, number: int) -> None:
        """Cancels a job, unless it has ended since the menu was shown."""
        with contextlib.suppress(NotFound), self._connect() as client:
            job = client.job(number)
            if not job.finished:
                job.cancel()

    def _choose(self, toggle: Callable[[], Preferences]) -> None:
        try:
            toggle()
        except OSError as error:
            raise InvalidArgument(f"the choice cannot be saved: {error}") from None
        self._on_chosen()

    def _open_folder(self) -> None:
        status = self._snapshot().status
        if status is None or not status.models_directories:
            raise NotFound("flashd watches no folder", hint="choose one: flash config inbox.folders '[\"/a/folder\"]'")
        folder = Path(status.models_directories[0])
        with contextlib.suppress(OSError):  # we may not create the machine's folder, and it may exist
            folder.mkdir(parents=True, exist_ok=True)
        self._desktop.open_folder(folder)

    def _chat(self) -> None:
        active = self._snapshot().active
        if active is None:
            raise Unavailable("no model is active", hint="first choose a model in the menu")
        given = ["--bus", self._bus] if self._bus else []
        # If the window closed at once, its error message would be lost.
        waiting = ["sh", "-c", '"$@" || read -r _', "sh"]
        programs.start(programs.in_terminal([*waiting, programs.flash(), *given, "run", active.name]))

    def _show_error(self, number: int) -> None:
        job: JobView | None = next((job for job in self._snapshot().jobs if job.number == number), None)
        if job is not None:
            text = explain(job.error_name, job.error_message, job.error_hint, self._words)
            self._desktop.show_error(job.subject, text)


def name_for(path: Path) -> str:
    """Names a model as the inbox would: a folder by its name, a file without its suffix, `model.*` by its folder's."""
    path = path.absolute()
    if path.is_dir():
        return path.name
    return path.parent.name if path.stem in {"model", "pytorch_model"} else path.stem
