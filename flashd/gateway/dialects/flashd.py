# SPDX-License-Identifier: Apache-2.0
"""flashd's own interface, under /flashd/v1: its errors say their names, and what to do."""

from __future__ import annotations

import json

from flashd.errors import FlashdError
from flashd.gateway.dialects.dialect import name_of


class Flashd:
    """The form of errors."""

    def described(self, error: FlashdError) -> dict[str, object]:
        return {"error": {"name": name_of(error), "message": error.message, "hint": error.hint}}

    def ending(self, error: FlashdError) -> bytes:
        return f"event: failed\ndata: {json.dumps(self.described(error))}\n\n".encode()
