"""Prompts to conditioning, as core's CLIP Text Encode does."""

from __future__ import annotations

from typing import Any

from ..common.errors import SpeedLabError


def require_clip(clip: Any) -> None:
    """Raise SpeedLabError with what to do when a checkpoint brought no text encoder."""
    if clip is None:
        raise SpeedLabError(
            "There is no text encoder: the checkpoint file holds none. Load one with a CLIP loader, or choose a "
            "checkpoint that includes it."
        )


def device_of(clip: Any) -> Any:
    """The device that the text encoder computes on."""
    return clip.patcher.load_device


def encode(clip: Any, text: str) -> Any:
    """CONDITIONING of a prompt; schedules and hooks on the text encoder are honoured by core."""
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))
