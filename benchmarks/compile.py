"""What compiling gains on a CPU: eager SDPA, core's TorchCompileModel and each backend in turn, on full-size SD 1.5.

    COMFYUI_PATH=/path/to/ComfyUI python benchmarks/compile.py

Each run is one row of `..._compile-runs.csv`, written when it ends; a series that was cut off goes on where it stopped.
Each backend has a process of its own, in which it and eager take turns: programs of several would not fit the memory
together. Round 0 is cold: it holds the compiling, for the process begins with an empty cache. The part `first` compares
compile times the same way. `..._compile.csv` holds the figures: warm speed-up over eager, what a first run costs over a
warm one, the largest difference to eager, compile times, and graphs over a tour of LoRAs and sizes. Weights are random:
times are real.
"""

from __future__ import annotations

import argparse
import csv
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import inprocess
from accelerate_jobs import Bench, Plan, prepare
from jobs import Job, Rows, write

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
WARM = {"warm fp32": FP32, "warm bf16": BF16}
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


def beside(name: str) -> str:
    """The eager job that takes turns with a backend."""
    return f"{EAGER} beside {name}"


def jobs(bench: CompileBench, part: str, name: str, size: int, steps: int, rounds: int) -> list[Job]:
    """Eager first, for the other is compared with its latent."""
    model = bench.stock[0] if part == "warm fp32" else bench.bf16
    makers: dict[str, Callable[[], Any]] = {
        beside(name): lambda: bench.eager(model),
        name: lambda: bench.core_compiled(model) if name == CORE else bench.compiled(WARM[part][name], model),
    }
    made: dict[str, Any] = {}

    def run(name: str, steps: int) -> Any:
        made[name] = made.get(name) or makers[name]()
        return bench.sample(made[name], size, steps)

    return [
        Job(part, each, size, steps, partial(run, each, steps), rounds, beside(name), partial(run, each, 1))
        for each in makers
    ]


def pairs_of(parts: list[str], sizes: list[int]) -> Iterator[tuple[str, int, str]]:
    """(part, size, backend) of all warm runs."""
    for size in sizes:
        for part in parts:
            for name in (CORE, *WARM[part]):
                yield part, size, name


def in_process(options: argparse.Namespace, results: Path, *, part: str, size: int, name: str) -> None:
    """A backend and eager in turn, in a process of their own with an empty cache."""
    command = [sys.executable, __file__, "--base", str(options.base), "--results", str(results), "--sizes", str(size),
               "--steps", str(options.steps), "--rounds", str(options.rounds), "--pair", part, name]  # fmt: skip
    _forget_compiled(options.base)
    with tempfile.TemporaryDirectory(prefix="speedlab-compile-") as cache:
        done = subprocess.run(command, env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}, check=False)
    if done.returncode:
        print(f"{part} {size}: {name} ended with {done.returncode}, and the series goes on")


def vae_jobs(bench: CompileBench, size: int, rounds: int) -> list[Job]:
    """Decoding one picture with the full VAE."""
    import torch

    latent = torch.randn(1, 4, size // 8, size // 8, generator=torch.Generator().manual_seed(0))
    vaes = {EAGER: bench.stock[2]}
    for backend in VAE_BACKENDS:
        vaes[backend] = bench.node("SpeedLabCompileVAE").apply(bench.stock[2], backend, "default")[0]
    return [Job("vae", name, size, 1, lambda vae=vae: vae.decode(latent), rounds, EAGER) for name, vae in vaes.items()]


def _forget_compiled(base: Path) -> None:
    """Delete what the pack kept on the disk: exported graphs lie there, also where inductor's folder is another."""
    shutil.rmtree(base / "user" / "speedlab" / "compiled", ignore_errors=True)


def first_in_process(bench: CompileBench, name: str, size: int) -> float:
    """Seconds that the first picture of this process takes over a warm one: two steps each, eager ones before."""
    model = bench.stock[0]
    bench.sample(bench.eager(model), size, 1)
    compiled = bench.core_compiled(model) if name == CORE else bench.compiled(FP32[name], model)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        bench.sample(compiled, size, 2)
        seconds.append(time.perf_counter() - start)
    return seconds[0] - statistics.median(seconds[1:])


def first_pictures(series: Rows, size: int, rounds: int, base: Path) -> None:
    """Compile times, each in a process of its own with an empty cache."""
    for number in range(rounds):
        for name in (CORE, "inductor"):
            job = Job("first", name, size, 2, lambda: None, rounds)
            if series.done(job, number):
                continue
            with tempfile.TemporaryDirectory(prefix="speedlab-compile-") as cache:
                command = [sys.executable, __file__, "--base", str(base), "--sizes", str(size), "--one-first", name]
                environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
                output = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
            series.keep(job, number, float(output.split()[-1]))
            print(f"first {size}: {name}, round {number}: {output.split()[-1]} s of compiling")


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


def figures(series: Rows) -> Iterator[tuple]:
    """(figure, measured, limit, target) of each part and size that has rows."""
    known = sorted({(row["part"], int(row["size"])) for row in series.rows})
    for size in sorted({size for part, size in known if part == "first"}):
        core, ours = (series.median("first", name, size) for name in (CORE, "inductor"))
        yield f"first {size}x{size}: {CORE}, compile time, s", core, None, None
        yield f"first {size}x{size}: inductor, compile time, s", ours, None, None
        if core and ours:
            yield f"first {size}x{size}: compile time of {CORE} over inductor's", core / ours, None, 2.0
    for part, size in known:
        for name in dict.fromkeys(row["job"] for row in series.rows if row["part"] == part):
            eager = _warm(series, part, beside(name), size) or _warm(series, part, EAGER, size)
            warm, cold = _warm(series, part, name, size), _cold(series, part, name, size)
            if eager is None or warm is None or name.startswith(EAGER):
                continue
            yield f"{part} {size}x{size}: {name}, warm speed-up over eager", eager / warm, None, TARGETS.get(part)
            if cold is not None:
                yield f"{part} {size}x{size}: {name}, first run over a warm one, s", cold - warm, None, None
            error = series.median(part, name, size, "latent_error")
            yield f"{part} {size}x{size}: {name}, latent error", error, None, None


def _seconds(series: Rows, part: str, job: str, size: int) -> dict[int, float]:
    rows = (row for row in series.rows if (row["part"], row["job"], row["size"]) == (part, job, str(size)))
    return {int(row["round"]): float(row["seconds"]) for row in rows}


def _cold(series: Rows, part: str, job: str, size: int) -> float | None:
    return _seconds(series, part, job, size).get(0)


def _warm(series: Rows, part: str, job: str, size: int) -> float | None:
    warm = [seconds for number, seconds in _seconds(series, part, job, size).items() if number > 0]
    return statistics.median(warm) if warm else None


def rows_before(path: Path) -> list[tuple]:
    """The tour's figures of an earlier call."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["figure"].startswith("tour:")]
    return [(row["figure"], float(row["measured"]), None, None) for row in rows]


def parsed() -> argparse.Namespace:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--sizes", type=int, nargs="+", default=(256, 512), help="pictures, in pixels")
    options.add_argument("--steps", type=int, default=3, help="steps of each run")
    options.add_argument("--rounds", type=int, default=4, help="runs of each job; the first is cold")
    options.add_argument("--minutes", type=float, default=60.0, help="no part begins later")
    options.add_argument("--base", type=Path, default=Path.home() / ".cache" / "speedlab" / "benchmarks")
    options.add_argument("--results", type=Path, default=inprocess.ROOT / "benchmarks" / "results")
    options.add_argument("--only", choices=("fp32", "bf16", "vae", "first", "tour"), help="one part")
    options.add_argument("--backends", nargs="+", help="of the parts fp32 and bf16, these alone")
    options.add_argument("--one-first", choices=(CORE, "inductor"), help=argparse.SUPPRESS)
    options.add_argument("--pair", nargs=2, help=argparse.SUPPRESS)
    return options.parse_args()


def main() -> None:
    args = parsed()
    pack = inprocess.start(args.base)
    import torch

    from speedlab.measure.environment import device_name

    device = device_name(torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu"))
    facts = {"device": device, "torch": torch.__version__}
    args.results.mkdir(parents=True, exist_ok=True)

    def result(what: str) -> Path:
        return args.results / inprocess.result_name(what, device, torch.__version__, time.strftime("%Y-%m-%d"))

    def series() -> Rows:
        return Rows(result("compile-runs"), facts, args.minutes)

    with torch.inference_mode():
        if args.one_first is not None:
            seconds = first_in_process(CompileBench(pack, args.base), args.one_first, args.sizes[0])
            print(f"{seconds:.3f}")
            return
        if args.pair is not None:
            bench = CompileBench(pack, args.base)
            part, name = args.pair
            bench.sample(bench.patched(Plan("sdpa")), args.sizes[0], 1)  # warm: memory, kernels
            series().all_in_turn(jobs(bench, part, name, args.sizes[0], args.steps, args.rounds))
            return
    prepare(args.base)
    start = time.monotonic()

    def wanted(part: str) -> bool:
        return args.only in (None, part) and time.monotonic() - start < 60 * args.minutes

    if wanted("first"):
        first_pictures(series(), args.sizes[0], 2, args.base)
    for part, size, name in pairs_of([part for part in WARM if args.only in (None, part.split()[1])], args.sizes):
        if wanted(part.split()[1]) and name in (args.backends or [name]):
            in_process(args, args.results, part=part, size=size, name=name)
    extra: list[tuple] = []
    # What follows compiles in this process, also into an empty cache.
    with tempfile.TemporaryDirectory(prefix="speedlab-compile-") as kept, torch.inference_mode():
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = kept
        if wanted("vae"):
            _forget_compiled(args.base)
            bench = CompileBench(pack, args.base)
            for size in args.sizes:
                series().all_in_turn(vae_jobs(bench, size, args.rounds))
        if wanted("tour"):
            extra = list(tour(CompileBench(pack, args.base), (args.sizes[0], args.sizes[-1])))
    write(result("compile"), [*figures(series()), *(extra or rows_before(result("compile")))], facts)


if __name__ == "__main__":
    main()
