"""The routes under /speedlab/ as a browser or another program calls them. Needs ComfyUI in this process."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any
from urllib.parse import quote

from speedlab.common.core import output_directory
from speedlab.common.errors import SpeedLabError
from speedlab.measure.store import RunStore

from . import samples as valid
from .fuzz import HOSTILE_TEXTS, Broken, Target, of_json_text, random_text

_PATHS = ("/speedlab/runs", "/speedlab/runs/{0}", "/speedlab/runs/{0}/file/{1}/{2}", "/speedlab/results.csv",
          "/speedlab/runs/{0}/page", "/speedlab/runs/{0}/workflow",
          "/speedlab/delete", "/speedlab/prune", "/speedlab/live")  # fmt: skip
_BODIES = ({"run_ids": [valid.RUN_ID]}, {"keep": 3}, {"client_id": "a", "on": True})
_TYPES = ("application/json", "application/json; charset=utf-8", "application/json; charset=no-such", "text/plain",
          "application/json; charset=utf-16", "application/json; charset=rot13", "multipart/form-data", "")  # fmt: skip
SECRET = b"only for the owner of this machine"
_TIMEOUT_S = 20.0


class RefusedError(SpeedLabError):
    """A status of 400 to 499."""


@dataclass(frozen=True)
class Request:
    """A request as it is sent."""

    method: str
    path: str
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


def make_request(rng: Random) -> Request:
    """A request that is near to a valid one, or far from it."""

    def word(choices: tuple[str, ...]) -> str:
        text = rng.choice(choices) if rng.random() < 0.5 else rng.choice((rng.choice(HOSTILE_TEXTS), random_text(rng)))
        return quote(text[:500].encode("utf-8", "surrogatepass"), safe="" if rng.random() < 0.7 else "/.")

    path = rng.choice(_PATHS).format(
        word((valid.RUN_ID,)), word(("images", "chart", "trace")), word(("0", "1", "999999999"))
    )
    if rng.random() < 0.5:
        names = rng.sample(("offset", "limit", "q", "download", "x"), 2)
        path += "?" + "&".join(f"{name}={word(('0', '10', 'euler'))}" for name in names)
    if rng.random() < 0.4:
        return Request(
            rng.choice(("GET", "HEAD", "PUT")), path, headers={"Range": rng.choice(("bytes=0-", "x", "bytes=9-1"))}
        )
    body = of_json_text(_BODIES)(rng).encode("utf-8", "surrogatepass")
    kind = _TYPES[0] if rng.random() < 0.6 else rng.choice(_TYPES)
    headers = {"Content-Type": kind} if kind else {}
    if rng.random() < 0.1:
        headers["Content-Encoding"] = rng.choice(("gzip", "deflate", "br", "zstd", "no-such"))
    return Request(rng.choice(("POST", "POST", "POST", "DELETE")), path, body, headers)


@contextmanager
def route_targets(outside: Path) -> Iterator[list[Target]]:
    """The routes on a loopback server while the block runs; the output folder is ComfyUI's.

    A file beside the output folder, `outside`, must never be answered.
    """
    loop = asyncio.new_event_loop()
    try:
        site = loop.run_until_complete(_Site.start(outside))
        yield [Target("routes", make_request, lambda request: loop.run_until_complete(site.send(request)))]
        loop.run_until_complete(site.stop())
    finally:
        loop.close()


class _Site:
    """The routes behind a socket on 127.0.0.1, and a client."""

    def __init__(self, runner: Any, session: Any, port: int, store: Any) -> None:
        self._runner, self._session, self._port, self._store = runner, session, port, store

    @staticmethod
    async def start(outside: Path) -> _Site:
        import aiohttp
        from aiohttp import web

        from speedlab.web.routes import add_to

        store = RunStore(output_directory())
        store.check_writable()
        outside.write_bytes(SECRET)
        routes = web.RouteTableDef()
        add_to(routes)
        app = web.Application()
        app.add_routes(routes)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]
        timeout = aiohttp.ClientTimeout(total=_TIMEOUT_S)
        return _Site(runner, aiohttp.ClientSession(timeout=timeout), port, store)

    async def send(self, request: Request) -> None:
        """Send it and read the answer. Raises RefusedError, and Broken for a server error, a secret or a traceback."""
        from yarl import URL

        # A request may have deleted it.
        if not self._store.json_path(valid.RUN_ID).is_file():
            self._store.write(valid.record())
        url = URL(f"http://127.0.0.1:{self._port}{request.path}", encoded=True)
        async with self._session.request(
            request.method, url, data=request.body or None, headers=request.headers
        ) as answer:
            data = await answer.read()
            if answer.status >= 500:
                raise Broken(f"{request.method} answered {answer.status}: {data[:120]!r}")
            if SECRET in data or b"Traceback" in data:
                raise Broken(f"{request.method} gave away what it must not")
            if answer.status >= 400:
                has_error = answer.content_type == "application/json" and data
                raise RefusedError(json.loads(data)["error"] if has_error else str(answer.reason))

    async def stop(self) -> None:
        await self._session.close()
        await self._runner.cleanup()
