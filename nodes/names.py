"""ComfyUI's lists of names and its wildcard type: all that node classes take from it."""

from __future__ import annotations

import comfy.samplers
from comfy.comfy_types import IO

ANY = IO.ANY


def samplers() -> list[str]:
    """Names of sampling algorithms, those that other packs add included."""
    return comfy.samplers.KSampler.SAMPLERS


def schedulers() -> list[str]:
    """Names of schedulers, those that other packs add included."""
    return comfy.samplers.KSampler.SCHEDULERS
