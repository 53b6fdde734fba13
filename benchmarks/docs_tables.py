"""Tables and figures of the documents, made from the CSV files in benchmarks/results.

    python benchmarks/docs_tables.py            writes them into README*.md, CONTRIBUTING.md and docs/*.md
    python benchmarks/docs_tables.py --check    only compares; exit code 1 and a line for each one that differs

A document marks what is made from results:

    <!-- table: NAME -->        a whole table with its source, in lines of its own
    <!-- end -->
    <!--figure:NAME-->1.7<!--/-->    one figure inside a sentence or a cell

All of the devices in DEVICES; of several files of a kind the newest counts. Standard library only.
"""

from __future__ import annotations

import argparse
import csv
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path("benchmarks/results")
# What a file's name begins with, and what to call it.
DEVICES = {"amd-epyc": "AMD EPYC CPU", "intel-r-xeon-r-processor": "Intel Xeon CPU with AMX"}

_FILE = re.compile(r"(?P<device>.+?)(?:_torch(?P<torch>[^_]+))?_(?P<date>\d{4}-\d\d-\d\d)_(?P<kind>[^_]+)\.csv")
_TABLE = re.compile(r"<!-- table: (?P<name>[\w-]+) -->\n(?P<body>.*?)<!-- end -->", re.DOTALL)
_FIGURE = re.compile(r"<!--figure:(?P<name>[\w-]+)-->(?P<body>.*?)<!--/-->", re.DOTALL)
_MARKER = re.compile(r"<!-- table:|<!-- end -->|<!--figure:|<!--/-->")
_MARKERS_OF_A_TABLE, _MARKERS_OF_A_FIGURE = 2, 2

Row = Mapping[str, str]


class DocsError(Exception):
    """A document or a results file is not what the tables need; the message says which and why."""


class Results:
    """The CSV files of a results folder, read once. Each kind is answered from its newest file."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._rows: dict[Path, list[dict[str, str]]] = {}

    def newest(self, *kinds: str) -> Path:
        """The newest file of these kinds and of one of DEVICES. Raises DocsError where there is none."""
        found = []
        for path in self._folder.glob("*.csv"):
            parts = _FILE.fullmatch(path.name)
            if parts and parts["device"] in DEVICES and parts["kind"] in kinds:
                found.append((parts["date"], path.name, path))
        if not found:
            raise DocsError(
                f"{self._folder} has no file of {' or '.join(DEVICES)} that ends in _{' or _'.join(kinds)}.csv"
            )
        return max(found)[-1]

    def rows(self, *kinds: str) -> list[dict[str, str]]:
        """The rows of the newest file of these kinds."""
        path = self.newest(*kinds)
        if path not in self._rows:
            with path.open(encoding="utf-8", newline="") as file:
                self._rows[path] = list(csv.DictReader(file))
        return self._rows[path]

    def source(self, *kinds: str) -> str:
        """One line under a table: the file, the device, PyTorch's version and the date."""
        path = self.newest(*kinds)
        parts = _FILE.fullmatch(path.name)
        assert parts is not None
        torch = f", PyTorch {parts['torch']}" if parts["torch"] else ""
        device = DEVICES[parts["device"]]
        return f"Source: [{path.name}](../{RESULTS.as_posix()}/{path.name}) ({device}{torch}, {parts['date']})."

    def figure(self, kind: str, name: str) -> float | None:
        """What a table of figures (`figure,measured,...`) holds under that name, or None."""
        values = {row["figure"]: row["measured"] for row in self.rows(kind)}
        return float(values[name]) if name in values else None


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table: first column text, the others figures."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def show(value: float | None, digits: int) -> str:
    """A figure with that many decimals; a dash where nothing was measured."""
    return "-" if value is None else f"{value:.{digits}f}"


def error(value: float | None) -> str:
    """A relative error: 0.19, but 6e-06 where two decimals would show nothing."""
    if value is None:
        return "-"
    return "0" if value == 0 else f"{value:.2f}" if value >= 0.005 else f"{value:.0e}"


# benchmarks/accelerate.py: the name in the results, then what the plan is.
IMAGE_PLANS = {
    "interval 3": "exact + DeepCache 3 + Dynamic CFG 0.75 + Tiny VAE",
    "interval 5": "exact + DeepCache 5 + Dynamic CFG 0.75 + Tiny VAE",
    "interval 3, CFG kept": "exact + DeepCache 3 + Tiny VAE",
    "interval 3, bf16": "the first one in bf16",
    "interval 5, bf16": "the second one in bf16",
    "diffusers + DeepCache 3": "diffusers with the DeepCache package, interval 3",
    "stock + EasyCache": "ComfyUI's EasyCache",
}


def images(results: Results) -> list[str]:
    """Text to image against stock ComfyUI."""

    def cell(size: str, name: str, of: str) -> float | None:
        return results.figure("accelerate", of.format(size=size, name=name))

    faster, apart = "picture {size}: {name}, speed-up over stock", "picture {size}: latent error of {name}"
    rows = [
        [
            text,
            show(cell("256x256", name, faster), 1),
            show(cell("512x512", name, faster), 1),
            error(cell("512x512", name, apart)),
        ]
        for name, text in IMAGE_PLANS.items()
    ]
    head = ["plan", "times as fast, 256x256", "times as fast, 512x512", "latent error, 512x512"]
    return [*table(head, rows), "", results.source("accelerate")]


def sampling(results: Results) -> list[str]:
    """Sampling alone, beside the most that the saved work allows; and one step with faster kernels."""
    parts = {"512x512": "sampling 512x512, 5 steps: ", "256x256": "sampling 256x256, 15 steps: "}
    limits = {row["figure"]: row["limit"] for row in results.rows("accelerate")}
    plans = [name.removeprefix(parts["512x512"]) for name in limits if name.startswith(parts["512x512"])]
    rows = []
    for plan in plans:
        row = [plan]
        for prefix in parts.values():
            limit = limits.get(prefix + plan)
            row += [show(results.figure("accelerate", prefix + plan), 2), show(float(limit) if limit else None, 2)]
        rows.append(row)
    for name in ("Attention auto", "Attention and linear auto"):
        value = results.figure("accelerate", f"attention 512x512: {name}, speed-up over stock")
        what = name.replace(" and linear auto", " auto + Precision `linear`") + ", two steps"
        rows.append([what, show(value, 2), "-", "-", "-"])
    head = ["technique", "512x512", "by saved work", "256x256", "by saved work"]
    return [*table(head, rows), "", results.source("accelerate")]


def compiled(results: Results) -> list[str]:
    """Compile Model: warm steps against eager, and what the first run takes more."""
    cells = [f"warm {dtype} {size}" for dtype in ("fp32", "bf16") for size in ("256x256", "512x512")]
    names = _variants(results, "warm ", ", warm speed-up over eager")
    rows = []
    for name in names:
        warm = [show(results.figure("compile", f"{cell}: {name}, warm speed-up over eager"), 2) for cell in cells]
        first = results.figure("compile", f"warm fp32 512x512: {name}, first run over a warm one, s")
        apart = [error(results.figure("compile", f"warm {t} 512x512: {name}, latent error")) for t in ("fp32", "bf16")]
        rows.append([name, *warm, show(first, 0), *apart])
    head = [
        "backend",
        *(cell.removeprefix("warm ") for cell in cells),
        "first run, s more",
        "latent error, fp32",
        "latent error, bf16",
    ]
    return [*table(head, rows), "", results.source("compile")]


def compiled_first(results: Results) -> list[str]:
    """From an empty cache in a fresh process, and how many graphs LoRAs and sizes cost."""
    tour = {"blocks": "inductor, scope `blocks`", "model": "inductor, scope `model`"}
    rows = []
    for name in ("blocks", "model", "TorchCompileModel"):
        cold = {"blocks": "inductor", "TorchCompileModel": "TorchCompileModel"}.get(name, "")
        rows.append(
            [
                tour.get(name, "ComfyUI's TorchCompileModel"),
                show(results.figure("compile", f"first 256x256: {cold}, compile time, s"), 0),
                show(results.figure("compile", f"tour: graphs of the first picture, {name}"), 0),
                show(results.figure("compile", f"tour: graphs that LoRAs and sizes add, {name}"), 0),
            ]
        )
    head = ["", "cold compile, s", "graphs of the first image", "graphs that a LoRA and a second size add"]
    return [*table(head, rows), "", results.source("compile")]


def compiled_vae(results: Results) -> list[str]:
    """Compile VAE: a warm decode against eager."""
    rows = []
    for name in _variants(results, "vae ", ", warm speed-up over eager"):
        row = [name]
        for size in ("256x256", "512x512"):
            row.append(show(results.figure("compile", f"vae {size}: {name}, warm speed-up over eager"), 2))
        row.append(error(results.figure("compile", f"vae 512x512: {name}, latent error")))
        rows.append(row)
    return [*table(["backend", "256x256", "512x512", "error, 512x512"], rows), "", results.source("compile")]


def _variants(results: Results, start: str, end: str) -> list[str]:
    """The names between `start ...: ` and `end`, in the order of the file."""
    names = [row["figure"] for row in results.rows("compile")]
    between = [n.split(": ", 1)[1].removesuffix(end) for n in names if n.startswith(start) and n.endswith(end)]
    return list(dict.fromkeys(between))


DECODERS = {
    "full": "VAE Decode",
    "core_tiny": "ComfyUI's own TAESD decode",
    "tiny": "Tiny VAE Decode",
    "one_by_one": "sample and decode, one by one",
    "staged": "the same, staged by Prompt Queue and Free Memory",
}


def decoding(results: Results) -> list[str]:
    """Peaks beyond what was loaded, and times, of decoding with SDXL's VAE."""
    rows = []
    order = list(DECODERS)
    found = results.rows("memory-decode")
    for row in sorted(found, key=lambda r: (order.index(r["what"]), int(r["size"]), int(r["batch"]), r["cell"])):
        how = DECODERS[row["what"]]
        how += ", slicing" if row["slicing"] == "True" else ""
        how += f", tiles of {row['tile_size']}" if row["tile_size"] != "0" else ""
        rows.append(
            [how, f"{row['size']}x{row['size']}", row["batch"], show(float(row["over_gb"]), 2),
             show(float(row["seconds"]), 1), row["threads"]]
        )  # fmt: skip
    head = ["what", "size", "batch", "peak beyond loaded, GB", "seconds", "threads"]
    return [*table(head, rows), "", results.source("memory-decode")]


def memory_plan(results: Results) -> list[str]:
    """Predicted against measured peaks of Memory Plan."""
    found = results.rows("memory-plan")
    rows = []
    for offload in dict.fromkeys(row["offload"] for row in found):
        for phase in dict.fromkeys(row["phase"] for row in found):
            errors = [float(r["error_percent"]) for r in found if (r["offload"], r["phase"]) == (offload, phase)]
            rows.append([f"{offload}, {phase}", str(len(errors)), f"{min(errors):+.1f}", f"{max(errors):+.1f}"])
    every = [float(row["error_percent"]) for row in found]
    rows.append(["all", str(len(every)), f"{min(every):+.1f}", f"{max(every):+.1f}"])
    head = ["offload, phase", "peaks", "lowest error, %", "highest error, %"]
    return [*table(head, rows), "", results.source("memory-plan")]


def overhead(results: Results) -> list[str]:
    """What measuring costs."""

    def line(what: str, values: Sequence[float], digits: int = 3) -> list[str]:
        spread = [show(f(values), digits) for f in (statistics.median, min, max)]
        return [what, *spread, str(len(values))]

    pairs = results.rows("profiler-overhead")
    detail = results.rows("profiler-detail")
    rows = [
        line("Profile Sampler over KSampler, time", [float(r["ratio"]) for r in pairs]),
        line("step times added up, share of the node's time", [float(r["steps_over_wall"]) for r in pairs]),
    ]
    for name in ("kernels", "trace"):
        mine = [r for r in detail if r["detail"] == name]
        rows.append(line(f"detail `{name}` over `timing`, step time", [float(r["step_ratio"]) for r in mine]))
        rows.append(line(f"detail `{name}`, seconds after the run", [float(r["extra_s"]) for r in mine], 1))
    chart = [float(r["ratio"]) for r in results.rows("live-chart")]
    rows.append(line("live chart in a browser over none, sampling time", chart))
    for r in results.rows("library"):
        seconds = [show(float(r[key]), 2) for key in ("median_s", "min_s", "max_s")]
        rows.append([f"sidebar, {int(r['runs']):,} runs, {r['what']}, s", *seconds, r["calls"]])
    sources = [results.source(kind) for kind in ("profiler-overhead", "profiler-detail", "live-chart", "library")]
    head = ["what", "median", "lowest", "highest", "of"]
    return [*table(head, rows), "", *(f"{source}\\" for source in sources[:-1]), sources[-1]]


def fleet(results: Results) -> list[str]:
    """Rate and overhead of one and two workers."""
    rows = []
    for row in results.rows("fleet"):
        many = "one server without Ray" if row["variant"] != "fleet" else f"fleet, {row['workers']} worker"
        many += "s" if row["workers"] != "1" else ""
        median, most = row["overhead_median_ms"], row["overhead_max_ms"]
        rows.append(
            [many, show(float(row["prompts_per_min"]), 1), show(float(row["comfyui_median_s"]), 2),
             show(float(median) if median else None, 0), show(float(most) if most else None, 0)]
        )  # fmt: skip
    head = ["", "prompts a minute", "ComfyUI, s a prompt", "overhead, ms, median", "overhead, ms, highest"]
    return [*table(head, rows), "", results.source("fleet")]


def stress_input(results: Results) -> list[str]:
    """Broken and hostile inputs by reader."""
    kinds = ("stress-fuzz",)
    found = results.rows(*kinds)
    columns = ("inputs", "fine", "refused", "defects")
    rows = [[row["reader"], *(f"{int(row[column]):,}" for column in columns)] for row in found]
    rows.append(["**all**", *(f"{sum(int(row[column]) for row in found):,}" for column in columns)])
    head = ["reader", "inputs", "read", "refused with a message", "defects"]
    return [*table(head, rows), "", results.source(*kinds)]


def stress_faults(results: Results) -> list[str]:
    """Faults by kind."""
    kinds = ("stress-faults",)
    found = results.rows(*kinds)
    rows = [[row["fault"], row["faults"], row["broken"]] for row in found]
    rows.append(["**all**", *(str(sum(int(row[column]) for row in found)) for column in ("faults", "broken"))])
    return [*table(["fault", "faults", "broken or lost"], rows), "", results.source(*kinds)]


def stress_soak(results: Results) -> list[str]:
    """A server under random prompts: counts, then what may not grow. Rows of single nodes are left out."""
    kinds = ("stress-soak",)
    names = {"rss_mb": "RSS, MB", "device_mb": "device memory, MB"}
    rows = []
    for row in results.rows(*kinds):
        if not row["what"].startswith("SpeedLab"):
            what = names.get(row["what"], row["what"].replace("_", " "))
            rows.append([what, *(row[key] or "-" for key in ("count", "start", "end", "bound"))])
    head = ["what", "count", "after warm-up", "at the end", "allowed count or growth"]
    return [*table(head, rows), "", results.source(*kinds)]


_WAYS = (
    ("Forecast, adaptive", "0.02"), ("Forecast, adaptive", "0.05"), ("Forecast, fixed", "max_skip 2"),
    ("copy", "1 in 2"), ("EasyCache", "0.05"), ("EasyCache", "0.1"), ("LazyCache", "0.1"),
    ("Spectrum's scheme", "published"), ("Spectrum's scheme", "as in sd.cpp"),
)  # fmt: skip
_CASES = ("sampler", "scheduler", "steps")


def _quality(mixture: str) -> Callable[[Results], list[str]]:
    """Error at so many evaluations, and over the error of as many plain steps, for each way and sampler."""

    def made(results: Results) -> list[str]:
        found = [row for row in results.rows("quality") if row["mixture"] == mixture and not row["dynamic_cfg"]]
        cases = list(dict.fromkeys(tuple(row[name] for name in _CASES) for row in found))
        rows = []
        for way in _WAYS:
            cells = [" ".join(way)]
            for case in cases:
                here = [row for row in found if tuple(row[name] for name in _CASES) == case]
                (mine,) = (row for row in here if (row["way"], row["setting"]) == way)
                evaluations, missed = float(mine["evaluations"]), float(mine["error_median"])
                plain = _plain_error(here, evaluations)
                times = f", {missed / plain:.2f}" if plain else ""
                cells.append(f"{missed:.4f} at {evaluations:.1f}{times}")
            rows.append(cells)
        head = ["", *(f"{sampler}, {scheduler}, {steps} steps" for sampler, scheduler, steps in cases)]
        return [*table(head, rows), "", results.source("quality")]

    return made


def _plain_error(rows: Sequence[Row], evaluations: float, cost: str = "evaluations") -> float:
    """The median error of that many plain steps, between two counts on the line of the logarithm; 0 for all steps."""
    known = sorted((float(row[cost]), float(row["error_median"])) for row in rows if _is_plain(row))
    below, above = [p for p in known if p[0] <= evaluations], [p for p in known if p[0] >= evaluations]
    if not below or not above:
        return 0.0 if not above else above[0][1]
    (low, first), (high, last) = below[-1], above[0]
    share = (evaluations - low) / (high - low) if high > low else 0.0
    return float(first ** (1.0 - share) * last**share)


def _is_plain(row: Row) -> bool:
    return row["way"] == "fewer steps" and not row["dynamic_cfg"]


def quality_with_dynamic_cfg(results: Results) -> list[str]:
    """Rows of the model that each way takes, alone and with each measured setting of Dynamic CFG."""
    found = [row for row in results.rows("quality") if row["mixture"] == "apart"]
    cases = list(dict.fromkeys(tuple(row[name] for name in _CASES) for row in found))
    ways = list(dict.fromkeys((row["way"], row["setting"]) for row in found if row["dynamic_cfg"]))
    guidances = list(dict.fromkeys(row["dynamic_cfg"] for row in found if row["dynamic_cfg"]))
    rows = []
    for way in ways:
        cells = [" ".join(way).strip()]
        for case in cases:
            here = [r for r in found if tuple(r[name] for name in _CASES) == case and (r["way"], r["setting"]) == way]
            mine = [next(row for row in here if row["dynamic_cfg"] == guidance) for guidance in ("", *guidances)]
            taken = " / ".join(f"{float(row['rows']):.1f}" for row in mine)
            cells.append(f"{taken} rows, " + " / ".join(f"{float(row['error_median']):.4f}" for row in mine))
        rows.append(cells)
    first = f"alone / with Dynamic CFG {' / '.join(guidances)}"
    head = [first, *(f"{one}, {two}, {steps} steps" for one, two, steps in cases)]
    return [*table(head, rows), "", results.source("quality")]


def _when_measured(kind: str, made: Callable[[Results], list[str]]) -> Callable[[Results], list[str]]:
    """A table of the model that draws; a line that says so where nothing was measured yet."""

    def table_or_line(results: Results) -> list[str]:
        try:
            results.newest(kind)
        except DocsError:
            return ["Not measured yet: `python benchmarks/quality.py --model drawn` does it."]
        return made(results)

    return table_or_line


def quality_drawn(results: Results) -> list[str]:
    """Error, attributes and share of the time of all steps, with the error over that of plain steps of equal time."""
    found = [row for row in results.rows("quality-drawn") if not row["refused"]]
    cases = list(dict.fromkeys((row["kind"], *(row[name] for name in _CASES)) for row in found))
    rows = []
    for way in dict.fromkeys((row["way"], row["setting"], row["dynamic_cfg"]) for row in found):
        cells = [_way_name(way)]
        for case in cases:
            here = [row for row in found if (row["kind"], *(row[name] for name in _CASES)) == case]
            mine = [row for row in here if (row["way"], row["setting"], row["dynamic_cfg"]) == way]
            whole = next(row for row in here if row["way"] == "all steps" and not row["dynamic_cfg"])
            cells.append("-" if not mine else _cell_of(mine[0], whole, here))
        rows.append(cells)
    head = ["", *(f"{kind}: {sampler}, {scheduler}, {steps} steps" for kind, sampler, scheduler, steps in cases)]
    return [*table(head, rows), "", results.source("quality-drawn")]


def _cell_of(mine: Row, whole: Row, here: Sequence[Row]) -> str:
    missed, plain = float(mine["error_median"]), _plain_error(here, float(mine["cpu_s"]), "cpu_s")
    times = f", {missed / plain:.2f}" if plain and mine["way"] != "fewer steps" else ""
    share = float(mine["cpu_s"]) / float(whole["cpu_s"])
    return f"{missed:.4f} at {share:.0%}{times}; {float(mine['attributes']):.1%}"


_RIVALS = ("fewer steps", "EasyCache", "LazyCache", "Spectrum's scheme")


def quality_drawn_equal(results: Results) -> list[str]:
    """Errors of DeepCache and Forecast over those of each rival with as much time, at the best setting that it has."""
    found = [row for row in results.rows("quality-drawn") if not row["refused"]]
    cases = list(dict.fromkeys((row["kind"], *(row[name] for name in _CASES)) for row in found))
    ways = [row for row in found if row["way"].startswith(("DeepCache", "Forecast"))]
    rows = []
    for way in dict.fromkeys((row["way"], row["setting"], row["dynamic_cfg"]) for row in ways):
        cells = [_way_name(way)]
        for case in cases:
            here = [row for row in found if (row["kind"], *(row[name] for name in _CASES)) == case]
            mine = next((row for row in here if (row["way"], row["setting"], row["dynamic_cfg"]) == way), None)
            if mine is None:
                cells.append("")
                continue
            missed, cost = float(mine["error_median"]), float(mine["cpu_s"])
            # With noise of its own a run of fewer steps is another image.
            rivals = _RIVALS if case[0] == "ODE" else _RIVALS[1:]
            theirs = [_front_error(here, rival, way[2], cost) for rival in rivals]
            cells.append(" / ".join("-" if error is None else f"{missed / error:.2f}" for error in theirs))
        rows.append(cells)
    head = ["", *(f"{sampler}, {scheduler}, {steps} steps" for _, sampler, scheduler, steps in cases)]
    return [*table(head, rows), "", results.source("quality-drawn")]


def _way_name(way: Sequence[str]) -> str:
    return " ".join(way[:2]).strip() + (f" + Dynamic CFG {way[2]}" if way[2] else "")


def _front_error(rows: Sequence[Row], way: str, guidance: str, cost: float) -> float | None:
    """The error of a way with that much time, between two of its settings on the line of the logarithm; with Dynamic
    CFG too where `guidance` says so. Of its fastest setting where all take more; None where all take less."""
    known = sorted(
        (float(row["cpu_s"]), float(row["error_median"]))
        for row in rows
        if row["way"] == way and row["dynamic_cfg"] in ("", guidance) and float(row["error_median"])
    )
    front = [point for n, point in enumerate(known) if all(point[1] < before[1] for before in known[:n])]
    below, above = [p for p in front if p[0] <= cost], [p for p in front if p[0] > cost]
    if not below or not above:
        return above[0][1] if above else None
    (low, first), (high, last) = below[-1], above[0]
    share = (cost - low) / (high - low)
    return float(first ** (1.0 - share) * last**share)


def drawn_behaviour(results: Results) -> list[str]:
    """Attributes, error and clipped values over steps, CFG and DeepCache's interval, beside what is published."""
    rows, before = [], ""
    for row in results.rows("drawn-behaviour"):
        cells = [
            f"{row['axis']} {row['value']}",
            f"{float(row['attributes']):.1%}",
            f"{float(row['attributes_worst']):.0%}",
        ]
        cells += [error(float(row["error_median"]) if row["error_median"] else None), f"{float(row['clipped']):.1%}"]
        rows.append([*cells, row["published"] if row["axis"] != before else ""])
        before = row["axis"]
    head = ["", "attributes right", "of the worst image", "error of the latent", "clipped values", "published"]
    return [*table(head, rows), "", results.source("drawn-behaviour")]


TABLES: Mapping[str, Callable[[Results], list[str]]] = {
    "images": images,
    "sampling": sampling,
    "compile": compiled,
    "compile-first": compiled_first,
    "compile-vae": compiled_vae,
    "decoding": decoding,
    "memory-plan": memory_plan,
    "overhead": overhead,
    "fleet": fleet,
    "quality-apart": _quality("apart"),
    "quality-overlapping": _quality("overlapping"),
    "quality-dynamic-cfg": quality_with_dynamic_cfg,
    "quality-drawn": _when_measured("quality-drawn", quality_drawn),
    "quality-drawn-equal": _when_measured("quality-drawn", quality_drawn_equal),
    "drawn-behaviour": _when_measured("drawn-behaviour", drawn_behaviour),
    "stress-input": stress_input,
    "stress-faults": stress_faults,
    "stress-soak": stress_soak,
}


def _named(kind: str, name: str, form: Callable[[float | None], str]) -> Callable[[Results], str]:
    return lambda results: form(results.figure(kind, name))


def _decode(cell: str, column: str = "over_gb", digits: int = 2) -> Callable[[Results], str]:
    def value(results: Results) -> str:
        (row,) = (row for row in results.rows("memory-decode") if row["cell"] == cell)
        return show(float(row[column]), digits)

    return value


def _tiny_over_full(size: int) -> Callable[[Results], str]:
    def value(results: Results) -> str:
        seconds = {row["cell"]: float(row["seconds"]) for row in results.rows("memory-decode")}
        return show(seconds[f"full-{size}-b1"] / seconds[f"tiny-{size}-b1"], 0)

    return value


def _sampler_ratio(results: Results) -> str:
    return show(statistics.median(float(row["ratio"]) for row in results.rows("profiler-overhead")), 3)


def one(value: float | None) -> str:
    """One decimal."""
    return show(value, 1)


_FASTER, _APART = "picture 512x512: {}, speed-up over stock", "picture 512x512: latent error of {}"
FIGURES: Mapping[str, Callable[[Results], str]] = {
    "step-exact": _named("accelerate", "attention 512x512: Attention and linear auto, speed-up over stock", one),
    "image-3": _named("accelerate", _FASTER.format("interval 3"), one),
    "image-5": _named("accelerate", _FASTER.format("interval 5"), one),
    "image-5-bf16": _named("accelerate", _FASTER.format("interval 5, bf16"), one),
    "compile-onnxruntime": _named("compile", "warm fp32 512x512: onnxruntime, warm speed-up over eager", one),
    "decode-full": _decode("full-1024-b1"),
    "decode-tiles": _decode("full-tile512-1024-b1"),
    "decode-tiny": _decode("tiny-1024-b1"),
    "tiny-faster": _tiny_over_full(1024),
    "sampler-ratio": _sampler_ratio,
}


def rendered(text: str, results: Results, where: str = "text") -> str:
    """`text` with every marked table and figure made anew. Raises DocsError for unknown names and unpaired markers."""

    def made(kind: str, known: Iterable[str], name: str) -> None:
        if name not in known:
            raise DocsError(f"{where}: there is no {kind} {name!r}; there are {', '.join(known)}")

    def a_table(match: re.Match[str]) -> str:
        made("table", TABLES, match["name"])
        body = "\n".join(TABLES[match["name"]](results))
        return f"<!-- table: {match['name']} -->\n{body}\n<!-- end -->"

    def a_figure(match: re.Match[str]) -> str:
        made("figure", FIGURES, match["name"])
        return f"<!--figure:{match['name']}-->{FIGURES[match['name']](results)}<!--/-->"

    tables, figures = _TABLE.findall(text), _FIGURE.findall(text)
    if len(_MARKER.findall(text)) != _MARKERS_OF_A_TABLE * len(tables) + _MARKERS_OF_A_FIGURE * len(figures):
        raise DocsError(f"{where}: a marker has no partner, or a name with odd characters")
    return _FIGURE.sub(a_figure, _TABLE.sub(a_table, text))


def documents(root: Path = ROOT) -> list[Path]:
    """Every document that may hold a marker."""
    return [*sorted(root.glob("README*.md")), *root.glob("CONTRIBUTING.md"), *sorted((root / "docs").glob("*.md"))]


def differences(text: str, wanted: str) -> list[str]:
    """Names of the marked parts of `text` that are not as in `wanted`, which `rendered` made of it."""
    names = []
    for pattern, kind in ((_TABLE, "table"), (_FIGURE, "figure")):
        pairs = zip(pattern.finditer(text), pattern.finditer(wanted), strict=True)
        names += [f"{kind} {old['name']}" for old, new in pairs if old["body"] != new["body"]]
    return names


def main(argv: Sequence[str] | None = None) -> int:
    """Write, or with --check compare. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only compare; exit code 1 where something differs")
    parser.add_argument("--root", type=Path, default=ROOT, help="folder of the pack")
    args = parser.parse_args(argv)
    results = Results(args.root / RESULTS)
    stale = 0
    try:
        for path in documents(args.root):
            name = path.relative_to(args.root).as_posix()
            text = path.read_text(encoding="utf-8")
            wanted = rendered(text, results, name)
            for part in differences(text, wanted):
                stale += 1
                print(f"{name}: {part} {'is not what the results say' if args.check else 'written'}")
            if wanted != text and not args.check:
                path.write_text(wanted, encoding="utf-8", newline="\n")
    except DocsError as problem:
        print(problem, file=sys.stderr)
        return 2
    if args.check and stale:
        print("`python benchmarks/docs_tables.py` writes them anew.")
    return 1 if args.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
