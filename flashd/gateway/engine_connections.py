# SPDX-License-Identifier: Apache-2.0
"""Connections to engines' sockets, kept open between requests: a pool for each engine."""

from __future__ import annotations

import contextlib
import io
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass

from aiohttp import ClientResponse, ClientSession, ClientTimeout, DummyCookieJar, UnixConnector
from aiohttp.client_exceptions import ClientError, ServerDisconnectedError

from flashd.errors import EngineFailed, Unavailable

_CONNECT_S = 5.0
_KEEP_S = 30.0  # shorter than engines keep idle connections (flashd/workers/connections.py)
_DIRECT = {"x-flashd-direct": "1"}  # for this very engine (flashd/workers/connections.py)
_MOST_TRIES = 5
_MOST_POOLS = 16
_MAX_LINE_BYTES = 64 << 10
_LARGE_BYTES = 1 << 20


@dataclass(slots=True)
class _Pool:
    """The connections to one engine, and how many of its answers are being read."""

    session: ClientSession
    open_answers: int = 0


class EngineConnections:
    """Pools by socket path. On one event loop."""

    def __init__(self) -> None:
        self._pools: dict[str, _Pool] = {}

    @contextlib.asynccontextmanager
    async def answer(
        self, socket_path: str, method: str, target: str, headers: Mapping[str, str], body: bytes
    ) -> AsyncIterator[ClientResponse]:
        """An engine's answer, from its head on. Its connection is kept if the answer is read to its end, and closed
        otherwise, which ends a generation.

        Raises Unavailable if the engine cannot be reached, and EngineFailed if it ends before it answers.
        """
        pool = await self._pool(socket_path)
        pool.open_answers += 1
        try:
            response = await self._asked(pool.session, method, target, headers, body)
            try:
                yield response
            finally:
                if response.content.at_eof():
                    response.release()
                else:
                    response.close()
        finally:
            pool.open_answers -= 1

    @staticmethod
    async def _asked(
        session: ClientSession, method: str, target: str, headers: Mapping[str, str], body: bytes
    ) -> ClientResponse:
        may_have_died = False
        for _ in range(_MOST_TRIES):
            try:
                return await session.request(
                    method,
                    f"http://engine{target}",
                    headers={**headers, **_DIRECT},
                    # Bytes would be written in one go, while all other requests wait.
                    data=io.BytesIO(body) if len(body) > _LARGE_BYTES else body or None,
                    allow_redirects=False,
                )
            except (ServerDisconnectedError, ConnectionResetError, BrokenPipeError):
                # A kept connection that the engine has closed in this moment, maybe with all others; or the engine has
                # died of the request, which would kill the next one as well: then no connection is to be had.
                may_have_died = True
            except (ClientError, OSError) as error:  # includes TimeoutError
                if may_have_died:
                    break
                hint = "flash status shows what serves"
                raise Unavailable(f"the engine cannot be reached: {error}", hint=hint) from error
        raise EngineFailed("the engine ended before it answered", hint="its log may say why; ask again")

    async def close(self) -> None:
        for pool in self._pools.values():
            await pool.session.close()
        self._pools.clear()

    async def _pool(self, path: str) -> _Pool:
        pool = self._pools.pop(path, None)
        if pool is None:
            session = ClientSession(
                connector=UnixConnector(path, limit=0, keepalive_timeout=_KEEP_S),
                timeout=ClientTimeout(total=None, sock_connect=_CONNECT_S),
                cookie_jar=DummyCookieJar(),
                auto_decompress=False,
                skip_auto_headers={"User-Agent", "Accept", "Accept-Encoding", "Content-Type"},
                max_line_size=_MAX_LINE_BYTES,
                max_field_size=_MAX_LINE_BYTES,
            )
            pool = _Pool(session)
        self._pools[path] = pool  # the last one used is the last to go
        idle = [path for path, other in self._pools.items() if not other.open_answers and other is not pool]
        for oldest in idle[: max(0, len(self._pools) - _MOST_POOLS)]:
            await self._pools.pop(oldest).session.close()
        return pool
