"""One scenario on many ComfyUI workers through Ray: prompts or cells in, images and a manifest out."""

from __future__ import annotations

from speedlab.common.errors import SpeedLabError


class FleetError(SpeedLabError):
    """The fleet cannot start or go on; the message says why and what to do. What was done is kept."""
