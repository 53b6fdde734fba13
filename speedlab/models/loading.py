"""Checkpoints, LoRAs and VAEs from ComfyUI's model folders, through ComfyUI's own safe loaders.

Errors of the loaders are turned into sentences that name the file, what is wrong with it and what to do.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePath
from typing import Any

from ..common.core import core_nodes, is_dynamic, is_out_of_memory
from ..common.dtypes import CheckpointPrecision, cpu_computes_bf16, describe_parts, torch_dtype, unet_options
from ..common.errors import ModelFileError, SpeedLabError, UnavailableError, first_line

log = logging.getLogger(__name__)

SOURCE = "speedlab.source"
VAE_SOURCE = "speedlab.vae_source"
# On a VAE's patcher: the precision that was chosen for it. Decoding with `auto` then keeps to it.
FIXED_PRECISION = "speedlab.vae_precision"
# Latents of equal shape that no VAE of the other family can decode, by the class names of core's latent formats.
FAMILIES = {"SD15": "SD 1.x or 2.x", "SDXL": "SDXL", "SDXL_Playground_2_5": "SDXL"}
# Each use makes weights that are paged anew, in the layout of the file.
NO_LAYOUT = (
    "memory_format channels_last has no effect: ComfyUI's dynamic VRAM loads the weights, in the layout of the file. "
    "Compile Model loads the model whole and lays it out itself."
)
SAFETENSORS = (".safetensors", ".sft")
_LONGEST_HEADER = 100_000_000  # what the safetensors library accepts
_HASH_BLOCKS, _HASH_BLOCK = 128, 32768
HASHED = f"size and {_HASH_BLOCKS} blocks of {_HASH_BLOCK} bytes, spread evenly"


@dataclass(frozen=True)
class CheckpointSource:
    """Where a model came from: what the record names, and what is needed to load it again."""

    name: str
    path: Path
    size_bytes: int
    precision: CheckpointPrecision
    memory_format: str
    family: str
    parts: Mapping[str, Mapping[str, str | None]] = field(default_factory=dict)
    written_ns: int = 0
    sampled_sha256: str = ""

    def check_unchanged(self) -> None:
        """Raise ModelFileError where the file is no longer the one that was loaded."""
        try:
            now = self.path.stat()
        except OSError as error:
            raise ModelFileError(f"{self.path} cannot be read any more: {error.strerror or error}") from error
        if (now.st_size, now.st_mtime_ns) == (self.size_bytes, self.written_ns):
            return
        # A copy or a network drive gives the same bytes another time.
        if now.st_size != self.size_bytes or sampled_hash(self.path) != self.sampled_sha256:
            raise ModelFileError(
                f"{self.path} has changed since it was loaded, and the model in memory is the old one. Load it again: "
                "choose Unload Models and Execution Cache in ComfyUI's menu, or restart it."
            )


@dataclass(frozen=True)
class VaeSource:
    """The file that a VAE came from, to build it again in another dtype from unrounded weights.

    `latent_format` is the one of the checkpoint's model, by core's class name; a VAE file of its own does not tell.
    """

    path: Path
    in_checkpoint: bool
    latent_format: str | None = None


@dataclass(frozen=True)
class LoadedCheckpoint:
    """What Load Checkpoint returns. `clip` and `vae` are None where the file has none."""

    model: Any
    clip: Any | None
    vae: Any | None
    source: CheckpointSource
    load_ms: float
    asked_format: str = "contiguous"


def find_model_file(kind: str, name: str) -> Path:
    """The file of that name in a ComfyUI model folder. Raises ModelFileError with what to do if it is not there."""
    import folder_paths

    if not _stays_inside(name):
        raise ModelFileError(f"'{name}' is not a file name inside models/{kind}.")
    path = folder_paths.get_full_path(kind, name)
    if path is None:
        known = folder_paths.get_filename_list(kind)
        hint = f"There are {len(known)} files, {known[0]} for one." if known else "That folder is empty."
        raise ModelFileError(
            f"'{name}' is not in models/{kind}. {hint} Put the file there, press R to refresh, and choose it again."
        )
    return Path(path)


def _stays_inside(name: str) -> bool:
    """Whether a name is relative on this system: no drive, no root, no way up. Links are the user's own to follow.

    `c:odd.safetensors` and names with a backslash are plain file names wherever ComfyUI lists them, and the core
    loaders take them; only Windows reads a drive into them.
    """
    path = PurePath(name)
    return not ("\0" in name or path.drive or path.root or ".." in path.parts)


@contextmanager
def readable(path: Path, what: str) -> Iterator[None]:
    """Turn whatever a loader raises about a file into a ModelFileError that names it. Cancelling passes through."""
    import comfy.model_management as mm

    size_mb = path.stat().st_size / 1e6
    try:
        yield
    except (SpeedLabError, mm.InterruptProcessingException, mm.OOM_EXCEPTION, MemoryError):
        raise
    except Exception as error:
        # torch packs an allocation that fails inside load_state_dict into an error of its own about the file's keys.
        if is_out_of_memory(error):
            raise SpeedLabError(
                f"Out of memory while {path.name} ({size_mb:.1f} MB) was loaded as a {what}; the file is not to blame. "
                "Put Free Memory (SpeedLab) before it, close other programs, or choose a smaller precision."
            ) from error
        raise ModelFileError(_failure_text(path, what, size_mb, error)) from error


def load_checkpoint(name: str, precision: CheckpointPrecision, memory_format: str) -> LoadedCheckpoint:
    """Load a checkpoint as UNet, text encoder and VAE.

    `precision` is the UNet's weight dtype (fp32 holds for all parts). Raises ModelFileError for a file that is
    missing, truncated, unsafe or no checkpoint.
    """
    import comfy.sd
    import folder_paths
    import torch

    path = find_model_file("checkpoints", name)
    refuse_unsafe(path)
    asked_format = memory_format
    model_options, te_options = unet_options(precision)
    with readable(path, "checkpoint"):
        file, digest = path.stat(), sampled_hash(path)
    started = time.perf_counter()
    with readable(path, "checkpoint"):
        model, clip, vae = comfy.sd.load_checkpoint_guess_config(
            str(path),
            output_vae=precision != "fp32",
            output_clip=True,
            embedding_directory=folder_paths.get_folder_paths("embeddings"),
            model_options=model_options,
            te_model_options=te_options,
        )[:3]
        if model is None:
            raise ModelFileError(f"{path.name} holds no diffusion model.")
        wanted = torch_dtype(precision)
        if clip is None and wanted is not None and model.model_dtype() != wanted:
            # Core loads a file that holds a UNet alone without looking at the options.
            model = comfy.sd.load_diffusion_model(str(path), model_options=model_options)
        if precision == "fp32":
            vae = _rebuildable(partial(_vae_from_checkpoint, path, torch.float32))
        vae = vae if vae is not None and getattr(vae, "first_stage_model", None) is not None else None
    if vae is not None:
        latent_format = type(model.get_model_object("latent_format")).__name__
        vae.patcher.set_attachments(VAE_SOURCE, VaeSource(path, in_checkpoint=True, latent_format=latent_format))
        if precision == "fp32":
            vae.patcher.set_attachments(FIXED_PRECISION, precision)
    if memory_format == "channels_last" and is_dynamic(model):
        log.warning("SpeedLab: %s", NO_LAYOUT)
        memory_format = "contiguous"
    if memory_format == "channels_last":
        model.model.diffusion_model.to(memory_format=torch.channels_last)
    set_compute_dtype(model, precision)
    load_ms = (time.perf_counter() - started) * 1000.0
    source = CheckpointSource(
        name=name,
        path=path,
        size_bytes=file.st_size,
        precision=precision,
        memory_format=memory_format,
        family=family_of(model),
        parts=describe_parts(model, clip, vae),
        written_ns=file.st_mtime_ns,
        sampled_sha256=digest,
    )
    model.set_attachments(SOURCE, source)
    return LoadedCheckpoint(model, clip, vae, source, load_ms, asked_format)


def set_compute_dtype(model: Any, precision: CheckpointPrecision) -> None:
    """On a CPU with bf16 instructions compute in bf16 what is stored in bf16; core alone would compute in fp32."""
    import torch

    if precision == "bf16" and model.load_device.type == "cpu" and cpu_computes_bf16():
        model.set_model_compute_dtype(torch.bfloat16)


def load_vae(name: str, precision: str) -> Any:
    """Load a VAE from models/vae (or a Tiny VAE pair that core lists) in the dtype asked for.

    Raises ModelFileError for a file that is missing, truncated, unsafe or no VAE.
    """
    import folder_paths

    dtype = torch_dtype(precision)
    loader = core_nodes().VAELoader()
    # Core lists more than the files in models/vae: tiny VAE pairs, video TAEs and a pass-through.
    if name in loader.INPUT_TYPES()["required"]["vae_name"][0] and name not in folder_paths.get_filename_list("vae"):
        return _with_precision(_rebuildable(partial(_core_vae, loader, name, dtype)), precision)
    path = find_model_file("vae", name)
    refuse_unsafe(path)
    with readable(path, "VAE"):
        vae = _rebuildable(partial(_vae_from_file, path, dtype))
    vae.patcher.set_attachments(VAE_SOURCE, VaeSource(path, in_checkpoint=False))
    return _with_precision(vae, precision)


def _core_vae(loader: Any, name: str, dtype: Any | None) -> Any:
    """What core lists beside the files of models/vae; it may be built from files of models/vae_approx."""
    import folder_paths

    listed = folder_paths.get_filename_list("vae_approx")
    if name in listed:
        # Core lists each file whose name begins like that of a video TAE and loads only those of that very name.
        path = find_model_file("vae_approx", name)
        refuse_unsafe(path)
        with readable(path, "VAE"):
            return _vae_from_file(path, dtype)
    pair = (f"{name}_encoder.", f"{name}_decoder.")
    paths = [find_model_file("vae_approx", file) for file in listed if file.startswith(pair)]
    for path in paths:
        refuse_unsafe(path)
    if not paths:
        vae = loader.load_vae(name)[0]
    else:
        with readable(paths[0], "tiny VAE"):
            vae = loader.load_vae(name)[0]
    return vae if dtype is None else vae_in(vae, dtype)


def _rebuildable(make: Callable[[], Any]) -> Any:
    """The VAE that `make` makes; it notes how it is made once more, as ComfyUI does for another device."""
    vae = make()
    if getattr(vae, "patcher", None) is not None:
        vae.patcher.cached_patcher_init = (_made_again, (make,))
    return vae


def _made_again(make: Callable[[], Any], disable_dynamic: bool = False) -> Any:
    return make().patcher


def _in_dtype(init: tuple[Any, ...], dtype: Any, disable_dynamic: bool = False) -> Any:
    """What a loader makes once more, in another dtype."""
    patcher = init[0](*init[1])
    patcher = patcher[init[2]] if len(init) > 2 else patcher
    patcher.model.to(dtype)
    return patcher


def _with_precision(vae: Any, precision: str) -> Any:
    """Mark a VAE just made with the precision that was chosen for it."""
    if precision != "auto" and getattr(vae, "patcher", None) is not None:
        vae.patcher.set_attachments(FIXED_PRECISION, precision)
    return vae


def vae_in(vae: Any, dtype: Any) -> Any:
    """A second VAE with the same weights in another dtype; the given one is not touched (a VAE has no clone).

    Weights come from the file again where this pack loaded it, since the ones in memory may have been rounded. Those of
    other loaders do for VAEs that their weights describe whole; others have settings in the file's metadata. Raises
    UnavailableError for these.
    """
    import comfy.sd

    if vae.vae_dtype == dtype:
        return vae
    source: VaeSource | None = vae.patcher.get_attachment(VAE_SOURCE)
    if source is not None and source.path.is_file():
        make = _vae_from_checkpoint if source.in_checkpoint else _vae_from_file
        with readable(source.path, "VAE"):
            again = _rebuildable(partial(make, source.path, dtype, vae.device))
        if again is not None:
            return again
    if not is_sd_vae(vae) and type(vae.first_stage_model).__name__ != "TAESD":
        raise UnavailableError(
            f"This VAE ({type(vae.first_stage_model).__name__}) cannot be made in another precision from its weights "
            "alone. Load it with Load VAE (SpeedLab), or set precision to auto."
        )
    weights = {key: value.to(dtype) for key, value in vae.get_sd().items()}
    again = comfy.sd.VAE(sd=weights, dtype=dtype, device=vae.device)
    init = getattr(vae.patcher, "cached_patcher_init", None)
    if init is not None:
        again.patcher.cached_patcher_init = (_in_dtype, (init, dtype))
    return again


def is_sd_vae(vae: Any) -> bool:
    """Whether this is the image VAE of SD 1.x, 2.x or SDXL: four channels, eight pixels to each side."""
    from comfy.ldm.models.autoencoder import AutoencodingEngine
    from comfy.ldm.modules.diffusionmodules.model import Decoder

    network = vae.first_stage_model
    source: VaeSource | None = vae.patcher.get_attachment(VAE_SOURCE)
    return (
        isinstance(network, AutoencodingEngine)
        and type(network.decoder) is Decoder
        and (vae.latent_channels, vae.upscale_ratio, getattr(vae, "latent_dim", 2)) == (4, 8, 2)
        and (source is None or source.latent_format in (None, *FAMILIES))
    )


def family_of(model: Any) -> str:
    """A name that users know for the model's architecture, taken from ComfyUI's own detection."""
    config = type(model.model.model_config).__name__
    return {
        "SD15": "SD 1.x",
        "SD15_instructpix2pix": "SD 1.x (InstructPix2Pix)",
        "SD20": "SD 2.x",
        "SD21UnclipL": "SD 2.1 unCLIP-L",
        "SD21UnclipH": "SD 2.1 unCLIP-H",
        "SDXL": "SDXL",
        "SDXL_instructpix2pix": "SDXL (InstructPix2Pix)",
        "SDXLRefiner": "SDXL refiner",
        "SSD1B": "SDXL family (SSD-1B)",
        "Segmind_Vega": "SDXL family (Segmind Vega)",
        "KOALA_700M": "SDXL family (KOALA 700M)",
        "KOALA_1B": "SDXL family (KOALA 1B)",
        "LCM_BASE": "SD 1.x (LCM)",
    }.get(config, config)


def describe_checkpoint(loaded: LoadedCheckpoint) -> str:
    """The `info` text: format, size, family, precision of each part, load time and speed."""
    source = loaded.source
    seconds = loaded.load_ms / 1000.0
    lines = [
        f"{source.name}: {source.family}, {source.size_bytes / 1e9:.2f} GB, {_format_note(source.path)}",
        f"loaded in {seconds:.2f} s ({source.size_bytes / 1e6 / max(seconds, 1e-9):.0f} MB/s)",
    ]
    for part, dtypes in source.parts.items():
        weight, compute = dtypes.get("weight"), dtypes.get("compute")
        line = f"{part}: weights {weight}, computes in {compute}"
        if part == "unet" and weight != compute and not str(weight).startswith("fp8"):
            line += f" (this device does not compute in {weight})"
        lines.append(line)
    asked = source.precision
    unet = source.parts.get("unet", {})
    if asked not in ("auto", unet.get("compute")) and not asked.startswith("fp8"):
        lines.append(f"{asked} was asked for; the UNet is stored in {unet.get('weight')} and computes in "
                     f"{unet.get('compute')}, which is what this device can do.")  # fmt: skip
    lines += [f"no {part} in this file" for part, there in (("text encoder", loaded.clip), ("VAE", loaded.vae))
              if there is None]  # fmt: skip
    if source.memory_format == "channels_last":
        lines.append("UNet in channels-last memory format")
    if loaded.asked_format != source.memory_format:
        lines.append(NO_LAYOUT)
    return "\n".join(lines)


def refuse_unsafe(path: Path) -> None:
    """Refuse a pickle where this PyTorch cannot load it without running code from it. Raises ModelFileError."""
    import torch

    if path.suffix.lower() not in SAFETENSORS and not hasattr(torch.serialization, "add_safe_globals"):
        raise ModelFileError(
            f"{path.name} is a pickle file and this PyTorch ({torch.__version__}) could run code from it. "
            "Update PyTorch to 2.4 or newer, or convert the file to safetensors."
        )


def sampled_hash(path: Path) -> str:
    """SHA-256 of a file's size and of blocks spread evenly over it (see HASHED), first and last one included.

    A hash of every byte would read gigabytes in the middle of what is measured. Other weights differ in all blocks.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(size.to_bytes(8, "little"))
    with path.open("rb") as file:
        for offset in _hashed_offsets(size):
            file.seek(offset)
            digest.update(file.read(_HASH_BLOCK))
    return digest.hexdigest()


def _hashed_offsets(size: int) -> Sequence[int]:
    """Where the blocks begin; those of a small file follow each other and hold all of it."""
    if size <= _HASH_BLOCKS * _HASH_BLOCK:
        return range(0, size, _HASH_BLOCK)
    last = size - _HASH_BLOCK
    return [index * last // (_HASH_BLOCKS - 1) for index in range(_HASH_BLOCKS)]


def _vae_from_file(path: Path, dtype: Any | None, device: Any | None = None) -> Any:
    """A VAE file in `dtype`, or in the dtype that ComfyUI picks. Raises ModelFileError if it is no VAE."""
    import comfy.sd
    import comfy.utils

    weights, metadata = comfy.utils.load_torch_file(str(path), safe_load=True, return_metadata=True)
    if not isinstance(weights, Mapping) or not weights:
        raise ModelFileError(f"{path.name} holds no weights.")
    vae = comfy.sd.VAE(sd=dict(weights), metadata=metadata, device=device, dtype=dtype)
    if vae.first_stage_model is None:
        raise ModelFileError(f"{path} is not a VAE that this ComfyUI knows{_looks_like(path)}.")
    return vae


def _vae_from_checkpoint(path: Path, dtype: Any, device: Any | None = None) -> Any | None:
    """The checkpoint's VAE built from its original weights in `dtype`, not from weights already rounded to another."""
    import comfy.model_detection as detection
    import comfy.sd
    import comfy.utils

    weights, metadata = comfy.utils.load_torch_file(str(path), safe_load=True, return_metadata=True)
    config = detection.model_config_from_unet(
        weights, detection.unet_prefix_from_state_dict(weights), metadata=metadata
    )
    if config is None:
        return None
    prefixes: Sequence[str] = config.vae_key_prefix
    mine = {key[len(p) :]: value for p in prefixes for key, value in weights.items() if key.startswith(p)}
    mine = config.process_vae_state_dict(mine)
    return comfy.sd.VAE(sd=mine, metadata=metadata, dtype=dtype, device=device) if mine else None


def _format_note(path: Path) -> str:
    if path.suffix.lower() in SAFETENSORS:
        return "safetensors"
    return "pickle (loaded without running code from it; safetensors is safer, and faster to load, so convert it)"


def _failure_text(path: Path, what: str, size_mb: float, error: Exception) -> str:
    text, kind = str(error), type(error).__name__
    name = f"{path} ({size_mb:.1f} MB)"
    if size_mb == 0:
        return f"{path} is empty. Download or copy the {what} again."
    if isinstance(error, KeyError):
        return f"{name} lacks the tensor {text}: it is incomplete or of a kind that ComfyUI does not know."
    if "incomplete" in text.lower() or "unexpected EOF" in text or _ends_in_its_header(path):
        return f"{name} is truncated: the file ends too early. Download or copy the {what} again."
    if path.suffix.lower() in SAFETENSORS and ("Header" in text or kind == "SafetensorError"):
        return (
            f"{name} is not a safetensors file, whatever its name says ({first_line(error)}). "
            f"Download the {what} again, or give the file its real extension."
        )
    if kind == "UnpicklingError" or "weights_only" in text or "Unsupported global" in text:
        return (
            f"{name} is a pickle that wants to run code while it loads, or no pickle of weights at all. "
            f"It was refused and nothing in it was executed. Get the {what} as safetensors."
        )
    if "PytorchStreamReader" in text or "zip archive" in text:
        return f"{name} is damaged or truncated ({first_line(error)}). Download or copy the {what} again."
    if "Could not detect model type" in text:
        return f"{name} is not a {what} that ComfyUI knows{_looks_like(path)}."
    return f"{name} could not be loaded as a {what}: {kind}: {first_line(error)}"


def _ends_in_its_header(path: Path) -> bool:
    """Whether a safetensors file begins as one and ends before the header that it announces."""
    if path.suffix.lower() not in SAFETENSORS:
        return False
    with path.open("rb") as file:
        start = file.read(9)
    announced = int.from_bytes(start[:8], "little")
    return len(start) == 9 and start[8:] == b"{" and path.stat().st_size < 8 + announced <= _LONGEST_HEADER


def _looks_like(path: Path) -> str:
    if path.suffix.lower() not in SAFETENSORS:
        return ""
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        keys = list(file.keys())
    if any(".lora_" in key or "lora_up" in key or "lora_down" in key for key in keys):
        return "; it looks like a LoRA, which belongs in models/loras and the Load LoRA Stack node"
    if any(key.startswith(("decoder.conv_in", "encoder.conv_in")) for key in keys):
        return "; it looks like a VAE, which belongs in models/vae and the Load VAE node"
    return f"; it holds {len(keys)} tensors, {keys[0]} for one" if keys else "; it holds no tensors"
