"""What each way of offloading will need at its peak, phase by phase, before anything runs.

What UNet, text encoders and VAE take beside their weights, by counting.

How many bytes of tensors are alive at once during a forward, counted and not estimated.

On the `meta` device a forward allocates nothing and computes nothing, yet makes and drops the tensors that a real one
would: the count holds for any device whose attention keeps no matrix of scores (SDPA's fused kernels). Workspace that
a kernel takes for itself, as cuDNN may, is not seen.
"""

from __future__ import annotations

import copy
import csv
import itertools
import math
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from ..common.errors import UnavailableError
from ..common.torch_private import operations_through, storage_id, tensors_in
from ..models.unet import require_unet
from ..models.weights import is_plain, logical_shape
from ..techniques.compile.attach import held_copies
from ..vae.precision import starting_dtype
from ..vae.variants import HOLDS_WEIGHTS
from .placement import Offload
from .streaming import networks, streamed_bytes, weight_bytes

OFFLOADS: tuple[Offload, ...] = ("none", "model", "sequential")  # from the fastest on
_TABLE = Path(__file__).with_name("activations.csv")


@dataclass(frozen=True)
class Part:
    """One model of a plan and its phase. Bytes; `streamed` is what sequential offload keeps of the weights."""

    phase: str
    weights: int
    streamed: int
    activations: int
    on_device: bool = True


@dataclass(frozen=True)
class Phase:
    """What is on the device at the worst moment of a phase, in bytes."""

    name: str
    weights: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.activations


@dataclass(frozen=True)
class Prediction:
    """A way of offloading, and each of its phases in order."""

    offload: Offload
    phases: tuple[Phase, ...]

    @property
    def peak(self) -> int:
        return max(phase.total for phase in self.phases)

    @property
    def worst(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.total)


def parts_of(model: Any, clip: Any | None, vae: Any | None, size: ImageSize) -> tuple[Part, ...]:
    """Count weights by their dtypes and activations for `size`. A part on another device than the UNet needs nothing.

    Sampling is counted with guidance: cond and uncond of all images in one forward.
    """
    device = model.load_device
    parts = []
    if clip is not None:
        stage = clip.cond_stage_model
        parts.append(
            _part("text encoding", "text", stage, text_bytes(clip), device, clip.patcher.load_device == device)
        )
    sampling = _part("sampling", "unet", model.model, sampling_bytes(model, size), device)
    parts.append(replace(sampling, weights=sampling.weights + compiled_bytes(model)))
    if vae is not None:
        # VAE Decode may run a second module of these weights in another dtype.
        dtype = starting_dtype(vae, "auto")
        counted = decode_bytes(vae, size, dtype)
        part = _part("decoding", "vae", vae.first_stage_model, counted, device, vae.device == device)
        share = dtype.itemsize / vae.vae_dtype.itemsize
        weights = round(part.weights * share) + compiled_vae_bytes(vae)
        parts.append(replace(part, weights=weights, streamed=round(part.streamed * share)))
    return tuple(parts)


def compiled_bytes(model: Any) -> int:
    """Bytes of the weights that compiled programs of a MODEL hold beside its own."""
    copies = held_copies(model)
    return round(copies * weight_bytes(model.model.diffusion_model)) if copies else 0


def compiled_vae_bytes(vae: Any) -> int:
    """Bytes of the decoder's weights that compiled programs of a VAE hold beside its own."""
    network = vae.first_stage_model
    return weight_bytes(network.decoder) if HOLDS_WEIGHTS in vars(network) and hasattr(network, "decoder") else 0


def _part(phase: str, kind: str, module: Any, counted: int, device: Any, on_device: bool = True) -> Part:
    activations = round(counted * measured_factor(device.type, kind, counted))
    return Part(phase, weight_bytes(module), streamed_bytes(module), activations, on_device)


def predict(parts: Iterable[Part], offload: Offload) -> Prediction:
    """The phases of a plan. With `none` all weights stay; with the others each phase has its own alone."""
    here = [part for part in parts if part.on_device]
    together = sum(part.weights for part in here)
    weights = {
        "none": lambda part: together,
        "model": lambda part: part.weights,
        "sequential": lambda part: min(part.streamed, part.weights),
    }[offload]
    return Prediction(offload, tuple(Phase(part.phase, weights(part), part.activations) for part in here))


@lru_cache(maxsize=1)
def _measured() -> Mapping[tuple[str, str], tuple[tuple[float, float], ...]]:
    """(device, part) -> pairs of log(counted bytes) and measured / counted, in order."""
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    with _TABLE.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            counted, measured = int(row["counted_bytes"]), int(row["measured_bytes"])
            found.setdefault((row["device"], row["part"]), []).append((math.log(counted), measured / counted))
    return {key: tuple(sorted(rows)) for key, rows in found.items()}


def is_measured(device_type: str) -> bool:
    """Whether the committed table has measurements of this kind of device."""
    return any(device == device_type for device, _ in _measured())


def measured_factor(device_type: str, part: str, counted: int) -> float:
    """What was measured over what is counted, for a part on a kind of device; 1 where the table has nothing.

    Kernels take workspace that counting tensors does not see; oneDNN on a CPU re-orders what convolutions read and
    write. Between two sizes of the table the factor is interpolated, outside of it the nearest holds.
    """
    rows = _measured().get((device_type, part))
    if not rows or counted <= 0:
        return 1.0
    at = math.log(counted)
    if at <= rows[0][0]:
        return rows[0][1]
    for (left, low), (right, high) in itertools.pairwise(rows):
        if at <= right:
            return low + (high - low) * (at - left) / max(right - left, 1e-9)
    return rows[-1][1]


_TOKENS = 77
_PIXELS_PER_LATENT = 8


@dataclass(frozen=True)
class ImageSize:
    """Pixels of one image, and how many are made at once."""

    width: int
    height: int
    batch: int = 1

    @property
    def latent(self) -> tuple[int, int]:
        """Height and width of the latent."""
        return self.height // _PIXELS_PER_LATENT, self.width // _PIXELS_PER_LATENT


def sampling_bytes(model: Any, size: ImageSize) -> int:
    """Bytes of one evaluation of a MODEL with guidance: cond and uncond of all images in one forward.

    Networks other than image UNets are not counted; for them it is ComfyUI's own estimate.
    """
    rows = 2 * size.batch
    try:
        require_unet(model, "Memory Plan")
    except UnavailableError:
        channels = getattr(model.model.latent_format, "latent_channels", 4)
        return int(model.model.memory_required([rows, channels, *size.latent]))
    return unet_bytes(model.model, size, rows)


def unet_bytes(base: Any, size: ImageSize, rows: int) -> int:
    """Bytes of one forward of a diffusion model (ComfyUI's BaseModel) on `rows` latents, cond and uncond counted."""
    network = on_meta(base.diffusion_model)
    dtype = base.manual_cast_dtype or base.get_dtype()
    height, width = size.latent
    config = base.model_config.unet_config

    def meta(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    latent = meta(rows, config.get("in_channels", 4), height, width)
    context = meta(rows, _TOKENS, config.get("context_dim") or 768)
    adm = config.get("adm_in_channels")
    label = meta(rows, adm) if adm and network.num_classes is not None else None
    options = {"optimized_attention_override": fused_attention}
    timestep = meta(rows, dtype=torch.float32)
    forward = peak_bytes(
        lambda: network(latent, timestep, context=context, y=label, control=None, transformer_options=options)
    )
    # The sampler holds the noisy latent, the noise, the denoised one and copies of them, in fp32, for each image.
    return forward + latent.nbytes + context.nbytes + 6 * size.batch * 4 * height * width * 4


def decode_bytes(vae: Any, size: ImageSize, dtype: torch.dtype | None = None) -> int:
    """Bytes of decoding `size.batch` images in one piece with a ComfyUI VAE, in `dtype` or its own.

    A VAE for video or sound is not counted; for that it is ComfyUI's own estimate.
    """
    dtype = dtype or vae.vae_dtype
    # A compiled VAE is counted as the network that was compiled.
    stage = getattr(vae.first_stage_model, "speedlab_original", vae.first_stage_model)
    if getattr(vae, "latent_dim", 2) != 2:
        return int(vae.memory_used_decode((size.batch, vae.latent_channels, 1, *size.latent), dtype))
    decoder: Any = on_meta(stage).to(dtype)
    for part in decoder.modules():
        if hasattr(part, "optimized_attention"):
            part.optimized_attention = _attended
    latent = torch.empty((size.batch, vae.latent_channels, *size.latent), dtype=dtype, device="meta")
    image = size.batch * 3 * size.width * size.height * 4
    # The image is scaled and clamped in fp32 after it was made: two copies beside the decoder's own output.
    return max(peak_bytes(lambda: decoder.decode(latent)), 2 * image)


def text_bytes(clip: Any) -> int:
    """Bytes of encoding one prompt of 77 tokens with the largest of a CLIP's text encoders; they compute in fp32."""
    largest = 0
    for transformer in networks(clip.cond_stage_model):
        largest = max(largest, _encoder_bytes(transformer))
    return largest


def _encoder_bytes(transformer: Any) -> int:
    if type(transformer).__name__ not in ("CLIPTextModel", "T5"):
        return weight_bytes(transformer) // 10  # language models as text encoders: an allowance
    width = transformer.get_input_embeddings().weight.shape[1]
    embeds = torch.empty((1, _TOKENS, width), dtype=torch.float32, device="meta")
    network = on_meta(transformer)
    return peak_bytes(lambda: network(None, None, embeds=embeds, num_tokens=[_TOKENS], intermediate_output=-2))


def _attended(query: torch.Tensor, *_: Any) -> torch.Tensor:
    """In place of a VAE's attention, which takes its function from its module."""
    return torch.empty_like(query)


class LiveBytes:
    """Counts the storages that operations inside make: `peak` is the most that was alive at once.

    Tensors that exist before are not counted.
    """

    def __init__(self) -> None:
        self.alive = self.peak = 0
        self._known: set[int] = set()
        self._operations = operations_through(self._compute)

    def __enter__(self) -> LiveBytes:
        self._operations.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._operations.__exit__(*error)

    def _compute(self, function: Any, args: Any, kwargs: Any) -> Any:
        # What is an argument was there before this operation: an operation in place or a view makes nothing new.
        given = {storage_id(tensor.untyped_storage()) for tensor in tensors_in((args, kwargs))}
        result = function(*args, **kwargs)
        for tensor in tensors_in(result):
            self._count(tensor.untyped_storage(), given)
        return result

    def _count(self, storage: Any, given: set[int]) -> None:
        key, size = storage_id(storage), storage.nbytes()
        if key in self._known or key in given:
            return
        self._known.add(key)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.alive -= size


# What ComfyUI hangs on a layer while it pages its weights (dynamic VRAM): handles of memory that a copy would free.
_PAGING = (
    "_v", "_v_signature", "_v_weight", "_v_bias", "_v_block", "_pin_state", "_pins", "_prefetch",
    "weight_lowvram_function", "bias_lowvram_function",
)  # fmt: skip


def on_meta(network: torch.nn.Module) -> torch.nn.Module:
    """A copy of a network's structure on the `meta` device; no weight is copied, no hook comes along."""
    memo: dict[int, Any] = {}
    for weight in network.parameters():
        memo[id(weight)] = torch.nn.Parameter(_meta_weight(weight), requires_grad=False)
    for buffer in network.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    for part in network.modules():
        # Neither hooks, nor what ComfyUI does to offloaded weights in use: that holds patches with tensors of its own.
        left_out = [part._forward_hooks, part._forward_pre_hooks]
        left_out += [getattr(part, name) for name in ("weight_function", "bias_function") if hasattr(part, name)]
        for thing in left_out:
            memo[id(thing)] = type(thing)()
        for name in _PAGING:
            handle = part.__dict__.get(name)
            if not isinstance(handle, (type(None), bool, int, float, str, bytes)):
                memo[id(handle)] = None
    result = copy.deepcopy(network, memo)
    for part in result.modules():
        for name in _PAGING:
            part.__dict__.pop(name, None)
    return result


def _meta_weight(weight: torch.Tensor) -> torch.Tensor:
    """What a layer computes with: of a quantised weight the one that it stands for."""
    if is_plain(weight):
        return torch.empty_like(weight, device="meta")
    dtype = weight.dtype if weight.dtype.is_floating_point else torch.float16
    return torch.empty(logical_shape(weight), dtype=dtype, device="meta")


def peak_bytes(forward: Callable[[], Any]) -> int:
    """Bytes alive at the worst moment of `forward`, its result included."""
    with torch.inference_mode(), LiveBytes() as count:
        result = forward()
    del result
    return count.peak


def fused_attention(_function: Any, query: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """In place of attention on `meta`: what a fused kernel returns, and nothing beside it."""
    return torch.empty_like(query)
