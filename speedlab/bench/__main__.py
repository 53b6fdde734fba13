"""Command line: `python -m speedlab.bench bench|demo|scenarios|workflows`. `run.py` calls it with the host's Python."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from ..errors import SpeedLabError
from . import cmd_bench, cmd_demo, cmd_tables
from .files import ROOT
from .scenarios import UnknownScenarioError

INTERRUPTED = 130


def _run_options() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False)
    models = options.add_argument_group("model")
    models.add_argument("--checkpoint", metavar="FILE", help="checkpoint file, or a name the server knows")
    models.add_argument(
        "--vae", metavar="FILE", help="VAE file, or a name the server knows, in place of the checkpoint's"
    )
    models.add_argument("--controlnet", metavar="FILE", help="ControlNet, for the scenarios that use one")
    models.add_argument("--refiner", metavar="FILE", help="refiner checkpoint, for the scenarios with two models")
    sampling = options.add_argument_group("sampling")
    for name, what in (
        ("width", "pixels"), ("height", "pixels"), ("steps", "sampling steps"), ("batch", "pictures at once"),
        ("seed", "noise seed"), ("repeats", "measured runs"), ("warmup", "runs before the measured ones"),
    ):  # fmt: skip
        sampling.add_argument(f"--{name}", type=int, metavar="N", help=what)
    server = options.add_argument_group("server")
    server.add_argument("--server", metavar="URL", help="use a running ComfyUI instead of starting one")
    server.add_argument("--port", type=int, metavar="N", help="port of the ComfyUI that is started (a free one)")
    options.add_argument("--out", type=Path, metavar="DIR", default=ROOT / "output", help="folder for results (output)")
    return options


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = argparse.ArgumentParser(prog="python run.py", description="SpeedLab's benchmarks on a real ComfyUI.")
    commands = top.add_subparsers(dest="command", required=True)
    bench = commands.add_parser("bench", parents=[_run_options()], help="run scenarios and print their rows")
    bench.add_argument("scenarios", nargs="+", metavar="SCENARIO", help="ids, as 'scenarios' lists them")
    bench.set_defaults(run=cmd_bench.run)
    demo = commands.add_parser("demo", parents=[_run_options()], help="stock nodes and the best plan side by side")
    demo.set_defaults(run=cmd_demo.run)
    listing = commands.add_parser("scenarios", help="list the scenarios and what they need")
    listing.set_defaults(run=cmd_tables.run_scenarios)
    files = commands.add_parser("workflows", help="write the workflow files from the scenarios")
    files.add_argument("--check", action="store_true", help="only say which committed files differ")
    files.add_argument("--signatures", metavar="URL", help="first renew signatures.json from a running ComfyUI")
    files.set_defaults(run=cmd_tables.run_workflows)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (2: wrong arguments, 130: interrupted)."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    args = parser().parse_args(arguments)
    try:
        return int(args.run(args))
    except UnknownScenarioError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (SpeedLabError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
