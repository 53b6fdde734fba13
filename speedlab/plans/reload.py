"""The checkpoint of a graph in another precision: loaded again, with the patches of the model given."""

from __future__ import annotations

import uuid
from collections import OrderedDict
from dataclasses import replace
from typing import Any

from ..common.errors import SpeedLabError
from ..models.loading import SOURCE, VAE_SOURCE, CheckpointSource, load_checkpoint
from .techniques import Parts

_KEPT = 2
_COMPUTE_DTYPE = "manual_cast_dtype"


class Reloader:
    """Loads a graph's checkpoint in other precisions and keeps the last ones. Make one a sweep."""

    def __init__(self, parts: Parts) -> None:
        self._given = parts
        self._known: OrderedDict[tuple[str, str], Parts] = OrderedDict()

    def parts_in(self, precision: str, memory_format: str | None = None) -> Parts:
        """The parts with weights in `precision`; the very parts given where they are that already.

        Raises SpeedLabError for a model that no SpeedLab loader made or whose patches cannot be moved.
        """
        source: CheckpointSource | None = self._given.model.get_attachment(SOURCE)
        if source is None:
            raise SpeedLabError(
                "The precision axis loads the checkpoint again and does not know which: the model does not come from "
                "Load Checkpoint (SpeedLab). Use that loader, or leave the axis out."
            )
        layout = memory_format or source.memory_format
        key = (precision, layout)
        if key == (source.precision, source.memory_format):
            return self._given
        if key not in self._known:
            self._known[key] = self._load(source, precision, layout)
            while len(self._known) > _KEPT:
                self._known.popitem(last=False)
        self._known.move_to_end(key)
        return self._known[key]

    def keeps(self, parts: Parts) -> bool:
        """Whether these parts are the ones given, or still kept here."""
        weights = parts.model.model
        return weights is self._given.model.model or any(weights is known.model.model for known in self._known.values())

    def _load(self, source: CheckpointSource, precision: Any, layout: str) -> Parts:
        given = self._given
        loaded = load_checkpoint(source.name, precision, layout)
        model = _repatched(given.model, loaded.model)
        model.set_attachments(SOURCE, loaded.source)
        clip = given.clip
        if precision == "fp32" and clip is not None and loaded.clip is not None:
            clip = loaded.clip.clone()
            clip.patcher = _repatched(given.clip.patcher, loaded.clip.patcher)
            clip.layer_idx = given.clip.layer_idx
        vae = given.vae
        vae_source = vae.patcher.get_attachment(VAE_SOURCE) if vae is not None else None
        if loaded.vae is not None and vae_source is not None and vae_source.path == source.path:
            vae = loaded.vae
        return replace(given, model=model, clip=clip, vae=vae)


def _repatched(given: Any, fresh: Any) -> Any:
    """A clone of `given` on the weights of `fresh`: LoRAs, wrappers, options and attachments as they are."""
    import torch

    whole = [key for key, value in given.object_patches.items() if isinstance(value, torch.nn.Module)]
    inside = [key for key in whole if key.startswith("diffusion_model")]
    if inside:
        raise SpeedLabError(
            f"The model carries a module of its own weights ({inside[0]}), a compiled one say, which cannot move to "
            "other weights. Put that technique on the plan axis or into 'plan' instead of before Benchmark."
        )
    clone = fresh.clone()
    for key, patches in given.patches.items():
        clone.patches[key] = list(patches)
    if given.patches:
        clone.patches_uuid = uuid.uuid4()
    again = given.clone()
    for name in (
        "object_patches", "model_options", "wrappers", "callbacks", "attachments", "additional_models", "injections",
        "hook_patches",
    ):  # fmt: skip
        if hasattr(again, name):
            setattr(clone, name, getattr(again, name))
    # The compute dtype belongs to the weights that were loaded, not to those of the model given.
    own = {key: value for key, value in fresh.object_patches.items() if key == _COMPUTE_DTYPE}
    clone.object_patches = {k: v for k, v in again.object_patches.items() if k != _COMPUTE_DTYPE} | own
    return clone
