"""Command line: python -m speedlab_tools.synthetic checkpoint|lora|taesd|vae ..."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from . import FAMILY_NAMES, CheckpointSpec, write_checkpoint, write_controlnet, write_lora, write_taesd, write_vae
from .adapters import Keys
from .files import Progress
from .spec import DTYPES, Size
from .taesd import TaesdName


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes what the arguments ask for, its path to stdout, progress to stderr. Returns the exit status."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        for path in _write(options):
            sys.stdout.write(f"{path}\n")
    except (OSError, ValueError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


def _write(options: argparse.Namespace) -> Sequence[Path]:
    if options.what == "taesd":
        return write_taesd(options.path, options.name, options.seed)
    if options.what == "vae":
        return [write_vae(options.path, options.seed)]
    if options.what == "lora":
        spec = CheckpointSpec(options.family, options.size, options.dtype)
        text = not options.no_text_encoder
        return [write_lora(options.path, spec, options.rank, options.seed, options.scale, text, options.keys)]
    spec = CheckpointSpec(options.family, options.size, options.dtype, options.seed)
    if options.what == "controlnet":
        return [write_controlnet(options.path, spec)]
    return [write_checkpoint(options.path, spec, _progress(options.path.name))]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m speedlab_tools.synthetic", description=__doc__)
    kinds = parser.add_subparsers(dest="what", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("path", type=Path, help="file to write (for taesd: the folder)")
    common.add_argument("--seed", type=int, default=0)
    model = argparse.ArgumentParser(add_help=False)
    model.add_argument("--family", choices=FAMILY_NAMES, default="sd15")
    model.add_argument("--size", choices=get_args(Size), default="small")
    model.add_argument("--dtype", choices=tuple(DTYPES), default="fp16")
    kinds.add_parser("checkpoint", parents=[common, model], help="UNet, VAE and text encoders in one file")
    kinds.add_parser("controlnet", parents=[common, model], help="a ControlNet for the checkpoint of the same options")
    lora = kinds.add_parser("lora", parents=[common, model], help="a LoRA that fits the checkpoint of the same options")
    lora.add_argument("--rank", type=int, default=4)
    lora.add_argument("--scale", type=float, default=0.1, help="change at strength 1 relative to the weights")
    lora.add_argument("--keys", choices=get_args(Keys), default="all", help="how many of its keys match the model")
    lora.add_argument("--no-text-encoder", action="store_true")
    kinds.add_parser("vae", parents=[common], help="encoder and decoder of the full autoencoder")
    taesd = kinds.add_parser("taesd", parents=[common], help="encoder and decoder of a tiny autoencoder")
    taesd.add_argument("--name", choices=get_args(TaesdName), default="taesd")
    return parser


def _progress(title: str) -> Progress:
    """Reports at most twice a second, and at the end: on one line of a terminal, else on a line each 10 %."""
    terminal = sys.stderr.isatty()
    state = {"time": 0.0, "tenth": -1}

    def report(done: int, total: int) -> None:
        now, tenth = time.monotonic(), 10 * done // total
        if done < total and (now - state["time"] < 0.5 or (not terminal and tenth == state["tenth"])):
            return
        state.update(time=now, tenth=tenth)
        end = "\n" if done == total or not terminal else ""
        start = "\r" if terminal else ""
        sys.stderr.write(f"{start}{title}: {done / 1e9:.2f} of {total / 1e9:.2f} GB{end}")
        sys.stderr.flush()

    return report


if __name__ == "__main__":
    raise SystemExit(main())
