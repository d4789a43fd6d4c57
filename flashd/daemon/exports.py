# SPDX-License-Identifier: Apache-2.0
"""How do Python objects appear on the bus exactly as the interface XML says?

The XML files are the contract, so they are also the program: they name the members, give the signatures that are
checked and marshalled, and are served as introspection. An exported object supplies one coroutine per method
(`FindModel` is `find_model`) and one mapping with the value of every property. A test holds each against the XML.

Property changes are found by comparing with what was last sent, at most once per `COALESCE_S`, so that no change is
forgotten and a flood of them costs one signal.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import inspect
import re
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from dbus_next import Variant
from dbus_next.introspection import Interface, Node

from flashd import wire
from flashd.bus import OBJECT_MANAGER, PROPERTIES, Connection, Received, Reply, dictionary, dictionary_entry
from flashd.errors import InvalidArgument, NotFound

COALESCE_S = 0.05
_MANAGED_OBJECTS = "a{oa{sa{sv}}}"
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
      <arg name="interface" type="s" direction="in"/>
      <arg name="property" type="s" direction="in"/>
      <arg name="value" type="v" direction="out"/>
    </method>
    <method name="GetAll">
      <arg name="interface" type="s" direction="in"/>
      <arg name="properties" type="a{sv}" direction="out"/>
    </method>
    <method name="Set">
      <arg name="interface" type="s" direction="in"/>
      <arg name="property" type="s" direction="in"/>
      <arg name="value" type="v" direction="in"/>
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
    """A descriptor to hand to the caller; ours is closed once it is sent."""

    number: int


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks. Descriptors among the arguments of a call are borrowed: dup(2) what outlives it."""

    peer: str
    uid: int
    interactive: bool = False  # of this call: whether a person may be asked for a password
    gids: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Audience:
    """Who sees something: everybody, or, if there is an owner, those who may see what is private to this user."""

    owner_uid: int | None = None
    group: int | None = None

    def includes(self, caller: Caller) -> bool:
        return self.owner_uid is None or caller.uid in {0, self.owner_uid} or self.group in caller.gids


EVERYBODY = Audience()


class Exported:
    """Base of every object on the bus: a path, one interface of the contract, and its members."""

    interface: ClassVar[str]
    changes_unheard: ClassVar[bool] = False  # whether it has values that change without our being told

    def __init__(self, path: str) -> None:
        self.path = path

    def properties(self) -> Mapping[str, Any]:
        """Every property of the interface, by its name in the XML, as a plain value of its type."""
        return {}

    def audience(self) -> Audience:
        """For whom it exists; for others there is no such object."""
        return EVERYBODY

    def properties_only_for(self, viewer: Caller) -> Mapping[str, Any]:  # noqa: ARG002 -- most show all the same
        """The properties that somebody sees otherwise than everybody."""
        return {}


@functools.cache
def contract(interface: str) -> Interface:
    """The parsed XML of an interface."""
    (parsed,) = Node.parse(wire.interface_xml(interface)).interfaces
    return parsed


def method_name(member: str) -> str:
    """`FindModel` → `find_model`; a Python keyword gets an underscore: `Import` → `import_`."""
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", member).lower()
    return name + "_" if name == "import" else name


def as_variants(interface: str, values: Mapping[str, Any]) -> dict[str, Variant]:
    types = {p.name: p.signature for p in contract(interface).properties}
    return {name: Variant(types[name], value) for name, value in values.items()}


class ObjectTree:
    """All that we export under one root, and the answer to every call on it.

    `identify` turns a peer into a Caller; `authorize` raises NotAuthorized unless this caller may make this call.
    `check_calls` is told of a caller and of whose calls are under way, and may refuse.

    D-Bus knows signals for all and signals for one: what only some may see is sent to each of the `watchers`, those
    who have called us and are still there, that may.
    """

    def __init__(
        self,
        connection: Connection,
        *,
        identify: Callable[[str], Awaitable[Caller]],
        authorize: Callable[[Caller, str, str], Awaitable[None]],
        watchers: Callable[[], Collection[Caller]] = tuple,
        check_calls: Callable[[Caller, Collection[Caller]], None] = lambda caller, others: None,
    ) -> None:
        self._connection = connection
        self._identify = identify
        self._authorize = authorize
        self._watchers = watchers
        self._check_calls = check_calls
        self._calls: list[Caller] = []
        self._objects: dict[str, Exported] = {}
        self._sent: dict[str, dict[str, Any]] = {}
        self._sent_only_to: dict[tuple[str, str], Mapping[str, Any]] = {}  # by path and peer
        self._entries: dict[str, bytes] = {}  # of the answer to GetManagedObjects: listing 1,000 models takes 2 ms
        self._changed: set[str] = set()
        self._flush: asyncio.TimerHandle | None = None
        connection.serve(self._answer)

    def add(self, exported: Exported, *, announce: bool = True) -> None:
        """Without `announce`, for what is there before we have our name, and so before anybody listens."""
        self._objects[exported.path] = exported
        self._sent[exported.path] = dict(exported.properties())
        if announce:
            self._announce(exported)

    def remove(self, path: str) -> None:
        exported = self._objects.pop(path)
        del self._sent[path]
        self._entries.pop(path, None)
        self._changed.discard(path)
        body = [path, [exported.interface]]
        self._emit(exported.audience(), wire.ROOT_PATH, OBJECT_MANAGER, "InterfacesRemoved", "oas", body)

    def audience_changed(self, path: str) -> None:
        """To everybody it is gone, and to whoever may see it now, there again."""
        exported = self._objects[path]
        self._entries.pop(path, None)
        self._sent[path] = dict(exported.properties())
        body = [path, [exported.interface]]
        self._connection.emit(wire.ROOT_PATH, OBJECT_MANAGER, "InterfacesRemoved", "oas", body)
        self._announce(exported)

    def get(self, path: str) -> Exported | None:
        return self._objects.get(path)

    def last_sent(self, path: str) -> Mapping[str, Any]:
        """The properties of an object as they were told last."""
        return self._sent[path]

    def changed(self, path: str) -> None:
        """Some property of the object may have changed: it is compared, and told, within COALESCE_S."""
        self._entries.pop(path, None)
        if path in self._objects:
            self._changed.add(path)
            if self._flush is None:
                self._flush = asyncio.get_running_loop().call_later(COALESCE_S, self.flush)

    def flush(self, first: str = "") -> None:
        """Tells at once what `changed` collected, beginning with one object."""
        if self._flush is not None:
            self._flush.cancel()
            self._flush = None
        for path in sorted(self._changed, key=lambda path: (path != first, path)):
            exported, sent = self._objects[path], self._sent[path]
            now = dict(exported.properties())
            different = {name: value for name, value in now.items() if sent[name] != value}
            if different:
                self._sent[path] = now
                self._tell(exported.audience(), exported, different)
            self._tell_apart(exported)
        self._changed.clear()

    def signal(self, exported: Exported, member: str, *values: Any) -> None:
        """Emits a signal of the contract, after the property changes that came before it, of which its object's, which
        somebody may wait for, go first."""
        self.flush(first=exported.path)
        (signal,) = [s for s in contract(exported.interface).signals if s.name == member]
        self._emit(exported.audience(), exported.path, exported.interface, member, signal.signature, values)

    async def prepare(self) -> None:
        """Makes the first listing as fast as the later ones, without keeping anybody else waiting."""
        for path in list(self._objects):
            if path in self._objects and path != wire.ROOT_PATH:
                self._entry(path)
                await asyncio.sleep(0)

    def _announce(self, exported: Exported) -> None:
        body = [exported.path, self._interfaces(exported)]
        self._emit(exported.audience(), wire.ROOT_PATH, OBJECT_MANAGER, "InterfacesAdded", "oa{sa{sv}}", body)

    def _tell(
        self, audience: Audience, exported: Exported, changed: Mapping[str, Any], *, to: str | None = None
    ) -> None:
        body = [exported.interface, as_variants(exported.interface, changed), []]
        self._emit(audience, exported.path, PROPERTIES, "PropertiesChanged", "sa{sv}as", body, to=to)

    def _tell_apart(self, exported: Exported) -> None:
        """What some see otherwise than everybody, when that changes."""
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
        self, audience: Audience, path: str, interface: str, member: str, signature: str, body: Sequence[Any],
        *, to: str | None = None,
    ) -> None:  # fmt: skip
        if audience == EVERYBODY:
            self._connection.emit(path, interface, member, signature, body, to=to)
            return
        for viewer in self._watchers():
            if audience.includes(viewer):
                self._connection.emit(path, interface, member, signature, body, to=viewer.peer)

    def _entry(self, path: str) -> bytes:
        entry = self._entries.get(path)
        if entry is None:
            exported = self._objects[path]
            entry = dictionary_entry(_MANAGED_OBJECTS, path, self._interfaces(exported))
            if not exported.changes_unheard:
                self._entries[path] = entry
        return entry

    async def _answer(self, call: Received) -> Reply:
        caller = dataclasses.replace(await self._identify(call.sender), interactive=call.interactive)
        match call.interface, call.member:
            case (str(i), "Introspect") if i in {INTROSPECTABLE, ""}:
                return Reply("s", (self._introspection(call.path, caller),))
            case (str(i), "GetManagedObjects") if i in {OBJECT_MANAGER, ""} and call.path == wire.ROOT_PATH:
                entries = (self._entry(path) for path in self._seen_by(caller) if path != wire.ROOT_PATH)
                return Reply(_MANAGED_OBJECTS, ({},), marshalled=dictionary(entries))
        exported = self._objects.get(call.path)
        if exported is None or not exported.audience().includes(caller):
            raise NotFound(
                f"no object at {call.path}", hint="it may be gone; flash list and flash jobs show what there is"
            )
        if call.interface == PROPERTIES:
            return self._property(exported, call, caller)
        self._check_calls(caller, self._calls)
        self._calls.append(caller)
        try:
            return await self._invoke(exported, call, caller)
        finally:
            self._calls.remove(caller)

    def _seen_by(self, caller: Caller) -> list[str]:
        return [path for path, exported in self._objects.items() if exported.audience().includes(caller)]

    async def _invoke(self, exported: Exported, call: Received, caller: Caller) -> Reply:
        methods = {m.name: m for m in contract(exported.interface).methods}
        if call.member not in methods or call.interface not in {exported.interface, ""}:
            raise InvalidArgument(f"{call.path} has no method {call.interface}.{call.member}")
        method = methods[call.member]
        if call.signature != method.in_signature:
            wanted = f"{call.member} takes {method.in_signature!r}, not {call.signature!r}"
            raise InvalidArgument(
                wanted, hint=f"the interface is documented: busctl introspect {wire.BUS_NAME} {call.path}"
            )
        await self._authorize(caller, exported.interface, call.member)
        returned = await getattr(exported, method_name(call.member))(caller, *call.body)
        values = returned if isinstance(returned, tuple) else () if returned is None else (returned,)
        fds = tuple(value.number for value in values if isinstance(value, Fd))
        indexed = tuple(fds.index(value.number) if isinstance(value, Fd) else value for value in values)
        return Reply(method.out_signature, indexed, fds)

    def _property(self, exported: Exported, call: Received, caller: Caller) -> Reply:
        """Reading is everyone's (the policy of the bus decides who reaches us); no property is writable."""
        if not call.body or call.body[0] != exported.interface:
            asked = call.body[0] if call.body else ""
            if call.member == "GetAll" and asked in {"", *self._standard(), OBJECT_MANAGER}:
                return Reply("a{sv}", ({},))
            raise InvalidArgument(f"{call.path} has no interface {asked!r}")
        shown = {**exported.properties(), **exported.properties_only_for(caller)}
        values = as_variants(exported.interface, shown)
        match call.member, call.signature:
            case "GetAll", "s":
                return Reply("a{sv}", (values,))
            case "Get", "ss" if call.body[1] in values:
                return Reply("v", (values[call.body[1]],))
            case "Set", "ssv" if call.body[1] in values:
                raise InvalidArgument(f"{call.body[1]} is read-only", hint="methods change things; see the interface")
        raise InvalidArgument(f"{exported.interface} has no such property: {call.member} {list(call.body[1:])}")

    def _interfaces(self, exported: Exported) -> dict[str, dict[str, Variant]]:
        return {exported.interface: as_variants(exported.interface, exported.properties())}

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


def missing_members(exported: type[Exported]) -> list[str]:
    """Methods of the contract that a class does not implement with as many parameters: for the test of the contract."""
    missing = []
    for method in contract(exported.interface).methods:
        function = getattr(exported, method_name(method.name), None)
        wanted = 2 + len(method.in_args)
        if not inspect.iscoroutinefunction(function) or len(inspect.signature(function).parameters) != wanted:
            missing.append(method.name)
    return missing
