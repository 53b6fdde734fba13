"""The record of one cell: every repeat on every prompt, told as one run.

How far a cell's images are from the baseline's: PSNR and SSIM by kornia, LPIPS where it can run.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..common.dtypes import unet_dtypes
from ..common.errors import first_line
from ..measure.compare import compare_images
from ..measure.environment import environment, environment_hash
from ..measure.peaks import with_growth
from ..measure.plan_names import plan_of
from ..measure.record import RunRecord
from ..measure.summary import rows_of, speed, summarise
from ..models.loading import SOURCE
from ..patching.wrappers import accelerators
from ..sampling.complete import merge_memory
from ..vae.variants import COMPILED, derivations_of
from .axes import Cell
from .cell import OneRun, Prompt
from .in_turn import Series
from .techniques import Parts, of_core


@dataclass(eq=False)
class CellRuns(Series[tuple[OneRun, ...]]):
    """What a cell gathered; each run holds one of each prompt."""

    cell: Cell
    run_id: str
    baseline: Cell | None = None
    quality: Quality | None = None
    attributes: float | None = None  # the share that is right in the images, where the model is the one that draws
    was_tried: bool = True
    difference: str | None = None
    record: RunRecord | None = None

    def totals_ms(self) -> list[float]:
        """Text to image of each repeat, the mean over the prompts."""
        return [statistics.fmean(run.total_ms for run in runs) for runs in self.repeats]


@dataclass(frozen=True)
class SweepFacts:
    """What all cells of a sweep share in their records."""

    sweep_id: str
    scenario: str | None
    prompts: tuple[Prompt, ...]
    parts: Parts

    def carried(self) -> list[str]:
        """The techniques that the graph attached before the sweep, as a record tells them."""
        compiled = derivations_of(self.parts.vae).get(COMPILED)
        attached = [accelerator.describe() for accelerator in accelerators(self.parts.model)]
        return [*attached, *([] if compiled is None else [compiled.described])]


def measured_record(runs: CellRuns, facts: SweepFacts) -> RunRecord:
    """The record of a cell with at least one measured repeat."""
    every = [run for repeat in runs.repeats for run in repeat]
    first = every[0]
    totals = runs.totals_ms()
    sampling = [statistics.fmean(run.sample_ms for run in repeat) for repeat in runs.repeats]
    rows = [rows_of(run.record.steps) for run in every]
    begin = runs.first[0] if runs.first else first
    begun = rows_of(begin.record.steps)
    summary = summarise(sampling, rows, begin.record.summary.get("first_eval_ms"), begun[0].ms if begun else None)
    median = statistics.median(totals)
    phases = _phases(_middle(runs), median)
    summary |= {
        **speed(phases["sample"], summary["steps"]),
        "totals_ms": [round(ms, 3) for ms in totals],
        "first_run_ms": round(begin.total_ms + begin.compile_ms, 3),
        "saved": first.record.summary.get("saved", []),
        "images_per_min": round(60000.0 * runs.cell.settings.batch / median, 4) if median > 0 else None,
    }
    memory: Mapping[str, Any] = first.record.memory
    for run in every[1:]:
        for phase, peak in run.record.memory.items():
            memory = merge_memory(memory, None if phase == "overall" else phase, peak)
    # The sampler cannot know that this sweep encodes the text itself, and times it.
    said = dict.fromkeys(text for run in every for text in run.record.warnings)
    notes = [text for text in said if not text.startswith(("A core node encoded", "ComfyUI had the encoded"))]
    notes += [str(run.decode_info["warning"]) for run in every[:1] if "warning" in run.decode_info]
    request = {**first.record.request, **_decoded(first)}
    ran = set(request["accelerators"])
    carried = [words for words in facts.carried() if words in ran]
    return first.record.changed(
        run_id=runs.run_id,
        timestamp=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        status=runs.status,
        error=runs.error,
        request=_as_it_ran({**request, **_request(runs, facts, carried)}, runs.cell),
        phases_ms={
            **phases,
            "compile": _compile_ms(begin, every),
            "first_eval": first.record.summary.get("first_eval_ms"),
        },
        summary=summary,
        memory=with_growth(memory, _growths(runs)),
        quality=_quality(runs),
        artifacts=_artifacts(runs),
        warnings=tuple(notes),
    )


def _growths(runs: CellRuns) -> list[float | None]:
    """Of the measured runs but for the cell's first one, which loads weights, unless there is no other."""
    every = [run.rss_growth_gb for repeat in runs.repeats for run in repeat]
    # Runs before the measured ones have loaded what there is to load.
    warm = runs.first is not runs.repeats[0]
    return every if warm else every[1:] or every


def failed_record(runs: CellRuns, facts: SweepFacts) -> RunRecord:
    """The record of a cell that has no measured repeat: its settings, status and error."""
    env = environment(facts.parts.model.load_device)
    settings = runs.cell.settings
    source = facts.parts.model.get_attachment(SOURCE)
    replaced = {technique.name for technique in settings.techniques}
    carried = [words for words in facts.carried() if words.partition("(")[0] not in replaced]
    request = {
        "checkpoint": None if source is None else {"name": source.name, "family": source.family},
        "sampler": settings.sampler,
        "scheduler": settings.schedule,
        "steps": settings.steps,
        "cfg": settings.cfg,
        "width": settings.width,
        "height": settings.height,
        "batch": settings.batch,
        "accelerators": [*carried, *settings.accelerators()],
        "precision": {"unet": unet_dtypes(facts.parts.model)} if settings.weights is None else None,
        **_request(runs, facts, carried),
    }
    return RunRecord(
        run_id=runs.run_id,
        timestamp=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        status=runs.status,
        error=runs.error,
        env=env,
        env_hash=environment_hash(env),
        request=request,
        phases_ms={},
        steps=(),
        summary={},
        memory={},
    )


def _request(runs: CellRuns, facts: SweepFacts, carried: Sequence[str]) -> dict[str, Any]:
    seeds = list(dict.fromkeys(prompt.seed for prompt in facts.prompts))
    return {
        "sampled_as": runs.run_id,
        "scenario": facts.scenario,
        "plan": runs.cell.plan(carried),
        "plan_named": True,
        "seed": seeds[0] if len(seeds) == 1 else " ".join(map(str, seeds)),
        "prompts": len(facts.prompts),
        "prompt_tokens": runs.cell.settings.prompt_tokens,
        "sweep": {"id": facts.sweep_id, "cell": dict(runs.cell.labels)},
    }


def _decoded(run: OneRun) -> dict[str, Any]:
    """Techniques and precision with what really decoded."""
    info, request = run.decode_info, run.record.request
    tiny = [] if info.get("decoder") in (None, "vae") else [f"tiny_vae({info['decoder']})"]
    compiled = [str(info["compiled"])] if info.get("compiled") else []
    found: dict[str, Any] = {"accelerators": [*request.get("accelerators", ()), *compiled, *tiny], "decode": [info]}
    if isinstance(request.get("precision"), Mapping) and info.get("precision"):
        vae = {"weight": info["precision"], "compute": info["precision"]}
        found["precision"] = {**request["precision"], "vae": vae}
    return found


def _as_it_ran(request: dict[str, Any], cell: Cell) -> dict[str, Any]:
    """The request under the name of what ran, where that is not what the cell asked for: its own name is a label."""
    request.pop("label", None)  # of the workflow, which does not know the cells
    if "asked" not in request:
        return request
    ran = plan_of([*request["accelerators"], *(t.words() for t in cell.settings.techniques if of_core(t))])
    return {**request, "plan": cell.plan_that_ran(ran), "label": request["plan"]}


def _middle(runs: CellRuns) -> list[OneRun]:
    """The runs of the repeat with the median time, or of both in the middle: their phases add up to that time.

    Medians of each phase for itself would not, for the repeat with the longest decode need not be the one with the
    longest sampling.
    """
    order = sorted(runs.repeats, key=lambda repeat: statistics.fmean(run.total_ms for run in repeat))
    return [run for repeat in order[(len(order) - 1) // 2 : len(order) // 2 + 1] for run in repeat]


def _phases(middle: Sequence[OneRun], total: float) -> dict[str, float | None]:
    def mean(values: Sequence[Any]) -> float | None:
        known = [float(value) for value in values if isinstance(value, (int, float))]
        return round(sum(known) / len(middle), 3) if known else None

    return {
        "load": None,
        "text_encode": mean([run.encode_ms for run in middle]),
        "to_device": mean([run.record.phases_ms.get("to_device") for run in middle]),
        "prepare": mean([run.record.phases_ms.get("prepare") for run in middle]),
        "sample": mean([run.sample_ms for run in middle]),
        "decode": mean([run.decode_ms for run in middle]),
        "save": mean([run.save_ms for run in middle]),
        "total": round(total, 3),
    }


def _compile_ms(begin: OneRun, every: Sequence[OneRun]) -> float | None:
    """Of the cell's very first run and all measured ones."""
    others = [run for run in every if run.record.run_id != begin.record.run_id]
    return round(begin.compile_ms + sum(run.compile_ms for run in others), 3) or None


def _quality(runs: CellRuns) -> dict[str, Any] | None:
    quality = runs.quality
    own = {} if runs.attributes is None else {"attributes": runs.attributes}
    if quality is None:
        return own or None
    # JSON has no infinity: equal images are found by `identical`.
    found = {"psnr": quality.psnr, "ssim": quality.ssim, "identical": quality.psnr == float("inf")}
    named = {"baseline": dict(runs.baseline.labels)} if runs.baseline is not None else {}
    return {**found, **({} if quality.lpips is None else {"lpips": quality.lpips}), **own, **named}


def _artifacts(runs: CellRuns) -> dict[str, Any]:
    files = [file for run in runs.repeats[-1] for file in run.files]
    return {"images": files, **({} if runs.difference is None else {"difference": runs.difference})}


log = logging.getLogger(__name__)

_BACKBONE = "alexnet-owt-7be5be79.pth"


@dataclass(frozen=True)
class Quality:
    """PSNR in dB (infinite where equal), SSIM, LPIPS or None, and the stretched difference [B, H, W, 3]."""

    psnr: float
    ssim: float
    lpips: float | None
    difference: Any


def quality_of(images: Any, baseline: Any) -> Quality | None:
    """Compare images [B, H, W, 3] with the baseline's; None where their sizes differ, so that nothing compares."""
    if images.shape != baseline.shape:
        return None
    compared = compare_images(images, baseline)
    return Quality(compared.psnr, compared.ssim, _lpips(images, baseline), compared.diff)


def _lpips(a: Any, b: Any) -> float | None:
    network = _network()
    if network is None:
        return None
    import torch

    first, second = (images[..., :3].movedim(-1, 1).float().cpu() * 2.0 - 1.0 for images in (a, b))
    with torch.no_grad():
        return float(network(first, second).mean())


@lru_cache(maxsize=1)
def _network() -> Any | None:
    """The LPIPS network. Its backbone must lie in torch's cache already: nothing is fetched while a graph runs."""
    try:
        import lpips
    except ImportError:
        return None
    import torch

    file = Path(torch.hub.get_dir()) / "checkpoints" / _BACKBONE
    if not file.is_file():
        log.warning("SpeedLab: LPIPS is left out: its backbone %s is not there; lpips.LPIPS() fetches it once.", file)
        return None
    try:
        return lpips.LPIPS(net="alex", verbose=False).eval()
    except (RuntimeError, OSError) as error:
        log.warning("SpeedLab: LPIPS is left out: %s", first_line(error))
        return None
