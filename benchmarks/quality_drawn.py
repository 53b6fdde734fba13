"""`quality.py --model drawn`: all that leaves out evaluations, on images of the model that draws.

Each image has a held-out caption and a seed of its own, and is compared with the same sampler's image of all steps:
latent error, PSNR, SSIM, and how much of the caption both show. What was measured is kept image by image in --work, so
that an interrupted call goes on; every way makes its first image before the second ones, so that a drift of the machine
hits all alike. Writes `quality-drawn` (a row a way) and a plot into benchmarks/results, with --behaviour
`drawn-behaviour` (steps, CFG, DeepCache's interval); benchmarks/floors.py sets Tune's limits from what was kept.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import hashlib
import importlib
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import inprocess

Patch = Callable[[Any], Any]
Way = tuple[str, str, Patch]
# sampler, scheduler, steps; with noise of its own a run of fewer steps is another image
CASES = {
    "ODE": (("euler", "karras", 20), ("dpmpp_2m", "karras", 25)),
    "SDE": (("euler_ancestral", "karras", 20), ("dpmpp_2m_sde", "karras", 25)),
}
FEWER = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
# These settings also go with Dynamic CFG.
GUIDED = {
    ("all steps", ""), ("DeepCache", "uniform 3"), ("DeepCache", "adaptive 0.02"), ("DeepCache", "extrapolate 3"),
    ("Forecast, adaptive", "0.02"), ("Forecast, fixed", "max_skip 2"), ("copy", "1 in 2"), ("EasyCache", "0.1"),
    ("LazyCache", "0.1"), ("Spectrum's scheme", "as in sd.cpp"),
}  # fmt: skip
# The interval of sigmas is that of Kynkaanniemi et al. for their latent models.
GUIDANCES = {"stop_at 0.75": {"stop_at": 0.75}, "window": {"stop_at": 1.0, "sigma_low": 0.28, "sigma_high": 5.42}}
GUIDED_STEPS = "stop_at 0.75"  # beside fewer plain steps
# What a quick call leaves of these, and of Dynamic CFG: the window of all steps alone.
QUICK = {
    ("Forecast, adaptive", "0.02"), ("Forecast, adaptive", "0.05"), ("Forecast, fixed", "max_skip 2"),
    ("copy", "1 in 2"), ("EasyCache", "0.1"), ("EasyCache", "0.2"), ("LazyCache", "0.1"),
    ("Spectrum's scheme", "as in sd.cpp"), ("Spectrum's scheme", "warm-up 8"), ("DeepCache", "uniform 2"),
    ("DeepCache", "uniform 3"), ("DeepCache", "uniform 5"), ("DeepCache", "adaptive 0.02"),
    ("DeepCache", "adaptive 0.05"), ("DeepCache", "extrapolate 3"), ("DeepCache", "extrapolate 5"),
}  # fmt: skip
# Where an image of other steps is another one, less can be compared.
QUICK_SDE = {
    ("Forecast, adaptive", "0.02"), ("Forecast, fixed", "max_skip 2"), ("EasyCache", "0.1"),
    ("Spectrum's scheme", "as in sd.cpp"), ("DeepCache", "uniform 3"), ("DeepCache", "adaptive 0.05"),
    ("DeepCache", "extrapolate 3"),
}  # fmt: skip
QUICK_GUIDED = {
    ("all steps", ""), ("DeepCache", "uniform 3"), ("DeepCache", "extrapolate 3"), ("Forecast, adaptive", "0.02"),
}  # fmt: skip
QUICK_FEWER = {"ODE": (0.4, 0.55, 0.7, 0.85), "SDE": (0.55,)}
COLUMNS = ["side", "kind", "sampler", "scheduler", "steps", "way", "setting", "dynamic_cfg", "evaluations", "rows",
           "cpu_s", "error_median", "error_worst", "psnr_median", "ssim_median", "attributes", "attributes_worst",
           "images", "refused", "torch", "date"]  # fmt: skip
BEHAVIOUR = ["axis", "value", "attributes", "attributes_worst", "error_median", "clipped", "cpu_s", "images",
             "published", "torch", "date"]  # fmt: skip
STEPS = (2, 3, 4, 6, 8, 12, 16, 20, 25, 30, 50)
LONG = 100
CFGS = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)
INTERVALS = (1, 2, 3, 4, 5, 6, 8)
PUBLISHED = {
    "steps": "10 to 20 steps of a solver of second order come close to the limit (DPM-Solver++)",
    "cfg": "up to a point images follow the prompt better, then colours saturate (classifier-free guidance, Imagen)",
    "deepcache_interval": "the distance grows with the interval; 2 to 3 is close, 5 visible (DeepCache)",
}
SEED = 26


@dataclass
class Model:
    """The model that draws, with captions encoded once."""

    patcher: Any
    vae: Any
    scenes: list[Any]
    positive: list[Any]
    negative: Any
    side: int
    cfg: float
    counts: dict[str, int] = field(default_factory=dict)

    def sample(
        self, patch: Patch, image: int, sampler: str, scheduler: str, steps: int, cfg: float | None = None
    ) -> Any:
        """The latent of one image. `counts` tells runs of the middle block (whole evaluations) and their rows."""
        core = importlib.import_module("nodes")
        self.counts = {"evaluations": 0, "rows": 0}
        empty = {"samples": self.empty}
        return core.common_ksampler(
            patch(self.patcher), SEED + image, steps, self.cfg if cfg is None else cfg, sampler, scheduler,
            self.positive[image], self.negative, empty,
        )[0]["samples"]  # fmt: skip

    @property
    def empty(self) -> Any:
        import torch

        return torch.zeros(1, 4, self.side // 8, self.side // 8)

    def count(self, _block: Any, inputs: tuple[Any, ...]) -> None:
        self.counts["evaluations"] += 1
        self.counts["rows"] += len(inputs[0])

    def seen(self, latent: Any, image: int) -> tuple[Any, int, int, float]:
        """The picture [1, H, W, 3], its attributes that are right and asked for, and the share of clipped values."""
        import numpy as np

        from speedlab.measure.drawn import examiner

        picture = self.vae.decode(latent).float().cpu().clamp(0, 1)
        score = examiner.examine((picture[0].numpy() * 255.0).round().astype(np.uint8), self.scenes[image])
        return picture, score.right, score.asked, float(((picture < 0.004) | (picture > 0.996)).float().mean())


def load(factors: Path, images: int, work: Path, side: int | None) -> Model:
    """Build and load the model, for images of `side` pixels (as it was trained), with its layers as it was trained: two
    thin matrices each, with which the same image takes a third of the time."""
    import torch

    from speedlab_tools.scenarios.drawn import CFG
    from speedlab_tools.synthetic.drawn import packed
    from speedlab_tools.synthetic.train.data import scenes

    checkpoint = packed.write_drawn(work / "models", factors)[0]
    sd = importlib.import_module("comfy.sd")
    patcher, clip, vae = sd.load_checkpoint_guess_config(str(checkpoint), model_options={"dtype": torch.float32})[:3]
    thin_layers(patcher.model.diffusion_model, packed.unpack(packed.load_packed(factors)[0])[0])
    pairs = scenes(0, images, held_out=True)
    encode = importlib.import_module("nodes").CLIPTextEncode().encode
    positive = [encode(clip, text)[0] for _, text in pairs]
    side = side or int(packed.load_packed(factors)[1]["side"])
    made = Model(patcher, vae, [scene for scene, _ in pairs], positive, encode(clip, "")[0], side, CFG)
    patcher.model.diffusion_model.middle_block[0].register_forward_pre_hook(made.count)
    return made


def thin_layers(network: Any, weights: dict[str, Any]) -> None:
    """Put two thin layers in place of every large one, as the trainer has them."""
    from speedlab_tools.synthetic.train.net import Factored

    for name in [name.removesuffix(".first") for name in weights if name.endswith(".first")]:
        large = network.get_submodule(name)
        first, second = weights[f"{name}.first"], weights[f"{name}.second"]
        stride = getattr(large, "stride", (1,))[0]
        thin = Factored((len(second), *first.shape[1:]), len(first), large.bias is not None, stride)
        thin.first.data, thin.second.data = first, second
        if large.bias is not None:
            thin.bias.data = large.bias.data
        network.set_submodule(name, thin)


def with_deepcache(ways: list[Way], kind: str, quick: bool) -> list[Way]:
    """The oracle's ways, and DeepCache; of a quick call a part of the settings."""
    deepcache = importlib.import_module("speedlab.techniques.deepcache.attach")

    def cached(**options: Any) -> Patch:
        return lambda model: deepcache.attach_deepcache(model, deepcache.DeepCacheConfig(**options))

    found = list(ways)
    found += [("DeepCache", f"uniform {n}", cached(interval=n)) for n in (2, 3, 5)]
    found += [
        ("DeepCache", f"adaptive {t:g}", cached(interval=5, schedule="adaptive", tolerance=t)) for t in (0.02, 0.05)
    ]
    found += [("DeepCache", f"extrapolate {n}", cached(interval=n, features="extrapolate")) for n in (2, 3, 5)]
    kept = QUICK if kind == "ODE" else QUICK_SDE
    return [way for way in found if way[:2] in kept] if quick else found


def guided(options: dict[str, float], patch: Patch) -> Patch:
    """A way behind the node Dynamic CFG."""
    module = importlib.import_module("speedlab.techniques.guidance.dynamic_cfg")
    return lambda model: patch(module.attach_dynamic_cfg(model, module.DynamicCFGConfig(**options)))


class Kept:
    """What was measured, a line an image, in one file for these weights; what is there is not measured again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
        if lines and not lines[-1].endswith("\n"):  # cut off in the middle of a line
            path.write_text("".join(lines[:-1]), encoding="utf-8")
            del lines[-1]
        self.known: dict[str, dict[str, Any]] = {entry["key"]: entry for entry in map(json.loads, lines)}

    def get(self, key: tuple[Any, ...], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        name = json.dumps(key)
        if name not in self.known:
            self.known[name] = {"key": name, **measure()}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(self.known[name]) + "\n")
        return self.known[name]


@dataclass(frozen=True)
class Made:
    """An image: its attributes that are right and asked for, its CPU time, and whole evaluations with their rows."""

    latent: Any
    picture: Any
    right: int
    asked: int
    seconds: float
    counts: dict[str, int]


@dataclass
class Case:
    """A sampler with the latents and pictures of all steps, an image each, made when they are first needed."""

    model: Model
    kept: Kept
    kind: str
    sampler: str
    scheduler: str
    steps: int
    images: int
    references: dict[int, Made] = field(default_factory=dict)

    def make(self, patch: Patch, image: int, steps: int) -> Made:
        started = time.process_time()
        latent = self.model.sample(patch, image, self.sampler, self.scheduler, steps)
        seconds = time.process_time() - started
        return Made(latent, *self.model.seen(latent, image)[:3], seconds, dict(self.model.counts))

    def reference(self, image: int) -> Made:
        if image not in self.references:
            self.references[image] = self.make(_same, image, self.steps)
        return self.references[image]

    def measured(self, patch: Patch, image: int, steps: int) -> dict[str, Any]:
        from speedlab.common.errors import SpeedLabError
        from speedlab.measure.compare import compare_images, compare_latents

        reference = self.reference(image)
        try:
            mine = reference if patch is _same and steps == self.steps else self.make(patch, image, steps)
        except SpeedLabError as error:
            return {"refused": str(error)}
        apart = compare_images(mine.picture, reference.picture)
        return {
            "cpu_s": round(mine.seconds, 3), **mine.counts,
            "latent": compare_latents(mine.latent, reference.latent).relative_error, "psnr": min(apart.psnr, 200.0),
            "ssim": apart.ssim, "right": mine.right, "asked": mine.asked,
        }  # fmt: skip

    def row(self, way: str, setting: str, patch: Patch, steps: int, guidance: str = "") -> dict[str, Any]:
        place = (self.sampler, self.scheduler, self.steps, way, setting, guidance)
        found = [
            self.kept.get((*place, image), lambda image=image: self.measured(patch, image, steps))
            for image in range(self.images)
        ]
        row: dict[str, Any] = dict.fromkeys(COLUMNS, "")
        row |= {
            "side": self.model.side, "kind": self.kind, "sampler": self.sampler, "scheduler": self.scheduler,
            "steps": self.steps, "way": way, "setting": setting, "dynamic_cfg": guidance, "images": len(found),
        }  # fmt: skip
        refused = [one["refused"] for one in found if "refused" in one]
        return row | ({"refused": refused[0]} if refused else _summary(found))


def _summary(found: list[dict[str, Any]]) -> dict[str, Any]:
    def median(name: str) -> float:
        return statistics.median(one[name] for one in found)

    shares = [one["right"] / one["asked"] for one in found]
    return {
        "evaluations": round(statistics.mean(one["evaluations"] for one in found), 2),
        "rows": round(statistics.mean(one["rows"] for one in found), 2),
        "cpu_s": round(median("cpu_s"), 3),
        "error_median": f"{median('latent'):.6g}", "error_worst": f"{max(one['latent'] for one in found):.6g}",
        "psnr_median": f"{median('psnr'):.2f}", "ssim_median": f"{median('ssim'):.4f}",
        "attributes": f"{sum(one['right'] for one in found) / sum(one['asked'] for one in found):.4f}",
        "attributes_worst": f"{min(shares):.4f}",
    }  # fmt: skip


def _same(model: Any) -> Any:
    return model


def measure(
    model: Model, kept: Kept, images: int, quick: bool, samplers: int | None, ways: list[Way]
) -> Iterator[dict[str, Any]]:
    """A row of each way for the first `samplers` of each kind."""
    for kind, cases in CASES.items():
        for sampler, scheduler, steps in cases[:samplers]:
            case = Case(model, kept, kind, sampler, scheduler, steps, images)
            yield case.row("all steps", "", _same, steps)
            counts = sorted({max(round(share * steps), 1) for share in (QUICK_FEWER[kind] if quick else FEWER)})
            for number, count in enumerate(counts):
                yield case.row("fewer steps", str(count), _same, count)
                if not quick or (kind == "ODE" and number % 2 == 0):
                    late = guided(GUIDANCES[GUIDED_STEPS], _same)
                    yield case.row("fewer steps", str(count), late, count, GUIDED_STEPS)
            for way, setting, patch in [("all steps", "", _same), *with_deepcache(ways, kind, quick)]:
                if way != "all steps":
                    yield case.row(way, setting, patch, steps)
                if (way, setting) in (QUICK_GUIDED if quick else GUIDED):
                    for name, options in GUIDANCES.items():
                        if not quick or (kind == "ODE" and (name == GUIDED_STEPS or way == "all steps")):
                            yield case.row(way, setting, guided(options, patch), steps, name)


def behaviour(model: Model, kept: Kept, images: int, quick: bool) -> Iterator[dict[str, Any]]:
    """Whether it behaves like a trained model: steps converge, CFG trades, DeepCache's error grows."""
    from speedlab.measure.compare import compare_latents

    deepcache = importlib.import_module("speedlab.techniques.deepcache.attach")
    long: dict[int, Any] = {}

    def one(axis: str, value: float, image: int) -> dict[str, Any]:
        steps, cfg, patch = 25, model.cfg, _same
        if axis == "steps":
            steps = int(value)
        elif axis == "cfg":
            cfg = value
        elif value > 1:
            config = deepcache.DeepCacheConfig(interval=int(value))
            patch = lambda given: deepcache.attach_deepcache(given, config)  # noqa: E731
        started = time.process_time()
        latent = model.sample(patch, image, "dpmpp_2m", "karras", steps, cfg)
        seconds = time.process_time() - started
        _, right, asked, clipped = model.seen(latent, image)
        of = LONG if axis == "steps" else 25
        if axis != "cfg" and (of, image) not in long:
            long[(of, image)] = model.sample(_same, image, "dpmpp_2m", "karras", of)
        error = None if axis == "cfg" else compare_latents(latent, long[(of, image)]).relative_error
        return {"cpu_s": seconds, "right": right, "asked": asked, "clipped": clipped, "latent": error}

    axes = {"steps": STEPS, "cfg": CFGS, "deepcache_interval": INTERVALS}
    for axis, values in axes.items():
        for value in values[::2] if quick else values:
            found = [
                kept.get(("behaviour", axis, value, image), lambda a=axis, v=value, n=image: one(a, v, n))
                for image in range(images)
            ]
            errors = [each["latent"] for each in found if each["latent"] is not None]
            row = {
                "axis": axis, "value": f"{value:g}",
                "attributes": f"{sum(e['right'] for e in found) / sum(e['asked'] for e in found):.4f}",
                "attributes_worst": f"{min(e['right'] / e['asked'] for e in found):.4f}",
                "error_median": f"{statistics.median(errors):.6g}" if errors else "",
                "clipped": f"{statistics.mean(e['clipped'] for e in found):.4f}",
                "cpu_s": round(statistics.median(e["cpu_s"] for e in found), 3), "images": images,
                "published": PUBLISHED[axis],
            }  # fmt: skip
            print(*row.values(), flush=True)
            yield row


def work_of(folder: Path, checkpoint: str, side: int) -> Path:
    """Where the images of these weights in this size are kept."""
    return folder / f"{hashlib.sha256(checkpoint.encode()).hexdigest()[:12]}-{side}"


def main(args: argparse.Namespace, ways: list[Way]) -> None:
    import torch

    from speedlab_tools.synthetic.drawn import packed

    about = packed.load_packed(args.factors)[1]
    count = args.seeds or (4 if args.quick else 16)
    work = work_of(args.work, about["checkpoint"], args.side or int(about["side"]))
    with inference():
        model, kept = load(args.factors, count, work, args.side), Kept(work / "images.jsonl")
        if args.behaviour:
            kind, columns, rows = "drawn-behaviour", BEHAVIOUR, list(behaviour(model, kept, count, args.quick))
        else:
            samplers = args.samplers or (1 if args.quick else None)
            for images in range(1, count + 1):
                rows = list(measure(model, kept, images, args.quick, samplers, ways))
                print(f"image {images} of {count}", flush=True)
            kind, columns = "quality-drawn", COLUMNS
    date = datetime.date.today().isoformat()
    path = args.results / inprocess.result_name(kind, args.device, torch.__version__, date)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows({**row, "torch": torch.__version__, "date": date} for row in rows)
    print(path)
    if not args.behaviour:
        draw(rows, path.with_suffix(".png"))


@contextmanager
def inference() -> Iterator[None]:
    import torch

    with torch.inference_mode():
        yield


def draw(rows: Iterable[dict[str, Any]], path: Path) -> None:
    """Error and attributes against CPU time, a column a sampler."""
    from matplotlib.figure import Figure

    plain = [row for row in rows if not row["refused"] and not row["dynamic_cfg"]]
    cases = list(dict.fromkeys((row["kind"], row["sampler"], row["scheduler"], row["steps"]) for row in plain))
    figure = Figure(figsize=(4.2 * len(cases), 8.0), dpi=80)
    panels = figure.subplots(2, len(cases), squeeze=False)
    for column, case in enumerate(cases):
        here = [row for row in plain if (row["kind"], row["sampler"], row["scheduler"], row["steps"]) == case]
        for panel, name in enumerate(("error_median", "attributes")):
            axes = panels[panel][column]
            for number, way in enumerate(dict.fromkeys(row["way"] for row in plain)):
                points = sorted((row["cpu_s"], float(row[name])) for row in here if row["way"] == way)
                points = [point for point in points if panel or point[1] > 0.0]
                if points:
                    axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=way, color=f"C{number}")
            axes.set_xlabel("CPU seconds")
        panels[0][column].set_yscale("log")
        panels[0][column].set_title(f"{case[1]}, {case[2]}, {case[3]} steps ({case[0]})", fontsize=9)
    panels[0][0].set_ylabel("relative error of the latent, median")
    panels[1][0].set_ylabel("attributes right")
    panels[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path)
