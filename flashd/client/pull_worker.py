# SPDX-License-Identifier: Apache-2.0
"""Downloads a model for the bus method Pull of this user's daemon: `python -m flashd.client.pull_worker JOB`.

It is an ordinary client in a process of this user, so it finds the user's token, which never passes over the bus.
"""

from __future__ import annotations

import logging
import sys

from flashd.client.client import connect
from flashd.errors import FlashdError


def main(job_path: str) -> int:
    """Downloads the model and returns the exit status. An error is also that of the job, for its caller."""
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it logs URLs, which may contain a signature
    try:
        with connect(interactive=False, activate=False) as client:
            client.run_errand(job_path)
    except FlashdError as error:
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
