"""Measures what a forward takes beside its weights, for `speedlab/memory/activations.csv`.

    COMFYUI_PATH=... python benchmarks/activation_table.py [--minutes 9] [--full]

Each row is a process of its own: the model is made with random weights, one small forward warms up, and then the peak
of the resident set during one forward (on a GPU: of the allocator) is read against what there was before it. Beside it
stands the same forward counted on the `meta` device. Text encoders take a few MB and are left to the count. Attention
is SDPA. Rows that the table has are kept, so a run that was cut off goes on where it stopped. `--full` adds the UNets
of full width, which want 10 GB and time.
"""

from __future__ import annotations

import argparse
import csv
import gc
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "speedlab" / "memory" / "activations.csv"
COLUMNS = ("device", "part", "family", "dtype", "width", "height", "rows", "counted_bytes", "measured_bytes")
KEY = COLUMNS[:7]
SMALL = [
    ("vae", "sd15", "fp32", 256, 1), ("unet", "sd15-small", "fp32", 256, 2), ("unet", "vega-small", "fp32", 512, 2),
    ("vae", "sd15", "fp32", 512, 1), ("unet", "sd15-small", "fp32", 512, 2), ("unet", "vega-small", "fp32", 1024, 2),
    ("unet", "sdxl_refiner-small", "fp32", 512, 2),
    ("unet", "sd15-small", "fp32", 512, 8), ("vae", "sd15", "fp32", 256, 4),
    ("vae", "sd15", "fp32", 768, 1), ("vae", "sd15", "fp32", 1024, 1),
]  # fmt: skip
FULL = [("unet", "sd15", "fp32", 512, 2), ("unet", "sdxl", "bf16", 1024, 2), ("unet", "sdxl_refiner", "bf16", 1024, 2)]


def main() -> None:
    """Measure what is missing, until the time is over."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--table", type=Path, default=TABLE)
    parser.add_argument("--row", nargs=5)
    args = parser.parse_args()
    if args.row:
        part, family, dtype, side, rows = args.row
        print(*measure(part, family, dtype, int(side), int(rows)))
        return
    end = time.monotonic() + 60 * args.minutes
    done = {(r["part"], r["family"], r["dtype"], int(r["width"]), int(r["rows"])) for r in read(args.table)}
    for job in SMALL + (FULL if args.full else []):
        if job in done or time.monotonic() > end:
            continue
        command = [sys.executable, __file__, "--row", *map(str, job)]
        out = subprocess.run(command, capture_output=True, text=True, check=False)
        if out.returncode != 0:
            print(f"{job}: failed\n{out.stderr[-2000:]}", file=sys.stderr)
            continue
        device, counted, measured = out.stdout.split()[-3:]
        part, family, dtype, side, rows = job
        row = dict(zip(COLUMNS, (device, part, family, dtype, side, side, rows, counted, measured), strict=True))
        append(args.table, row)
        print(f"{job}: counted {int(counted) / 1e6:.1f} MB, measured {int(measured) / 1e6:.1f} MB", flush=True)


def read(table: Path) -> list[dict[str, str]]:
    if not table.is_file():
        return []
    with table.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def append(table: Path, row: dict[str, Any]) -> None:
    new = not table.is_file() or not table.stat().st_size
    with table.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def measure(part: str, family: str, dtype: str, side: int, rows: int) -> tuple[str, int, int]:
    """Device type, bytes counted and bytes measured of one forward."""
    import importlib

    sys.path.insert(0, str(Path(__file__).resolve().parent))
    import inprocess

    inprocess.start(Path(tempfile.mkdtemp(prefix="speedlab-")))
    engine = lambda name: importlib.import_module(f"speedlab.{name}")  # noqa: E731
    import torch
    from comfy.model_management import get_torch_device

    device = get_torch_device()
    forward, counted = {"unet": _unet, "vae": _vae}[part](engine, family, dtype, side, rows, device)
    with torch.inference_mode():
        forward(64)
        gc.collect()
        memory = engine("measure.peaks")
        before = torch.cuda.memory_allocated(device) if device.type == "cuda" else memory.rss_bytes()
        with memory.measure_peak(device) as reading:
            forward(side)
    peak = reading.peak.allocated if device.type == "cuda" else reading.peak.rss
    return device.type, counted, peak - before


def _dtype(word: str) -> Any:
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[word]


def _filled(module: Any) -> Any:
    """Weights that keep activations finite: Inf and NaN slow attention down."""
    import torch

    for name, weight in module.named_parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
        else:
            torch.nn.init.constant_(weight, 1.0 if name.endswith("weight") else 0.0)
    return module


def _unet(engine: Any, family: str, dtype: str, side: int, rows: int, device: Any) -> tuple[Any, int]:
    import comfy.ldm.modules.attention as attention
    import comfy.supported_models as supported
    import torch

    from speedlab_tools.synthetic import spec

    name, _, small = family.partition("-")
    shape = spec.architecture(spec.CheckpointSpec(family=name, size=small or "full")).unet
    config = {
        "image_size": 32, "in_channels": 4, "out_channels": 4, "legacy": False, "use_spatial_transformer": True,
        "model_channels": shape.model_channels, "channel_mult": list(shape.channel_mult),
        "num_res_blocks": [shape.num_res_blocks] * len(shape.channel_mult), "transformer_depth": list(shape.depth_in),
        "transformer_depth_output": list(reversed(shape.depth_out)), "transformer_depth_middle": shape.depth_middle,
        "context_dim": shape.context_dim, "use_linear_in_transformer": shape.linear_projection,
        "adm_in_channels": shape.adm_channels, "dtype": _dtype(dtype),
    }  # fmt: skip
    config |= {"num_classes": "sequential", "num_head_channels": 64} if shape.adm_channels else {"num_heads": 8}
    kind = {"sd15": "SD15", "sdxl": "SDXL", "vega": "Segmind_Vega", "sdxl_refiner": "SDXLRefiner"}[name]
    chosen = getattr(supported, kind)(config)
    chosen.set_inference_dtype(_dtype(dtype), None)
    with torch.inference_mode():
        base = chosen.get_model({}, "", device=device)
        _filled(base.diffusion_model)
    activations = engine("memory.predict")
    size = activations.ImageSize(side, side, max(1, rows // 2))
    options = {"optimized_attention_override": lambda _f, *a, **k: attention.attention_pytorch(*a, **k)}

    def forward(pixels: int) -> Any:
        latent = torch.randn(rows, 4, pixels // 8, pixels // 8, dtype=_dtype(dtype), device=device)
        context = torch.randn(rows, 77, shape.context_dim, dtype=_dtype(dtype), device=device)
        label = (rows, shape.adm_channels or 1)
        adm = torch.randn(label, dtype=_dtype(dtype), device=device) if shape.adm_channels else None
        time_ = torch.full((rows,), 500.0, device=device)
        return base.diffusion_model(latent, time_, context=context, y=adm,
                                    control=None, transformer_options=dict(options))  # fmt: skip

    return forward, activations.unet_bytes(base, size, rows)


def _vae(engine: Any, family: str, dtype: str, side: int, rows: int, device: Any) -> tuple[Any, int]:
    import comfy.sd
    import torch

    weights = _vae_weights()
    vae = comfy.sd.VAE(sd=weights, dtype=_dtype(dtype))
    del weights
    activations = engine("memory.predict")
    counted = activations.decode_bytes(vae, activations.ImageSize(side, side, rows))
    return lambda pixels: vae.decode(torch.randn(rows, 4, pixels // 8, pixels // 8)), counted


def _vae_weights() -> dict[str, Any]:
    from comfy.ldm.models.autoencoder import AutoencoderKL

    shape = {
        "double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128,
        "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0,
    }  # fmt: skip
    return dict(_filled(AutoencoderKL(ddconfig=shape, embed_dim=4)).state_dict())


if __name__ == "__main__":
    main()
