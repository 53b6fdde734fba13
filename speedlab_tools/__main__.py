"""Command line: `python -m speedlab_tools bench|demo|scenarios|compare|workflows|contract`, which `run.py` calls."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from speedlab.common.errors import SpeedLabError

from . import contract as cmd_contract
from . import demo as cmd_demo
from . import locales as cmd_locales
from .bench import command as cmd_bench
from .client.files import ROOT
from .compare import command as cmd_compare
from .host.base import CALLED_FROM
from .host.child import INTERRUPTED
from .scenarios import workflows as cmd_tables
from .scenarios.catalog import UnknownScenarioError


def _run_options() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False)
    models = options.add_argument_group("model")
    models.add_argument("--checkpoint", metavar="FILE", help="checkpoint file, or a name the server knows")
    models.add_argument(
        "--vae", metavar="FILE", help="VAE file, or a name the server knows, in place of the checkpoint's"
    )
    models.add_argument("--controlnet", metavar="FILE", help="ControlNet, for the scenarios that use one")
    models.add_argument("--refiner", metavar="FILE", help="refiner checkpoint, for the scenarios with two models")
    models.add_argument("--lora", metavar="FILE", help="LoRA, for the scenarios that use one")
    models.add_argument("--lora-2", metavar="FILE", help="second LoRA, for the scenarios that switch between two")
    sampling = options.add_argument_group("sampling")
    for name, what in (
        ("width", "pixels"), ("height", "pixels"), ("steps", "sampling steps"), ("batch", "images at once"),
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
    bench.add_argument("scenarios", nargs="+", metavar="SCENARIO", help="ids, as 'scenarios' lists them, or 'all'")
    bench.add_argument("--csv", type=Path, metavar="FILE", help="write this series' rows into a table of its own too")
    bench.add_argument("--html", type=Path, metavar="FILE", help="write one HTML page with tables and images")
    bench.add_argument(
        "--small", action="store_true", help="cut sizes, steps and repeats to try it out; records say so"
    )
    bench.add_argument("--restart", action="store_true", help="run everything again, also what an earlier call did")
    bench.set_defaults(run=cmd_bench.run)
    demo = commands.add_parser("demo", parents=[_run_options()], help="stock nodes and the best plan side by side")
    demo.set_defaults(run=cmd_demo.run)
    listing = commands.add_parser("scenarios", help="list the scenarios and what they need")
    listing.set_defaults(run=cmd_tables.run_scenarios)
    compare = commands.add_parser(
        "compare", help="two results tables: ratio of times; from three runs of each in turn, a verdict"
    )
    compare.add_argument("a", metavar="A.csv", help="the earlier table")
    compare.add_argument("b", metavar="B.csv", help="the later one")
    compare.add_argument("--strict", action="store_true", help="exit with code 3 where something became slower")
    compare.add_argument(
        "--across", action="store_true", help="one machine is meant: judge also across versions of its software"
    )
    compare.set_defaults(run=cmd_compare.run)
    files = commands.add_parser("workflows", help="write the workflow files from the scenarios")
    files.add_argument("--check", action="store_true", help="only say which committed files differ")
    files.add_argument("--signatures", metavar="URL", help="first renew signatures.json from a running ComfyUI")
    files.set_defaults(run=cmd_tables.run_workflows)
    texts = commands.add_parser("locales", help="write the English texts of the nodes from their classes")
    texts.set_defaults(run=cmd_locales.run)
    contract = commands.add_parser("contract", help="at a release: renew what saved workflows may rely on")
    contract.add_argument("url", metavar="URL", help="a running ComfyUI with this pack")
    contract.add_argument("--check", action="store_true", help="only say what of the last release is gone")
    contract.add_argument("--breaking", action="store_true", help="renew even though something is gone")
    contract.set_defaults(run=cmd_contract.run)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (2: wrong arguments, 130: interrupted)."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    args = parser().parse_args(arguments)
    called_from = os.environ.get(CALLED_FROM)
    if called_from is not None and Path(called_from).is_dir():
        os.chdir(called_from)
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
