# SPDX-License-Identifier: Apache-2.0
"""Downloads what somebody asked the daemon of this user for over the bus: `python -m flashd.errands JOB`.

It is a client like any other. So a token is found where this user keeps it, and does not pass through the bus.
"""

from __future__ import annotations

import logging
import sys

from flashd.client import connect
from flashd.errors import FlashdError


def main(job_path: str) -> int:
    """The exit status; what went wrong is the job's error, for whoever asked."""
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it logs addresses, which may hold a signature
    try:
        with connect(interactive=False, activate=False) as client:
            client.run_errand(job_path)
    except FlashdError as error:
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
