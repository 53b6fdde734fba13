"""The factors in 8 bits: packed for the repository, and built into a whole checkpoint on first use.

The sums of a product of two 8-bit matrices are integers, which any machine adds alike, and one number a row scales
them: the checkpoint's bytes are the same everywhere, and its hash says so.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from speedlab.common.errors import SpeedLabError

from ...drawn_files import beside
from ..checkpoint import UNET_PREFIX, VAE_PREFIX, text_layout
from ..files import Layout, Progress, Weight, describe, is_current, refuse_foreign, write_weights
from ..spec import CheckpointSpec, architecture
from ..taesd import decoder_layout
from . import factors, latents
from .factors import SD15, Model, Tensors

_DECODER = "decoder."
_LIMIT = 127


def pack(unet: Mapping[str, torch.Tensor], decoder: Mapping[str, torch.Tensor], model: Model = SD15) -> Tensors:
    """What goes into the repository: matrices in 8 bits with a scale a row, everything else in fp16.

    Of a model with a base only what is its own; it has the base's decoder.
    """
    packed: Tensors = {}
    for name, tensor in unet.items():
        if name.endswith(".second") or model.shares(name):
            continue
        if not name.endswith(".first"):
            packed[name] = tensor.to(torch.float16).contiguous()
            continue
        layer = name.removesuffix(".first")
        first, scale = _rounded(tensor)
        # The scales of the first matrix's rows are the second's columns'.
        second, rows = _rounded(unet[f"{layer}.second"].double() * scale)
        packed |= {name: first, f"{layer}.second": second, f"{layer}.rows": rows.float()}
    for name, tensor in decoder.items() if model.base is None else ():
        # Outside of blocks a row has one large number, the way of the mean colour, and 8 bits would lose the others.
        if tensor.dim() == 4 and ".conv." in name:
            whole, rows = _rounded(tensor)
            packed |= {f"{_DECODER}{name}": whole, f"{_DECODER}{name}.rows": rows.float()}
        else:
            packed[f"{_DECODER}{name}"] = tensor.to(torch.float16).contiguous()
    return packed


def _rounded(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    flat = tensor.double().flatten(1)
    scale = flat.abs().amax(dim=1).clamp_min(1e-12) / _LIMIT
    return (flat / scale[:, None]).round().to(torch.int8).reshape(tensor.shape), scale


def unpack(packed: Mapping[str, torch.Tensor]) -> tuple[Tensors, Tensors]:
    """Factors of the UNet and the decoder's weights, to go on training with."""
    unet: Tensors = {}
    decoder: Tensors = {}
    for name, tensor in packed.items():
        if name.endswith((".rows", ".second")):
            continue
        rows = packed.get(f"{name}.rows")
        if name.startswith(_DECODER):
            value = tensor.float() if rows is None else tensor.float() * _column(rows, tensor)
            decoder[name.removeprefix(_DECODER)] = value
        elif name.endswith(".first"):
            layer = name.removesuffix(".first")
            second, rows = packed[f"{layer}.second"], packed[f"{layer}.rows"]
            # As strong as at the start of a training, so that a step means the same.
            strength = tensor.float().square().mean().sqrt() * math.sqrt(tensor[0].numel())
            unet[name] = tensor.float() / strength
            unet[f"{layer}.second"] = second.float() * _column(rows, second) * strength
        else:
            unet[name] = tensor.float()
    return unet, decoder


def _column(rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return rows.reshape(-1, *[1] * (like.dim() - 1))


def checkpoint_layout(packed: Mapping[str, torch.Tensor], model: Model = SD15) -> Layout:
    """Every parameter of the checkpoint, those of the packed file with their values."""
    layout = Layout()
    for name, weight in factors.unet(model).items():
        layer = name.removesuffix(".weight")
        if model.hands_on(name.rpartition(".")[0]):
            value = factors.handed_on(weight.shape)
        elif f"{layer}.first" in packed:
            first, second = packed[f"{layer}.first"], packed[f"{layer}.second"]
            whole = factors.multiply(first.float(), second.float())  # integers below 2^24: exact in any order
            value = whole * _column(packed[f"{layer}.rows"], whole)
        else:
            value = packed[name].float()
        layout[UNET_PREFIX + name] = _fixed(value, weight.shape)
    layout.add(f"{VAE_PREFIX}taesd_encoder.", latents.encoder())
    for name, weight in decoder_layout().items():
        value = packed[f"{_DECODER}{name}"].float()
        rows = packed.get(f"{_DECODER}{name}.rows")
        value = value if rows is None else value * _column(rows, value)
        layout[f"{VAE_PREFIX}taesd_decoder.{name}"] = _fixed(value, weight.shape)
    layout[f"{VAE_PREFIX}vae_scale"] = Weight((), mean=model.latent_scale)
    layout[f"{VAE_PREFIX}vae_shift"] = Weight(())
    for text in architecture(CheckpointSpec(model.family)).text:
        layout.update(text_layout(text))
    return layout


def _fixed(value: torch.Tensor, shape: tuple[int, ...]) -> Weight:
    if tuple(value.shape) != shape:
        raise SpeedLabError(f"the packed factors do not fit: {tuple(value.shape)} where the layout has {shape}")
    return Weight(shape, adjust=partial(_copy, value=value))


def _copy(tensor: torch.Tensor, value: torch.Tensor) -> None:
    tensor.copy_(value)


def save_packed(path: Path, packed: Tensors, step: int, side: int, model: Model = SD15) -> None:
    """Write the packed file with the hash of the checkpoint that it builds, and the side of the pictures it knows."""
    known = checkpoint_hash(_complete(packed, model), model)
    save_file(packed, path, {"step": str(step), "side": str(side), "checkpoint": known})


def checkpoint_hash(packed: Mapping[str, torch.Tensor], model: Model = SD15) -> str:
    """sha256 over the trained weights of the checkpoint as they are written, in order; the text encoder is drawn."""
    from ..files import draw

    digest = hashlib.sha256()
    for name, weight in checkpoint_layout(packed, model).items():
        if weight.adjust is not None:
            digest.update(name.encode())
            digest.update(draw(name, weight, 0, torch.float16, "cpu").numpy().tobytes())
    return digest.hexdigest()


def load_packed(path: Path | None = None, model: Model = SD15) -> tuple[Tensors, dict[str, str]]:
    """The packed file's tensors, with those of the model's base, and what the file says of itself.

    Raises SpeedLabError where it, or the base's, is damaged or missing.
    """
    path = path or model.packed
    try:
        with safe_open(path, framework="pt") as file:
            about = dict(file.metadata() or {})
        own = load_file(path)
    except (SafetensorError, OSError) as error:
        raise SpeedLabError(f"{path} cannot be read ({error}); get it again from the repository") from error
    return _complete(own, model), about


def _complete(own: Tensors, model: Model) -> Tensors:
    if model.base is None:
        return own
    base = load_packed(model=model.base)[0]
    decoder = {name: tensor for name, tensor in base.items() if name.startswith(_DECODER)}
    return factors.with_base(own, base, model) | decoder


def write_drawn(
    models: Path, packed_path: Path | None = None, progress: Progress | None = None, model: Model = SD15
) -> tuple[Path, ...]:
    """The model that draws below a models folder: its checkpoint, and its autoencoder as a Tiny VAE and as a VAE.

    What is there already and equal stays. Raises SpeedLabError for a packed file that is missing, damaged or changed,
    and OSError.
    """
    packed_path = packed_path or model.packed
    packed, about = load_packed(packed_path, model)
    known = {"checkpoint": about.get("checkpoint", "")}
    layout = checkpoint_layout(packed, model)
    tiny = f"{VAE_PREFIX}taesd_"
    wanted = [(models / "checkpoints" / model.checkpoint, layout, _about("model that draws", **known))]
    for part in ("encoder", "decoder"):
        prefix = f"{tiny}{part}."
        weights = Layout({n.removeprefix(prefix): w for n, w in layout.items() if n.startswith(prefix)})
        about_it = _about(f"model that draws, {model.tiny} {part}", **known)
        wanted.append((models / "vae_approx" / f"{model.tiny}_{part}.safetensors", weights, about_it))
    own = Layout({n.removeprefix(VAE_PREFIX): w for n, w in layout.items() if n.startswith(VAE_PREFIX)})
    about_it = _about("autoencoder of the model that draws", **known)
    wanted.append((models / "vae" / beside(model.checkpoint, "vae"), own, about_it))
    if (
        not all(is_current(path, metadata) for path, _, metadata in wanted)
        and checkpoint_hash(packed, model) != known["checkpoint"]
    ):
        raise SpeedLabError(f"{packed_path} builds another checkpoint than it says; get it again from the repository")
    for path, _, _ in wanted:
        refuse_foreign(path)  # before any of them is written
    for path, weights, metadata in wanted:
        write_weights(path, weights, 0, torch.float16, metadata, progress)
    return tuple(path for path, _, _ in wanted)


def _about(kind: str, **known: str) -> dict[str, str]:
    return {
        **describe(kind, **known),
        "modelspec.title": f"SpeedLab {kind}",
        "modelspec.description": "Made by SpeedLab: draws simple scenes. See docs/drawn-model.md.",
    }
