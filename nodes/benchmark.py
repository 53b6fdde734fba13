"""Measure one graph over one or two axes of settings, or find its fastest plan."""

from __future__ import annotations

from collections.abc import Mapping

from ..speedlab.common.core import core_nodes
from ..speedlab.measure.context import NodeContext
from ..speedlab.plans.axes import AXES, NO_AXIS, CellSettings
from ..speedlab.plans.output import read_prompts, write_output
from ..speedlab.plans.sweep import Sweep, SweepRequest
from ..speedlab.plans.techniques import Parts
from ..speedlab.plans.tune_report import tune
from ..speedlab.plans.tune_request import request_of
from ..speedlab.plans.tune_search import FLOORS
from . import names

_HIDDEN = {"prompt": "PROMPT", "extra_pnginfo": "EXTRA_PNGINFO", "unique_id": "UNIQUE_ID"}
_VALUES = (
    "One a line or between commas; * before a value makes it the baseline. batch: 1, 2, 4, max. resolution: 768x512. "
    "sampler: dpmpp_2m/karras. deepcache_interval, cfg_stop_at, compile, attention: off too. plan, one a line: "
    "fast=attention(sdpa)+deepcache(cache_interval=3)+tiny."
)


def _text(default: str, tooltip: str, multiline: bool = True) -> tuple[str, dict]:
    return "STRING", {"default": default, "multiline": multiline, "tooltip": tooltip}


def _int(default: int, low: int, high: int, tooltip: str, step: int = 1) -> tuple[str, dict]:
    return "INT", {"default": default, "min": low, "max": high, "step": step, "tooltip": tooltip}


class Benchmark:
    """Every value of one or two axes, measured in turn."""

    NODE_ID = "SpeedLabBenchmark"
    # The nodes that its plans are made of, by id: set where they are all known.
    pack_nodes: Mapping[str, type] = {}
    DISPLAY_NAME = "Benchmark (SpeedLab)"
    CATEGORY = "SpeedLab/measure"
    SEARCH_ALIASES = ["speed test", "timer", "fps", "throughput", "xy plot", "sweep", "compare settings"]
    DESCRIPTION = (
        "Makes the same image with every value of one or two axes and reports what each costs: time with its spread, "
        "peak memory, and how far the image is from the baseline's. Cells run in turn, so that drift of the machine "
        "hits them all; what fails is a row. Every cell becomes a row of output/speedlab/results.csv."
    )
    RETURN_TYPES = ("STRING", "IMAGE", "IMAGE", "STRING")
    RETURN_NAMES = ("table", "plot", "contact_sheet", "csv_path")
    OUTPUT_TOOLTIPS = (
        "The results as a Markdown table.",
        "Time, memory, throughput and quality over the first axis.",
        "The image of every cell with time, memory and quality under it.",
        "Where results.csv lies.",
    )
    FUNCTION = "benchmark"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "The model to measure, with any accelerations attached."}),
                "clip": ("CLIP", {"tooltip": "The text encoder: the benchmark encodes the prompts itself."}),
                "vae": ("VAE", {"tooltip": "The VAE that decodes where no tiny decoder is chosen."}),
                "positive": _text("a lighthouse on a rocky coast at dawn", "One prompt, or one a line: averaged."),
                "negative": _text("", "What the images shall not show. Blank on SDXL: zeroed conditioning.", False),
                "axis_x": (list(AXES), {"default": "steps", "tooltip": "What to vary, from left to right."}),
                "values_x": _text("10, 20, 30", f"The values of axis_x. {_VALUES}"),
                "axis_y": ([NO_AXIS, *AXES], {"default": NO_AXIS, "tooltip": "A second thing to vary, or none."}),
                "values_y": _text("", "The values of axis_y, written like those of axis_x."),
                "width": _int(512, 64, 16384, "Width in pixels, where no axis or plan sets it.", 8),
                "height": _int(512, 64, 16384, "Height in pixels, where no axis or plan sets it.", 8),
                "batch": _int(1, 1, 4096, "Images at once, where no axis or plan sets them."),
                "steps": _int(20, 1, 10000, "Sampling steps, where no axis or plan sets them."),
                "cfg": (
                    "FLOAT",
                    {"default": 8.0, "min": 0.0, "max": 100.0, "step": 0.1, "round": 0.01,
                     "tooltip": "Guidance, where no axis or plan sets it."},
                ),
                "sampler_name": (names.samplers(), {"tooltip": "The sampler, where no axis sets it."}),
                "scheduler": (names.schedulers(), {"tooltip": "The scheduler, where no axis sets it."}),
                "seed": _text("0", "One seed for all prompts, or one each: 1, 2, 3. Every cell uses the same.", False),
                "warmup": _int(1, 0, 100, "Rounds before the measured ones; the very first run is listed apart."),
                "repeats": _int(5, 1, 1000, "Measured rounds: the table shows their median and spread."),
                "plan": _text(
                    "", "Techniques for every cell, such as attention(sdpa)+tiny; blank: the graph as it is.", False
                ),
            },
            "optional": {
                "refiner": ("MODEL", {"tooltip": "The refiner, for the axis handoff alone."}),
                "refiner_clip": ("CLIP", {"tooltip": "The refiner's own text encoder, for the axis handoff alone."}),
            },
            "hidden": _HIDDEN,
        }  # fmt: skip

    @classmethod
    def IS_CHANGED(cls, **_: object) -> float:
        """A measurement is never taken from the cache."""
        return float("nan")

    def benchmark(
        self, model: object, clip: object, vae: object, positive: str, negative: str, axis_x: str, values_x: str,
        axis_y: str, values_y: str, width: int, height: int, batch: int, steps: int, cfg: float, sampler_name: str,
        scheduler: str, seed: str, warmup: int = 1, repeats: int = 5, plan: str = "", refiner: object = None,
        refiner_clip: object = None, prompt: object = None, extra_pnginfo: object = None, unique_id: object = None,
    ) -> dict:  # fmt: skip
        request = SweepRequest(
            axis_x, values_x, axis_y, values_y,
            CellSettings(width, height, batch, steps, cfg, sampler_name, scheduler),
            plan, read_prompts(positive, negative, seed), warmup, repeats,
        )  # fmt: skip
        nodes = {**core_nodes().NODE_CLASS_MAPPINGS, **self.pack_nodes}
        parts = Parts(model, clip, vae, refiner, refiner_clip)
        context = NodeContext.of(prompt, extra_pnginfo, unique_id)
        sweep = Sweep(parts, request, nodes, context)
        output = write_output(sweep.run(), sweep.store, context.workflow_id())
        return {"ui": output.ui, "result": (output.table, output.plot, output.sheet, output.csv_path)}


class Tune:
    """The fastest plan on this machine that keeps the image close enough."""

    NODE_ID = "SpeedLabTune"
    # The nodes that its plans are made of, by id: set where they are all known.
    pack_nodes: Mapping[str, type] = {}
    DISPLAY_NAME = "Tune (SpeedLab)"
    CATEGORY = "SpeedLab/measure"
    SEARCH_ALIASES = ["fast", "speed", "optimize", "autotune", "find best settings", "fps", "timer"]
    DESCRIPTION = (
        "Finds the fastest plan for this model, size and sampler on this machine, within a distance from your own "
        "image and a memory budget, in the minutes that you give. It measures the parts of all plans once, predicts "
        "every plan, and makes images with those that look best. What it finds is Accelerate's preset tuned. A cancel "
        "keeps the best so far."
    )
    RETURN_TYPES = ("STRING", "STRING", "IMAGE", "IMAGE", "STRING")
    RETURN_NAMES = ("plan", "table", "chart", "contact_sheet", "report_path")
    OUTPUT_TOOLTIPS = (
        "The plan line, as Accelerate's custom takes it.",
        "What was tried as a Markdown table, with what was predicted and measured.",
        "Time against distance, with the front.",
        "Your own image and one of every plan that was tried.",
        "Where the HTML page lies; a workflow with the plan and all figures as JSON lie beside it.",
    )
    FUNCTION = "find"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "The model as you use it, without accelerations."}),
                "clip": ("CLIP", {"tooltip": "The text encoder: Tune encodes the prompts itself."}),
                "vae": ("VAE", {"tooltip": "The VAE that decodes your own image."}),
                "positive": _text("a lighthouse on a rocky coast at dawn", "One prompt, or one a line."),
                "negative": _text("", "What the images shall not show. Blank on SDXL: zeroed conditioning.", False),
                "width": _int(512, 64, 16384, "Width in pixels that the plan is for.", 8),
                "height": _int(512, 64, 16384, "Height in pixels that the plan is for.", 8),
                "batch": _int(1, 1, 4096, "Images at once that the plan is for."),
                "steps": _int(20, 1, 10000, "Sampling steps of your own image. Fewer plain steps are tried too."),
                "cfg": (
                    "FLOAT",
                    {"default": 8.0, "min": 0.0, "max": 100.0, "step": 0.1, "round": 0.01,
                     "tooltip": "Guidance of your own image."},
                ),
                "sampler_name": (names.samplers(), {"tooltip": "The sampler that the plan is for."}),
                "scheduler": (names.schedulers(), {"tooltip": "The scheduler that the plan is for."}),
                "seed": _text(
                    "0", "One seed for all prompts, or one each: 1, 2, 3. Held-out seeds are made from them.", False
                ),
                "quality": (
                    list(FLOORS),
                    {
                        "default": "close",
                        "tooltip": "How far an image may be from your own. exact: rounding. close: small details. "
                        "similar: the same image with visible changes. any: the fastest plan whatever it makes.",
                    },
                ),
                "budget_minutes": (
                    "FLOAT",
                    {"default": 10.0, "min": 0.1, "max": 1440.0, "step": 0.5, "tooltip": "How long to search."},
                ),
                "budget_gb": (
                    "FLOAT",
                    {"default": 0.0, "min": 0.0, "max": 1024.0, "step": 0.1,
                     "tooltip": "How much memory a plan may take, in GB of 10^9 bytes; 0: no limit."},
                ),
            },
            "optional": {
                "candidates": _text("", "Plan lines to choose from in place of all that are known, one a line."),
                "steps_axis": _text("", "Other numbers of steps to try with every plan: 20:30, or 20, 25.", False),
                "samplers_axis": _text("", "Samplers to try with every plan: euler, dpmpp_2m/karras.", False),
            },
            "hidden": _HIDDEN,
        }  # fmt: skip

    @classmethod
    def IS_CHANGED(cls, **_: object) -> float:
        """A measurement is never taken from the cache."""
        return float("nan")

    def find(
        self, model: object, clip: object, vae: object, positive: str, negative: str, width: int, height: int,
        batch: int, steps: int, cfg: float, sampler_name: str, scheduler: str, seed: str, quality: str,
        budget_minutes: float, budget_gb: float, candidates: str = "", steps_axis: str = "", samplers_axis: str = "",
        prompt: object = None, extra_pnginfo: object = None, unique_id: object = None,
    ) -> dict:  # fmt: skip
        base = CellSettings(width, height, batch, steps, cfg, sampler_name, scheduler)
        request = request_of(
            base, read_prompts(positive, negative, seed), quality, budget_minutes, budget_gb, candidates, steps_axis,
            samplers_axis,
        )  # fmt: skip
        nodes = {**core_nodes().NODE_CLASS_MAPPINGS, **self.pack_nodes}
        report = tune(Parts(model, clip, vae), request, nodes, NodeContext.of(prompt, extra_pnginfo, unique_id))
        result = (report.plan, report.table, report.chart, report.sheet, report.path)
        return {"ui": {"text": [report.table], "speedlab_tune": [report.path, report.plan]}, "result": result}


NODES = (Benchmark, Tune)
