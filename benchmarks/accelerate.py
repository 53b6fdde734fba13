"""What the accelerating nodes gain on a CPU: stock ComfyUI and this pack in turn, in one process, on full-size SD 1.5.

    COMFYUI_PATH=/path/to/ComfyUI python benchmarks/accelerate.py

`diffusers` and `DeepCache` must be installed beside it, as they are where `python run.py test` has run. Each run is one
row of `..._accelerate-runs.csv`, written when it ends; a series that was cut off goes on where it stopped. After
`--minutes` no further repeat begins. `..._accelerate.csv` holds the figures: medians over the repeats, ratios against
stock ComfyUI of the same series, and limits counted in FLOPs. In the part `sampling` stock runs with PyTorch's SDPA, as
the plans do, so that a ratio is that of one technique alone; in `sampling, memory kept` both also run with Precision's
`memory`. Weights are random: times are real, the latent error says how far a latent is from stock's and nothing about
how a picture looks.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import accelerate_limits
import inprocess
from accelerate_jobs import Bench, Plan, prepare
from jobs import Job, Rows, write

EVERYTHING_OFF = Plan()
SAMPLING = {
    "stock": EVERYTHING_OFF,
    "DeepCache 3": Plan(interval=3),
    "DeepCache 5": Plan(interval=5),
    "Dynamic CFG 0.5": Plan(stop_at=0.5),
    "Dynamic CFG 0.75": Plan(stop_at=0.75),
    "DeepCache 3 + Dynamic CFG 0.75": Plan(interval=3, stop_at=0.75),
    "DeepCache 5 + Dynamic CFG 0.5": Plan(interval=5, stop_at=0.5),
}
KEPT = "sampling, memory kept"
INTERVAL_3, INTERVAL_5 = (Plan("auto", interval, 0.75, "auto") for interval in (3, 5))
# As far from stock as the rivals are, which keep both halves of CFG to the end.
RIVAL = "interval 3, CFG kept"
INTERVAL_3_CFG = replace(INTERVAL_3, stop_at=1.0)
PICTURE_STEPS = 20
DIFFUSERS = "diffusers + DeepCache 3"
EASY_CACHE = "stock + EasyCache"
# Speed-up over stock ComfyUI, text to picture at the large size.
PICTURE_TARGETS: dict[str, float | None] = {
    "interval 3": 5.5,
    "interval 5": 8.0,
    RIVAL: None,
    "interval 3, bf16": None,
    "interval 5, bf16": 10.0,
    DIFFUSERS: None,
    EASY_CACHE: None,
}


def sampling_jobs(bench: Bench, part: str, sizes: dict[int, tuple[int, int]]) -> list[Job]:
    memory = "auto" if part == KEPT else "keep"
    return [
        Job(part, name, size, steps, bench.sampling(replace(plan, memory=memory), size, steps), rounds)
        for size, (steps, rounds) in sizes.items()
        for name, plan in SAMPLING.items()
    ]


def attention_jobs(bench: Bench, size: int, rounds: int) -> list[Job]:
    return [
        Job("attention", name, size, 2, bench.sampling(plan, size, 2), rounds)
        for name, plan in (
            ("stock", Plan(None)),
            ("Attention auto", Plan("auto")),
            ("Attention and linear auto", Plan("auto", linear="auto")),
        )
    ]


def picture_jobs(bench: Bench, size: int, rounds: int) -> list[Job]:
    steps = PICTURE_STEPS
    bench.make("diffusers_unet", "bf16")  # loading is no part of the job
    from_here = {
        "stock": lambda: bench.stock_picture(size, steps),
        "interval 3": lambda: bench.our_picture(INTERVAL_3, size, steps),
        "interval 5": lambda: bench.our_picture(INTERVAL_5, size, steps),
        RIVAL: lambda: bench.our_picture(INTERVAL_3_CFG, size, steps),
        DIFFUSERS: lambda: bench.diffusers_picture(3, size, steps),
        "interval 3, bf16": lambda: bench.our_picture(INTERVAL_3, size, steps, bf16=True),
        "interval 5, bf16": lambda: bench.our_picture(INTERVAL_5, size, steps, bf16=True),
    }
    return [Job("picture", name, size, steps, run, rounds) for name, run in from_here.items()]


def easy_cache(series: Rows, bench: Bench, search_size: int, size: int) -> None:
    """Core's EasyCache at the latent error of our `RIVAL`: the threshold is searched where a run is short."""
    target = series.median("picture", RIVAL, search_size, "latent_error")
    if target is None:
        return
    low, high = 0.0, 3.0
    for number in range(4):
        middle = (low + high) / 2 if number else 0.4
        name = f"{EASY_CACHE}, search {number}"
        job = Job("picture", name, search_size, PICTURE_STEPS, _with_easy_cache(bench, middle, search_size), 1)
        series.run(job, 0, middle)
        error = series.median("picture", name, search_size, "latent_error")
        if error is None:
            return
        low, high = (middle, high) if error < target else (low, middle)
    for where in (search_size, size):
        series.run(Job("picture", EASY_CACHE, where, PICTURE_STEPS, _with_easy_cache(bench, low, where), 1), 0, low)


def _with_easy_cache(bench: Bench, threshold: float, size: int) -> Callable[[], Any]:
    return lambda: bench.stock_picture(size, PICTURE_STEPS, bench.easy_cache(threshold))


def figures(series: Rows, bench: Bench, sizes: dict[int, tuple[int, int]], size: int, small: int) -> Iterator[tuple]:
    """(figure, measured, limit or None, target or None): what the rows say."""
    for where in sizes:
        cost = accelerate_limits.count(bench.stock[0].model.diffusion_model, where)
        yield f"FLOP share of a cached step at {where}x{where}", cost.cached / cost.full, None, None
        for part, (name, plan) in product(("sampling", KEPT), SAMPLING.items()):
            stock, seconds = series.median(part, "stock", where), series.median(part, name, where)
            if name == "stock" or stock is None or seconds is None:
                continue
            share = 0.97 if plan.interval == 1 else 0.95
            steps = next(int(row["steps"]) for row in series.rows if (row["part"], row["size"]) == (part, str(where)))
            limit = cost.limit(plan, steps)
            yield f"{part} {where}x{where}, {steps} steps: {name}", stock / seconds, limit, share * limit
    yield _ratio(series, "attention", "Attention auto", size, 1.6)
    yield _ratio(series, "attention", "Attention and linear auto", size, None)
    for name, target in PICTURE_TARGETS.items():
        for where in (small, size):
            yield _ratio(series, "picture", name, where, target if where == size else None)
            error = series.median("picture", name, where, "latent_error")
            yield f"picture {where}x{where}: latent error of {name}", error, None, None
    for rival in (DIFFUSERS, EASY_CACHE):
        yield _ratio(series, "picture", RIVAL, size, 1.0, rival)


def _ratio(series: Rows, part: str, job: str, size: int, target: float | None, over: str = "stock") -> tuple:
    theirs, ours = series.median(part, over, size), series.median(part, job, size)
    ratio = None if theirs is None or ours is None else theirs / ours
    return f"{part} {size}x{size}: {job}, speed-up over {over}", ratio, None, target


def pictures(series: Rows, bench: Bench, small: int, large: int, rounds: int) -> None:
    """Text to image at both sizes, attention alone between them, and the rivals."""
    series.all_in_turn(picture_jobs(bench, small, 1))
    bench.forget("diffusers_unet")
    series.all_in_turn(attention_jobs(bench, large, rounds))
    series.all_in_turn(picture_jobs(bench, large, 1))
    bench.forget("diffusers_unet", "bf16")
    easy_cache(series, bench, small, large)


def everything_off(bench: Bench) -> tuple:
    """Nodes that are off add not one wrapper: they return the very object."""
    model = bench.stock[0]
    off = bench.node("SpeedLabDeepCache").apply(model, 1, 0, 0.0, 1.0, "uniform")[0]
    off = bench.node("SpeedLabDynamicCFG").apply(off, "fixed", 1.0, 0.99)[0]
    off = bench.node("SpeedLabPrecision").apply(off, "keep", "keep", "keep", "keep", "keep", "off", "keep")[0]
    return "everything off: the same object, no wrapper (1 is yes)", float(off is model), None, 1.0


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--size", type=int, default=512, help="the large size, in pixels")
    options.add_argument("--small", type=int, default=256, help="the small size")
    options.add_argument("--steps", type=int, nargs=2, default=(5, 15), help="sampling steps at each size")
    options.add_argument("--rounds", type=int, nargs=2, default=(2, 3), help="repeats at each size")
    options.add_argument("--minutes", type=float, default=34.0, help="no repeat begins later; first runs always do")
    options.add_argument("--base", type=Path, default=Path.home() / ".cache" / "speedlab" / "benchmarks")
    options.add_argument("--results", type=Path, default=inprocess.ROOT / "benchmarks" / "results")
    options.add_argument("--only", choices=("pictures", "sampling", "kept"), help="one part; kept runs only when named")
    args = options.parse_args()
    pack = inprocess.start(args.base)
    import torch

    from speedlab.measure.environment import device_name

    prepare(args.base)
    device = device_name(torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu"))
    facts = {"device": device, "torch": torch.__version__}
    args.results.mkdir(parents=True, exist_ok=True)

    def result(what: str) -> Path:
        return args.results / inprocess.result_name(what, device, torch.__version__, time.strftime("%Y-%m-%d"))

    series = Rows(result("accelerate-runs"), facts, args.minutes)
    sizes = dict(zip((args.size, args.small), zip(args.steps, args.rounds, strict=True), strict=True))
    with torch.inference_mode():
        bench = Bench(pack, args.base)
        bench.sample(
            bench.patched(Plan("auto", linear="auto")), args.size, 1
        )  # warm: memory, kernels, the choice of `auto`
        off = everything_off(bench)
        if args.only in (None, "pictures"):
            pictures(series, bench, args.small, args.size, args.rounds[1])
        for part, word in (("sampling", "sampling"), (KEPT, "kept")):
            if args.only == word or (args.only is None and part != KEPT):
                for where, (steps, rounds) in sizes.items():
                    series.all_in_turn(sampling_jobs(bench, part, {where: (steps, rounds)}))
        write(result("accelerate"), [off, *figures(series, bench, sizes, args.size, args.small)], facts)


if __name__ == "__main__":
    main()
