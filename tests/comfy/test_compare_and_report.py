"""Compare Images, Compare Latents, Profile Report."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest

from ..held_table import held


def image(seed=0, batch=1, height=24, width=32):
    import torch

    return torch.rand(batch, height, width, 3, generator=torch.Generator().manual_seed(seed))


def test_psnr_and_ssim_are_the_fields_own(node):
    import torch
    from kornia.metrics import ssim

    a, b = image(1, 2), image(2, 2)
    psnr_value, ssim_value, diff, report = node("SpeedLabCompareImages").compare(a, b)["result"]
    assert psnr_value == pytest.approx(10 * math.log10(1.0 / float(((a - b) ** 2).mean())), abs=1e-4)
    assert ssim_value == pytest.approx(float(ssim(a.movedim(-1, 1), b.movedim(-1, 1), 11).mean()), abs=1e-6)
    assert diff.shape == a.shape
    assert float(diff.max()) == pytest.approx(1.0)
    assert "dB" in report
    same = node("SpeedLabCompareImages").compare(a, a)["result"]
    assert same[0] == math.inf
    assert same[1] == pytest.approx(1.0)
    assert torch.count_nonzero(same[2]) == 0


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 9), (4, 4), (5, 3)])
def test_very_small_pictures_are_compared_too(node, height, width):
    psnr_value, ssim_value, *_ = node("SpeedLabCompareImages").compare(
        image(1, height=height, width=width), image(2, height=height, width=width)
    )["result"]
    assert math.isfinite(psnr_value)
    assert -1 <= ssim_value <= 1


def test_pictures_of_other_sizes_are_refused(node, engine):
    with pytest.raises(engine("common.errors").SpeedLabError, match="32x24"):
        node("SpeedLabCompareImages").compare(image(), image(height=16))


def test_latents(node, engine):
    import torch

    a = {"samples": torch.ones(1, 4, 2, 2)}
    b = {"samples": torch.full((1, 4, 2, 2), 2.0)}
    relative, largest, _ = node("SpeedLabCompareLatents").compare(a, b)["result"]
    assert relative == pytest.approx(0.5)
    assert largest == pytest.approx(1.0)
    assert node("SpeedLabCompareLatents").compare(a, a)["result"][0] == 0.0
    assert "bit for bit" in node("SpeedLabCompareLatents").compare(a, a)["result"][2]
    with pytest.raises(engine("common.errors").SpeedLabError, match="one shape"):
        node("SpeedLabCompareLatents").compare(a, {"samples": torch.ones(1, 4, 2, 3)})


@pytest.fixture
def profile(node, tiny):
    return node("SpeedLabProfileSampler").sample(
        tiny.model, 1, 3, 5.0, "euler", "normal", tiny.cond(1), tiny.cond(2), tiny.latent()
    )["result"][1]


def test_a_report_completes_the_record_and_appends_one_row(node, profile, base_dir):
    import torch

    images = image(batch=2)
    out = node("SpeedLabProfileReport").report(profile, images)
    passed, text, chart, json_path = out["result"]
    assert torch.equal(passed, images)
    data = json.loads(Path(json_path).read_text())
    assert data["run_id"] == profile.run_id
    assert data["phases_ms"]["total"] is None, "nothing is known of text encoding outside of a prompt"
    assert len(data["artifacts"]["images"]) == 2
    output = Path(base_dir) / "output"
    assert all((output / name).is_file() for name in [*data["artifacts"]["images"], data["artifacts"]["chart"]])
    assert chart.ndim == 4
    assert chart.shape[1] > 300
    for word in ("sampling", "text to image", "it/s", profile.run_id):
        assert word in text
    assert profile.artifacts == {}, "the profile handed over stays as it was"
    again = json.loads(Path(node("SpeedLabProfileReport").report(profile, images)["result"][3]).read_text())
    assert again["run_id"] != profile.run_id, "a second report is a result of its own"
    assert not set(again["artifacts"]["images"]) & set(data["artifacts"]["images"])
    with (output / "speedlab" / "results.csv").open(newline="") as file:
        mine = [row for row in csv.DictReader(file) if row["run_id"] == profile.run_id]
    assert len(mine) == 1
    assert mine[0]["status"] == "ok"
    assert mine[0]["time_s"] == ""
    assert float(mine[0]["step_time_s"]) > 0
    assert mine[0]["steps"] == "3"


def test_a_table_open_in_another_program_stops_nothing(node, tiny, profile, base_dir):
    output = Path(base_dir) / "output"
    table = output / "speedlab" / "results.csv"
    node("SpeedLabProfileReport").report(profile, image())

    def run():
        made = node("SpeedLabProfileSampler").sample(
            tiny.model, 1, 2, 5.0, "euler", "normal", tiny.cond(1), tiny.cond(2), tiny.latent()
        )["result"][1]
        return made.run_id, node("SpeedLabProfileReport").report(made, image())["result"]

    def times(run_id):
        with table.open(newline="") as file:
            return sum(row["run_id"] == run_id for row in csv.DictReader(file))

    with held(table):
        run_id, (_, text, _, json_path) = run()
    data = json.loads(Path(json_path).read_text())
    assert any("open in another program" in warning for warning in data["warnings"])
    assert "open in another program" in text
    assert all((output / name).is_file() for name in (*data["artifacts"]["images"], data["artifacts"]["chart"]))
    assert times(run_id) == 0
    next_id, (_, text, *_) = run()
    assert "open in another program" not in text
    assert (times(run_id), times(next_id)) == (1, 1)


def test_a_report_without_pictures_passes_none_on(node, profile):
    from comfy_execution.graph_utils import ExecutionBlocker

    out = node("SpeedLabProfileReport").report(profile)
    assert isinstance(out["result"][0], ExecutionBlocker)
    assert "images" in out["ui"]
    assert out["ui"]["images"] == []


def test_pictures_carry_the_workflow(node, profile, base_dir):
    from PIL import Image

    out = node("SpeedLabProfileReport").report(
        profile, image(), prompt={"1": {"class_type": "X", "inputs": {}}}, extra_pnginfo={"workflow": {"nodes": []}},
        unique_id="1",
    )  # fmt: skip
    (shown,) = out["ui"]["images"]
    with Image.open(Path(base_dir) / "output" / shown["subfolder"] / shown["filename"]) as picture:
        assert json.loads(picture.text["prompt"])["1"]["class_type"] == "X"
        assert json.loads(picture.text["workflow"]) == {"nodes": []}


def test_a_chart_of_a_failed_run_is_drawn_too(engine, profile):
    charts = engine("measure.charts")
    failed = profile.changed(status="oom", steps=(), error="no memory")
    assert charts.run_chart(failed).shape[-1] == 3
    assert "oom" in engine("measure.report").summary_text(failed)
