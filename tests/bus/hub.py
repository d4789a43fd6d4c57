# SPDX-License-Identifier: Apache-2.0
"""A server that behaves like the Hugging Face Hub, or as badly as it might, for tests of `flash pull`.

It answers https://huggingface.co/docs/hub/api's model_info and /resolve, which redirects large files to a "CDN": a
second server on a port of its own, which must never see a token. Faults are said for each path, and used up one by one.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE_BYTES = 10_000  # such files are "in LFS": described by SHA-256, and served by the CDN


@dataclass(slots=True)
class Fault:
    """What happens instead of, or during, an answer. `cut_after` closes the connection after so many bytes of it."""

    status: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    cut_after: int = -1
    corrupt: bool = False
    ends_early: bool = False  # politely: with a Content-Length of less than there is
    ignores_range: bool = False


@dataclass(slots=True)
class Repository:
    """Commits by name of revision, and the files of each commit."""

    revisions: dict[str, str] = field(default_factory=dict)
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    token: str = ""  # private unless it is given
    gated: bool = False
    siblings: list[dict[str, Any]] = field(default_factory=list)  # listed in addition
    described: list[dict[str, Any]] = field(default_factory=list)  # listed instead

    def commit(self, files: Mapping[str, bytes], revision: str = "main") -> str:
        digest = hashlib.sha1(repr(sorted((n, hashlib.sha256(c).hexdigest()) for n, c in files.items())).encode())
        self.revisions[revision] = digest.hexdigest()
        self.files[digest.hexdigest()] = dict(files)
        return digest.hexdigest()


@dataclass(slots=True)
class Hub:
    """The repositories, how it misbehaves, and what it was asked."""

    url: str = ""
    cdn_url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    faults: dict[str, list[Fault]] = field(default_factory=lambda: defaultdict(list))
    bytes_per_s: float = 0.0
    holds: dict[str, threading.Event] = field(default_factory=dict)  # files that wait for these
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    served_bytes: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    answering: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def repository(self, name: str) -> Repository:
        return self.repositories.setdefault(name, Repository())

    def fault(self, path: str) -> Fault:
        with self.lock:
            waiting = self.faults.get(path)
            return waiting.pop(0) if waiting else Fault()

    @property
    def is_busy(self) -> bool:
        return self.answering > 0

    def environment(self, home: Path) -> dict[str, str]:
        """Variables by which a program finds this hub, with its caches at home."""
        caches = {"HF_HOME": str(home / "huggingface"), "XDG_CACHE_HOME": str(home / "cache")}
        local = {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        return {"HF_ENDPOINT": self.url, "HF_TOKEN": "", **caches, **local}

    def total_served_bytes(self) -> int:
        with self.lock:
            return sum(self.served_bytes.values())


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub
    is_cdn: bool

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 -- its name in the base class
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        with self.hub.lock:
            self.hub.requests.append((self.command, path, dict(self.headers.items())))
            self.hub.answering += 1
        try:
            if self.is_cdn:
                assert "authorization" not in {name.lower() for name in self.headers}, "the CDN was given a token"
                _, name, commit, file = path.split("|")
                self._file(self.hub.repositories[name].files[commit][file], file)
            elif match := re.fullmatch(r"/api/models/(.+?)(?:/revision/([^/]+))?", path):
                self._model_info(match[1], match[2] or "main")
            elif match := re.fullmatch(r"/(.+?)/resolve/([^/]+)/(.+)", path):
                self._resolve(match[1], match[2], match[3])
            else:
                self._refuse(404)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        finally:
            with self.hub.lock:
                self.hub.answering -= 1

    def _allowed(self, name: str) -> Repository | None:
        repository = self.hub.repositories.get(name)
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if given == "expired":
            self._refuse(401, "", "Invalid credentials in Authorization header")
        elif repository is None or (repository.token and given != repository.token and not repository.gated):
            self._refuse(401, "RepoNotFound")  # the hub does not say which
        else:
            return repository
        return None

    def _model_info(self, name: str, revision: str) -> None:
        fault = self.hub.fault("api")
        if fault.status:
            self._refuse(fault.status, headers=fault.headers)
            return
        if (repository := self._allowed(name)) is None:
            return
        commit = repository.revisions.get(revision, revision)
        if commit not in repository.files:
            self._refuse(404, "RevisionNotFound")
            return
        listed = [sibling(file, content) for file, content in repository.files[commit].items()]
        siblings = [*(repository.described or listed), *repository.siblings]
        document = {"id": name, "modelId": name, "sha": commit, "siblings": siblings}
        self._send(200, json.dumps(document).encode(), {"Content-Type": "application/json", **fault.headers})

    def _resolve(self, name: str, revision: str, file: str) -> None:
        if (repository := self._allowed(name)) is None:
            return
        if repository.gated and self.headers.get("Authorization") != f"Bearer {repository.token}":
            self._refuse(403, "GatedRepo")
            return
        fault = self.hub.fault(f"resolve/{file}")
        if fault.status:
            self._refuse(fault.status, headers=fault.headers)
            return
        commit = repository.revisions.get(revision, revision)
        content = repository.files.get(commit, {}).get(file)
        if content is None:
            self._refuse(404, "EntryNotFound")
        elif len(content) >= LARGE_BYTES:
            location = f"{self.hub.cdn_url}/|{name}|{commit}|{file}"
            linked = {"X-Linked-Etag": f'"{_sha256(content)}"', "X-Linked-Size": str(len(content))}
            self._send(302, b"", {"Location": location, "X-Repo-Commit": commit, **linked, **fault.headers})
        else:
            self._file(content, file, {"X-Repo-Commit": commit, **fault.headers})

    def _file(self, content: bytes, file: str, headers: Mapping[str, str] | None = None) -> None:
        fault = self.hub.fault(file)
        if fault.status:
            self._refuse(fault.status, headers=fault.headers)
            return
        whole = len(content)
        if fault.corrupt:
            content = bytes(byte ^ 1 for byte in content)
        status, start, end = 200, 0, whole
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked and not fault.ignores_range:
            status, start = 206, int(asked[1])
            end = min(whole, int(asked[2]) + 1) if asked[2] else whole
        if fault.ends_early:
            end = start + (end - start) // 2
        sent = {"ETag": f'"{_sha256(content)}"', "Accept-Ranges": "bytes", **(headers or {})}
        if status == 206:
            sent["Content-Range"] = f"bytes {start}-{end - 1}/{whole}"
        self._head(status, end - start, sent)
        if self.command == "HEAD":
            return
        if (hold := self.hub.holds.get(file)) and end == whole:
            hold.wait(60)
        stop = end if fault.cut_after < 0 else min(end, start + fault.cut_after)
        for offset in range(start, stop, 65536):
            chunk = content[offset : min(offset + 65536, stop)]
            self.wfile.write(chunk)
            with self.hub.lock:
                self.hub.served_bytes[file] += len(chunk)
            if self.hub.bytes_per_s:
                time.sleep(len(chunk) / self.hub.bytes_per_s)
        if stop < end:
            self.close_connection = True

    def _refuse(
        self, status: int, code: str = "", message: str = "", *, headers: Mapping[str, str] | None = None
    ) -> None:
        extra = {"X-Error-Code": code} if code else {}
        if message:
            extra["X-Error-Message"] = message
        self._send(status, b"", {**extra, **(headers or {})})

    def _send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self._head(status, len(body), headers)
        if self.command != "HEAD":
            self.wfile.write(body)

    def _head(self, status: int, length: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()


def sibling(file: str, content: bytes) -> dict[str, Any]:
    described: dict[str, Any] = {
        "rfilename": file,
        "size": len(content),
        "blobId": hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(),
    }
    if len(content) >= LARGE_BYTES:
        described["lfs"] = {"sha256": _sha256(content), "size": len(content), "pointerSize": 134}
    return described


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()
    servers = []
    for is_cdn in (False, True):
        handler = type("Handler", (_Handler,), {"hub": hub, "is_cdn": is_cdn})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
    hub.url, hub.cdn_url = (f"http://127.0.0.1:{server.server_address[1]}" for server in servers)
    try:
        yield hub
    finally:
        for hold in hub.holds.values():
            hold.set()
        for server in servers:
            server.shutdown()
            server.server_close()
