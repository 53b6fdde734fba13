"""Fixtures of the engine tier: plain values, no ComfyUI."""

from __future__ import annotations

import pytest

from speedlab.measure import record as records
from speedlab.measure.peaks import MemoryPeak


def _make_record(**changes):
    base = records.RunRecord(
        run_id="20260102-030405-0123abcd",
        timestamp="2026-01-02T03:04:05+0000",
        status="ok",
        error=None,
        env={"device": "Test Card", "torch": "2.12.1", "comfyui": "0.3.75", "speedlab": "0.1.0"},
        env_hash="0123456789ab",
        request={
            "scenario": "txt2img-default", "plan": "stock", "checkpoint": {"name": "a.safetensors"}, "sampler": "euler",
            "scheduler": "normal", "steps": 20, "cfg": 8.0, "width": 512, "height": 512, "batch": 2, "seed": 2**64 - 1,
            "precision": {"unet": {"weight": "fp16", "compute": "fp32"}}, "accelerators": ["tiny_vae(taesd)"],
        },
        phases_ms={"load": 900.0, "text_encode": 100.0, "prepare": 50.0, "first_eval": 30.0, "sample": 2000.0,
                   "decode": 250.0, "save": 100.0, "total": 2500.0},
        steps=[],
        summary={"runs_ms": [2000.0, 2200.0, 1900.0], "repeats": 3, "steps": 20, "step_time_ms": 100.0,
                 "first_eval_ms": 130.0, "it_per_s": 10.0, "images_per_min": 48.0},
        memory={"overall": records.memory_dict(MemoryPeak(7_400_000_000, 8_000_000_000, 3_000_000_000, None))},
    )  # fmt: skip
    return base.changed(**changes)


@pytest.fixture(scope="session")
def make_record():
    """A whole record, with fields replaced by keyword."""
    return _make_record
