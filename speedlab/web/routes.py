"""What the browser asks this pack: lists of runs, a run and its files, deleting, and whether it shows live charts.

All under `/speedlab/`, on ComfyUI's own server and behind its checks. What changes something is a POST with a JSON
body, which no other site's page can send. Files are read and deleted in threads, off the server's loop.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from functools import wraps
from pathlib import Path
from typing import Any

from ..common.core import output_directory
from ..common.errors import ResultsError, SpeedLabError, first_line
from ..common.timing import tell_of_work_through
from ..measure.page import POLICY
from ..measure.store import RunStore
from ..sampling.profiled import show_runs_through
from . import live
from .library import RunLibrary, UnknownRunError

log = logging.getLogger(__name__)

MAX_DELETED = 1000
_MAX_CLIENT_ID = 200
# What a browser may show in place; everything else is handed over as a file to save.
_SHOWN = {".png": "image/png", ".jpg": "image/jpeg", ".webp": "image/webp", ".json": "application/json"}


class _BadRequestError(SpeedLabError):
    """The request is not one of ours; the message says what is wrong."""


def register() -> bool:
    """Add the routes and the live feed to the running server; False where there is none, as in tests and scripts."""
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    routes = getattr(server, "routes", None)
    if routes is None:
        return False
    add_to(routes)
    show_runs_through(live.open_feed)
    tell_of_work_through(live.tell_of_work)
    return True


def add_to(routes: Any) -> None:
    """Add the routes to an aiohttp RouteTableDef."""
    routes.get("/speedlab/runs")(_answering(_list))
    routes.get("/speedlab/runs/{run_id}")(_answering(_record))
    routes.get("/speedlab/runs/{run_id}/page")(_answering(_page))
    routes.get("/speedlab/runs/{run_id}/workflow")(_answering(_workflow))
    routes.get("/speedlab/runs/{run_id}/file/{kind}/{index}")(_answering(_file))
    routes.get("/speedlab/results.csv")(_answering(_csv))
    routes.post("/speedlab/delete")(_answering(_delete))
    routes.post("/speedlab/prune")(_answering(_prune))
    routes.post("/speedlab/live")(_answering(_live))


def _answering(handler: Callable[[Any], Awaitable[Any]]) -> Callable[[Any], Awaitable[Any]]:
    """The handler with this pack's errors turned into answers that say what is wrong."""
    from aiohttp import web

    @wraps(handler)
    async def answer(request: Any) -> Any:
        try:
            return await handler(request)
        except _BadRequestError as error:
            return web.json_response({"error": str(error)}, status=400)
        except UnknownRunError as error:
            return web.json_response({"error": str(error)}, status=404)
        except SpeedLabError as error:
            return web.json_response({"error": str(error)}, status=409)
        except OSError as error:
            log.warning("SpeedLab: %s: %s", request.path, first_line(error))
            return web.json_response({"error": first_line(error)}, status=500)

    return answer


async def _list(request: Any) -> Any:
    from aiohttp import web

    query = request.query
    offset, limit = _whole(query.get("offset", "0"), "offset"), _whole(query.get("limit", "50"), "limit")
    page = await asyncio.to_thread(lambda: _library().page(offset, limit, query.get("q", "")))
    # Where a run stands among all files, so that a list can leave room for those that it has not asked for.
    runs = [
        {**asdict(run), "markdown": run.markdown(), "position": place}
        for run, place in zip(page.runs, page.positions, strict=True)
    ]
    return web.json_response(
        {"runs": runs, "files": page.files, "skipped": page.skipped, "next_offset": page.next_offset}
    )


async def _record(request: Any) -> Any:
    from aiohttp import web

    run_id = request.match_info["run_id"]
    as_file = "download" in request.query
    try:
        text = await asyncio.to_thread(lambda: (_library().text if as_file else _library().shown)(run_id))
    except UnknownRunError:
        if "if_there" not in request.query:
            raise
        # A workflow may name a run that was deleted since: to a browser 404 is an error, in the console too.
        return web.Response(status=204)
    return web.Response(
        text=text,
        content_type="application/json",
        headers=_headers(f"{run_id}.json" if as_file else None),
    )


async def _page(request: Any) -> Any:
    from aiohttp import web

    run_id = request.match_info["run_id"]
    text = await asyncio.to_thread(lambda: _library().page_of(run_id))
    headers = _headers(f"{run_id}.html" if "download" in request.query else None)
    headers["Content-Security-Policy"] = f"{POLICY}; sandbox"
    return web.Response(text=text, content_type="text/html", headers=headers)


async def _workflow(request: Any) -> Any:
    from aiohttp import web

    try:
        found = await asyncio.to_thread(lambda: _library().workflow(request.match_info["run_id"]))
    except UnknownRunError as error:
        if "if_there" not in request.query:
            raise
        found = {"error": str(error)}
    return web.json_response(found, headers=_headers(None))


async def _file(request: Any) -> Any:
    from aiohttp import web

    found = request.match_info
    index = _whole(found["index"], "index")
    try:
        path = await asyncio.to_thread(lambda: _library().artifact(found["run_id"], found["kind"], index))
    except UnknownRunError:
        if "if_there" not in request.query:
            raise
        return web.Response(status=204)
    shown = _SHOWN.get(path.suffix.lower())
    return _file_response(path, shown or "application/octet-stream", None if shown else path.name)


async def _csv(_request: Any) -> Any:
    store = RunStore(output_directory())
    path = store.csv_path

    def is_there() -> bool:
        store.refuse_symlink_out()
        try:
            store.take_in()
        except ResultsError as error:  # the rows that are in the table can be read all the same
            log.warning("SpeedLab: %s", error)
        return path.is_file() and not path.is_symlink()

    there = await asyncio.to_thread(is_there)
    if not there:
        raise UnknownRunError(f"There is no {path} yet.")
    return _file_response(path, "text/csv", path.name)


async def _delete(request: Any) -> Any:
    from aiohttp import web

    run_ids = (await _body(request)).get("run_ids")
    if not isinstance(run_ids, list) or not all(isinstance(run_id, str) for run_id in run_ids):
        raise _BadRequestError("run_ids has to be a list of run ids.")
    if len(run_ids) > MAX_DELETED:
        raise _BadRequestError(f"At most {MAX_DELETED} runs are deleted at once.")

    def work() -> dict[str, Any]:
        library, deleted, failed = _library(), [], {}
        for run_id in dict.fromkeys(run_ids):
            try:
                library.delete(run_id)
                deleted.append(run_id)
            except SpeedLabError as error:
                failed[run_id] = str(error)
        return {"deleted": deleted, "failed": failed}

    return web.json_response(await asyncio.to_thread(work))


async def _prune(request: Any) -> Any:
    from aiohttp import web

    keep = (await _body(request)).get("keep")
    if not isinstance(keep, int) or isinstance(keep, bool) or keep < 0:
        raise _BadRequestError("keep has to be a whole number, 0 to keep all.")
    return web.json_response({"deleted": await asyncio.to_thread(lambda: _library().prune(keep))})


async def _live(request: Any) -> Any:
    from aiohttp import web

    body = await _body(request)
    client_id, listens = body.get("client_id"), body.get("on")
    if not isinstance(client_id, str) or not 0 < len(client_id) <= _MAX_CLIENT_ID or not isinstance(listens, bool):
        raise _BadRequestError("client_id has to be a text and on true or false.")
    live.listen(client_id, listens)
    return web.json_response({})


def _library() -> RunLibrary:
    return RunLibrary(RunStore(output_directory()))


async def _body(request: Any) -> dict[str, Any]:
    """The JSON object of a POST. Only with its content type: a page of another site cannot send that unasked."""
    from aiohttp import web

    if request.content_type != "application/json":
        raise _BadRequestError("The body has to be sent as application/json.")
    try:
        body = json.loads(await request.text())
    except web.RequestPayloadError as error:
        raise _BadRequestError(f"The body is not packed as its header says: {first_line(error)}.") from error
    except (ValueError, LookupError, RecursionError) as error:  # a charset that Python does not know is a LookupError
        raise _BadRequestError(f"The body is not JSON: {first_line(error)}.") from error
    if not isinstance(body, dict):
        raise _BadRequestError("The body has to be a JSON object.")
    return body


def _whole(text: str, name: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 9:
        raise _BadRequestError(f"{name} has to be a whole number.")
    return int(text)


def _headers(attachment: str | None) -> dict[str, str]:
    headers = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}
    if attachment is not None:
        # Names are made here from run ids, so they hold nothing that would have to be quoted.
        headers["Content-Disposition"] = f'attachment; filename="{_plain_name(attachment)}"'
    return headers


def _plain_name(name: str) -> str:
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in name if c.isascii())


def _file_response(path: Path, content_type: str, attachment: str | None) -> Any:
    from aiohttp import web

    return web.FileResponse(path, headers={**_headers(attachment), "Content-Type": content_type})
