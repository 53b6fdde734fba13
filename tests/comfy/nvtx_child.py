"""One Profile Sampler run in a process of its own: `nvtx_child.py BASE STEPS SAMPLER DETAIL`."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def load(name: str, path: Path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    base, steps, sampler, detail = sys.argv[1:]
    pack = load("inprocess", HERE.parents[1] / "benchmarks" / "inprocess.py").start(Path(base))
    import torch

    unet = load("tiny_unet", HERE / "tiny_unet.py").build("sd15")
    with torch.inference_mode():
        pack.NODE_CLASS_MAPPINGS["SpeedLabProfileSampler"]().sample(
            unet.model, 1, int(steps), 5.0, sampler, "normal", unet.cond(1), unet.cond(2),
            {"samples": torch.zeros(1, 4, 8, 8)}, detail=detail, warmup=1, repeats=2,
        )  # fmt: skip


if __name__ == "__main__":
    main()
