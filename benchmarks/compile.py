"""What compiling gains on a CPU: eager SDPA, core's TorchCompileModel and each backend in turn, on full-size SD 1.5.

    COMFYUI_PATH=/path/to/ComfyUI python benchmarks/compile.py

Each run is one row of `..._compile-runs.csv`, written when it ends; a series that was cut off goes on where it stopped.
Round 0 of a job is cold: it holds the compiling, for what earlier series left on the disk is deleted first.
`..._compile.csv` holds the figures: warm speed-up over eager, what a first run costs over a warm one, the largest
difference to eager, and graphs over a tour of LoRAs and sizes. Weights are random: times are real.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import inprocess
from accelerate_jobs import Bench, Plan, prepare
from in_turn import Job, Series, write

EAGER, CORE = "eager SDPA", "TorchCompileModel"
FP32 = {
    "inductor": {"backend": "inductor"},
    "inductor, frozen": {"backend": "inductor", "freeze_weights": True},
    "inductor, model, frozen": {"backend": "inductor", "scope": "model", "freeze_weights": True},
    "jit_trace": {"backend": "jit_trace"},
    "jit_trace, frozen": {"backend": "jit_trace", "freeze_weights": True},
    "onnxruntime": {"backend": "onnxruntime"},
    "openvino": {"backend": "openvino"},
}
BF16 = {name: FP32[name] for name in ("inductor", "inductor, frozen", "openvino")}
VAE_BACKENDS = ("inductor", "onnxruntime", "jit_trace")
TARGETS = {"warm fp32": 1.5, "warm bf16": 1.2}
DEFAULTS = {
    "backend": "inductor", "scope": "auto", "mode": "default", "dynamic": "auto", "on_failure": "error",
    "freeze_weights": False,
}  # fmt: skip


class CompileBench(Bench):
    """Models under a compile setting, and the latents of each job for the largest difference."""

    def compiled(self, settings: dict[str, Any], model: Any) -> Any:
        return self.node("SpeedLabCompileModel").apply(model, **{**DEFAULTS, **settings})[0]

    def eager(self, model: Any) -> Any:
        """SDPA, which is what compiled blocks use too."""
        return self.node("SpeedLabAttention").apply(model, "sdpa")[0]

    def core_compiled(self, model: Any) -> Any:
        from comfy_extras.nodes_torch_compile import TorchCompileModel

        return TorchCompileModel.execute(self.eager(model), "inductor").args[0]


def jobs(bench: CompileBench, size: int, steps: int, rounds: int, bf16: bool) -> list[Job]:
    """Eager first, for the others are compared with its latent."""
    part = f"warm {'bf16' if bf16 else 'fp32'}"
    model = bench.bf16 if bf16 else bench.stock[0]
    makers: dict[str, Callable[[], Any]] = {EAGER: lambda: bench.eager(model), CORE: lambda: bench.core_compiled(model)}
    for name, settings in (BF16 if bf16 else FP32).items():
        makers[name] = lambda settings=settings: bench.compiled(settings, model)
    made: dict[str, Any] = {}

    def run(name: str) -> Any:
        made[name] = made.get(name) or makers[name]()
        return bench.sample(made[name], size, steps)

    return [Job(part, name, size, steps, lambda name=name: run(name), rounds, EAGER) for name in makers]


def vae_jobs(bench: CompileBench, size: int, rounds: int) -> list[Job]:
    """Decoding one picture with the full VAE."""
    import torch

    latent = torch.randn(1, 4, size // 8, size // 8, generator=torch.Generator().manual_seed(0))
    vaes = {EAGER: bench.stock[2]}
    for backend in VAE_BACKENDS:
        vaes[backend] = bench.node("SpeedLabCompileVAE").apply(bench.stock[2], backend, "default")[0]
    return [Job("vae", name, size, 1, lambda vae=vae: vae.decode(latent), rounds, EAGER) for name, vae in vaes.items()]


def tour(bench: CompileBench, sizes: tuple[int, int]) -> Iterator[tuple]:
    """Graphs over two LoRA strengths and two sizes: core's compile, and ours by blocks and as a whole."""
    import torch
    from torch._dynamo.utils import counters

    weights = {k: v for k, v in bench.stock[0].model.state_dict().items() if "attn2.to_v" in k}
    patches = {key: ("diff", (torch.full_like(value, 1e-3),)) for key, value in weights.items()}
    makers = {
        CORE: bench.core_compiled,
        "blocks": lambda model: bench.compiled({}, model),
        "model": lambda model: bench.compiled({"scope": "model"}, model),
    }
    for name, make in makers.items():
        torch._dynamo.reset()
        counters.clear()
        for place, (strength, size) in enumerate(((0.0, sizes[0]), (0.5, sizes[0]), (1.0, sizes[1]), (0.5, sizes[0]))):
            model = bench.stock[0].clone()
            if strength:
                model.add_patches(patches, strength)
            bench.sample(make(model), size, 1)
            if place == 0:
                first = counters["stats"]["unique_graphs"]
        graphs = counters["stats"]["unique_graphs"]
        yield f"tour: graphs of the first picture, {name}", float(first), None, None
        yield f"tour: graphs that LoRAs and sizes add, {name}", float(graphs - first), None, None


def figures(series: Series) -> Iterator[tuple]:
    """(figure, measured, limit, target) of each part and size that has rows."""
    known = sorted({(row["part"], int(row["size"])) for row in series.rows})
    for part, size in known:
        eager = _warm(series, part, EAGER, size)
        for name in dict.fromkeys(row["job"] for row in series.rows if row["part"] == part):
            warm, cold = _warm(series, part, name, size), _cold(series, part, name, size)
            if eager is None or warm is None or cold is None or name == EAGER:
                continue
            yield f"{part} {size}x{size}: {name}, warm speed-up over eager", eager / warm, None, TARGETS.get(part)
            yield f"{part} {size}x{size}: {name}, first run over a warm one, s", cold - warm, None, None
            error = series.median(part, name, size, "latent_error")
            yield f"{part} {size}x{size}: {name}, latent error", error, None, None


def _seconds(series: Series, part: str, job: str, size: int) -> dict[int, float]:
    rows = (row for row in series.rows if (row["part"], row["job"], row["size"]) == (part, job, str(size)))
    return {int(row["round"]): float(row["seconds"]) for row in rows}


def _cold(series: Series, part: str, job: str, size: int) -> float | None:
    return _seconds(series, part, job, size).get(0)


def _warm(series: Series, part: str, job: str, size: int) -> float | None:
    import statistics

    warm = [seconds for number, seconds in _seconds(series, part, job, size).items() if number > 0]
    return statistics.median(warm) if warm else None


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--sizes", type=int, nargs="+", default=(256, 512), help="pictures, in pixels")
    options.add_argument("--steps", type=int, default=3, help="steps of each run")
    options.add_argument("--rounds", type=int, default=4, help="runs of each job; the first is cold")
    options.add_argument("--minutes", type=float, default=60.0, help="no repeat begins later; first runs always do")
    options.add_argument("--base", type=Path, default=Path.home() / ".cache" / "speedlab" / "benchmarks")
    options.add_argument("--results", type=Path, default=inprocess.ROOT / "benchmarks" / "results")
    options.add_argument("--only", choices=("fp32", "bf16", "vae", "tour"), help="one part")
    args = options.parse_args()
    pack = inprocess.start(args.base)
    # Core's compiled code and ours are kept in the same place, which is new.
    kept = tempfile.TemporaryDirectory(prefix="speedlab-compile-")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = kept.name
    import torch

    from speedlab.profiling.environment import device_name

    prepare(args.base)
    device = device_name(torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu"))
    facts = {"device": device, "torch": torch.__version__}
    args.results.mkdir(parents=True, exist_ok=True)

    def result(what: str) -> Path:
        return args.results / inprocess.result_name(what, device, torch.__version__, time.strftime("%Y-%m-%d"))

    series = Series(result("compile-runs"), facts, args.minutes)
    if not series.rows:
        shutil.rmtree(args.base / "user" / "speedlab" / "compiled", ignore_errors=True)
    extra: list[tuple] = []
    with torch.inference_mode():
        bench = CompileBench(pack, args.base)
        bench.sample(bench.patched(Plan("sdpa")), args.sizes[0], 1)  # warm: memory, kernels
        for size in args.sizes:
            if args.only in (None, "fp32"):
                series.all_in_turn(jobs(bench, size, args.steps, args.rounds, bf16=False))
            if args.only in (None, "bf16"):
                series.all_in_turn(jobs(bench, size, args.steps, args.rounds, bf16=True))
            if args.only in (None, "vae"):
                series.all_in_turn(vae_jobs(bench, size, args.rounds))
        if args.only in (None, "tour"):
            extra = list(tour(bench, (args.sizes[0], args.sizes[-1])))
        write(result("compile"), [*figures(series), *extra], facts)


if __name__ == "__main__":
    main()
