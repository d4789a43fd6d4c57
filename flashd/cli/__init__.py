# SPDX-License-Identifier: Apache-2.0
"""The `flash` command."""

from __future__ import annotations


def main() -> None:
    from flashd.cli.app import run

    run()
