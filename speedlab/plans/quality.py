"""How far a cell's pictures are from the baseline's: PSNR and SSIM by kornia, LPIPS where it can run."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..common.errors import first_line
from ..measure.compare import compare_images

log = logging.getLogger(__name__)

_BACKBONE = "alexnet-owt-7be5be79.pth"


@dataclass(frozen=True)
class Quality:
    """PSNR in dB (infinite where equal), SSIM, LPIPS or None, and the stretched difference [B, H, W, 3]."""

    psnr: float
    ssim: float
    lpips: float | None
    difference: Any


def quality_of(pictures: Any, baseline: Any) -> Quality | None:
    """Compare pictures [B, H, W, 3] with the baseline's; None where their sizes differ, so that nothing compares."""
    if pictures.shape != baseline.shape:
        return None
    compared = compare_images(pictures, baseline)
    return Quality(compared.psnr, compared.ssim, _lpips(pictures, baseline), compared.diff)


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
