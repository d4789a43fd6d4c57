# SPDX-License-Identifier: Apache-2.0
"""The files of the page. They are a few, and are read once: no path of a request ever names a file.

All but the page itself have a folder that is named after their contents, so that a browser may keep them for ever.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

FOLDER = "/page/"
_STATIC = Path(__file__).parent / "static"
_INDEX = "index.html"
_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".svg": "image/svg+xml",
}
_HERE = "{here}"  # in the page, for the folder of the other files
# Nothing inline, nothing of other hosts; and no text becomes markup, whatever a model is called.
_POLICY = "; ".join(
    (
        "default-src 'none'",
        *("script-src 'self'", "style-src 'self'", "connect-src 'self'", "img-src 'self' data:"),
        *("base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'"),
        *("require-trusted-types-for 'script'", "trusted-types 'none'"),
    )
)
SECURE: Mapping[str, str] = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}
_OF_THE_PAGE = {
    **SECURE,
    "content-security-policy": _POLICY,
    "cross-origin-opener-policy": "same-origin",
    "x-frame-options": "DENY",
    "cache-control": "no-cache",
    "vary": "accept",
}


@dataclass(frozen=True, slots=True)
class _File:
    content: bytes
    media_type: str


class PageFiles:
    """The files as they are served."""

    def __init__(self, folder: Path = _STATIC) -> None:
        found = {
            path.relative_to(folder).as_posix(): _File(path.read_bytes(), _TYPES[path.suffix])
            for path in sorted(folder.rglob("*"))
            if path.is_file() and path.suffix in _TYPES
        }
        digest = hashlib.sha256()
        for name, file in found.items():
            digest.update(f"{name}\0{len(file.content)}\0".encode() + file.content)
        self._version = digest.hexdigest()[:16]
        index = found.pop(_INDEX)
        self._page = index.content.replace(_HERE.encode(), f"{FOLDER}{self._version}".encode())
        self._others = found

    def page(self, request: Request) -> Response:
        """The page itself, which browsers ask for each time."""
        tag = f'"{self._version}"'
        headers = {**_OF_THE_PAGE, "etag": tag}
        if tag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(self._page, media_type=_TYPES[".html"], headers=headers)

    def other(self, version: str, name: str) -> Response:
        """A file that the page uses."""
        file = self._others.get(name) if version == self._version else None
        if file is None:
            return Response("there is no such file\n", 404, media_type="text/plain", headers=SECURE)
        headers = {**SECURE, "cache-control": "public, max-age=31536000, immutable"}
        return Response(file.content, media_type=file.media_type, headers=headers)
