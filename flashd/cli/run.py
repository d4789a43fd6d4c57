# SPDX-License-Identifier: Apache-2.0
"""Runs one command line, and turns errors into a message and an exit status."""

from __future__ import annotations

import contextlib
import os
import sys
from dataclasses import dataclass

from flashd.cli import quick
from flashd.cli.session import Session
from flashd.errors import FlashdError


@dataclass(frozen=True, slots=True)
class _Context:
    obj: Session


def run() -> None:
    try:
        call = quick.read(sys.argv[1:])
        if call is None:
            from flashd.cli.app import app

            app()
        else:
            _run(call)
    except FlashdError as error:
        from flashd.cli import output

        output.show_error(error)
        sys.exit(error.exit_status)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output has closed the pipe. Without this, flushing at exit would fail a second time.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


def _run(call: quick.Call) -> None:
    with Session(call.bus) as session:
        if call.context_name:
            call.values[call.context_name] = _Context(session)
        call.function(**call.values)
