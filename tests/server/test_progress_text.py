"""While something is compiled that no repeat compiles again, the node that waits for it says so in the browser."""

from __future__ import annotations

import asyncio
import struct

import aiohttp
import pytest

pytestmark = pytest.mark.server
TEXT = 3  # ComfyUI's BinaryEventTypes.TEXT


async def texts_of(url, prompt):
    """Queue a prompt as a browser does; (node, text) of each progress text until it has ended."""
    told = []
    async with (
        aiohttp.ClientSession() as session,
        session.ws_connect(f"{url.replace('http', 'ws', 1)}/ws", params={"clientId": "texts"}) as socket,
    ):
        async with session.post(f"{url}/prompt", json={"prompt": prompt, "client_id": "texts"}) as answer:
            number = (await answer.json())["prompt_id"]
        async for message in socket:
            if message.type is aiohttp.WSMsgType.BINARY and struct.unpack(">I", message.data[:4])[0] == TEXT:
                (length,) = struct.unpack(">I", message.data[4:8])
                told.append((message.data[8 : 8 + length].decode(), message.data[8 + length :].decode()))
            if message.type is aiohttp.WSMsgType.TEXT:
                entry = message.json()
                data = entry["data"]
                if entry["type"] == "executing" and data["node"] is None and data["prompt_id"] == number:
                    return told
    raise AssertionError("the server closed the connection")


def test_compiling_is_told_once_on_the_sampler_and_not_when_it_is_found_again(server, graph):
    prompt = graph(text="progress text", size=72)
    prompt["1"]["inputs"]["precision"] = "fp32"
    prompt["20"] = {"class_type": "SpeedLabCompileModel", "inputs": {
        "model": ["1", 0], "backend": "jit_trace", "scope": "auto", "mode": "default", "dynamic": "auto",
        "on_failure": "error"}}  # fmt: skip
    prompt["5"]["inputs"]["model"] = ["20", 0]
    first = asyncio.run(texts_of(server.url, prompt))
    assert [node for node, _ in first] == ["5", "5"]
    assert first[0][1] == "Compiling (once for this model and size) ..."
    assert first[1][1].startswith("Compiling: ") and first[1][1].endswith(" s, paid once")
    prompt["5"]["inputs"]["seed"] = 2
    assert asyncio.run(texts_of(server.url, prompt)) == []
