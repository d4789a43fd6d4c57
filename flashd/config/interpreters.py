# SPDX-License-Identifier: Apache-2.0
"""What interpreters for engines can import."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence

from flashd.errors import Unavailable

_MISSING = "import importlib.util as u, sys; print(*[n for n in sys.argv[1:] if u.find_spec(n) is None])"
_TIMEOUT_S = 20.0


def missing_in(python: str, modules: Sequence[str], environment: Mapping[str, str] | None = None) -> list[str]:
    """Returns the modules that an interpreter does not find, in this environment or ours. None is imported, which would
    take seconds.

    Raises Unavailable if the interpreter cannot be run.
    """
    try:
        done = subprocess.run(
            [python, "-c", _MISSING, *modules],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=True,
            timeout=_TIMEOUT_S,
        )
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise Unavailable(f"{python} cannot be run: {error}", hint="choose another interpreter") from None
    return done.stdout.split()
