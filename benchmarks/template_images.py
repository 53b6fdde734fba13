"""Images of the templates: a chart of what each measures, from benchmarks/results, or a part of a screenshot.

    python benchmarks/template_images.py        writes workflows/<template>.jpg

The browser tests draw those of the remaining templates (`SPEEDLAB_PICTURES=1`): their graphs. Each image keeps its
figures as a comment, by which a test sees whether results have changed since. Needs matplotlib and Pillow.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.docs_tables import DEVICES, RESULTS, ROOT, Results
from speedlab_tools.scenarios.catalog import TEMPLATES

BACKGROUND, TEXT, FAINT, BAR, BASE = "#202225", "#f2f2f2", "#9aa0a6", "#4a8de0", "#8a94a0"


@dataclass(frozen=True)
class Chart:
    """Bars, each with the text behind it; `base` are those that the others are compared with."""

    title: str
    bars: tuple[tuple[str, float, str], ...]
    source: str
    base: tuple[int, ...] = (0,)

    def comment(self) -> str:
        """All figures in one line of text."""
        return "; ".join([self.title, *(f"{name}: {text}" for name, _, text in self.bars), self.source])


@dataclass(frozen=True)
class Part:
    """A part of a screenshot: left, top, right, bottom."""

    file: str
    box: tuple[int, int, int, int]

    def comment(self) -> str:
        """Where it is from."""
        return f"{self.file} {self.box}"


def _source(results: Results, kind: str, model: str) -> str:
    name = results.newest(kind).name
    return f"{DEVICES[name.partition('_')[0]]}, {model}; {name}"


def _times(results: Results, title: str, kind: str, model: str, base: str, figures: Mapping[str, str]) -> Chart:
    bars = [(base, 1.0, "1")]
    for name, figure in figures.items():
        value = results.figure(kind, figure)
        if value is not None:
            bars.append((name, value, f"{value:.1f} times as fast"))
    return Chart(title, tuple(bars), _source(results, kind, model))


def _deepcache(results: Results) -> Chart:
    start = "sampling 512x512, 5 steps: "
    plans = ("DeepCache 3", "DeepCache 5", "DeepCache 3 + Dynamic CFG 0.75", "DeepCache 5 + Dynamic CFG 0.5")
    figures = {plan: start + plan for plan in plans}
    return _times(results, "Sampling", "accelerate", "SD 1.5, 512x512", "every step in full", figures)


def _together(results: Results) -> Chart:
    plans = {
        "ComfyUI's EasyCache": "stock + EasyCache",
        "DeepCache 3 + Dynamic CFG + Tiny VAE": "interval 3",
        "DeepCache 5 + Dynamic CFG + Tiny VAE": "interval 5",
        "the same in bf16": "interval 5, bf16",
    }
    figures = {name: f"picture 512x512: {plan}, speed-up over stock" for name, plan in plans.items()}
    return _times(results, "Text to image", "accelerate", "SD 1.5, 512x512", "stock ComfyUI", figures)


def _on_a_cpu(results: Results) -> Chart:
    backends = ("inductor", "openvino", "onnxruntime")
    figures = {name: f"warm fp32 512x512: {name}, warm speed-up over eager" for name in backends}
    return _times(results, "A step, the same up to rounding", "compile", "SD 1.5, 512x512", "PyTorch, eager", figures)


def _compiled(results: Results) -> Chart:
    bars = []
    for name, figure in (("ComfyUI's TorchCompileModel", "TorchCompileModel"), ("Compile Model", "inductor")):
        value = results.figure("compile", f"first 256x256: {figure}, compile time, s") or 0.0
        bars.append((name, value, f"{value:.0f} s"))
    return Chart("Compiling for the first image", tuple(bars), _source(results, "compile", "SD 1.5, 256x256"))


def _plan(results: Results) -> Chart:
    rows = [r for r in results.rows("memory-plan") if (r["checkpoint"], r["width"]) == ("speedlab_demo_vega", "1024")]
    bars = []
    for row in rows:
        if row["offload"] == "none":
            for key in ("predicted", "measured"):
                value = float(row[f"{key}_gb"])
                bars.append((f"{row['phase']}, {key}", value, f"{value:.2f} GB"))
    source = _source(results, "memory-plan", "SDXL family, 1024x1024")
    return Chart("What Memory Plan predicts", tuple(bars), source, base=tuple(range(0, len(bars), 2)))


def _tiles(results: Results) -> Chart:
    names = {
        "full-1024-b1": "1024x1024, whole", "full-tile512-1024-b1": "1024x1024, in tiles",
        "full-tile512-4096-b1": "4096x4096, in tiles", "tiny-4096-b1": "4096x4096, Tiny VAE",
    }  # fmt: skip
    found = {row["cell"]: float(row["over_gb"]) for row in results.rows("memory-decode")}
    bars = tuple((name, found[cell], f"{found[cell]:.2f} GB") for cell, name in names.items())
    return Chart("Memory of decoding", bars, _source(results, "memory-decode", "SDXL's VAE"))


def _steps(results: Results) -> Chart:
    case = ("apart", "euler", "karras", "20", "fewer steps")
    keys = ("mixture", "sampler", "scheduler", "steps", "way")
    rows = [row for row in results.rows("quality") if tuple(row[key] for key in keys) == case]
    bars = tuple((f"{r['setting']} steps", float(r["error_median"]), f"{float(r['error_median']):.3f}") for r in rows)
    return Chart("Distance from 20 steps", bars, _source(results, "quality", "Euler, Karras, exact denoiser"))


CHARTS: Mapping[str, Callable[[Results], Chart]] = {
    "sd15-cpu-onnxruntime": _on_a_cpu,
    "sdxl-torch-compile": _compiled,
    "sdxl-deepcache": _deepcache,
    "sdxl-fastest-deepcache": _together,
    "sdxl-under-8gb": _plan,
    "sdxl-vae-tiling": _tiles,
    "sweep-steps": _steps,
}
PARTS: Mapping[str, Part] = {
    "txt2img-default": Part("node-dark.png", (662, 468, 1086, 945)),
    "profile-nvtx": Part("detail.png", (60, 160, 366, 406)),
    "xy-grid": Part("compare.png", (68, 268, 356, 710)),
    "sdxl-staged-batch": Part("drawn-sdxl.png", (0, 0, 384, 256)),
}
# What nothing was measured of shows its graph, which the browser tests draw.
GRAPHS = ("sdxl-refiner-ensemble",)


def images(results: Results) -> dict[str, Chart | Part]:
    """What stands in the image of each template, by scenario."""
    return {**{name: make(results) for name, make in CHARTS.items()}, **PARTS}


def draw(chart: Chart) -> bytes:
    """A chart as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 6), dpi=100, facecolor=BACKGROUND)
    axes.set_facecolor(BACKGROUND)
    positions = range(len(chart.bars), 0, -1)
    values = [value for _, value, _ in chart.bars]
    colours = [BASE if index in chart.base else BAR for index in range(len(values))]
    axes.barh(list(positions), values, height=0.5, color=colours)
    for position, (name, value, text) in zip(positions, chart.bars, strict=True):
        axes.text(0, position + 0.31, name, color=TEXT, fontsize=17, va="bottom")
        axes.text(value + max(values) * 0.015, position, text, color=TEXT, fontsize=17, va="center", weight="bold")
    axes.set_xlim(0, max(values) * 1.42)
    axes.set_ylim(0.5, len(values) + 0.75)
    axes.axis("off")
    figure.suptitle(chart.title, x=0.04, ha="left", color=TEXT, fontsize=27, weight="bold")
    figure.text(0.04, 0.025, chart.source, color=FAINT, fontsize=11)
    figure.subplots_adjust(left=0.04, right=0.98, top=0.88, bottom=0.08)
    data = io.BytesIO()
    figure.savefig(data, facecolor=BACKGROUND)
    pyplot.close(figure)
    return data.getvalue()


def main() -> None:
    """Write the images."""
    from PIL import Image

    for scenario, content in images(Results(ROOT / RESULTS)).items():
        if isinstance(content, Part):
            picture = Image.open(ROOT / "docs" / "images" / content.file).convert("RGB").crop(content.box)
            picture = picture.resize((picture.width * 2, picture.height * 2), Image.Resampling.LANCZOS)
        else:
            picture = Image.open(io.BytesIO(draw(content))).convert("RGB")
        path = ROOT / "workflows" / f"{TEMPLATES[scenario]}.jpg"
        picture.save(path, quality=85, optimize=True, comment=content.comment().encode())
        print(path)


if __name__ == "__main__":
    main()
