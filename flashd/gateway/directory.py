# SPDX-License-Identifier: Apache-2.0
"""The daemon's models and what serves, kept up to date by its signals: no request asks the daemon anything.

While the daemon is away, what it said last stays, so that a list of models is answered even then.
"""

from __future__ import annotations

import contextlib
import difflib
import logging
import queue
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

from flashd import toml
from flashd.client.client import Client
from flashd.client.results import Engine, Event, Model, Status, engine_from, name_of
from flashd.config import loading
from flashd.config.settings import Config
from flashd.dbus import wire
from flashd.errors import FlashdError, NotFound, Unavailable

log = logging.getLogger(__name__)

_RECONNECT_S = 0.5
_GATHER_S = 0.02  # changes of models come in bursts: one list is asked for after each
_PROBE_S = 30.0  # without any event for so long, a question finds out whether the connection lives
_MOST_NEAR = 3
LATEST = ":latest"  # Ollama's programs add it to names


@dataclass(frozen=True, slots=True)
class Wanted:
    """The model that is to answer a request, and the name by which its engine is asked: its own, or an adapter's.

    One that is not here `is_to_be_pulled` from the hub first.
    """

    model: str
    name: str
    is_to_be_pulled: bool = False


@dataclass(frozen=True, slots=True)
class Directory:
    """The models by name, what serves, and where; never changed, but replaced."""

    models: Mapping[str, Model] = field(default_factory=dict)
    active: str = ""
    resting: str = ""
    engines: Mapping[str, Engine] = field(default_factory=dict)  # by path
    config: Config = field(default_factory=Config)  # no more than the gateway's own settings
    is_connected: bool = False
    is_settled: bool = False  # the daemon was asked once, whether or not it answered

    @property
    def serving(self) -> Mapping[str, str]:
        """The models that serve, and the socket at which each is asked."""
        return {each.model: each.endpoint for each in self.engines.values() if self._serves(each)}

    def engine_of(self, model: str) -> Engine | None:
        """The engine in which a model serves."""
        return next((each for each in self.engines.values() if each.model == model and self._serves(each)), None)

    def _serves(self, engine: Engine) -> bool:
        """False for an engine that is being put away, which answers only what it has begun to, and for one that has an
        older version of its model."""
        model = self.models.get(engine.model)
        return engine.state == "serving" and model is not None and model.serving

    def public(self) -> Directory:
        """What users may know who are not known to be the owners of private models."""
        models = {name: model for name, model in self.models.items() if not model.private}
        engines = {path: engine for path, engine in self.engines.items() if engine.model in models}
        active, resting = (name if name in models else "" for name in (self.active, self.resting))
        return replace(self, models=models, engines=engines, active=active, resting=resting)

    def only(self, names: Collection[str]) -> Directory:
        """What a token may know that is for the models with these names or aliases."""
        models = {name: model for name, model in self.models.items() if not {name, *model.aliases}.isdisjoint(names)}
        return replace(self, models=models).public()

    def resolve(self, name: str) -> Model:
        """Finds a model by its name or an alias, both with or without `:latest`; the empty name means the one that
        serves or rests. Raises NotFound with the nearest names."""
        if not name:
            if found := self.models.get(self.active or self.resting):
                return found
            raise NotFound("the request names no model, and none serves", hint="name one in the field `model`")
        for wanted in (name, name.removesuffix(LATEST)):
            if found := self.models.get(wanted):
                return found
            if found := next((model for model in self.models.values() if wanted in model.aliases), None):
                return found
        if not self.is_connected and not self.models:
            raise Unavailable("flashd does not run", hint="start it: flash start, or systemctl start flashd")
        raise NotFound(f"there is no model {name[:200]!r}", hint=self._nearest(name))

    def listed(self) -> list[tuple[str, Model]]:
        """What requests may name, in order: models, each followed by its adapters with the same model."""
        models = [model for _, model in sorted(self.models.items())]
        adapters = {model.name: [name for name in model.adapters if name not in self.models] for model in models}
        return [(name, model) for model in models for name in (model.name, *adapters[model.name])]

    def wanted(self, name: str) -> Wanted:
        """Finds a model like `resolve`, or else an adapter, with or without `:latest`. Raises NotFound."""
        try:
            model = self.resolve(name)
        except NotFound:
            for adapter in (name, name.removesuffix(LATEST)):
                if base := next((model for model in self.models.values() if adapter in model.adapters), None):
                    return Wanted(base.name, adapter)
            raise
        return Wanted(model.name, model.name)

    def _nearest(self, name: str) -> str:
        names = [*self.models, *(other for model in self.models.values() for other in model.aliases + model.adapters)]
        lowered = {known.lower(): known for known in names}
        near = difflib.get_close_matches(name[:200].lower(), lowered, _MOST_NEAR, 0.5)
        if near:
            return "did you mean " + " or ".join(lowered[each] for each in near) + "?"
        return "GET /v1/models lists the models, flash pull gets one" if names else "there are none yet: flash pull"


class Connect(Protocol):
    """Connects to the daemon, which the bus starts if it does not run and the connection `activates` it."""

    def __call__(self, activates: bool, /) -> Client: ...


class Watch(Protocol):
    """What else wants to know of the daemon. Its methods are called by the follower's thread."""

    def began(self, client: Client) -> None:
        """The daemon is followed from now on, by this client."""

    def listed(self, models: Mapping[str, Model], status: Status) -> None:
        """The daemon was asked anew."""

    def happened(self, event: Event) -> None:
        """The daemon has sent a signal."""


class Watches(list[Watch]):
    """Several watches as one. All are there before the follower starts."""

    def began(self, client: Client) -> None:
        for watch in self:
            watch.began(client)

    def listed(self, models: Mapping[str, Model], status: Status) -> None:
        for watch in self:
            watch.listed(models, status)

    def happened(self, event: Event) -> None:
        for watch in self:
            watch.happened(event)


class Follower:
    """Follows the daemon from a thread of its own, and connects again whenever the daemon was away."""

    def __init__(self, connect: Connect, on_change: Callable[[Directory], None], watch: Watch) -> None:
        """`on_change` is called from the thread."""
        self._connect = connect
        self._watch = watch
        self._activates = True  # the first time only: a daemon that an administrator stopped stays so
        self._on_change = on_change
        self._known = Directory()
        self._stopping = threading.Event()
        self._events: queue.SimpleQueue[Event | None] | None = None
        self._thread = threading.Thread(target=self._run, name="directory", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        if (events := self._events) is not None:
            events.put(None)

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                activates, self._activates = self._activates, False
                with self._connect(activates) as client, client.subscribed() as self._events:
                    self._follow(client, self._events)
            except FlashdError as error:
                log.debug("the daemon is away: %s", error)
            except Exception:  # a daemon of another version, say: what it says next may be understood
                log.exception("the daemon could not be understood")
            self._events = None
            if not self._stopping.is_set():
                # Engines may go on answering meanwhile; whoever asks one that does not is told.
                self._publish(replace(self._known, is_connected=False, is_settled=True))
                self._stopping.wait(_RECONNECT_S)

    def _follow(self, client: Client, events: queue.SimpleQueue[Event | None]) -> None:
        """Returns when the connection has ended."""
        with _unharmed():
            self._watch.began(client)
        self._known = replace(self._known, config=_settings(client.config()))
        self._ask(client)
        while True:
            is_listed_anew = False
            deadline = time.monotonic() + _PROBE_S
            while (left_s := deadline - time.monotonic()) > 0:
                try:
                    event = events.get(timeout=left_s)
                except queue.Empty:
                    break
                if event is None:
                    return
                with _unharmed():
                    self._watch.happened(event)
                if event.interface == wire.MANAGER:
                    self._note(event)
                elif event.interface == wire.ENGINE:
                    self._note_engine(event)
                elif event.interface == wire.MODEL:
                    self._note_model(event)
                    if not is_listed_anew:
                        deadline = time.monotonic() + _GATHER_S
                    is_listed_anew = True
            self._ask(client)

    def _note(self, event: Event) -> None:
        """What serves is in the signal itself, and known at once."""
        said, known = event.properties, self._known
        active = name_of(said["ActiveModel"]) if "ActiveModel" in said else known.active
        resting = name_of(said["RestingModel"]) if "RestingModel" in said else known.resting
        self._publish(replace(known, active=active, resting=resting))

    def _note_model(self, event: Event) -> None:
        known = self._known.models.get(name_of(event.path))
        if known is not None and "Serving" in event.properties:
            model = replace(known, serving=event.properties["Serving"])
            self._publish(replace(self._known, models={**self._known.models, known.name: model}))

    def _note_engine(self, event: Event) -> None:
        engines, said = dict(self._known.engines), event.properties
        match event.kind:
            case "added":
                engines[event.path] = engine_from(event.path, said)
            case "removed":
                engines.pop(event.path, None)
            case _ if (known := engines.get(event.path)) is not None:
                state, path = said.get("State", known.state), said.get("Model")
                model = known.model if path is None else name_of(path)
                engines[event.path] = replace(known, state=state, model=model)
        self._publish(replace(self._known, engines=engines))

    def _ask(self, client: Client) -> None:
        models = {model.name: model for model in client.models()}
        status = client.status()
        with _unharmed():
            self._watch.listed(models, status)
        self._publish(
            replace(
                self._known,
                models=models,
                active=status.active_model,
                resting=status.resting_model,
                engines={engine.path: engine for engine in client.engines()},
                is_connected=True,
                is_settled=True,
            )
        )

    def _publish(self, known: Directory) -> None:
        if known != self._known:
            self._known = known
            self._on_change(known)


@contextlib.contextmanager
def _unharmed() -> Iterator[None]:
    """Logs what goes wrong in the block: answers do not depend on metrics, and the daemon may be of another version."""
    try:
        yield
    except FlashdError:
        raise
    except Exception:
        log.exception("the metrics miss what the daemon said")


def _settings(toml_text: str) -> Config:
    """The gateway's settings in the daemon's configuration, which may be of another version and have others."""
    document, config = toml.parse(toml_text), Config()
    for setting in loading.settings():
        if setting.key.startswith("gateway.") or setting.key == "engines.turn_s":
            config = loading.with_value(config, setting.key, loading.value_in(document, setting.key))
    return config
