# SPDX-License-Identifier: Apache-2.0
"""Exports Python objects on the bus as the interface XML describes them.

The XML files are the contract: they name the members, give the signatures by which values are checked and marshalled,
and are served as introspection. An exported object supplies one coroutine per method (`find_model` for `FindModel`) and
one mapping with the values of all properties. A test compares every object with its XML.

Property changes are found by comparison with the values last sent, at most once per `COALESCE_S`, so that no change is
missed and a flood of changes costs one signal.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import inspect
import json
import logging
import re
from collections.abc import Awaitable, Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from dbus_next import Variant
from dbus_next.introspection import Interface, Node

from flashd.dbus import wire
from flashd.dbus.arguments import Arguments
from flashd.dbus.call_limits import arguments_by_method
from flashd.dbus.connection import UNSENDABLE, Connection, Received, Reply, dictionary, dictionary_entry
from flashd.dbus.messages import Head
from flashd.dbus.opened_files import OpenedFiles
from flashd.dbus.wire import DBUS, OBJECT_MANAGER, PROPERTIES
from flashd.errors import InvalidArgument, LimitExceeded, NotFound

log = logging.getLogger(__name__)

COALESCE_S = 0.05
_MANAGED_OBJECTS = "a{oa{sa{sv}}}"
_OPENED_FILES = "a{sh}"
_AWAITED = (f"{wire.ROOT_PATH}/engine/", f"{wire.ROOT_PATH}/model/")
_UNKNOWN_UID = -1  # of a peer on its first call
MOST_READING = 4096  # unanswered calls of one user that read properties
INTROSPECTABLE = "org.freedesktop.DBus.Introspectable"

_STANDARD_XML = """\
  <interface name="org.freedesktop.DBus.Introspectable">
    <method name="Introspect"><arg name="xml" type="s" direction="out"/></method>
  </interface>
  <interface name="org.freedesktop.DBus.Peer">
    <method name="Ping"/>
    <method name="GetMachineId"><arg name="machine_uuid" type="s" direction="out"/></method>
  </interface>
  <interface name="org.freedesktop.DBus.Properties">
    <method name="Get">
      <arg name="interface" type="s" direction="in"><annotation name="org.flashd1.MaxLength" value="255"/></arg>
      <arg name="property" type="s" direction="in"><annotation name="org.flashd1.MaxLength" value="255"/></arg>
      <arg name="value" type="v" direction="out"/>
    </method>
    <method name="GetAll">
      <arg name="interface" type="s" direction="in"><annotation name="org.flashd1.MaxLength" value="255"/></arg>
      <arg name="properties" type="a{sv}" direction="out"/>
    </method>
    <method name="Set">
      <arg name="interface" type="s" direction="in"><annotation name="org.flashd1.MaxLength" value="255"/></arg>
      <arg name="property" type="s" direction="in"><annotation name="org.flashd1.MaxLength" value="255"/></arg>
      <arg name="value" type="v" direction="in">
        <annotation name="org.flashd1.MaxLength" value="4096"/>
        <annotation name="org.flashd1.MaxItems" value="64"/>
        <annotation name="org.flashd1.MaxValue" value="9007199254740992"/>
      </arg>
    </method>
    <signal name="PropertiesChanged">
      <arg name="interface" type="s"/>
      <arg name="changed" type="a{sv}"/>
      <arg name="invalidated" type="as"/>
    </signal>
  </interface>
"""
_OBJECT_MANAGER_XML = """\
  <interface name="org.freedesktop.DBus.ObjectManager">
    <method name="GetManagedObjects">
      <arg name="objects" type="a{oa{sa{sv}}}" direction="out"/>
    </method>
    <signal name="InterfacesAdded">
      <arg name="object" type="o"/>
      <arg name="interfaces" type="a{sa{sv}}"/>
    </signal>
    <signal name="InterfacesRemoved">
      <arg name="object" type="o"/>
      <arg name="interfaces" type="as"/>
    </signal>
  </interface>
"""


@dataclass(frozen=True, slots=True)
class Fd:
    """A descriptor for the caller. Ours is closed after it is sent."""

    number: int


@dataclass(frozen=True, slots=True)
class Caller:
    """The sender of a call. Descriptors among the arguments are borrowed: dup(2) those that outlive the call."""

    peer: str
    uid: int
    interactive: bool = False  # of this call: whether polkit may ask a person for a password
    gids: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Audience:
    """The users who may see an object: all, or, with an `owner`, those who may see this user's private models."""

    owner_uid: int | None = None
    group: int | None = None

    def includes(self, caller: Caller) -> bool:
        return self.owner_uid is None or caller.uid in {0, self.owner_uid} or self.group in caller.gids


EVERYBODY = Audience()


class Exported:
    """Base of all objects on the bus: a path, one interface of the contract, and its members."""

    interface: ClassVar[str]
    changes_unheard: ClassVar[bool] = False  # whether it has values that change without notice

    def __init__(self, path: str) -> None:
        self.path = path

    def properties(self) -> Mapping[str, object]:
        """Returns all properties of the interface by their names in the XML, as plain values of their types."""
        return {}

    @classmethod
    def implementation(cls, name: str) -> Callable[..., object] | None:
        """Returns the function that implements a method of the interface, by its Python name."""
        return getattr(cls, name, None)

    def method(self, name: str) -> Callable[..., Awaitable[object]]:
        """Returns `implementation`, bound to this object."""
        bound: Callable[..., Awaitable[object]] = getattr(self, name)
        return bound

    async def refresh(self, name: str) -> None:
        """Updates values that change without notice, before the property `name` is read, or all if it is empty."""

    def audience(self) -> Audience:
        """Returns the users for whom this object exists."""
        return EVERYBODY

    def properties_only_for(self, viewer: Caller) -> Mapping[str, object]:  # noqa: ARG002 -- most objects look the same to all
        """Returns the properties that have other values for this viewer than for everybody."""
        return {}


@functools.cache
def contract(interface: str) -> Interface:
    """Returns the parsed XML of an interface."""
    (parsed,) = Node.parse(wire.interface_xml(interface)).interfaces
    return parsed


@functools.cache
def _arguments() -> Mapping[tuple[str, str], Arguments]:
    """Returns the arguments of all our methods, by interface and member."""
    standard = f"<node>{_STANDARD_XML}{_OBJECT_MANAGER_XML}</node>"
    return arguments_by_method([*map(wire.interface_xml, wire.INTERFACES), standard])


def method_name(member: str) -> str:
    """Converts `FindModel` to `find_model`, and a Python keyword such as `Import` to `import_`."""
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", member).lower()
    return name + "_" if name == "import" else name


@functools.cache
def _signatures(interface: str) -> Mapping[str, str]:
    return {p.name: p.signature for p in contract(interface).properties}


def as_variant(interface: str, name: str, value: object) -> Variant:
    """Wraps the value of a property of this interface in a variant."""
    return Variant(_signatures(interface)[name], value)


class ObjectTree:
    """The exported objects under one root; answers all calls on them.

    `identify` turns a peer into a Caller; `known` returns the Caller of a peer that is already identified. `authorize`
    raises NotAuthorized unless the caller may make this call. `check_calls` takes a caller with the numbers of
    unanswered calls of its connection and of its user, and raises to refuse another call.

    D-Bus sends a signal to all connections or to one. A signal that only some users may see is sent to each of the
    `watchers`, the connections that have called us and are still on the bus, whose user may see it.
    """

    def __init__(
        self,
        connection: Connection,
        *,
        identify: Callable[[str], Awaitable[Caller]],
        authorize: Callable[[Caller, str, str], Awaitable[None]],
        watchers: Callable[[], Collection[Caller]] = tuple,
        known: Callable[[str], Caller | None] = lambda peer: None,
        check_calls: Callable[[Caller, int, int], None] = lambda caller, of_peer, of_user: None,
    ) -> None:
        self._connection = connection
        self._identify = identify
        self._authorize = authorize
        self._watchers = watchers
        self._known = known
        self._check_calls = check_calls
        self._opened_files = OpenedFiles()
        self._objects: dict[str, Exported] = {}
        self._sent: dict[str, dict[str, object]] = {}
        self._sent_only_to: dict[tuple[str, str], Mapping[str, object]] = {}  # by path and peer
        self._entries: dict[
            str, bytes
        ] = {}  # of the reply to GetManagedObjects, so that listing 1,000 models takes 2 ms
        self._texts: dict[str, str] = {}  # of the reply to ListModels, so that the listing takes 1 ms
        self._withheld: set[tuple[str, str]] = set()  # properties that cannot be sent, by path and name
        self._changed: set[str] = set()
        self._flush: asyncio.TimerHandle | None = None
        connection.serve(self._answer, self)

    def arguments(self, head: Head) -> Arguments | None:
        """Returns the arguments of the called method; None if there is no such method."""
        taken = _arguments().get((head.interface, head.member))
        return taken if taken is not None and taken.signature == head.signature else None

    def group(self, peer: str) -> Hashable:
        """Returns the user, so that users take turns, each with all their connections."""
        caller = self._known(peer)
        return peer if caller is None else caller.uid

    def check_room(self, head: Head, of_peer: int, of_group: int) -> None:
        """Checks the caller's limits. Raises LimitExceeded."""
        if not head.interface.startswith(DBUS):
            self._check_calls(self._known(head.sender) or Caller(head.sender, _UNKNOWN_UID), of_peer, of_group)
        elif of_group >= MOST_READING:
            hint = "wait for their answers; GetManagedObjects and ListModels return everything in one call"
            raise LimitExceeded(f"{of_group} calls of this user are waiting for their answers", hint=hint)

    def add(self, exported: Exported, *, announce: bool = True) -> None:
        """Adds an object. `announce` is False before the daemon has its name, because no program can listen yet."""
        self._sent[exported.path] = dict(exported.properties())
        self._objects[exported.path] = exported
        if announce:
            self._announce(exported)

    def remove(self, path: str) -> None:
        exported = self._objects.pop(path)
        del self._sent[path]
        self._forget_listed(path)
        self._changed.discard(path)
        body = [path, [exported.interface]]
        self._emit(exported.audience(), wire.ROOT_PATH, OBJECT_MANAGER, "InterfacesRemoved", "oas", body)

    def audience_changed(self, path: str) -> None:
        """Announces to all that the object was removed, and to its new audience that it was added again."""
        exported = self._objects[path]
        self._forget_listed(path)
        self._sent[path] = dict(exported.properties())
        body = [path, [exported.interface]]
        self._connection.emit(wire.ROOT_PATH, OBJECT_MANAGER, "InterfacesRemoved", "oas", body)
        self._announce(exported)

    def _forget_listed(self, path: str) -> None:
        self._entries.pop(path, None)
        self._texts.pop(path, None)

    def get(self, path: str) -> Exported | None:
        return self._objects.get(path)

    def as_json(self, exported: Exported) -> str:
        """Returns the path and properties of an object as one entry of a JSON object."""
        text = self._texts.get(exported.path)
        if text is None:
            text = f"{json.dumps(exported.path)}: {json.dumps(exported.properties())}"
            if exported.path in self._objects:
                self._texts[exported.path] = text
        return text

    def last_sent(self, path: str) -> Mapping[str, object]:
        """Returns the properties of an object as last sent."""
        return self._sent[path]

    def changed(self, path: str) -> None:
        """Notes that properties of the object may have changed. Within COALESCE_S they are compared and announced."""
        self._forget_listed(path)
        if path in self._objects:
            self._changed.add(path)
            if self._flush is None:
                self._flush = asyncio.get_running_loop().call_later(COALESCE_S, self.flush)

    def flush(self, first: str = "") -> None:
        """Announces the changes that `changed` has noted at once, beginning with the object at `first`.

        Models and engines, for which programs wait, come before the rest.
        """
        if self._flush is not None:
            self._flush.cancel()
            self._flush = None
        changed, self._changed = self._changed, set()
        for path in sorted(changed, key=lambda path: (path != first, not path.startswith(_AWAITED), path)):
            try:
                self._tell_changes(self._objects[path])
            except Exception:  # the boundary of an object: a bug in one must not silence the others
                log.exception("bug in the properties of %s", path)

    def _tell_changes(self, exported: Exported) -> None:
        sent, now = self._sent[exported.path], dict(exported.properties())
        different = {name: value for name, value in now.items() if sent[name] != value}
        if different:
            self._sent[exported.path] = now
            self._tell(exported.audience(), exported, different)
        self._tell_apart(exported)

    def signal(self, exported: Exported, member: str, *values: object) -> None:
        """Emits a signal of the contract, after all earlier property changes.

        Changes of its own object are sent first, because a program may be waiting for them.
        """
        self.flush(first=exported.path)
        (signal,) = [s for s in contract(exported.interface).signals if s.name == member]
        self._emit(exported.audience(), exported.path, exported.interface, member, signal.signature, values)

    async def prepare(self) -> None:
        """Makes the first listing as fast as later ones, without delaying other calls."""
        for path in list(self._objects):
            if path in self._objects and path != wire.ROOT_PATH:
                list(self._entries_of([path]))
                await asyncio.sleep(0)

    def _announce(self, exported: Exported) -> None:
        body = [exported.path, {exported.interface: self._sendable(exported, exported.properties())}]
        self._emit(exported.audience(), wire.ROOT_PATH, OBJECT_MANAGER, "InterfacesAdded", "oa{sa{sv}}", body)

    def _tell(
        self, audience: Audience, exported: Exported, changed: Mapping[str, object], *, to: str | None = None
    ) -> None:
        values = self._sendable(exported, changed)
        if not values:
            return
        body = [exported.interface, values, []]
        self._emit(audience, exported.path, PROPERTIES, "PropertiesChanged", "sa{sv}as", body, to=to)

    def _tell_apart(self, exported: Exported) -> None:
        """Sends changed properties that have special values for some viewers to these viewers."""
        for viewer in self._watchers():
            key = (exported.path, viewer.peer)
            before, now = self._sent_only_to.get(key, {}), exported.properties_only_for(viewer)
            if now != before:
                self._sent_only_to[key] = now
                over = {name: self._sent[exported.path][name] for name in before.keys() - now.keys()}
                self._tell(EVERYBODY, exported, {**over, **now}, to=viewer.peer)
        peers = {viewer.peer for viewer in self._watchers()}
        self._sent_only_to = {key: seen for key, seen in self._sent_only_to.items() if seen and key[1] in peers}

    def _emit(
        self, audience: Audience, path: str, interface: str, member: str, signature: str, body: Sequence[object],
        *, to: str | None = None,
    ) -> None:  # fmt: skip
        if audience == EVERYBODY:
            self._connection.emit(path, interface, member, signature, body, to=to)
            return
        for viewer in self._watchers():
            if audience.includes(viewer):
                self._connection.emit(path, interface, member, signature, body, to=viewer.peer)

    def _entries_of(self, paths: Iterable[str]) -> Iterator[bytes]:
        """Yields the entries of the objects that can be listed. A bug in one must not hide the others."""
        for path in paths:
            try:
                yield self._entry(path)
            except Exception:  # the boundary of an object
                log.exception("bug: %s is not listed", path)

    def _entry(self, path: str) -> bytes:
        entry = self._entries.get(path)
        if entry is None:
            exported = self._objects[path]
            values = exported.properties()
            try:
                shown = {name: as_variant(exported.interface, name, value) for name, value in values.items()}
                entry = dictionary_entry(_MANAGED_OBJECTS, path, {exported.interface: shown})
            except UNSENDABLE:
                entry = dictionary_entry(_MANAGED_OBJECTS, path, {exported.interface: self._sendable(exported, values)})
            if not exported.changes_unheard:
                self._entries[path] = entry
        return entry

    async def _answer(self, call: Received) -> Reply:
        caller = dataclasses.replace(await self._identify(call.sender), interactive=call.interactive)
        match call.interface, call.member:
            case (str(i), "Introspect") if i in {INTROSPECTABLE, ""}:
                return Reply("s", (self._introspection(call.path, caller),))
            case (str(i), "GetManagedObjects") if i in {OBJECT_MANAGER, ""} and call.path == wire.ROOT_PATH:
                seen = [path for path in self._seen_by(caller) if path != wire.ROOT_PATH]
                return Reply(_MANAGED_OBJECTS, ({},), marshalled=dictionary(self._entries_of(seen)))
        exported = self._objects.get(call.path)
        if exported is None or not exported.audience().includes(caller):
            raise _no_object(call.path)
        if call.interface == PROPERTIES:
            await exported.refresh(call.body[1] if call.member == "Get" and call.signature == "ss" else "")
            return self._property(exported, call, caller)
        return await self._invoke(exported, call, caller)

    def _seen_by(self, caller: Caller) -> list[str]:
        return [path for path, exported in self._objects.items() if exported.audience().includes(caller)]

    async def _invoke(self, exported: Exported, call: Received, caller: Caller) -> Reply:
        methods = {m.name: m for m in contract(exported.interface).methods}
        if call.member not in methods or call.interface not in {exported.interface, ""}:
            raise InvalidArgument(f"{call.path} has no method {call.interface}.{call.member}")
        method = methods[call.member]
        if call.signature != method.in_signature:
            wanted = f"{call.member} takes {method.in_signature!r}, not {call.signature!r}"
            raise InvalidArgument(wanted, hint=f"see busctl introspect {wire.BUS_NAME} {call.path}")
        await self._authorize(caller, exported.interface, call.member)
        if not exported.audience().includes(caller):  # time may have passed, because polkit may have asked a person
            raise _no_object(call.path)
        for argument, value in zip(method.in_args, call.body, strict=True):
            if argument.signature == _OPENED_FILES:
                await self._opened_files.check(caller.uid, value)
        returned = await exported.method(method_name(call.member))(caller, *call.body)
        values = returned if isinstance(returned, tuple) else () if returned is None else (returned,)
        fds = tuple(value.number for value in values if isinstance(value, Fd))
        indexed = tuple(fds.index(value.number) if isinstance(value, Fd) else value for value in values)
        return Reply(method.out_signature, indexed, fds)

    def _property(self, exported: Exported, call: Received, caller: Caller) -> Reply:
        """Answers org.freedesktop.DBus.Properties. All callers that the bus lets reach us may read; none may write."""
        if not call.body or call.body[0] != exported.interface:
            asked = call.body[0] if call.body else ""
            if call.member == "GetAll" and asked in {"", *self._standard(), OBJECT_MANAGER}:
                return Reply("a{sv}", ({},))
            raise InvalidArgument(f"{call.path} has no interface {asked!r}")
        shown = {**exported.properties(), **exported.properties_only_for(caller)}
        match call.member, call.signature:
            case "GetAll", "s":
                entries = (entry for _, _, entry in self._marshalled(exported, shown))
                return Reply("a{sv}", ({},), marshalled=dictionary(entries))
            case "Get", "ss" if call.body[1] in shown:
                return Reply("v", (as_variant(exported.interface, call.body[1], shown[call.body[1]]),))
            case "Set", "ssv" if call.body[1] in shown:
                raise InvalidArgument(
                    f"{call.body[1]} is read-only", hint="use the methods of the interface to make changes"
                )
        raise InvalidArgument(f"{exported.interface} has no such property: {call.member} {list(call.body[1:])}")

    def _sendable(self, exported: Exported, values: Mapping[str, object]) -> dict[str, Variant]:
        return {name: variant for name, variant, _ in self._marshalled(exported, values)}

    def _marshalled(self, exported: Exported, values: Mapping[str, object]) -> Iterator[tuple[str, Variant, bytes]]:
        """Yields properties by name, except those that D-Bus cannot carry. A bug in one must not hide the others."""
        for name, value in values.items():
            try:
                variant = as_variant(exported.interface, name, value)
                yield name, variant, dictionary_entry("a{sv}", name, variant)
            except UNSENDABLE as error:
                if (exported.path, name) not in self._withheld:
                    self._withheld.add((exported.path, name))
                    log.error("bug: %s of %s cannot be sent: %s", name, exported.path, error)

    @staticmethod
    def _standard() -> tuple[str, ...]:
        return (INTROSPECTABLE, "org.freedesktop.DBus.Peer", PROPERTIES)

    def _introspection(self, path: str, caller: Caller) -> str:
        body = ""
        seen = self._seen_by(caller)
        exported = self._objects.get(path)
        if exported is not None and path in seen:
            xml = wire.interface_xml(exported.interface)
            body = xml[xml.index("<interface") : xml.index("</node>")]
            body = "  " + body + _STANDARD_XML + (_OBJECT_MANAGER_XML if path == wire.ROOT_PATH else "")
        prefix = path.rstrip("/") + "/"
        children = sorted({other[len(prefix) :].split("/")[0] for other in seen if other.startswith(prefix)})
        nodes = "".join(f'  <node name="{child}"/>\n' for child in children)
        return f"<node>\n{body}{nodes}</node>\n"


def _no_object(path: str) -> NotFound:
    hint = "it may have been removed; see flash list and flash jobs"
    return NotFound(f"there is no {wire.called(path)}", hint=hint)


def missing_members(exported: type[Exported]) -> list[str]:
    """Returns methods of the contract that a class lacks or has with other parameters, for the test of the contract."""
    missing = []
    for method in contract(exported.interface).methods:
        function = exported.implementation(method_name(method.name))
        wanted = 2 + len(method.in_args)
        if not inspect.iscoroutinefunction(function) or len(inspect.signature(function).parameters) != wanted:
            missing.append(method.name)
    return missing
