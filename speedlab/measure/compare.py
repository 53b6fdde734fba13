"""How far apart two images or two latents are: PSNR and SSIM by kornia, relative and largest error."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ..common.errors import SpeedLabError, UnavailableError

_SSIM_WINDOW = 11


@dataclass(frozen=True)
class ImageComparison:
    """PSNR in dB (infinite for equal images), mean SSIM, and the difference [B, H, W, 3] stretched to 0..1."""

    psnr: float
    ssim: float
    max_abs: float
    diff: Any
    report: str


@dataclass(frozen=True)
class LatentComparison:
    """Norm of the difference over the norm of the reference, and the largest absolute difference."""

    relative_error: float
    max_abs: float
    report: str


def compare_images(a: Any, b: Any) -> ImageComparison:
    """Compare two IMAGE batches [B, H, W, C] in 0..1; `b` is the reference.

    Raises SpeedLabError for batches that cannot be compared, UnavailableError without kornia.
    """
    import torch

    try:
        from kornia.metrics import psnr, ssim
    except ImportError as error:
        raise UnavailableError("Comparing images needs kornia, which ComfyUI lists: pip install kornia") from error
    if a.shape != b.shape:
        raise SpeedLabError(
            f"Only images of one size can be compared: image_a is {_size(a)}, image_b is {_size(b)}. Scale or crop "
            "one of them first."
        )
    first = a[..., :3].movedim(-1, 1).float().cpu()
    second = b[..., :3].movedim(-1, 1).float().cpu()
    difference = (first - second).abs()
    largest = float(difference.max()) if difference.numel() else 0.0
    db = math.inf if largest == 0.0 else float(psnr(first, second, 1.0))
    similarity = float(ssim(first, second, _window(first)).mean())
    stretched = difference / largest if largest > 0 else torch.zeros_like(difference)
    verdict = "identical" if largest == 0.0 else _verdict(db)
    report = f"PSNR {db:.2f} dB, SSIM {similarity:.4f}, largest difference {largest * 255:.1f} of 255: {verdict}" + (
        "" if largest == 0.0 else f" (the difference image is brightened {1 / largest:.0f} times)"
    )
    return ImageComparison(db, similarity, largest, stretched.movedim(1, -1), report)


def compare_latents(a: Any, b: Any) -> LatentComparison:
    """Compare two latents of one shape; `b` is the reference. Raises SpeedLabError for different shapes."""
    if a.shape != b.shape:
        raise SpeedLabError(
            f"Only latents of one shape can be compared: samples_a is {tuple(a.shape)}, samples_b is {tuple(b.shape)}."
        )
    first, second = a.double().cpu(), b.double().cpu()
    difference = first - second
    norm = float(second.norm())
    error = float(difference.norm())
    relative = 0.0 if error == 0.0 else (error / norm if norm > 0 else math.inf)
    largest = float(difference.abs().max()) if difference.numel() else 0.0
    equal = bool((a == b).all()) and a.dtype == b.dtype
    report = "bit for bit equal" if equal else f"relative error {relative:.3e}, largest difference {largest:.3e}"
    return LatentComparison(relative, largest, report)


def _window(images: Any) -> int:
    """SSIM's usual window, or the largest odd one that fits a very small image with its mirrored border."""
    return int(min(_SSIM_WINDOW, 2 * min(images.shape[-2:]) - 1))


def _verdict(db: float) -> str:
    if db >= 40:
        return "no visible difference"
    if db >= 30:
        return "close, small details differ"
    if db >= 20:
        return "the same image with visible changes"
    return "a different image"


def _size(images: Any) -> str:
    batch, height, width = images.shape[:3]
    return f"{batch} of {width}x{height} with {images.shape[-1]} channels"
