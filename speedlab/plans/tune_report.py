"""What Tune returns and writes: table, chart of time against distance, contact sheet, HTML page, a workflow."""

from __future__ import annotations

import json
import logging
import math
import statistics
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ..common.errors import ResultsError, UnavailableError
from ..common.tables import markdown_table
from ..measure.charts import blank, new_figure, to_image
from ..measure.context import NodeContext, class_of, inputs_of, link_of
from ..measure.store import RunStore, cannot_write, new_run_id, write_atomically
from .axes import CellSettings
from .output import ATTRIBUTES, share
from .page import html_page
from .sheet import SIDE
from .techniques import NodeTable
from .techniques import Parts as Models
from .tune import Tune, TuneResult, name_of
from .tune_request import HELD_OUT, TuneRequest
from .tune_search import CALIBRATED, FLOORS, Tried

log = logging.getLogger(__name__)

HEADER = ("plan", "time", "predicted", "stock / plan", "latent error", "SSIM", "PSNR", "LPIPS", "images", "")
_COLUMNS = 4
_NOTHING = "-"


@dataclass(frozen=True)
class TuneReport:
    """The node's outputs."""

    plan: str
    table: str
    chart: Any
    sheet: Any
    path: str


def tune(models: Models, request: TuneRequest, nodes: NodeTable, context: NodeContext) -> TuneReport:
    """Tune and report. A cancel leaves a report of what was found so far, and goes on as a cancel."""
    one = Tune(models, request, nodes, context)
    name = new_run_id()
    try:
        result = one.run()
    except BaseException:
        if one.result.found is not None:
            # The cancel, or the error, is what ComfyUI has to see, not a full disk on the way.
            with suppress(ResultsError):
                write_report(one.result, one.store, context, name)
        raise
    return write_report(result, one.store, context, name)


def write_report(result: TuneResult, store: RunStore, context: NodeContext, name: str) -> TuneReport:
    """Draw, save and gather. Raises ResultsError naming the path."""
    table, chart, sheet = table_of(result), _chart(result), _sheet(result)
    best = result.found.best if result.found is not None else None
    plan = best.candidate.line if best is not None else ""
    folder = store.folder("tunes")
    pages = {
        f"{name}.html": _page(result, chart, sheet).encode(),
        f"{name}.json": json.dumps(_facts(result, context), indent=2, default=str).encode(),
    }
    if best is not None:
        pages[f"{name}_workflow.json"] = json.dumps(_workflow(result, context), indent=2).encode()
    for file, data in pages.items():
        try:
            write_atomically(folder / file, data)
        except OSError as error:
            raise cannot_write(folder / file, error) from error
    return TuneReport(plan, table, chart, sheet, str(folder / f"{name}.html"))


def ranked(result: TuneResult) -> list[Tried]:
    """What was tried: the choice first, then by time; what never ran last."""
    if result.found is None:
        return []
    best = result.found.best
    return sorted(
        result.found.tried, key=lambda one: (one is not best, one.seconds if one.looks else math.inf, one.predicted)
    )


def table_of(result: TuneResult) -> str:
    """The table in Markdown, and the notes under it."""
    return markdown_table(*_header_and_rows(result), notes_of(result))


def _header_and_rows(result: TuneResult) -> tuple[tuple[str, ...], list[list[str]]]:
    """Header and rows of the table; of the model that draws with the share of attributes that are right."""
    tried = ranked(result)
    rows = [_row(result, one) for one in tried]
    known = [one.mean.attributes if one.looks else None for one in tried]
    if not any(part is not None for part in known):
        return HEADER, rows
    *plain, last = HEADER
    return (*plain, ATTRIBUTES, last), [[*row[:-1], share(own), row[-1]] for row, own in zip(rows, known, strict=True)]


def notes_of(result: TuneResult) -> list[str]:
    """The choice in a sentence, and what a reader has to know of the figures."""
    found, request = result.found, result.request
    notes = []
    if found is not None and found.best is not None:
        best = found.best
        # The distance was measured with the settings that the plan was tried with.
        ratio = "" if not result.stock_s else f", {result.stock_s / best.seconds:.2f} times as fast as without it"
        notes.append(f"Recommended: {name_of(best.candidate)}: {best.seconds:.2f} s{ratio}.")
        notes += [f"As fast within the noise: {name_of(one.candidate)}, {one.seconds:.2f} s." for one in found.ties]
    notes += found.notes if found is not None else []
    floor = FLOORS[request.quality]
    if request.quality != "any":
        calibrated = f"calibrated {CALIBRATED}" if CALIBRATED else "not calibrated on a model that draws"
        notes.append(
            f"Floor {request.quality}: relative latent error up to {floor.latent:g}, SSIM from {floor.ssim:g}, PSNR "
            f"from {floor.psnr:g} dB, LPIPS up to {floor.lpips:g} where it is installed; means over the prompts, and "
            f"again over {HELD_OUT} held-out seeds. These limits are {calibrated}."
        )
    notes.append("Distances are to your own image, made without a plan; how good an image looks they do not tell.")
    if result.synthetic:
        notes.append(
            "The weights of this checkpoint are random: the times are real, a distance is no statement on quality."
        )
    if result.size:
        notes.append(f"{result.size} plans were predicted from parts measured once.")
    looks = [look for one in ranked(result) for look in one.looks.values()]
    off = sorted(abs(look.seconds / look.predicted - 1.0) for look in looks if look.predicted)
    if off:
        notes.append(
            f"Predicted against measured, over {len(off)} images: off by {100 * statistics.median(off):.0f} % in the "
            f"median, {100 * off[-1]:.0f} % at most. A prediction is the parts times what the last images took over "
            "theirs, because the machine drifts."
        )
    notes += [f"{count} plans were dropped: {reason}." for reason, count in result.dropped.items()]
    return [*notes, *result.notes]


def _row(result: TuneResult, one: Tried) -> list[str]:
    best = result.found is not None and one is result.found.best
    text = "recommended" if best else one.why or ""
    if not one.looks:
        return [name_of(one.candidate), _NOTHING, f"{one.expected:.2f} s", *[_NOTHING] * 5, "0", text]
    mean = one.mean
    return [
        name_of(one.candidate),
        f"{one.seconds:.2f} s",
        f"{one.expected:.2f} s",
        f"{result.stock_s / one.seconds:.2f}" if result.stock_s else _NOTHING,
        f"{mean.latent:.4f}",
        f"{mean.ssim:.4f}",
        f"{mean.psnr:.1f} dB",
        _NOTHING if mean.lpips is None else f"{mean.lpips:.3f}",
        str(len(one.looks)),
        text,
    ]


def _facts(result: TuneResult, context: NodeContext) -> dict[str, Any]:
    """Everything as numbers: what was asked, the machine, every plan with what was predicted and measured; and the
    prompt, for /prompt, that asks the same again."""
    request = result.request
    return {
        "schema": 1,
        "request": {
            "base": vars(request.base), "prompts": [vars(prompt) for prompt in request.prompts],
            "quality": request.quality, "minutes": request.minutes, "budget_gb": request.budget_gb,
            "candidates": request.candidates, "steps": request.steps, "samplers": request.samplers,
        },
        "prompt": {
            node_id: {"class_type": class_of(node), "inputs": inputs_of(node)}
            for node_id in sorted(context.ancestors())
            if (node := context.graph.get(node_id)) is not None
        },
        "checkpoint": result.checkpoint,
        "tuned_for": vars(result.tuned_for),
        "env": result.env,
        "stock_s": result.stock_s,
        "synthetic": result.synthetic,
        "plans": [
            {
                "plan": one.candidate.line, "steps": one.candidate.steps, "sampler": one.candidate.sampler,
                "scheduler": one.candidate.scheduler, "predicted_s": one.expected, "from_parts_s": one.predicted,
                "measured_s": one.seconds if one.looks else None, "peak_gb": _peak(result, one), "why": one.why,
                "looks": {prompt: vars(look) for prompt, look in one.looks.items()},
                "recommended": result.found is not None and one is result.found.best,
            }
            for one in ranked(result)
        ],
        "dropped": result.dropped,
        "notes": notes_of(result),
    }  # fmt: skip


def _chart(result: TuneResult) -> Any:
    """Time against the distance of the latent, with the front of what was made; without matplotlib a white image."""
    points = [one for one in ranked(result) if one.looks]
    if not points:
        return blank()
    try:
        figure = new_figure(9.0, 5.2)
    except UnavailableError as error:
        log.warning("SpeedLab: %s", error)
        return blank()
    axes = figure.subplots()
    xs, ys = [one.seconds for one in points], [max(one.mean.latent, 1e-6) for one in points]
    peaks = [_peak(result, one) for one in points]
    axes.scatter(xs, ys, s=[30 + 12 * peak for peak in peaks], color="#3b7dd8", alpha=0.6)
    front, lowest = [], math.inf
    for x, y in sorted(zip(xs, ys, strict=True)):
        if y < lowest:
            front.append((x, y))
            lowest = y
    axes.plot(*zip(*front, strict=True), color="#9aa5b1", linewidth=1, drawstyle="steps-post", label="front")
    best = result.found.best if result.found is not None else None
    if best is not None and best.looks:
        axes.scatter([best.seconds], [max(best.mean.latent, 1e-6)], s=120, color="#e07a5f", label="recommended")
    limit = FLOORS[result.request.quality].latent
    if math.isfinite(limit):
        axes.axhline(limit, color="#e0a030", linestyle=":", label=f"floor {result.request.quality}")
    axes.set_yscale("log")
    axes.set_xlabel("seconds, text to image (size of a point: memory)", fontsize=8)
    axes.set_ylabel("relative error of the latent, at least 1e-6 is drawn", fontsize=8)
    axes.set_title(f"{result.env.get('device')}, torch {result.env.get('torch')}", fontsize=9, loc="left")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, frameon=False)
    figure.tight_layout()
    return to_image(figure)


def _peak(result: TuneResult, one: Tried) -> float:
    parts = result.parts.variants.get(one.candidate.variant) if result.parts is not None else None
    return parts.peak_gb or 0.0 if parts is not None else 0.0


def _sheet(result: TuneResult) -> Any:
    """The user's own image and one of each plan that was tried, as an IMAGE tensor."""
    import numpy
    import torch
    from PIL import Image, ImageDraw

    own = [
        (
            "without a plan",
            f"{result.stock_s:.2f} s" if result.stock_s else "reference with more steps",
            next(iter(result.thumbnails.values()), None),
        )
    ]
    shown = [(one, result.thumbnails.get(name_of(one.candidate))) for one in ranked(result) if one.looks]
    cells = own + [(name_of(one.candidate), _caption(one), image) for one, image in shown if image is not None]
    rows = -(-len(cells) // _COLUMNS)
    box_width, box_height = SIDE + 8, SIDE + 44
    sheet = Image.new("RGB", (_COLUMNS * box_width + 8, rows * box_height + 8), (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    for index, (title, caption, image) in enumerate(cells):
        x, y = index % _COLUMNS * box_width + 8, index // _COLUMNS * box_height + 8
        if image is not None:
            sheet.paste(image, (x, y))
        draw.multiline_text((x, y + SIDE + 2), "\n".join((title[:44], title[44:88], caption)), fill=(32, 32, 32))
    return torch.from_numpy(numpy.asarray(sheet).astype(numpy.float32) / 255.0).unsqueeze(0)


def _caption(one: Tried) -> str:
    mean = one.mean
    return f"{one.seconds:.2f} s, error {mean.latent:.3f}, SSIM {mean.ssim:.3f}"


def _workflow(result: TuneResult, context: NodeContext) -> dict[str, Any]:
    """A graph in ComfyUI's API format, which can be dragged onto the canvas: the loaders of this one, and the plan."""
    graph: dict[str, Any] = {}
    tune = context.graph.get(context.node_id or "")
    inputs = tune.get("inputs", {}) if isinstance(tune, dict) else {}
    links = {name: link_of(inputs.get(name)) for name in ("model", "clip", "vae")}
    for link in links.values():
        for node_id in context.upstream(link[0]) if link is not None else ():
            graph[f"given-{node_id}"] = _renamed(context.graph[node_id])

    def given(name: str, index: int) -> list[Any]:
        link = links[name]
        return ["load", index] if link is None else [f"given-{link[0]}", link[1]]

    if None in links.values():
        graph["load"] = {"class_type": "SpeedLabCheckpointLoader", "inputs": {"precision": "auto"}}
    base, prompt = result.request.base, result.request.prompts[0]
    best = result.found.best.candidate  # type: ignore[union-attr]
    nodes: dict[str, tuple[str, dict[str, Any]]] = {
        "plan": ("SpeedLabAccelerate", {
            "preset": "custom", "custom": best.line, "compile": False, "model": given("model", 0),
            "clip": given("clip", 1), "vae": given("vae", 2)}),
        "positive": ("CLIPTextEncode", {"clip": ["plan", 1], "text": prompt.text}),
        "negative": _negative(result.tuned_for.family, prompt.negative),
        "latent": ("EmptyLatentImage", {"width": base.width, "height": base.height, "batch_size": base.batch}),
        **_sampling(best.over(base), prompt.seed, result.sigmas),
        "decode": ("VAEDecode", {"samples": ["sampler", 0], "vae": ["plan", 2]}),
        "save": ("SaveImage", {"images": ["decode", 0], "filename_prefix": "tuned"}),
    }  # fmt: skip
    graph |= {name: {"class_type": kind, "inputs": values} for name, (kind, values) in nodes.items()}
    # Numbers, as the canvas counts them.
    ids = {name: str(number) for number, name in enumerate(graph, start=1)}
    return {ids[name]: _renamed(node, ids) for name, node in graph.items()}


def _negative(family: str, text: str) -> tuple[str, dict[str, Any]]:
    """As Tune's own images have it: none is zeroed conditioning on SDXL."""
    if not text.strip() and family.startswith("SDXL"):
        return "ConditioningZeroOut", {"conditioning": ["positive", 0]}
    return "CLIPTextEncode", {"clip": ["plan", 1], "text": text}


def _sampling(
    settings: CellSettings, seed: int, sigmas: tuple[str, dict[str, Any]] | None
) -> dict[str, tuple[str, Any]]:
    """The sampler's node; where a node of core's makes the sigmas, that one and core's sampler that takes them."""
    shared = {
        "model": ["plan", 0], "positive": ["positive", 0], "negative": ["negative", 0], "latent_image": ["latent", 0],
        "cfg": settings.cfg,
    }  # fmt: skip
    if sigmas is None:
        return {
            "sampler": ("KSampler", {
                **shared, "seed": seed, "steps": settings.steps, "sampler_name": settings.sampler,
                "scheduler": settings.scheduler, "denoise": 1.0})
        }  # fmt: skip
    return {
        "select": ("KSamplerSelect", {"sampler_name": settings.sampler}),
        "sigmas": sigmas,
        "sampler": ("SamplerCustom", {
            **shared, "add_noise": True, "noise_seed": seed, "sampler": ["select", 0], "sigmas": ["sigmas", 0]}),
    }  # fmt: skip


def _renamed(node: Any, ids: dict[str, str] | None = None) -> Any:
    """A node whose links lead to nodes of other ids."""
    inputs = {}
    for name, value in node.get("inputs", {}).items():
        link = link_of(value)
        known = link is not None and (ids is None or link[0] in ids)
        inputs[name] = [f"given-{link[0]}" if ids is None else ids[link[0]], link[1]] if known and link else value
    return {"class_type": node.get("class_type"), "inputs": inputs}


def _page(result: TuneResult, chart: Any, sheet: Any) -> str:
    names, cells = _header_and_rows(result)
    tuned = result.tuned_for
    made = f"{tuned.family} on {tuned.device}, {time.strftime('%Y-%m-%d %H:%M')}"
    return html_page(
        f"SpeedLab Tune: {tuned.words()}",
        [made, *notes_of(result)],
        (names, cells),
        [("time against distance", chart), ("contact sheet", sheet)],
        result.env,
    )
