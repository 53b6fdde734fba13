"""The images of Tune: the user's own on each prompt, and those of plans, with how far they are from it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..common.errors import SpeedLabError
from ..measure.compare import compare_latents
from ..measure.context import NodeContext
from ..measure.drawn.accuracy import accuracy, draws
from ..measure.store import RunStore
from ..sampling.complete import save_pngs
from ..sampling.profiled import failure_message, failure_status
from .axes import CellSettings
from .cell import OneRun, Prompt, Reloader, prepare, run_once
from .cell_record import quality_of
from .in_turn import own_failure
from .techniques import NodeTable
from .techniques import Parts as Models
from .tune_search import Look, Refused
from .tune_space import Candidate


class Images:
    """Makes and measures them. `base` are the user's own settings; the user's own image has `steps` steps."""

    def __init__(
        self, models: Models, base: CellSettings, prompts: Sequence[Prompt], nodes: NodeTable, context: NodeContext,
        store: RunStore, steps: int,
    ) -> None:  # fmt: skip
        self.models, self.base, self.prompts, self.nodes = models, base, prompts, nodes
        self.context, self.store, self.steps = context, store, steps
        self.file = "tune-now"
        self.references: dict[int, OneRun] = {}
        self._reloader = Reloader(models)
        self._draws = draws(models.model, context)
        self._weights: Any = None

    def once(self, settings: CellSettings, prompt: int) -> OneRun:
        """One image. Raises Refused with the reason where the plan cannot run."""
        import comfy.model_management as mm

        failed: list[str] = []

        def note(error: Exception) -> str:
            failed.append(failure_message(error))
            return failure_status(error)

        with own_failure(note):
            prepared = prepare(self.models, settings, self.nodes, self._reloader)
            text = self.prompts[prompt]
            weights = prepared.parts.model.model
            if weights is not self._weights:
                if self._weights is not None:
                    mm.unload_all_models()
                self._weights = weights
                if prepared.sigmas is None:
                    # No repeat moves all weights in again; a step does, and is not counted.
                    one_step = replace(prepared, settings=replace(settings, steps=1))
                    run_once(one_step, text, self.context, self._step, self._save)
            return run_once(prepared, text, self.context, self._step, self._save)
        raise Refused(failed[0] if failed else "it ended without an image")

    def reference(self, prompt: int) -> OneRun:
        """The user's own image, uncompressed."""
        if prompt not in self.references:
            try:
                self.references[prompt] = self.once(replace(self.base, steps=self.steps), prompt)
            except Refused as error:
                raise SpeedLabError(f"Tune cannot make the image that it compares with: {error}") from error
        return self.references[prompt]

    def look(self, candidate: Candidate, prompt: int) -> tuple[Look, OneRun]:
        """An image of a plan beside the user's own. Raises Refused where the plan cannot run."""
        reference = self.reference(prompt)
        run = self.once(candidate.over(self.base), prompt)
        quality = quality_of(run.images, reference.images)
        if quality is None:
            raise Refused("its image has another size than the user's own")
        error = compare_latents(run.latent, reference.latent).relative_error
        if not math.isfinite(error):
            raise Refused("its latent has NaN or Inf")
        right = accuracy(run.images, [self.prompts[prompt].text]) if self._draws else None
        seconds = run.total_ms / 1000.0
        return Look(seconds, error, quality.ssim, min(quality.psnr, 200.0), quality.lpips, right), run

    def _step(self, _step: int) -> None:
        import comfy.model_management as mm

        mm.throw_exception_if_processing_interrupted()

    def _save(self, images: Any) -> list[str]:
        """The image of one plan replaces that of the one before: what counts is the time that saving takes."""
        paths = save_pngs(images, self.file, self.context, self.store)
        return [path.relative_to(self.store.root.parent).as_posix() for path in paths]
