"""A plan in words and numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .activations import PictureSize
from .placement import Offload

_WORDS: dict[Offload, str] = {
    "none": "everything stays on the device",
    "model": "text encoders, UNet and VAE take turns on the device",
    "sequential": "weights are streamed layer by layer, two layers at most on the device",
}


def gigabytes(nbytes: float) -> str:
    """`6.91 GB`, of 10^9 bytes."""
    return f"{nbytes / 1e9:.2f} GB"


def plan_text(
    predictions: Mapping[Offload, Any], chosen: Offload, size: PictureSize, budget: float, given: bool,
    device_type: str, dynamic: bool, measured: bool, fused: bool,
) -> str:  # fmt: skip
    """Every phase of the chosen plan, the peaks of the others, and what the numbers leave out."""
    plan = predictions[chosen]
    pictures = "1 picture" if size.batch == 1 else f"{size.batch} pictures"
    limit = f"budget {gigabytes(budget)}" if given else f"{gigabytes(budget)} free"
    lines = [f"Memory plan: {chosen} ({_WORDS[chosen]}), for {pictures} of {size.width}x{size.height}; {limit}"]
    lines += [
        f"  {phase.name}: {gigabytes(phase.total)} = weights {gigabytes(phase.weights)} "
        f"+ activations {gigabytes(phase.activations)}"
        for phase in plan.phases
    ]
    lines.append(f"Predicted peak: {gigabytes(plan.peak)}, while {plan.worst.name}.")
    others = [f"{name} {gigabytes(other.peak)}" for name, other in predictions.items() if name != chosen]
    lines.append(f"The other plans: {', '.join(others)}.")
    if plan.peak > budget:
        lines.append("That is more than there is: expect ComfyUI to offload more, or to run out of memory.")
    if device_type == "cpu":
        lines.append(
            "Models run on the CPU: their weights lie in its memory under every plan, and sequential adds two layers. "
            "The numbers are what another device would need."
        )
    if dynamic:
        lines.append(
            "ComfyUI's dynamic VRAM pages weights by itself here: under sequential it streams them, and uses what is "
            "free. Start ComfyUI with --reserve-vram to keep it below a budget."
        )
    if not measured:
        lines.append(f"Activations are counted from tensors; they were never measured on {device_type}.")
    if not fused:
        lines.append(
            "ComfyUI's attention here keeps scores beside what is predicted. Attention Backend with sdpa does not."
        )
    return "\n".join(lines)


def too_small(predictions: Mapping[Offload, Any], budget: float, asked: Offload | None, given: bool) -> str:
    """Why a budget, `given` or what is free, does not do, and the smallest that would."""
    least = min(predictions.values(), key=lambda one: one.peak)
    if asked is not None:
        peak = predictions[asked].peak
        head = f"offload {asked} needs {gigabytes(peak)} and the budget is {gigabytes(budget)}."
        if least.peak <= budget:
            return f"{head} Set offload to auto or {least.offload} ({gigabytes(least.peak)}), or the budget higher."
    else:
        head = f"No plan fits {'' if given else 'the '}{gigabytes(budget)}{'' if given else ' that are free'}."
    step = 0.01
    smallest = -(-least.peak // (step * 1e9)) * step
    raised = f"set budget_gb to {smallest:.2f} or more, make" if given else "make"
    return (
        f"{head} The smallest is {least.offload} offload with {gigabytes(least.peak)}, needed while "
        f"{least.worst.name}: {raised} the picture or the batch smaller"
        f"{', or decode with Tiny VAE Decode and leave vae unconnected' if least.worst.name == 'decoding' else ''}."
    )
