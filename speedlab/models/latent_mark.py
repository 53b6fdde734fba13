"""The mark that this pack's samplers leave in a LATENT: the latent format, and the run that made it.

Nodes that make a new LATENT out of an old one copy what they do not know, so a mark travels on through other samplers,
upscalers and models. It therefore names the very images that it was made for, and says nothing of any others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

KEY = "speedlab"


@dataclass(frozen=True)
class LatentMark:
    """What made the images of a LATENT: core's class name of the model's latent format, and the id of the run."""

    latent_format: str | None
    run_id: str | None


def marked(latent: Mapping[str, Any], model: Any, run_id: str) -> dict[str, Any]:
    """A copy of the LATENT with a mark for what it holds now."""
    mark = {
        "latent_format": type(model.get_model_object("latent_format")).__name__,
        "run_id": run_id,
        "images": tuple(_fingerprints(latent["samples"])),
    }
    return {**latent, KEY: mark}


def mark_of(latent: Mapping[str, Any]) -> LatentMark | None:
    """The mark of a LATENT, where every image in it is one that the mark was made for; else None."""
    mark = latent.get(KEY)
    made_for = mark.get("images") if isinstance(mark, Mapping) else None
    if not isinstance(mark, Mapping) or not isinstance(made_for, (tuple, list)):
        return None
    if not set(_fingerprints(latent["samples"])) <= {name for name in made_for if isinstance(name, str)}:
        return None
    return LatentMark(_text(mark.get("latent_format")), _text(mark.get("run_id")))


def _fingerprints(samples: Any) -> list[str]:
    """One an image, so that images picked out of a batch, or repeated, are still known."""
    if getattr(samples, "is_nested", False):
        samples = samples.unbind()
    parts = samples if isinstance(samples, (list, tuple)) else [samples]
    return [_fingerprint(image) for part in parts for image in part]


def _fingerprint(image: Any) -> str:
    import torch

    values = image.detach().to("cpu").contiguous()
    digest = hashlib.blake2b(f"{tuple(values.shape)} {values.dtype}".encode(), digest_size=16)
    digest.update(values.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None
