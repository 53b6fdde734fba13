"""Tune's limits: what benchmarks/floors.py makes of measured plans, and that the help pages tell them."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def floors() -> ModuleType:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        spec = importlib.util.spec_from_file_location("speedlab_floors", ROOT / "benchmarks" / "floors.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["speedlab_floors"] = module
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
    return module


def line(way: str, setting: str, image: int, *, latent: float, right: int) -> dict:
    key = json.dumps(["euler", "karras", 20, way, setting, "", image])
    return {"key": key, "latent": latent, "ssim": 1 - latent, "psnr": 20.0 - latent, "right": right, "asked": 10}


def test_a_floor_ends_where_attributes_are_lost(floors: ModuleType) -> None:
    lines = [line("all steps", "", image, latent=0.0, right=9) for image in range(4)]
    for number in range(1, 31):
        latent = number / 100
        lost = 0 if latent <= 0.1 else 1 if latent <= 0.2 else 5
        lines += [
            line("copy", str(number), image, latent=latent, right=9 - (lost > image) - lost // 5) for image in range(4)
        ]
    lines += [{"key": json.dumps(["euler", "karras", 20, "EasyCache", "0.1", "", 0]), "refused": "not with these"}]
    lines += [{**lines[0], "key": json.dumps(["behaviour", "cfg", 3, 0])}]
    plans = floors.plans_of(lines)
    assert len(plans) == 30 and plans[0].lost == pytest.approx(0.0) and plans[-1].lost > 0.05
    close, similar = (floors.floor_of(plans, loss) for loss in floors.LOSSES.values())
    assert (close["latent"], similar["latent"]) == (0.16, 0.21)
    assert similar["ssim"] < close["ssim"] < 1 and similar["psnr"] <= close["psnr"]
    assert floors.floor_of(plans[-8:], (0.01, 0.03)) is None
    assert floors.floor_of(plans[:10], (0.01, 0.03)) is None  # none of them loses anything


def test_the_help_pages_tell_the_limits(floors: ModuleType) -> None:
    table = json.loads(floors.FLOORS.read_text())
    assert floors.text_of(table) == floors.FLOORS.read_text()
    for page in floors.HELP:
        text = page.read_text(encoding="utf-8")
        assert floors.with_floors(text, table["floors"]) == text
        assert floors.with_floors(text, {"close": {"latent": 0.5, "ssim": 0.5, "psnr": 5, "lpips": 0.5}}) != text
