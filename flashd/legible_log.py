# SPDX-License-Identifier: Apache-2.0
"""Formats log records as legible lines."""

from __future__ import annotations

import logging
import textwrap
from types import TracebackType

from flashd.legible import MAX_CHARACTERS, legible

MAX_LINE_CHARACTERS = 4 * MAX_CHARACTERS  # of the log: an error's message, its hint, and their subject
MAX_TRACEBACK_CHARACTERS = 20 * MAX_CHARACTERS

_Raised = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]


class LegibleFormatter(logging.Formatter):
    """Formats each log record as one legible line, with semicolons in place of line breaks.

    A traceback follows indented, so that no text in it can pass for another record.
    """

    def formatMessage(self, record: logging.LogRecord) -> str:
        return legible("; ".join(super().formatMessage(record).split("\n")), MAX_LINE_CHARACTERS)

    def formatException(self, ei: _Raised) -> str:
        return _indented(super().formatException(ei))

    def formatStack(self, stack_info: str) -> str:
        return _indented(super().formatStack(stack_info))


def _indented(traceback: str) -> str:
    return textwrap.indent(legible(traceback, MAX_TRACEBACK_CHARACTERS, keep="\n"), "  ", lambda line: True)
