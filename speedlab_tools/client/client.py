"""A ComfyUI client over HTTP and WebSocket: queue a graph, follow it, fetch what it made.

Following one prompt to its end: by the socket where it holds, by the history where it does not.

What a server sent, read as the JSON object that it should be. The program at the address may be any.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import aiohttp

from .errors import (
    BenchError,
    ExecutionFailed,
    ExecutionInterrupted,
    PromptRejected,
    RunTimeout,
    ServerGone,
    describe_rejection,
    failure_from_status,
)
from .events import Event, EventLog
from .graph import ApiGraph

Listener = Callable[[Event], None]


@dataclass(frozen=True)
class ImageRef:
    """A file on the server, as SaveImage reports it: `type` is output, input or temp."""

    filename: str
    subfolder: str
    type: str


@dataclass(frozen=True)
class RunResult:
    """A finished prompt: outputs by node id (what each node showed), and the log of its messages."""

    prompt_id: str
    outputs: Mapping[str, Any]
    log: EventLog
    graph: ApiGraph = field(repr=False)

    def images(self, class_type: str) -> list[ImageRef]:
        """The images that nodes of that class show, in node order."""
        refs = []
        for node, shown in self.outputs.items():
            if self.graph.get(node, {}).get("class_type") == class_type:
                refs += [ImageRef(e["filename"], e.get("subfolder", ""), e["type"]) for e in shown.get("images", [])]
        return refs


class ComfyClient:
    """One client id on one server. Use as `async with ComfyClient(url) as client`."""

    def __init__(self, url: str, *, client_id: str | None = None, timeout_s: float = 30.0) -> None:
        if "://" not in url:
            url = f"http://{url}"
        self.url = url.rstrip("/")
        self.client_id = client_id or uuid.uuid4().hex
        self._timeout = aiohttp.ClientTimeout(total=timeout_s)
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> ComfyClient:
        self._session = aiohttp.ClientSession(timeout=self._timeout)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()

    @property
    def session(self) -> aiohttp.ClientSession:
        """The open HTTP session."""
        if self._session is None:
            raise RuntimeError("ComfyClient is used outside 'async with'")
        return self._session

    async def _request(self, method: str, path: str, **options: Any) -> tuple[int, bytes]:
        """Status and body. ServerGone where nothing answers at the address."""
        try:
            async with self.session.request(method, f"{self.url}{path}", **options) as answer:
                return answer.status, await answer.read()
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError) as error:
            why = str(error) or type(error).__name__
            raise ServerGone(f"no answer from ComfyUI at {self.url}: {why}") from error

    async def _json(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        status, body = await self._request(method, path, **options)
        if status != 200:
            raise BenchError(f"{method} {self.url}{path} answered {status}: {body[:300].decode(errors='replace')}")
        answer = json_object(body)
        if answer is None:
            raise BenchError(f"{method} {self.url}{path} answered no JSON object: is that a ComfyUI server?")
        return answer

    async def object_info(self, node: str | None = None) -> dict[str, Any]:
        """The server's description of every node, or of one (empty where it has no such node)."""
        return await self._json("GET", f"/object_info/{node}" if node else "/object_info")

    async def system_stats(self) -> dict[str, Any]:
        """Versions, RAM and devices of the server."""
        return await self._json("GET", "/system_stats")

    async def history(self, prompt_id: str) -> dict[str, Any] | None:
        """What the server keeps of a finished prompt, or None while it runs or is unknown."""
        data = await self._json("GET", f"/history/{prompt_id}")
        return data.get(prompt_id)

    async def is_queued(self, prompt_id: str) -> bool:
        """Whether the prompt runs or waits."""
        data = await self._json("GET", "/queue")
        return any(item[1] == prompt_id for part in ("queue_running", "queue_pending") for item in data.get(part, []))

    async def view(self, image: ImageRef) -> bytes:
        """The bytes of an image."""
        query = {"filename": image.filename, "subfolder": image.subfolder, "type": image.type}
        status, body = await self._request("GET", "/view", params=query)
        if status != 200:
            raise BenchError(f"the server does not give back {image.subfolder}/{image.filename} (status {status})")
        return body

    async def upload(self, path: Path, *, overwrite: bool = True) -> str:
        """Put an image into the server's input folder; returns the name that Load Image takes."""
        form = aiohttp.FormData()
        form.add_field("image", path.read_bytes(), filename=path.name, content_type="application/octet-stream")
        form.add_field("overwrite", "true" if overwrite else "false")
        data = await self._json("POST", "/upload/image", data=form)
        return f"{data['subfolder']}/{data['name']}" if data.get("subfolder") else str(data["name"])

    async def interrupt(self, prompt_id: str | None = None) -> None:
        """Stop what runs; with `prompt_id`, that one alone: it leaves the queue, or is stopped where it runs."""
        if prompt_id is not None:
            await self._request("POST", "/queue", json={"delete": [prompt_id]})
        await self._request("POST", "/interrupt", json={"prompt_id": prompt_id} if prompt_id else {})

    async def free(self) -> None:
        """Let the server drop its models and what it keeps of earlier graphs, before the next prompt."""
        await self._request("POST", "/free", json={"unload_models": True, "free_memory": True})

    async def delete_runs(self, run_ids: Sequence[str]) -> None:
        """Delete records of runs from the server's library. Raises BenchError with the first reason."""
        answer = await self._json("POST", "/speedlab/delete", json={"run_ids": list(run_ids)})
        failed = answer.get("failed") or {}
        if failed:
            raise BenchError(str(next(iter(failed.values()))))

    async def forget(self) -> None:
        """Let the server drop its history: what finished prompts showed, and their graphs."""
        await self._request("POST", "/history", json={"clear": True})

    async def queue(self, graph: ApiGraph, extra_data: Mapping[str, Any] | None = None) -> str:
        """Queue a graph and return its prompt id. PromptRejected where the server refuses it."""
        body = {"prompt": graph, "client_id": self.client_id, "extra_data": dict(extra_data or {})}
        status, answer = await self._request("POST", "/prompt", json=body)
        data = json_object(answer)
        if data is None:
            raise BenchError(f"/prompt answered {status} and no JSON object: {answer[:300].decode(errors='replace')}")
        # A graph with a broken output beside a sound one is queued in part: that is a refusal too.
        if status != 200 or data.get("node_errors"):
            if data.get("prompt_id"):
                await self.interrupt(data["prompt_id"])
            raise PromptRejected(describe_rejection(data, graph), data.get("node_errors") or {})
        return str(data["prompt_id"])

    async def run(
        self,
        graph: ApiGraph,
        *,
        extra_data: Mapping[str, Any] | None = None,
        listener: Listener | None = None,
        timeout_s: float | None = None,
        ends_s: float = 0.0,
    ) -> RunResult:
        """Queue a graph and wait until it ended well.

        Raises PromptRejected, ExecutionFailed, ExecutionInterrupted, ServerGone, or RunTimeout (after which the
        prompt is interrupted). `listener` gets every message of this prompt as it comes. `ends_s` is how long a
        prompt may take to end after this is cancelled.
        """
        # which needs this module

        follower = Follower(self, graph, listener)
        try:
            return await asyncio.wait_for(follower.run(extra_data), timeout_s)
        except asyncio.TimeoutError:
            if follower.prompt_id:
                await self.interrupt(follower.prompt_id)
            raise RunTimeout(f"the run took longer than {timeout_s:g} s and was stopped") from None
        except asyncio.CancelledError:
            if follower.prompt_id:
                with suppress(BenchError):  # a server that is gone has nothing to end
                    await self.interrupt(follower.prompt_id)
                    deadline = time.monotonic() + ends_s
                    while time.monotonic() < deadline and await self.is_queued(follower.prompt_id):
                        await asyncio.sleep(0.2)
            raise


POLL_S = 5.0  # how long a silent socket is trusted before /history is asked
RECONNECT_S = 0.5
GONE_AFTER_S = 20.0  # how long an unreachable server may take to come back
HISTORY_WAIT_S = 10.0  # the end message may come before the history holds the prompt
END_KINDS = frozenset({"execution_error", "execution_interrupted"})


class PromptForgotten(ServerGone):
    """The server answers but knows nothing of the prompt: it was restarted."""


class Follower:
    """Queues one graph and follows it. `prompt_id` is empty until the server took it."""

    def __init__(self, client: ComfyClient, graph: ApiGraph, listener: Listener | None) -> None:
        self.client = client
        self.graph = graph
        self.listener = listener
        self.log = EventLog()
        self.prompt_id = ""
        self._unreachable_since: float | None = None

    async def run(self, extra_data: Mapping[str, Any] | None) -> RunResult:
        socket = await self._connect()
        try:
            self.prompt_id = await self.client.queue(self.graph, extra_data)
            entry: dict[str, Any] | None = None
            while entry is None:
                if socket is None:
                    entry, socket = await self._without_socket()
                else:
                    ended = await self._listen(socket)
                    if ended is None:
                        await socket.close()
                        socket, self.log.complete = None, False
                    elif ended:
                        entry = await self._await_history()
        finally:
            if socket is not None:
                await socket.close()
        return self._result(entry)

    async def _connect(self) -> aiohttp.ClientWebSocketResponse | None:
        url = f"{self.client.url.replace('http', 'ws', 1)}/ws"
        try:
            parameters = {"clientId": self.client.client_id}
            return await self.client.session.ws_connect(url, params=parameters, max_msg_size=0)  # type: ignore[return-value]
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError) as error:
            if not self.prompt_id:
                raise ServerGone(f"no ComfyUI answers at {self.client.url}: {error or type(error).__name__}") from error
            return None

    async def _listen(self, socket: aiohttp.ClientWebSocketResponse) -> bool | None:
        """Read until something is known: True the prompt ended, False nothing yet, None the socket is lost."""
        while True:
            try:
                message = await socket.receive(timeout=POLL_S)
            except asyncio.TimeoutError:
                return await self._silent()
            now = time.perf_counter()
            if message.type is aiohttp.WSMsgType.TEXT:
                if self._take(now, json_object(message.data) or {}):
                    return True
            elif message.type is not aiohttp.WSMsgType.BINARY:
                return None

    async def _silent(self) -> bool | None:
        """Nothing came for a while, as in a long step: ask whether the prompt is still there."""
        try:
            ended = await self.client.history(self.prompt_id) is not None
        except ServerGone:
            return None
        if not ended:
            await self._require_known()
        return ended

    async def _require_known(self) -> None:
        if await self.client.is_queued(self.prompt_id):
            return
        # It may have ended between the two questions.
        if await self.client.history(self.prompt_id) is None:
            raise PromptForgotten(
                f"ComfyUI at {self.client.url} has forgotten the prompt: it was restarted while it ran"
            )

    async def _without_socket(self) -> tuple[dict[str, Any] | None, aiohttp.ClientWebSocketResponse | None]:
        """One round of polling and of trying to get the socket back."""
        await asyncio.sleep(RECONNECT_S)
        try:
            entry = await self.client.history(self.prompt_id)
            if entry is None:
                await self._require_known()
        except PromptForgotten:
            raise
        except ServerGone:
            now = time.perf_counter()
            self._unreachable_since = self._unreachable_since or now
            if now - self._unreachable_since > GONE_AFTER_S:
                raise
            return None, None
        self._unreachable_since = None
        return entry, None if entry is not None else await self._connect()

    async def _await_history(self) -> dict[str, Any]:
        end = time.perf_counter() + HISTORY_WAIT_S
        while time.perf_counter() < end:
            entry = await self.client.history(self.prompt_id)
            if entry is not None:
                return entry
            await asyncio.sleep(0.05)
        raise BenchError(f"the server says that prompt {self.prompt_id} ended but keeps no history of it")

    def _take(self, now: float, message: Mapping[str, Any]) -> bool:
        """Keep a message of this prompt; True where it is the last one."""
        kind, data = str(message.get("type")), message.get("data") or {}
        if not isinstance(data, Mapping) or data.get("prompt_id") != self.prompt_id:
            return False
        node = data.get("node")
        if kind == "execution_cached":
            cached = data.get("nodes")
            self.log.cached.update(str(entry) for entry in (cached if isinstance(cached, list) else ()))
        event = Event(
            now,
            kind,
            str(node) if node is not None else None,
            _whole(data.get("value")),
            _whole(data.get("max")),
        )
        self.log.add(event)
        if self.listener is not None:
            self.listener(event)
        return kind in END_KINDS or (kind == "executing" and node is None)

    def _result(self, entry: Mapping[str, Any]) -> RunResult:
        status = entry.get("status") or {}
        messages = dict(status.get("messages", []))
        if "execution_interrupted" in messages:
            raise ExecutionInterrupted("the run was interrupted")
        if "execution_error" in messages:
            raise failure_from_status(messages["execution_error"], self.graph)
        if status.get("status_str") == "error":
            raise ExecutionFailed("?", "?", "", "", "the server reports an error without a message")
        return RunResult(self.prompt_id, entry.get("outputs") or {}, self.log, self.graph)


def _whole(value: Any) -> int:
    """A step count as the server tells it; 0 for what is none."""
    return int(value) if isinstance(value, (int, float)) and abs(value) < 1e9 else 0


def json_object(text: bytes | str) -> dict[str, Any] | None:
    """The object, or None for anything else."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return data if isinstance(data, dict) else None
