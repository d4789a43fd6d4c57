# SPDX-License-Identifier: Apache-2.0
"""Arguments of the quick start, which are checked before .venv is made: this needs only the standard library."""

from __future__ import annotations

import argparse
from pathlib import Path

_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt"}


def parse() -> argparse.Namespace:
    """Returns `source`, a model folder or None, and `keep`. Exits with an error if they are wrong."""
    parser = argparse.ArgumentParser(
        prog="packaging/quickstart",
        allow_abbrev=False,  # packaging/quickstart looks for --help
        description="Shows a swap: a model is dropped and converted, is swapped to, and answers.",
    )
    parser.add_argument(
        "source", nargs="?", type=Path, metavar="MODEL_FOLDER", help="a model of your own, in place of two small ones"
    )
    parser.add_argument("--keep", action="store_true", help="leave the daemon running, to go on with")
    options = parser.parse_args()
    if options.source is not None and (problem := _problem(options.source)):
        parser.exit(2, f"flashd: {problem}\n        give the folder that holds config.json and the weights\n")
    return options


def _problem(source: Path) -> str:
    try:
        names = list(source.iterdir())
    except OSError as error:
        return f"{source} is no model folder: {error.strerror}"
    return "" if any(path.suffix in _WEIGHTS for path in names) else f"{source} holds no weights"


if __name__ == "__main__":
    parse()
