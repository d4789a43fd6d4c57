# SPDX-License-Identifier: Apache-2.0
"""`flashd-gateway`: one HTTP address for all models of a daemon."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from flashd._version import __version__
from flashd.config.paths import Scope
from flashd.errors import FlashdError, Unavailable
from flashd.gateway import listening
from flashd.gateway.tokens import TokenFile, default_file
from flashd.legible_log import LegibleFormatter

log = logging.getLogger("flashd.gateway")


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    handler = logging.StreamHandler()
    handler.setFormatter(LegibleFormatter("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])  # libraries tell of each request to the hub
    logging.getLogger("flashd").setLevel(logging.INFO)
    try:
        with contextlib.ExitStack() as stack:
            tokens = TokenFile(options.tokens or default_file(Scope.SYSTEM if options.bus == "system" else Scope.USER))
            has_tokens = bool(tokens.all())
            opened = listening.opened(
                options.address or [listening.DEFAULT_ADDRESS], options.socket, has_tokens=has_tokens, until=stack
            )
            for each in opened.refused:
                log.warning("not served: %s; %s", each.why, each.remedy)
            try:  # late, because the manual page is made where these libraries are not
                from flashd.gateway import server
            except ImportError as error:
                hint = "install it: pip install 'flashd[gateway]'"
                raise Unavailable(
                    f"the gateway needs {error.name or 'libraries'}, which is missing", hint=hint
                ) from None

            asyncio.run(server.serve(options, opened, tokens))
    except FlashdError as error:
        print(f"flashd-gateway: {error}", file=sys.stderr)
        return error.exit_status
    return 0


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser("flashd-gateway", description="One HTTP address for all models of a flashd.")
    made.add_argument("--version", action="version", version=__version__)
    made.add_argument("--bus", help="session, system or a D-Bus address; default: as flash finds it")
    made.add_argument(
        "--address",
        action="append",
        help=f"HOST:PORT to listen at, as often as you like; default: {listening.DEFAULT_ADDRESS}",
    )
    made.add_argument("--socket", type=Path, help="a Unix socket to listen at, besides")
    made.add_argument("--tokens", type=Path, help="file of the tokens; default: the one that flash token changes")
    made.add_argument(
        "--history",
        type=Path,
        help="file of what the page remembers; default: in the state directory of a service",
    )
    made.add_argument(
        "--linger", type=float, metavar="SECONDS", help="end when no daemon has run for this long; default: never"
    )
    return made


if __name__ == "__main__":
    sys.exit(main())
