"""A server to be stressed: on the CPU, with the probe and nothing but the models that are given."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..client.files import link_model
from ..host.base import from_environment, pack_root
from ..host.server import ComfyServer
from .cancels import bring_probe


@contextmanager
def stressed_server(
    base: Path, models: Mapping[str, Sequence[Path]], output: Path | None = None
) -> Iterator[ComfyServer]:
    """`models`: folder below `models/` -> files. Raises ServerError."""
    for kind, files in models.items():
        for file in files:
            link_model(file, base / "models" / kind)
    bring_probe(base)
    with ComfyServer(from_environment(), pack=pack_root(), base=base, output=output, cpu=True) as server:
        yield server
