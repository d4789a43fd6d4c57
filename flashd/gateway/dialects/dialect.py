# SPDX-License-Identifier: Apache-2.0
"""What every dialect has: the form of its errors. The status of an error is the same in all."""

from __future__ import annotations

from http import HTTPStatus
from typing import Protocol

from flashd import errors
from flashd.errors import FlashdError
from flashd.gateway.exchange import TooLarge


class Refused(errors.EngineFailed):
    """An engine's refusal: the status of its answer, and the parameter that it names, which is one of OpenAI's."""

    def __init__(self, message: str, *, hint: str = "", status: int = 500, param: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.status = status
        self.param = param


class NoSuchRoute(errors.NotFound):
    """There is nothing at this path, or not for this method."""

    def __init__(self, message: str, *, hint: str = "", status: int = 404) -> None:
        super().__init__(message, hint=hint)
        self.status = status


class Dialect(Protocol):
    """The form of errors in an interface."""

    def described(self, error: FlashdError) -> dict[str, object]:
        """The body of an answer that is an error."""

    def ending(self, error: FlashdError) -> bytes:
        """The last piece of a stream that ends with an error."""


# The first that fits counts.
_STATUS: tuple[tuple[type[FlashdError], HTTPStatus], ...] = (
    (TooLarge, HTTPStatus.REQUEST_ENTITY_TOO_LARGE),
    (errors.InvalidArgument, HTTPStatus.BAD_REQUEST),
    (errors.NotFound, HTTPStatus.NOT_FOUND),
    (errors.NotAuthorized, HTTPStatus.FORBIDDEN),
    (errors.LimitExceeded, HTTPStatus.TOO_MANY_REQUESTS),
    (errors.Unsupported, HTTPStatus.NOT_IMPLEMENTED),
    (errors.Busy, HTTPStatus.SERVICE_UNAVAILABLE),
    (errors.Unavailable, HTTPStatus.SERVICE_UNAVAILABLE),
    (errors.OutOfMemory, HTTPStatus.SERVICE_UNAVAILABLE),
    (errors.Cancelled, HTTPStatus.SERVICE_UNAVAILABLE),
)


def status_of(error: FlashdError) -> int:
    if isinstance(error, Refused | NoSuchRoute):
        return error.status
    return next((int(status) for kind, status in _STATUS if isinstance(error, kind)), 500)


def name_of(error: FlashdError) -> str:
    """The name of an error in metrics: that of its kind on the bus, or `engine` for an engine's refusal."""
    if isinstance(error, Refused):
        return "engine"
    kind = next(kind for kind in type(error).__mro__ if kind.__module__ == errors.__name__)
    return kind.__name__


def retry_headers(error: FlashdError) -> dict[str, str]:
    return {"Retry-After": "1"} if status_of(error) in {429, 503} else {}
