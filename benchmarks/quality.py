"""Error against evaluations, of all that leaves out evaluations, on a model whose answers are exact.

    COMFYUI_PATH=/path/to/ComfyUI python benchmarks/quality.py [--model drawn [--quick]]

With `--model drawn` it is the model that draws: see quality_drawn.py. Else the model is the denoiser of a Gaussian
mixture (tests/comfy/mixture.py) behind ComfyUI's own sampling, guided with CFG 7. Each way is compared with the same
sampler's run of all steps on the same seed, which chooses prompt and noise, and with the truth: 200 steps of DPM++ 2M,
where the sampler adds no noise. Writes a CSV and a plot into benchmarks/results; `docs_tables.py` makes the table of
docs/quality.md from it.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import importlib
import importlib.util
import logging
import math
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import inprocess
import quality_drawn

from speedlab.measure.environment import cpu_name
from speedlab_tools.drawn_files import FACTORS
from speedlab_tools.host import cache_root

ROOT = Path(__file__).resolve().parent.parent
# sampler, scheduler, steps
CASES = (
    ("euler", "karras", 20),
    ("euler", "normal", 30),
    ("dpmpp_2m", "karras", 20),
    ("dpmpp_2m", "normal", 30),
    ("euler_ancestral", "karras", 20),
)
MIXTURES = {"apart": {}, "overlapping": {"spread": 0.3, "width": 0.9}}
FEWER = {20: (8, 10, 11, 12, 13, 14, 16, 18), 30: (10, 12, 13, 14, 15, 16, 20, 25)}
# One setting of each way; EasyCache and Dynamic CFG refuse each other.
WITH_DYNAMIC_CFG = {
    ("Forecast, adaptive", "0.02"), ("Forecast, fixed", "max_skip 2"), ("copy", "1 in 2"), ("LazyCache", "0.1"),
    ("Spectrum's scheme", "as in sd.cpp"),
}  # fmt: skip
# What Dynamic CFG does: uncond until a share of the steps; the interval of sigmas of Kynkaanniemi et al.
GUIDANCES: dict[str, Callable[[int, int, float], bool]] = {
    "0.75": lambda step, steps, sigma: step < int(0.75 * steps),
    "window": lambda step, steps, sigma: 0.28 < sigma <= 5.42,
}
COLUMNS = ["mixture", "sampler", "scheduler", "steps", "way", "setting", "dynamic_cfg", "evaluations", "rows",
           "error_median", "error_worst", "truth_median", "seeds", "torch", "date"]  # fmt: skip
Patch = Callable[[Any], Any]


@dataclass
class Kept:
    """A published scheme over the denoised latents of one run, each group of conds by itself: it tells whether a step
    is evaluated, and what stands for it otherwise. One instance samples once."""

    values: dict[Any, dict[int, Any]] = field(default_factory=dict)
    decided: dict[int, bool] = field(default_factory=dict)
    skipped: int = 0
    # So many values a guess needs; a group that comes late, as uncond in a window, is evaluated until they are there.
    fewest: int = 1

    def is_full(self, step: int, steps: int) -> bool:
        raise NotImplementedError

    def guess(self, known: dict[int, Any], step: int) -> Any:
        raise NotImplementedError

    def attach(self, model: Any) -> Any:
        def calc_cond_batch(executor: Any, base: Any, conds: list, x: Any, t: Any, options: dict) -> Any:
            sigmas = options["transformer_options"]["sample_sigmas"][:-1]
            step = max(int((sigmas >= t[0] * (1 - 1e-5)).sum()) - 1, 0)
            groups = [group for group, members in enumerate(conds) if members is not None]
            if step not in self.decided:
                self.decided[step] = self.is_full(step, len(sigmas))
                self.skipped = 0 if self.decided[step] else self.skipped + 1
            if not self.decided[step] and all(len(self.values.get(group, {})) >= self.fewest for group in groups):
                return [
                    self.guess(self.values[group], step) if group in groups else x * 0 for group in range(len(conds))
                ]
            out = executor(base, conds, x, t, options)
            for group in groups:
                self.values.setdefault(group, {})[step] = out[group].clone()
            return out

        clone = model.clone()
        clone.add_wrapper_with_key("calc_cond_batch", "scheme", calc_cond_batch)
        return clone


@dataclass
class Copying(Kept):
    """The last denoised latent again, with one full step in `interval`."""

    interval: int = 2

    def is_full(self, step: int, steps: int) -> bool:
        return step % self.interval == 0 or step == steps - 1

    def guess(self, known: dict[int, Any], step: int) -> Any:
        return known[max(known)].clone()


@dataclass
class Spectrum(Kept):
    """Spectrum's scheme as its text and settings state it: Chebyshev polynomials of the step number, fitted by ridge
    regression to all predictions so far, mixed with the line through the last two; the interval grows by `growth`.
    Steps from the share `stop` of the run on are full."""

    growth: float = 0.75
    mix: float = 1.0
    interval: float = 2.0
    degree: int = 4
    ridge: float = 0.1
    warm_up: int = 5
    stop: float = 1.0
    fewest: int = 2

    def is_full(self, step: int, steps: int) -> bool:
        if step < self.warm_up or step >= self.stop * steps:
            return True
        full = (self.skipped + 1) % math.floor(self.interval) == 0
        self.interval += self.growth if full else 0.0
        return full

    def guess(self, known: dict[int, Any], step: int) -> Any:
        import torch

        def basis(number: int) -> Any:
            tau = 2.0 * number / 50.0 - 1.0
            return torch.tensor([math.cos(k * math.acos(max(min(tau, 1.0), -1.0))) for k in range(self.degree + 1)])

        steps = sorted(known)
        values = torch.stack([known[number].flatten() for number in steps])
        design = torch.stack([basis(number) for number in steps])
        normal = design.T @ design + self.ridge * torch.eye(self.degree + 1)
        fitted = basis(step) @ torch.linalg.solve(normal, design.T @ values)
        older, newer = steps[-2:]
        line = values[-1] + (step - newer) / (newer - older) * (values[-1] - values[-2])
        return (self.mix * fitted + (1.0 - self.mix) * line).reshape(known[newer].shape)


def ways() -> list[tuple[str, str, Patch]]:
    """Name, setting, and what makes a model of it, for one single run."""
    forecast = importlib.import_module("speedlab.techniques.forecast.attach")
    easycache = importlib.import_module("comfy_extras.nodes_easycache")

    def core(name: str, threshold: float) -> Patch:
        def patch(model: Any) -> Any:
            made = getattr(easycache, f"{name}Node").execute(model, threshold, 0.15, 0.95, False).args[0]
            # It looks at each 8th pixel: of a latent this small that would be one.
            made.model_options["transformer_options"]["easycache"].subsample_factor = 1
            return made

        return patch

    def ours(**options: Any) -> Patch:
        return lambda model: forecast.attach_forecast(model, forecast.ForecastConfig(**options))

    found: list[tuple[str, str, Patch]] = []
    found += [("Forecast, adaptive", f"{t:g}", ours(tolerance=t)) for t in (0.005, 0.01, 0.02, 0.05, 0.1)]
    found += [("Forecast, fixed", f"max_skip {n}", ours(mode="fixed", max_skip=n)) for n in (1, 2)]
    found += [("copy", f"1 in {n}", lambda model, n=n: Copying(interval=n).attach(model)) for n in (2, 3)]
    found += [("EasyCache", f"{t:g}", core("EasyCache", t)) for t in (0.05, 0.1, 0.2)]
    found += [("LazyCache", f"{t:g}", core("LazyCache", t)) for t in (0.05, 0.1, 0.2)]
    small = {"mix": 0.4, "growth": 0.5, "degree": 3, "ridge": 1.0, "warm_up": 4, "stop": 0.9}
    found.append(("Spectrum's scheme", "published", lambda model: Spectrum(mix=0.5).attach(model)))
    found.append(("Spectrum's scheme", "as in sd.cpp", lambda model: Spectrum(**small).attach(model)))
    # As slow as Forecast: what it does with the time that the others leave.
    found.append(("Spectrum's scheme", "warm-up 8", lambda model: Spectrum(**{**small, "warm_up": 8}).attach(model)))
    return found


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", choices=("oracle", "drawn"), default="oracle")
    options.add_argument("--quick", action="store_true", help="drawn: a few images of one setting of each way")
    options.add_argument("--samplers", type=int, help="drawn: so many samplers of each kind (all, quick 1)")
    options.add_argument("--side", type=int, help="drawn: pixels of an image's side (as the model was trained)")
    options.add_argument("--behaviour", action="store_true", help="drawn: only steps, CFG and DeepCache's interval")
    options.add_argument("--seeds", type=int, help="images of each row (16, quick 4)")
    options.add_argument("--factors", type=Path, default=FACTORS["sd15"], help="drawn: the packed weights")
    options.add_argument("--work", type=Path, default=cache_root() / "quality-drawn", help="drawn: what is kept")
    options.add_argument("--device", help="the name of this machine in the file's name (its CPU's)")
    options.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    args = options.parse_args()
    args.device = args.device or cpu_name()
    with tempfile.TemporaryDirectory() as folder:
        inprocess.start(Path(folder))
        logging.disable(logging.INFO)
        if args.model == "drawn":
            quality_drawn.main(args, ways())
            return
        rows = measure(args.seeds or 16)
    import torch

    date = datetime.date.today().isoformat()
    name = inprocess.result_name("quality", args.device, torch.__version__, date)
    with (args.results / name).open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows({**row, "torch": torch.__version__, "date": date} for row in rows)
    draw(rows, (args.results / name).with_suffix(".png"))


@dataclass(frozen=True)
class Case:
    """A sampler on a mixture, with the latents of all steps and the true ones, one a seed."""

    mixture: Any
    oracle: Any
    labels: dict[str, Any]
    truths: list[Any]
    references: list[Any]

    @property
    def how(self) -> dict[str, Any]:
        return {name: self.labels[name] for name in ("sampler", "scheduler")}

    def row(self, name: str, setting: str, patch: Patch, steps: int, dynamic_cfg: str = "") -> dict[str, Any]:
        """Of all seeds, with `steps` steps."""
        errors, far, rows = [], [], []
        for seed, (reference, truth) in enumerate(zip(self.references, self.truths, strict=True)):
            self.oracle.denoiser.calls = 0
            made = self.oracle.sample(patch(self.oracle.model), seed=seed, steps=steps, **self.how)
            rows.append(self.oracle.denoiser.calls)
            errors.append(self.mixture.error(made, reference))
            far.append(self.mixture.error(made, truth))
        is_ode = "ancestral" not in self.labels["sampler"]
        made = {
            **self.labels, "way": name, "setting": setting, "dynamic_cfg": dynamic_cfg,
            "evaluations": "" if dynamic_cfg else round(statistics.mean(rows) / 2, 2),
            "rows": round(statistics.mean(rows), 2),
            "error_median": f"{statistics.median(errors):.6g}", "error_worst": f"{max(errors):.6g}",
            "truth_median": f"{statistics.median(far):.6g}" if is_ode else "", "seeds": len(rows),
        }  # fmt: skip
        print(*made.values(), flush=True)
        return made


def measure(seeds: int) -> list[dict[str, Any]]:
    mixture = _mixture()
    rows: list[dict[str, Any]] = []
    for name, shape in MIXTURES.items():
        oracle = mixture.build(**shape)
        truths = [oracle.sample(seed=n, steps=200, sampler="dpmpp_2m", scheduler="normal") for n in range(seeds)]
        for sampler, scheduler, steps in CASES:
            labels = {"mixture": name, "sampler": sampler, "scheduler": scheduler, "steps": steps}
            whole = [oracle.sample(seed=n, steps=steps, sampler=sampler, scheduler=scheduler) for n in range(seeds)]
            case = Case(mixture, oracle, labels, truths, whole)
            rows.append(case.row("all steps", "", _same, steps))
            rows += [case.row("fewer steps", str(n), _same, n) for n in FEWER[steps]]
            for way, setting, patch in ways():
                rows.append(case.row(way, setting, patch, steps))
                if (way, setting) in WITH_DYNAMIC_CFG and name == "apart":
                    rows += [case.row(way, setting, _guided(patch, known), steps, known) for known in GUIDANCES]
            if name == "apart":
                rows += [case.row("all steps", "", _guided(_same, known), steps, known) for known in GUIDANCES]
    return rows


def _same(model: Any) -> Any:
    return model


def _guided(patch: Patch, guidance: str) -> Patch:
    """With what Dynamic CFG does; the node itself takes image UNets alone."""

    def predict_noise(executor: Any, x: Any, timestep: Any, model_options: Any, *args: Any) -> Any:
        sigmas = model_options["transformer_options"]["sample_sigmas"][:-1]
        step = int((sigmas >= timestep[0] * (1 - 1e-5)).sum()) - 1
        guider = executor.class_obj
        is_guided = GUIDANCES[guidance](step, len(sigmas), float(sigmas[step]))
        cfg, guider.cfg = guider.cfg, guider.cfg if is_guided else 1.0
        try:
            return executor(x, timestep, model_options, *args)
        finally:
            guider.cfg = cfg

    def patched(model: Any) -> Any:
        clone = patch(model).clone()
        clone.add_wrapper_with_key("predict_noise", "guided", predict_noise)
        return clone

    return patched


def _mixture() -> Any:
    spec = importlib.util.spec_from_file_location("mixture", ROOT / "tests" / "comfy" / "mixture.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["mixture"] = module
    spec.loader.exec_module(module)
    return module


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Error against evaluations, a panel a case and mixture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(CASES), 4.0 * len(MIXTURES)), dpi=80)
    panels = figure.subplots(len(MIXTURES), len(CASES), squeeze=False)
    for row_of_panels, mixture_name in zip(panels, MIXTURES, strict=True):
        for axes, (sampler, scheduler, steps) in zip(row_of_panels, CASES, strict=True):
            here = [
                row for row in rows
                if (row["mixture"], row["sampler"], row["scheduler"]) == (mixture_name, sampler, scheduler)
                and not row["dynamic_cfg"]
            ]  # fmt: skip
            for name in dict.fromkeys(row["way"] for row in here):
                points = sorted((row["evaluations"], float(row["error_median"])) for row in here if row["way"] == name)
                points = [point for point in points if point[1] > 0.0]
                if points:
                    axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
            axes.set_yscale("log")
            axes.set_title(f"{sampler}, {scheduler}, {steps} steps, {mixture_name}", fontsize=9)
            axes.set_xlabel("evaluations")
    panels[0][0].set_ylabel("relative error of the latent, median")
    panels[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    main()
