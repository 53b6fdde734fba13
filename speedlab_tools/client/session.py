"""The ComfyUI that a command talks to: one it starts itself, or one that runs already (`--server`)."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..host import ComfyServer, HostError, cache_root, from_environment, pack_root
from .files import link_model


@dataclass(frozen=True)
class ServerOptions:
    """How to reach a server: `url` of a running one, or `port` and `out` for one to start. None is a free port."""

    url: str | None
    port: int | None
    out: Path


@dataclass(frozen=True)
class Target:
    """A server that answers. `process` is the one started here, None where it runs already."""

    url: str
    process: ComfyServer | None = None

    @property
    def pid(self) -> int | None:
        """The process id of a server started here."""
        running = self.process.process if self.process is not None else None
        return None if running is None else running.pid

    def tail(self, lines: int = 15) -> str:
        """The end of the server's log, empty for a server of someone else."""
        return "" if self.process is None else "\n".join(self.process.tail(lines))


def kept_models() -> Path:
    """The models folder of `run.py serve`: what the user put there is seen here too."""
    return cache_root() / "serve" / "models"


def model_folders() -> list[Path]:
    """The models folders that a server started here looks into."""
    folders = [kept_models()]
    with contextlib.suppress(HostError):
        host = from_environment()
        if not host.managed:
            folders.append(host.comfyui / "models")
    return folders


@contextlib.contextmanager
def open_server(options: ServerOptions, models: Mapping[str, Sequence[Path]]) -> Iterator[Target]:
    """Yield a server that answers; one started here is stopped in the end.

    `models` are files to show to a started server: folder below `models/` -> files. HostError where none starts.
    """
    if options.url is not None:
        yield Target(options.url)
        return
    host = from_environment()
    # A base directory of its own for each run: two runs at once must not share a database or a list of model paths.
    with tempfile.TemporaryDirectory(prefix="speedlab-", ignore_cleanup_errors=True) as folder:
        base = Path(folder)
        for kind, files in models.items():
            for file in files:
                link_model(file, base / "models" / kind)
        print(f"Starting ComfyUI ({host.comfyui}) ...", flush=True)
        server = ComfyServer(
            host,
            pack=pack_root(),
            base=base,
            output=options.out,
            models=kept_models() if kept_models().is_dir() else None,
            port=options.port,
            log=options.out / "speedlab" / "server.log",
        )
        with server:
            yield Target(server.url, server)
