# SPDX-License-Identifier: Apache-2.0
"""Errors, defined once for the bus, the command line and the Python API.

    FlashdError                       exit  when
    ├── InvalidArgument                2    the request itself makes no sense
    ├── NotFound                       3    no such model, job, lease or engine
    ├── AlreadyExists                  4    the name is taken
    ├── NotAuthorized                  5    the caller may not do this
    ├── Busy                           6    leased, pinned or in transition: try later
    ├── InvalidSource                  7    a dropped or imported source is malformed or hostile
    │   └── BaseMissing                7    an adapter's base is not in the store yet
    ├── CorruptCheckpoint              8    stored bytes do not match their digests
    ├── StoreFull                      9    disk or quota cannot take it
    ├── OutOfMemory                   10    a pool's budget cannot take it
    ├── TransferFailed                11    the operating system refused a read or write
    ├── EngineFailed                  12    an inference process died or refused
    │   ├── Unsupported               12    no engine here can run this architecture
    │   └── EngineOutOfMemory         10    no memory for what it needs besides weights
    ├── Unavailable                   13    the daemon, the bus, the hub or an engine's software is missing
    ├── Cancelled                     14    the operation was cancelled
    ├── DeviceFailed                  15    a GPU or its driver reported an error
    ├── LimitExceeded                 16    the caller has too many operations in progress
    └── Internal                      70    a bug in flashd; the journal has the traceback

Every error says what happened and, in `hint`, what to do about it. Over D-Bus both are one string, because GLib, sd-bus
and gdbus show no more of an error: the message is its first line, the hint the following lines. The error's name is
`org.flashd1.Error.<class name>`.

Messages quote file names, requests and models' files, so every error escapes and shortens its text.
"""

from __future__ import annotations

from typing import ClassVar

from flashd.legible import legible

BUS_PREFIX = "org.flashd1.Error."


class FlashdError(Exception):
    """Base of all errors that flashd raises deliberately; never raised itself."""

    exit_status: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        self.message = legible(" ".join(message.split("\n")))
        self.hint = legible(hint, keep="\n")
        super().__init__(self.message)

    @classmethod
    def bus_name(cls) -> str:
        return BUS_PREFIX + cls.__name__

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message

    def to_bus(self) -> str:
        """Formats the error for the bus: the message in one line, then the hint."""
        return "\n".join(filter(None, [self.message, self.hint]))


class InvalidArgument(FlashdError):
    exit_status = 2


class NotFound(FlashdError):
    exit_status = 3


class AlreadyExists(FlashdError):
    exit_status = 4


class NotAuthorized(FlashdError):
    exit_status = 5


class Busy(FlashdError):
    exit_status = 6


class InvalidSource(FlashdError):
    exit_status = 7


class BaseMissing(InvalidSource):
    """Raised for an adapter without its base. `recorded` is its name in the adapter, which is not sent over the bus."""

    exit_status = 7

    def __init__(self, message: str, *, hint: str = "", recorded: str = "") -> None:
        super().__init__(message, hint=hint)
        self.recorded = recorded


class CorruptCheckpoint(FlashdError):
    exit_status = 8


class StoreFull(FlashdError):
    exit_status = 9


class OutOfMemory(FlashdError):
    exit_status = 10


class TransferFailed(FlashdError):
    exit_status = 11


class EngineFailed(FlashdError):
    exit_status = 12


class Unsupported(EngineFailed):
    exit_status = 12


class EngineOutOfMemory(EngineFailed):
    exit_status = 10


class Unavailable(FlashdError):
    exit_status = 13


class Cancelled(FlashdError):
    exit_status = 14


class DeviceFailed(FlashdError):
    exit_status = 15


class LimitExceeded(FlashdError):
    exit_status = 16


class Internal(FlashdError):
    exit_status = 70


def _subclasses(cls: type[FlashdError]) -> list[type[FlashdError]]:
    direct = cls.__subclasses__()
    return direct + [deeper for child in direct for deeper in _subclasses(child)]


def from_bus(name: str, message: str, hint: str = "") -> FlashdError:
    """Returns the error for a D-Bus error reply of this name; `Internal` for a name that is not ours."""
    for cls in _subclasses(FlashdError):
        if cls.bus_name() == name:
            return cls(message, hint=hint)
    return Internal(f"{name}: {message}", hint=hint)
