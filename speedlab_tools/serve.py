"""`run.py serve`: a ComfyUI in the foreground with this pack loaded."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from .cli.arguments import parse
from .host.base import Host, cache_root, pack_root
from .host.progress import Reporter
from .host.server import ComfyServer


def serve(host: Host, arguments: Sequence[str], reporter: Reporter) -> int:
    """Run the server until Ctrl-C, its log on the terminal. Returns 0, or the server's code where that ended first."""
    options, rest = parse("serve", arguments)
    base = cache_root() / "serve" if options.base is None else options.base
    server = ComfyServer(
        host,
        pack=pack_root(),
        base=base,
        models=options.models,
        port=options.port,
        cpu=options.cpu,
        extra_args=[argument for argument in rest if argument != "--"],
    )
    reporter.line(f"Starting ComfyUI from {host.comfyui} ...")
    with server:
        reporter.line(f"ComfyUI with SpeedLab: {server.url}")
        reporter.line(f"  models   {server.base / 'models'}" + (f" and {options.models}" if options.models else ""))
        reporter.line(f"  images   {server.base / 'output'}")
        reporter.line(f"  log      {server.log_path}")
        if server.threads is not None:
            reporter.line(f"  threads  {server.threads.words} (the environment variable OMP_NUM_THREADS sets another)")
        reporter.line("Ctrl-C ends it.")
        try:
            code = _follow(server)
        except KeyboardInterrupt:
            reporter.line("Stopping ...")
            return 0
        reporter.line(f"ComfyUI ended with exit code {code}.")
        return code


def _follow(server: ComfyServer) -> int:
    """Copy the server's log to standard output until the server ends."""
    process = server.process
    assert process is not None
    with server.log_path.open(encoding="utf-8", errors="replace") as log:
        while True:
            code = process.poll()
            text = log.read()
            if text:
                sys.stdout.write(text)
                sys.stdout.flush()
            elif code is not None:
                return code
            time.sleep(0.3)
