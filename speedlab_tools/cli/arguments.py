"""Every command with its arguments, declared once: `run.py` checks them before it sets anything up.

Standard library only: `run.py` uses it before anything is installed.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from speedlab.common.errors import SpeedLabError

from ..gpu import PACK_FOLDER, RESULTS
from ..host.base import pack_root

_ROOT = pack_root()
MODELS = ("checkpoint", "vae", "controlnet", "refiner", "lora", "lora-2")
Parser = argparse.ArgumentParser


class UsageError(SpeedLabError):
    """The command line makes no sense; the message says what does."""


@dataclass(frozen=True)
class Command:
    """One command. `runs` is `module:function` of speedlab_tools, called in the host's Python with what was read;
    without it `run.py` does the work itself. `passes`: arguments that are not declared are left to another program.
    `moves`: it runs in the folder where the user stands, else in the pack's. `alone`: it needs no ComfyUI, and nothing
    is set up for it.
    """

    text: str
    declare: Callable[[Parser], None] = lambda _parser: None
    runs: str | None = None
    passes: bool = False
    moves: bool = True
    alone: bool = False
    description: str | None = None
    epilog: str | None = None
    usage: str | None = None
    interrupted: str = "interrupted"


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("a whole number of 1 or more")
    return value


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e7:
        raise argparse.ArgumentTypeError("a number above 0")
    return value


def _model_files(parser: Parser, checkpoint: str, *rest: str) -> None:
    add = parser.add_argument_group("model").add_argument
    for name, text in zip(MODELS, (checkpoint, *rest), strict=True):
        add(f"--{name}", metavar="FILE", help=text)


def _sampling(parser: Parser, batch: str, seed: str, warmup: str) -> argparse._ArgumentGroup:
    group = parser.add_argument_group("sampling")
    for name, text in (
        ("width", "pixels"), ("height", "pixels"), ("steps", "sampling steps"), ("batch", batch), ("seed", seed),
        ("repeats", "measured runs"), ("warmup", warmup),
    ):  # fmt: skip
        group.add_argument(f"--{name}", type=int, metavar="N", help=text)
    return group


def _demo(parser: Parser) -> None:
    _model_files(
        parser, "checkpoint file, or a name the server knows",
        "VAE file, or a name the server knows, in place of the checkpoint's",
        "ControlNet, for the scenarios that use one", "refiner checkpoint, for the scenarios with two models",
        "LoRA, for the scenarios that use one", "second LoRA, for the scenarios that switch between two",
    )  # fmt: skip
    _sampling(parser, "images at once", "noise seed", "runs before the measured ones")
    add = parser.add_argument_group("server").add_argument
    add("--server", metavar="URL", help="use a running ComfyUI instead of starting one")
    add("--port", type=int, metavar="N", help="port of the ComfyUI that is started (a free one)")
    parser.add_argument("--out", type=Path, metavar="DIR", default=_ROOT / "output", help="folder for results (output)")


def _bench(parser: Parser) -> None:
    _demo(parser)
    add = parser.add_argument
    add("scenarios", nargs="+", metavar="SCENARIO", help="ids, as 'scenarios' lists them, or 'all'")
    add("--csv", type=Path, metavar="FILE", help="write this series' rows into a table of its own too")
    add("--html", type=Path, metavar="FILE", help="write one HTML page with tables and images")
    add("--small", action="store_true", help="cut sizes, steps and repeats to try it out; records say so")
    add("--restart", action="store_true", help="run everything again, also what an earlier call did")


def _tune(parser: Parser) -> None:
    add = parser.add_argument
    add("--checkpoint", metavar="FILE", help="checkpoint file, or a name the server knows")
    add("--prompts", metavar="FILE", help="one prompt a line (default: the demo's)")
    add("--negative", default="", metavar="TEXT", help="negative prompt")
    add("--quality", choices=("exact", "close", "similar", "any"), default="close",
        help="how far an image may be from your own (default: %(default)s)")  # fmt: skip
    add("--minutes", type=_positive, default=20.0, help="how long to search (default: %(default)g)")
    add("--budget-gb", type=float, default=0.0, metavar="GB", help="memory that a plan may take (0: no limit)")
    add("--steps", default="20", metavar="N or N:M", help="your steps; a range opens them (default: %(default)s)")
    add("--samplers", default="", metavar="NAMES", help="samplers to try too: euler,dpmpp_2m/karras")
    group = parser.add_argument_group("sampling")
    for name in ("width", "height"):
        group.add_argument(f"--{name}", type=_count, metavar="N", help="pixels (512; what the demo model draws)")
    group.add_argument("--batch", type=_count, default=1, metavar="N", help="images at once (1)")
    group.add_argument("--seed", type=int, default=20230711, metavar="N", help="seed of the prompts")
    group.add_argument("--cfg", type=float, metavar="X", help="guidance (8; of the demo model 3)")
    group.add_argument("--sampler", default="euler", metavar="NAME", help="your sampler (default: %(default)s)")
    group.add_argument("--scheduler", default="normal", metavar="NAME", help="your scheduler (default: %(default)s)")
    add("--html", type=Path, metavar="FILE", help="put the page there too")
    add = parser.add_argument_group("server").add_argument
    add("--server", metavar="URL", help="use a running ComfyUI instead of starting one")
    add("--port", type=int, metavar="N", help="port of the ComfyUI that is started (a free one)")
    parser.add_argument("--out", type=Path, metavar="DIR", default=_ROOT / "output", help="folder for results (output)")


def _compare(parser: Parser) -> None:
    add = parser.add_argument
    add("a", metavar="A.csv", help="the earlier table")
    add("b", metavar="B.csv", help="the later one")
    add("--strict", action="store_true", help="exit with code 3 where something became slower")
    add("--across", action="store_true", help="one machine is meant: judge also across versions of its software")


def _test(parser: Parser) -> None:
    parser.add_argument("--all", action="store_true", help="all tests, those of OneDiff too (3 GB more)")


def _check(parser: Parser) -> None:
    parser.add_argument("checks", nargs="*", metavar="CHECK", help="some of ruff, format, mypy, layers (default: all)")
    parser.add_argument("--fix", action="store_true", help="let ruff fix what it can, and format")


def _serve(parser: Parser) -> None:
    add = parser.add_argument
    add("--port", type=int, default=8188, help="the port (default %(default)s)")
    add("--base", type=Path, help="base directory with models, input, output (default: in the cache)")
    add("--models", type=Path, help="one more models folder, with checkpoints, loras, vae and so on")
    add("--cpu", action="store_true", default=None, help="use the CPU (default: where torch sees no device)")


def _bundle(parser: Parser) -> None:
    common = Parser(add_help=False)
    common.add_argument("file", type=Path, metavar="FILE", help="the bundle")
    common.add_argument("--user", type=Path, metavar="DIR",
        help="ComfyUI's user folder (default: that of the ComfyUI, of the private one that of `serve`)")  # fmt: skip
    kinds = parser.add_subparsers(dest="what", required=True)
    kinds.add_parser("pack", parents=[common], help="write what is kept here into FILE")
    kinds.add_parser("unpack", parents=[common], help="put what is in FILE where it is kept, if it is for this machine")


def _nsys(parser: Parser) -> None:
    add = parser.add_argument
    add("--out", type=Path, metavar="DIR", default=_ROOT / "output", help="folder for results")
    add("--whole", action="store_true", help="record everything, not only the sampling")


def _stress(parser: Parser) -> None:
    add = parser.add_argument
    add("--inputs", type=int, default=100_000, metavar="N", help="inputs in all (default %(default)s)")
    add("--faults", type=int, default=100, metavar="N", help="faults of each kind (default %(default)s, 0: none)")
    add("--soak", type=int, default=1000, metavar="N",
        help="random prompts on one server (default %(default)s, 0: none)")  # fmt: skip
    add("--seed", type=int, default=20260101, metavar="N", help="another seed makes other inputs")
    add("--only", metavar="WORD", default="", help="readers whose name holds this word, and nothing else")
    add("--out", type=Path, metavar="DIR", default=RESULTS, help="folder for the figures")


def _fleet(parser: Parser) -> None:
    add = parser.add_argument
    add("scenario", metavar="SCENARIO", help="an id, as `run.py scenarios` lists them")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompts", type=Path, metavar="FILE", help="an image for each of its prompts")
    what.add_argument("--cells", action="store_true", help="the scenario's own prompts, graphs and cells")
    add("--quality", action="store_true",
        help="with --cells: each cell beside its baseline, so that rows have PSNR and SSIM")  # fmt: skip
    add("--out", type=Path, metavar="DIR", required=True, help="folder for the results")
    add("--restart", action="store_true", help="start over in that folder: its images are deleted")
    add("--accept-changes", action="store_true",
        help="go on although prompts or settings have changed: results that are still asked for stay")  # fmt: skip
    add = parser.add_argument_group("workers").add_argument
    add("--address", metavar="RAY", help="a running cluster: HOST:PORT, ray://HOST:PORT, or auto")
    add("--workers", type=_count, metavar="N", help="how many (one a GPU; without a GPU one a machine)")
    add("--cpu", action="store_true", help="run on CPUs, also where there are GPUs")
    add("--threads", type=_count, metavar="N",
        help="CPU threads of each worker (on this machine without a GPU: its cores shared evenly)")  # fmt: skip
    add("--attempts", type=_count, default=3, metavar="N",
        help="workers that may be lost on one prompt before its row says so (default: %(default)s)")  # fmt: skip
    add("--timeout", type=_positive, default=3600.0, metavar="SECONDS",
        help="a prompt that takes longer counts as a lost worker (default: %(default)g)")  # fmt: skip
    add("--start-timeout", type=_positive, default=300.0, metavar="SECONDS",
        help="so long may a worker take to start (default: %(default)g)")  # fmt: skip
    _model_files(
        parser, "checkpoint file (without it a small demo)", "VAE file in place of the checkpoint's",
        "ControlNet file", "refiner checkpoint", "LoRA file", "second LoRA file",
    )  # fmt: skip
    add = _sampling(parser, "images of one prompt", "seed of the first prompt", "runs before those").add_argument
    add("--negative", metavar="TEXT", help="negative prompt ('' for none) where the file has none")
    add("--small", action="store_true", help="cut sizes and steps to try it out; records say so")


_FLEET_NOTES = """\
A prompts file has one prompt a line; a .jsonl file has {"prompt": ..., "negative": ..., "seed": ...} on each line, the
last two as you like. A prompt without a seed gets --seed (the scenario's where it is not given) plus its place from 0.

Below --out: pictures/00001.png ... in the order of the prompts, manifest.jsonl in the same order, records and
results.csv as `bench` writes them. The same command goes on where an earlier one ended. Images are those of one machine
bit for bit, on the same kind of device (on a CPU: with as many threads).

Times of workers that share a machine are not to be compared with anything: they wait for each other. Cells (--cells)
run on different workers, so quality against a baseline is left out; --quality runs the baseline beside each.

Without --address a cluster of its own is started on this machine's loopback address and ended with the call.
With --address every machine needs Ray and Python in the same versions, a ComfyUI (the same path, COMFYUI_PATH, or
`python run.py setup`) and the model files; this pack travels by itself. docs/fleet.md says more.
"""


def _gpu(parser: Parser) -> None:
    add = parser.add_argument
    add("--minutes", type=_positive, default=8.0, help="time of this call (default: 8)")
    add("--repeats", type=_count, default=5, help="images of each variant that count (default: 5)")
    add("--only", nargs="+", default=[], metavar="BLOCK", help="blocks whose id begins so")
    add("--try", nargs="+", default=[], dest="plans", metavar="NAME=STACK",
        help="only these plans, written as Benchmark's plan axis takes them, in turns with stock: "
        "'mine=compile(inductor)+dynamic_cfg(0.5)+tiny'")  # fmt: skip
    add("--model", choices=("sdxl", "sd15"), default="sdxl", help="model of --try (default: sdxl)")
    add("--dtype", choices=("fp16", "bf16"), default="fp16", help="its dtype (default: fp16)")
    add("--list", action="store_true", help="list the blocks and end")
    add("--small", action="store_true", help="tiny models: to try the suite out, on a CPU too")
    add("--again", action="store_true", help="measure again, with --only those blocks alone")
    add("--out", type=Path, default=RESULTS, metavar="DIR", help="folder for results")
    add("--resume", type=Path, nargs="+", default=[], metavar="DIR", help="more places of earlier ones")
    add("--pack", nargs="?", type=Path, const=PACK_FOLDER, metavar="DIR",
        help="only make the folder that brings ComfyUI and its pure-Python packages to a machine without network "
        f"(default: {PACK_FOLDER.relative_to(_ROOT)} beside run.py, where the suite looks for it)")  # fmt: skip


def _workflows(parser: Parser) -> None:
    parser.add_argument("--check", action="store_true", help="only say which committed files differ")
    parser.add_argument("--signatures", metavar="URL", help="first renew signatures.json from a running ComfyUI")


def _contract(parser: Parser) -> None:
    parser.add_argument("url", metavar="URL", help="a running ComfyUI with this pack")
    parser.add_argument("--check", action="store_true", help="only say what of the last release is gone")
    parser.add_argument("--breaking", action="store_true", help="renew even though something is gone")


def _synthetic(parser: Parser) -> None:
    kinds = parser.add_subparsers(dest="what", required=True)
    common = Parser(add_help=False)
    common.add_argument("path", type=Path, help="file to write (for taesd: the folder; for drawn: a models folder)")
    common.add_argument("--seed", type=int, default=0)
    model = Parser(add_help=False)
    model.add_argument("--family", choices=("sd15", "sd21", "sdxl", "ssd1b", "vega", "sdxl_refiner"), default="sd15")
    model.add_argument("--size", choices=("small", "full", "drawn"), default="small")
    model.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), default="fp16")
    kinds.add_parser("checkpoint", parents=[common, model], help="UNet, VAE and text encoders in one file")
    kinds.add_parser("controlnet", parents=[common, model], help="a ControlNet for the checkpoint of the same options")
    lora = kinds.add_parser("lora", parents=[common, model], help="a LoRA that fits the checkpoint of the same options")
    lora.add_argument("--rank", type=int, default=4)
    lora.add_argument("--scale", type=float, default=0.1, help="change at strength 1 relative to the weights")
    lora.add_argument(
        "--keys", choices=("all", "partial", "none"), default="all", help="how many of its keys match the model"
    )
    lora.add_argument("--no-text-encoder", action="store_true")
    kinds.add_parser("vae", parents=[common], help="encoder and decoder of the full autoencoder")
    draws = kinds.add_parser(
        "drawn", parents=[common], help="the model that draws and its Tiny VAE, below a models folder"
    )
    draws.add_argument("--family", choices=("sd15", "sdxl"), default="sd15")
    taesd = kinds.add_parser("taesd", parents=[common], help="encoder and decoder of a tiny autoencoder")
    taesd.add_argument("--name", choices=("taesd", "taesdxl"), default="taesd")


COMMANDS: Mapping[str, Command] = {
    "demo": Command(
        "stock KSampler and the presets of Accelerate, side by side: images, one table, ratios", _demo, "demo:run"
    ),
    "bench": Command(
        "run scenarios on a real server and measure them: bench SCENARIO... [--checkpoint FILE]", _bench,
        "bench.command:run", description="Run scenarios on a real server, measure them and print their rows.",
    ),
    "tune": Command(
        "the fastest plan for a checkpoint on this machine, within a distance: tune [--checkpoint FILE]", _tune,
        "tune:run", interrupted="interrupted; what was measured is kept, and the same command goes on",
        description="Find the fastest plan for a checkpoint on this machine within a distance and a memory budget.",
    ),
    "scenarios": Command(
        "list the scenarios, what each needs and whether that is there", runs="scenarios.workflows:run_scenarios",
        alone=True,
    ),
    "compare": Command(
        "two results tables: ratio of times with a confidence interval, regressions named", _compare,
        "compare.command:run", alone=True,
        description="Two results tables: ratio of times; from three runs of each in turn, a verdict.",
    ),
    "test": Command(
        "run the tests of every day; --all: all, those of OneDiff too (3 GB more); other arguments go to pytest", _test,
        passes=True,
    ),
    "check": Command("ruff, ruff format, mypy and the layers; name some of them, --fix repairs", _check),
    "serve": Command(
        "a ComfyUI with this pack on 127.0.0.1, until Ctrl-C", _serve, passes=True,
        description="Start a ComfyUI with this pack on 127.0.0.1 and stay until Ctrl-C. "
        "Options that are not listed here go to ComfyUI.",
    ),
    "bundle": Command(
        "what is kept compiled here, for another machine of the same kind: bundle pack FILE, bundle unpack FILE",
        _bundle, "bundle:run",
        description="Write what Compile Model, Compile VAE and `quantize` have kept on this machine into one file, or "
        "take it from there. A file of another CPU or of other versions, or a damaged one, is refused.",
    ),
    "nsys": Command(
        "run scenarios with ComfyUI under Nsight Systems and print its summaries: nsys SCENARIO... [--whole]", _nsys,
        passes=True, usage="run.py nsys SCENARIO... [--whole] [--out DIR] [options of bench]",
        description="Run scenarios as 'bench' does, with ComfyUI under Nsight Systems, and print where time went by "
        "NVTX range and by kernel. Options that are not listed here go to 'bench'.",
    ),
    "stress": Command(
        "broken input, faults and a soak, counted: stress [--inputs N] [--faults N] [--soak N]", _stress,
        "stress.command:run", interrupted="interrupted; nothing was kept",
        description="Feed broken and hostile input to everything that reads a file or a request, cancel prompts and "
        "kill writers, soak a server with random prompts, and count what that does. Exit code 1 where something broke.",
    ),
    "fleet": Command(
        "prompts or cells over many ComfyUI workers on a Ray cluster: fleet SCENARIO --prompts FILE --out DIR", _fleet,
        # Ray would put the user's folder on every worker's module path.
        "fleet.command:run", moves=False, interrupted="interrupted; all workers have ended. The same command goes on.",
        description="Spread prompts, or the cells of a benchmark, over many ComfyUI workers on a Ray cluster.",
        epilog=_FLEET_NOTES,
    ),
    "gpu": Command(
        "measure everything on an NVIDIA GPU with full-size random models; --pack for machines without network", _gpu,
        description="Measure this pack on an NVIDIA GPU with full-size models of random weights: stock ComfyUI and "
        "each technique in turns. A call that was cut off, or ran out of time, is gone on with by the next one.",
    ),
    "setup": Command("only set up what the other commands need"),
    "workflows": Command(
        "write the workflow files from the scenarios", _workflows, "scenarios.workflows:run_workflows"
    ),
    "locales": Command("write the English texts of the nodes from their classes", runs="locales:run"),
    "contract": Command("at a release: renew what saved workflows may rely on", _contract, "contract:run"),
    "synthetic": Command(
        "write a made-up model file: checkpoint, controlnet, lora, vae, taesd or drawn", _synthetic,
        "synthetic.command:run",
    ),
}  # fmt: skip


@cache
def tree() -> Parser:
    """The whole command line behind the options that choose a host."""
    top = Parser(prog="run.py", allow_abbrev=False)
    commands = top.add_subparsers(dest="command", required=True)
    for name, command in COMMANDS.items():
        command.declare(
            commands.add_parser(
                name,
                help=command.text,
                description=command.description or f"{command.text[0].upper()}{command.text[1:]}.",
                epilog=command.epilog,
                usage=command.usage,
                allow_abbrev=False,
                formatter_class=argparse.RawDescriptionHelpFormatter if command.epilog else argparse.HelpFormatter,
            )
        )
    return top


def parse(name: str, arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """What a command was given, and what it leaves to another program.

    Help and what a command does not take end the process, with code 0 and 2. Raises UsageError for an unknown command.
    """
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise UsageError(f"run.py has no command {name!r}.{hint} It has {', '.join(COMMANDS)}.")
    line = [name, *arguments]
    return tree().parse_known_args(line) if COMMANDS[name].passes else (tree().parse_args(line), [])
