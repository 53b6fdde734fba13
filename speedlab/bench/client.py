"""A ComfyUI client over HTTP and WebSocket: queue a graph, follow it, fetch what it made."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import aiohttp

from .answers import json_object
from .errors import BenchError, PromptRejected, RunTimeout, ServerGone, describe_rejection
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
        """The pictures that nodes of that class show, in node order."""
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
        """The bytes of a picture."""
        query = {"filename": image.filename, "subfolder": image.subfolder, "type": image.type}
        status, body = await self._request("GET", "/view", params=query)
        if status != 200:
            raise BenchError(f"the server does not give back {image.subfolder}/{image.filename} (status {status})")
        return body

    async def upload(self, path: Path, *, overwrite: bool = True) -> str:
        """Put a picture into the server's input folder; returns the name that Load Image takes."""
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
    ) -> RunResult:
        """Queue a graph and wait until it ended well.

        Raises PromptRejected, ExecutionFailed, ExecutionInterrupted, ServerGone, or RunTimeout (after which the
        prompt is interrupted). `listener` gets every message of this prompt as it comes.
        """
        from .follow import Follower  # which needs this module

        follower = Follower(self, graph, listener)
        try:
            return await asyncio.wait_for(follower.run(extra_data), timeout_s)
        except asyncio.TimeoutError:
            if follower.prompt_id:
                await self.interrupt(follower.prompt_id)
            raise RunTimeout(f"the run took longer than {timeout_s:g} s and was stopped") from None
        except asyncio.CancelledError:
            if follower.prompt_id:
                await self.interrupt(follower.prompt_id)
            raise
