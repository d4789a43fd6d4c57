# SPDX-License-Identifier: Apache-2.0
"""What can go wrong, once, for the bus, the CLI and the Python API.

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
    │   └── EngineOutOfMemory         10    what it needs besides weights is not there
    ├── Unavailable                   13    the daemon, or the bus itself, is not there
    ├── Cancelled                     14    somebody asked for that
    ├── DeviceFailed                  15    a GPU or its driver refused
    ├── LimitExceeded                 16    the caller has too much under way at once
    └── Internal                      70    a defect of ours; the journal has the traceback

Every error says what happened and, in `hint`, what to do about it. Both travel over D-Bus in one string, since that is
all that GLib, sd-bus and gdbus show of an error: the message in its first line, the hint in those after it. The error's
name is `org.flashd1.Error.<class name>`.
"""

from __future__ import annotations

from typing import ClassVar

BUS_PREFIX = "org.flashd1.Error."


class FlashdError(Exception):
    """Base of all errors raised on purpose; never raised itself."""

    exit_status: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    @classmethod
    def bus_name(cls) -> str:
        return BUS_PREFIX + cls.__name__

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message

    def to_bus(self) -> str:
        """The message in one line, then the hint."""
        return "\n".join(filter(None, [" ".join(self.message.split("\n")), self.hint]))


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
    """`recorded` is what the adapter calls its base; it does not travel over the bus."""

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
    """The error that a D-Bus error reply of this name stands for; `Internal` for names that are not ours."""
    for cls in _subclasses(FlashdError):
        if cls.bus_name() == name:
            return cls(message, hint=hint)
    return Internal(f"{name}: {message}", hint=hint)
