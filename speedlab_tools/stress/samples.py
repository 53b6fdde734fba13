"""Small valid inputs, from which broken ones are made."""

from __future__ import annotations

import csv
import io
import json
import struct
from typing import Any

from speedlab.measure.record import CSV_COLUMNS, RunRecord, csv_row

RUN_ID = "20260102-030405-0123abcd"


def record() -> RunRecord:
    """A whole record."""
    return RunRecord(
        run_id=RUN_ID,
        timestamp="2026-01-02T03:04:05+0000",
        status="ok",
        error=None,
        env={"device": "Test GPU", "torch": "2.12.1", "comfyui": "0.3.75", "speedlab": "0.1.0"},
        env_hash="0123456789ab",
        request={
            "scenario": "txt2img-default", "plan": "stock", "checkpoint": {"name": "a.safetensors"}, "sampler": "euler",
            "scheduler": "normal", "steps": 20, "cfg": 8.0, "width": 512, "height": 512, "batch": 2, "seed": 7,
            "precision": {"unet": {"weight": "fp16", "compute": "fp32"}}, "accelerators": ["tiny_vae(taesd)"],
        },
        phases_ms={"load": "cached", "text_encode": 100.0, "prepare": 50.0, "sample": 2000.0, "decode": 250.0},
        steps=[{"index": 0, "sigma": 14.6, "gpu_ms": None, "cpu_ms": 100.0, "evals": 1, "cond_rows": 1,
                "uncond_rows": 1, "cached": False, "model": "base"}],
        summary={"runs_ms": [2000.0, 2200.0], "repeats": 2, "steps": 20, "step_time_ms": 105.0, "it_per_s": 9.52381},
        memory={"overall": {"peak_allocated_gb": 7.4, "peak_rss_gb": 3.0}},
        quality={"psnr": 31.5, "ssim": 0.97},
        artifacts={"images": [f"speedlab/images/{RUN_ID}.png"], "chart": f"speedlab/charts/{RUN_ID}.png"},
    )  # fmt: skip


def record_json() -> dict[str, Any]:
    """The same as it stands in its file."""
    return dict(json.loads(record().to_json()))


def table() -> str:
    """A results table of three rows."""
    text = io.StringIO()
    writer = csv.DictWriter(text, CSV_COLUMNS)
    writer.writeheader()
    for plan in ("stock", "deepcache(3)", "all, in one"):
        row = record().changed(request={**record().request, "plan": plan})
        writer.writerow(csv_row(row))
    return text.getvalue()


def safetensors() -> bytes:
    """A file with three small tensors and metadata."""
    header = {
        "__metadata__": {"format": "pt"},
        "a.lora_down.weight": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
        "a.lora_up.weight": {"dtype": "F16", "shape": [4], "data_offsets": [16, 24]},
        "model.diffusion_model.x": {"dtype": "I64", "shape": [1], "data_offsets": [24, 32]},
    }
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(range(32))


def prompt() -> dict[str, Any]:
    """A prompt as `/prompt` takes it."""
    return {
        "1": {"class_type": "SpeedLabCheckpointLoader", "inputs": {"ckpt_name": "a.safetensors"}},
        "2": {"class_type": "SpeedLabTextEncode", "inputs": {"clip": ["1", 1], "text": "x"}},
        "3": {"class_type": "SpeedLabProfileSampler", "inputs": {"model": ["1", 0], "positive": ["2", 0]},
              "_meta": {"title": "t", "speedlab": {"scenario": "txt2img-default", "plan": "stock"}}},
        "4": {"class_type": "SpeedLabVAEDecode", "inputs": {"samples": ["3", 0], "vae": ["1", 2]}},
        "5": {"class_type": "SpeedLabProfileReport", "inputs": {"profile": ["3", 1], "images": ["4", 0]}},
    }  # fmt: skip


def extra() -> dict[str, Any]:
    """What the canvas sends beside a prompt."""
    plans = {"scenario": "s", "plan": "p", "plans": {"3": "fast"}}
    return {"speedlab": plans, "workflow": {"id": "w", "extra": {"speedlab": plans}}}
