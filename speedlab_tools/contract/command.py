"""`contract`: what a running ComfyUI's nodes of this pack keep of the last release, and renewing it at the next."""

from __future__ import annotations

import argparse
import asyncio

from speedlab import __version__

from ..client.client import ComfyClient
from ..client.errors import BenchError
from .contract import CONTRACT, PREFIX, RENEW, NodeContract, breaches, contract_from_info, contract_text, read_contract


def run(args: argparse.Namespace) -> int:
    """Compare, and unless `--check` was given write the new contract; exit code 1 where something of it is gone."""
    present = asyncio.run(_fetch(args.url))
    if not present:
        raise BenchError(f"the server at {args.url} has no node of this pack")
    broken = breaches(read_contract(), present) if CONTRACT.is_file() else []
    for line in broken:
        print(line)
    if args.check:
        print(f"{len(broken)} breaches of {CONTRACT.name}")
        return 1 if broken else 0
    if broken and not args.breaking:
        print(f"Nothing was written. Where that is meant: {RENEW}, and say so in the changelog.")
        return 1
    CONTRACT.write_text(contract_text(__version__, present.values()), encoding="utf-8", newline="\n")
    print(CONTRACT)
    return 0


async def _fetch(url: str) -> dict[str, NodeContract]:
    async with ComfyClient(url) as client:
        info = await client.object_info()
    return {node_id: contract_from_info(node_id, info[node_id]) for node_id in info if node_id.startswith(PREFIX)}
