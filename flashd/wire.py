# SPDX-License-Identifier: Apache-2.0
"""What the bus calls things: names, paths and the documented interface XML.

The XML files in `flashd/interfaces/` are the contract; this module only names what stands in them.
"""

from __future__ import annotations

from importlib import resources

BUS_NAME = "org.flashd1"
ROOT_PATH = "/org/flashd1"

MANAGER = "org.flashd1.Manager"
MODEL = "org.flashd1.Model"
JOB = "org.flashd1.Job"
LEASE = "org.flashd1.Lease"
ENGINE = "org.flashd1.Engine"
DEVICE = "org.flashd1.Device"
INTERFACES = (MANAGER, MODEL, JOB, LEASE, ENGINE, DEVICE)

# The bus daemon's default limit is 16 file descriptors a message (max_message_unix_fds); larger imports take
# several calls.
FILES_PER_MESSAGE = 16


def escape(label: str) -> str:
    """A path element for any string, reversible: all but ASCII letters and digits become `_xx` (as systemd does)."""
    if not label:
        return "_"
    return "".join(chr(b) if chr(b).isascii() and chr(b).isalnum() else f"_{b:02x}" for b in label.encode())


def unescape(element: str) -> str:
    """Inverse of `escape`."""
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


def interface_xml(interface: str) -> str:
    """The documented introspection XML of one of `INTERFACES`."""
    return (resources.files("flashd") / "interfaces" / f"{interface}.xml").read_text(encoding="utf-8")
