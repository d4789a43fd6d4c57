# SPDX-License-Identifier: Apache-2.0
"""Names, paths and errors on the bus, and access to the interface XML.

The XML files in `flashd/dbus/interfaces/` are the contract; this module only defines constants for their names.
"""

from __future__ import annotations

import contextlib
import functools

from flashd import errors

DBUS = "org.freedesktop.DBus"
DBUS_PATH = "/org/freedesktop/DBus"
PROPERTIES = "org.freedesktop.DBus.Properties"
OBJECT_MANAGER = "org.freedesktop.DBus.ObjectManager"

BUS_NAME = "org.flashd1"
ROOT_PATH = "/org/flashd1"

MANAGER = "org.flashd1.Manager"
MODEL = "org.flashd1.Model"
JOB = "org.flashd1.Job"
LEASE = "org.flashd1.Lease"
ENGINE = "org.flashd1.Engine"
DEVICE = "org.flashd1.Device"
INTERFACES = (MANAGER, MODEL, JOB, LEASE, ENGINE, DEVICE)

# The bus daemon's default limit is 16 file descriptors per message (max_message_unix_fds); larger imports take
# several calls.
NEVER = 365 * 86_400  # of Model.SetIdleTimeout, in seconds
FILES_PER_MESSAGE = 16


def escape(label: str) -> str:
    """Encodes a string as a path element, reversibly: all but ASCII letters and digits become `_xx`, as in systemd."""
    if not label:
        return "_"
    return "".join(chr(b) if chr(b).isascii() and chr(b).isalnum() else f"_{b:02x}" for b in label.encode())


def unescape(element: str) -> str:
    """Decodes the result of `escape`."""
    if element == "_":
        return ""
    head, *tail = element.split("_")
    return (head.encode() + b"".join(bytes([int(part[:2], 16)]) + part[2:].encode() for part in tail)).decode()


def model_path(name: str) -> str:
    return f"{ROOT_PATH}/model/{escape(name)}"


def job_path(number: int) -> str:
    return f"{ROOT_PATH}/job/{number}"


def lease_path(number: int) -> str:
    return f"{ROOT_PATH}/lease/{number}"


def engine_path(number: int) -> str:
    return f"{ROOT_PATH}/engine/{number}"


def device_path(name: str) -> str:
    return f"{ROOT_PATH}/device/{escape(name)}"


def called(path: str) -> str:
    """Describes the object at a path in words, such as `job 7` or `model 'ada'`."""
    kind, _, element = path.removeprefix(f"{ROOT_PATH}/").partition("/")
    if kind in {"job", "lease", "engine"} and element.isdecimal():
        return f"{kind} {element}"
    with contextlib.suppress(ValueError, IndexError):
        if kind in {"model", "device"} and element:
            return f"{kind} {unescape(element)!r}"
    return f"object at {path}"


@functools.cache
def interface_xml(interface: str) -> str:
    """Returns the documented introspection XML of one of `INTERFACES`."""
    from importlib import resources  # here, because its import takes as long as all others, and clients do not need it

    return (resources.files("flashd") / "dbus" / "interfaces" / f"{interface}.xml").read_text(encoding="utf-8")


def raised(name: str, text: str) -> errors.FlashdError:
    """Returns the error for an error reply of this name."""
    if name.startswith(errors.BUS_PREFIX):
        message, _, hint = text.partition("\n")
        return errors.from_bus(name, message, hint)
    error: errors.FlashdError
    match name.removeprefix(DBUS + ".Error."):
        case "ServiceUnknown" | "NameHasNoOwner" | "Disconnected" | "NoServer":
            error = errors.Unavailable("flashd is not running", hint="start it: flash start")
        case "NoReply":
            hint = "the call may have taken effect: see flash list"
            error = errors.Unavailable("flashd ended before it answered", hint=hint)
        case "AccessDenied" | "AuthFailed":
            error = errors.NotAuthorized(text, hint="the bus itself refused this; ask an administrator")
        case "UnknownObject":
            error = errors.NotFound(text)
        case "InvalidArgs" | "UnknownMethod" | "UnknownProperty" | "UnknownInterface" | "PropertyReadOnly":
            error = errors.InvalidArgument(text)
        case _:
            error = errors.from_bus(name, text)
    return error
