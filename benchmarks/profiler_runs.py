"""What the two measurements of Profile Sampler share: options, one small model with its settings, and the table."""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import inprocess

_CHECKPOINT = "speedlab_demo_sd15.safetensors"
# What Profile Sampler gets beside its settings.
AS_NODE = {"prompt": {"5": {"class_type": "SpeedLabProfileSampler", "inputs": {}}}, "unique_id": "5"}
Rows = list[dict[str, Any]]


def measured(
    doc: str, repeats: tuple[str, int], what: str, measure: Callable[[Any, dict[str, Any], int], Rows]
) -> tuple[Rows, Path]:
    """Read the command line, measure, and write the table; `measure` gets nodes, the sampler's settings, repeats."""
    options = argparse.ArgumentParser(description=doc)
    options.add_argument(f"--{repeats[0]}", dest="repeats", type=int, default=repeats[1])
    options.add_argument("--steps", type=int, default=10)
    options.add_argument("--size", type=int, default=256)
    options.add_argument("--base", type=Path, default=Path.home() / ".cache" / "speedlab" / "benchmarks")
    options.add_argument("--results", type=Path, default=inprocess.ROOT / "benchmarks" / "results")
    args = options.parse_args()
    nodes = inprocess.start(args.base).NODE_CLASS_MAPPINGS
    import torch

    with torch.inference_mode():
        rows = measure(nodes, _settings(nodes, args), args.repeats)
    return rows, _write(what, rows, args)


def _settings(nodes: Any, args: argparse.Namespace) -> dict[str, Any]:
    import torch

    from speedlab_tools import synthetic

    spec = synthetic.CheckpointSpec(family="sd15", size="small")
    synthetic.write_checkpoint(args.base / "models" / "checkpoints" / _CHECKPOINT, spec)
    model, clip, _, _ = nodes["SpeedLabCheckpointLoader"]().load(_CHECKPOINT, "auto", "contiguous")
    positive, negative = (nodes["SpeedLabTextEncode"]().encode(clip, text)[0] for text in ("a tree", ""))
    latent = {"samples": torch.zeros(1, 4, args.size // 8, args.size // 8)}
    return {"model": model, "seed": 1, "steps": args.steps, "cfg": 8.0, "sampler_name": "euler",
            "scheduler": "normal", "positive": positive, "negative": negative, "latent_image": latent}  # fmt: skip


def _write(what: str, rows: Rows, args: argparse.Namespace) -> Path:
    import torch

    from speedlab.measure.environment import device_name

    device = device_name(torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu"))
    path = args.results / inprocess.result_name(what, device, torch.__version__, time.strftime("%Y-%m-%d"))
    facts = {"size": args.size, "steps": args.steps, "device": device, "torch": torch.__version__}
    args.results.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *facts])
        writer.writeheader()
        writer.writerows(
            {**{k: round(v, 5) if isinstance(v, float) else v for k, v in r.items()}, **facts} for r in rows
        )
    return Path(path)
