"""Following one prompt to its end: by the socket where it holds, by the history where it does not."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any

import aiohttp

from .answers import json_object
from .client import ComfyClient, Listener, RunResult
from .errors import BenchError, ExecutionFailed, ExecutionInterrupted, ServerGone, failure_from_status
from .events import Event, EventLog
from .graph import ApiGraph

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
